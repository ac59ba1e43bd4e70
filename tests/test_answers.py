"""Answers survive a kill: what was interrupted ends as if it had not been."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qnb.accuracy import answer_cache as answers
from qnb.accuracy import scorer
from qnb.accuracy.answer_cache import Answers
from qnb.accuracy.tasks import Evaluator


def test_a_torn_line_and_answers_to_other_requests_are_passed_over(tmp_path):
    first = Answers(tmp_path / "kept", ["a", "b"])
    first.keep({0: 1.5})
    Answers(tmp_path / "kept", ["b", "a"]).keep({1: 2.5})
    with (tmp_path / "kept").open("a") as file:
        file.write('{"of": "')
    again = Answers(tmp_path / "kept", ["a", "b"])
    assert again.known == {0: 1.5}
    again.keep({1: 3.5})
    assert Answers(tmp_path / "kept", ["a", "b"]).known == {0: 1.5, 1: 3.5}


def test_answers_are_due_after_a_while(tmp_path, monkeypatch):
    kept = Answers(tmp_path / "kept", ["a"])
    assert not kept.due
    monkeypatch.setattr(answers, "KEEP_S", 0)
    assert kept.due and not Answers(None, ["a"]).due


def places(path):
    """The requests answered in a file, as often as they are in it."""
    lines = (json.loads(line) for line in path.read_text().splitlines() if line.endswith("}"))
    return [place for line in lines for place in line["places"]]


CHILD = """
import sys, time
from pathlib import Path
import torch
from conftest import tiny_model
from qnb.accuracy import answer_cache as answers
from qnb.accuracy import scorer
from qnb.accuracy.tasks import Evaluator

torch.set_num_threads(1)
source, kept = sys.argv[1:]
answers.KEEP_S = 0
scorer.SharedContextLM._tokens = lambda self: 64
def slow(self, *given, work=scorer.SharedContextLM._forward):
    found = work(self, *given)
    time.sleep(0.5)
    return found
scorer.SharedContextLM._forward = slow
Evaluator("sample_easy", 16).evaluate(*tiny_model(source), "sample_easy", Path(kept))
"""


def test_killed_and_resumed_equals_undisturbed(tiny, source, tmp_path, monkeypatch):
    """SIGKILL once two batches are kept; then only the others are computed, and all items are equal to the bit."""
    kept = tmp_path / "kept"
    child = subprocess.Popen([sys.executable, "-c", CHILD, source.path, kept], cwd=Path(__file__).parent)
    try:
        while child.poll() is None and (not kept.exists() or kept.read_text().count("places") < 2):
            time.sleep(0.05)
        assert child.poll() is None, "it ended before it could be killed"
    finally:
        child.kill()
        child.wait()
    before = places(kept)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(scorer.SharedContextLM, "_tokens", lambda self: 64)
    try:
        whole = Evaluator("sample_easy", 16).evaluate(*tiny, "sample_easy", tmp_path / "whole")
        again = Evaluator("sample_easy", 16).evaluate(*tiny, "sample_easy", kept)
    finally:
        torch.set_num_threads(threads)
    assert again.items.equals(whole.items)
    assert sorted(places(kept)) == sorted(places(tmp_path / "whole")), "each once"
    assert 0 < len(before) < len(places(kept))


def test_interrupted_generation_goes_on_behind_what_it_wrote(tiny, tmp_path, monkeypatch):
    """Three contexts at a time; the third batch fails, and only that and the rest are written afterwards."""
    monkeypatch.setattr(scorer.SharedContextLM, "_generated_rows", lambda self, length: 3)
    whole = Evaluator("sample_arithmetic", 12).evaluate(*tiny, "sample_arithmetic", tmp_path / "whole")
    write, calls = scorer.SharedContextLM._generate, []

    def failing(self, *given):
        calls.append(len(given[0]))
        if len(calls) == 3:
            raise RuntimeError("cut off")
        return write(self, *given)

    monkeypatch.setattr(scorer.SharedContextLM, "_generate", failing)
    with pytest.raises(RuntimeError, match="cut off"):
        Evaluator("sample_arithmetic", 12).evaluate(*tiny, "sample_arithmetic", tmp_path / "kept")
    again = Evaluator("sample_arithmetic", 12).evaluate(*tiny, "sample_arithmetic", tmp_path / "kept")
    assert calls == [3, 3, 3, 3, 3] and again.items.equals(whole.items)
