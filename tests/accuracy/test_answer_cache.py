"""Answers survive a kill: an interrupted task ends as if it had run through."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qnb.accuracy import answer_cache
from qnb.accuracy.answer_cache import AnswerCache
from qnb.accuracy.generation import GreedyGenerator
from qnb.accuracy.scorer import SharedContextLM


@pytest.fixture(autouse=True)
def written_at_once(monkeypatch):
    monkeypatch.setattr(answer_cache, "WRITE_EVERY_S", 0)


def test_a_torn_line_and_answers_to_other_requests_are_passed_over(tmp_path):
    path = tmp_path / "answers.jsonl"
    AnswerCache(path, ["a", "b"]).keep({0: 1.5})
    AnswerCache(path, ["b", "a"]).keep({1: 2.5})
    with path.open("a") as file:
        file.write('\n{"requests_sha256": "')
    resumed = AnswerCache(path, ["a", "b"])
    assert resumed.answers == {0: 1.5} and resumed.has([0]) and not resumed.has([0, 1])
    resumed.keep({1: 3.5})
    assert AnswerCache(path, ["a", "b"]).answers == {0: 1.5, 1: 3.5}


def test_answers_wait_for_each_other_on_their_way_to_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(answer_cache, "WRITE_EVERY_S", 0.1)
    path = tmp_path / "answers.jsonl"
    answers = AnswerCache(path, ["a", "b"])
    answers.keep({0: 1.5})
    assert not path.exists()
    time.sleep(0.1)
    answers.keep({1: 2.5})
    assert len(path.read_text().split()) > 1 and AnswerCache(path, ["a", "b"]).answers == answers.answers


def positions(path):
    """Return the requests answered in a file, as often as they are in it."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [position for line in lines for position in line["positions"]]


CHILD = """
import sys, time
from pathlib import Path
import torch
sys.path.append(str(Path.cwd().parent))
from conftest import tiny_model
from test_answer_cache import scores
from qnb.accuracy import answer_cache
from qnb.accuracy.backbone import Backbone

torch.set_num_threads(1)
answer_cache.WRITE_EVERY_S = 0
def slow(self, *arguments, score=Backbone.score):
    time.sleep(0.5)
    return score(self, *arguments)
Backbone.score = slow
scores(tiny_model(sys.argv[1]), Path(sys.argv[2]))
"""


def scorer(tiny, path):
    network, tokenizer = tiny
    lm = SharedContextLM(pretrained=network, tokenizer=tokenizer, answers_path=path)
    lm.backbone.max_tokens = 64
    return lm


def scores(tiny, path):
    """Score 48 choices in about ten batches."""
    pairs = [(f"Question {number}: what is next?", f" word {choice}") for number in range(16) for choice in range(3)]
    return scorer(tiny, path).loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)


@pytest.fixture
def one_thread():
    """Sums are taken in one order, here and in the child."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_killed_task_resumes_and_ends_with_the_same_scores(tiny, source, tmp_path, one_thread):
    """SIGKILL once two batches are kept. Then only the others are computed, and all scores are equal to the bit."""
    path = tmp_path / "answers.jsonl"
    child = subprocess.Popen([sys.executable, "-c", CHILD, source.path, path], cwd=Path(__file__).parent)
    try:
        while child.poll() is None and (not path.exists() or path.read_text().count("positions") < 2):
            time.sleep(0.05)
        assert child.poll() is None, "it ended before it could be killed"
    finally:
        child.kill()
        child.wait()
    before = positions(path)
    assert scores(tiny, path) == scores(tiny, None)
    assert sorted(positions(path)) == list(range(48)), "each once"
    assert 0 < len(before) < 48


def test_interrupted_generation_goes_on_behind_what_it_wrote(tiny, tmp_path, monkeypatch):
    """Three contexts at a time. The third batch fails, and only that one and those behind it are generated later."""
    monkeypatch.setattr(GreedyGenerator, "fitting_rows", lambda self, length: 3)
    settings = {"until": ["."], "max_gen_toks": 4}
    requests = [SimpleNamespace(args=(f"Count to {number}:", settings)) for number in range(12)]
    expected = scorer(tiny, None).generate_until(requests, disable_tqdm=True)
    generate, sizes = GreedyGenerator.generate, []

    def failing(self, prompts, *more):
        sizes.append(len(prompts))
        if len(sizes) == 3:
            raise RuntimeError("cut off")
        return generate(self, prompts, *more)

    monkeypatch.setattr(GreedyGenerator, "generate", failing)
    with pytest.raises(RuntimeError, match="cut off"):
        scorer(tiny, tmp_path / "answers.jsonl").generate_until(requests, disable_tqdm=True)
    resumed = scorer(tiny, tmp_path / "answers.jsonl").generate_until(requests, disable_tqdm=True)
    assert sizes == [3, 3, 3, 3, 3] and resumed == expected
