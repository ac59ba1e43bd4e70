"""Answers survive a kill: an interrupted task ends as if it had run through. Rounds of more items share them."""

import json
import time
from itertools import chain
from types import SimpleNamespace

import pytest

from qnb.accuracy import answer_cache
from qnb.accuracy.answer_cache import AnswerCache, kept_s
from qnb.accuracy.backbone import Backbone
from qnb.accuracy.generation import GreedyGenerator
from qnb.accuracy.scorer import SharedContextLM


@pytest.fixture(autouse=True)
def written_at_once(monkeypatch):
    monkeypatch.setattr(answer_cache, "WRITE_EVERY_S", 0)


def test_a_torn_line_and_answers_to_other_requests_are_passed_over(tmp_path):
    path = tmp_path / "answers.jsonl"
    AnswerCache(path, ["a", "b"]).keep({0: 1.5})
    AnswerCache(path, ["c", "d"]).keep({1: 2.5})
    with path.open("a") as file:
        file.write('\n{"requests": "')
    resumed = AnswerCache(path, ["a", "b"])
    assert resumed.answers == {0: 1.5} and resumed.has([0]) and not resumed.has([0, 1])
    resumed.keep({1: 3.5})
    assert AnswerCache(path, ["d", "b", "a"]).answers == {0: 2.5, 1: 3.5, 2: 1.5}


def test_answers_wait_for_each_other_on_their_way_to_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(answer_cache, "WRITE_EVERY_S", 0.1)
    answers = AnswerCache(tmp_path / "answers.jsonl", ["a", "b"])
    answers.keep({0: 1.5})
    assert not answers.path.exists()
    time.sleep(0.1)
    answers.keep({1: 2.5})
    assert AnswerCache(answers.path, ["a", "b"]).answers == {0: 1.5, 1: 2.5}
    assert 0.1 <= kept_s(answers.path) < 10 and kept_s(None) == kept_s(tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("method", "owner", "batches"),
    [("loglikelihood", Backbone, "score"), ("generate_until", GreedyGenerator, "generate")],
)
def test_an_interrupted_task_goes_on_behind_what_it_wrote(method, owner, batches, tiny, tmp_path, monkeypatch):
    """The third batch fails. Only that one and those behind it are asked again. All answers are equal to the bit.

    A round of more requests asks what is new, and no batch holds what was answered.
    """
    monkeypatch.setattr(GreedyGenerator, "fitting_rows", lambda self, length: 3)
    path, ask, sizes = tmp_path / "answers.jsonl", getattr(owner, batches), []
    last = {"until": ["."], "max_gen_toks": 4} if method == "generate_until" else " word"
    requests = [SimpleNamespace(args=(f"Count to {number}: what is next?", last)) for number in range(17)]

    def answer(answers_path, asked=requests[:12], **options):
        lm = SharedContextLM(pretrained=tiny[0], tokenizer=tiny[1], answers_path=answers_path, **options)
        lm.backbone.max_tokens = 30
        return getattr(lm, method)(asked, disable_tqdm=True)

    def failing(self, batch, *more):
        sizes.append(len(batch))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return ask(self, batch, *more)

    expected = answer(None)
    monkeypatch.setattr(owner, batches, failing)
    with pytest.raises(KeyboardInterrupt):
        answer(path)
    assert answer(path) == expected
    assert sizes == [3, 3, 3, 3, 3]
    more = answer(path, requests[::-1], in_rounds=True)
    assert sizes[5:] == [3, 2] and more == answer(None, requests[:11:-1]) + expected[::-1]
    lines = path.read_text().strip().splitlines()
    names = [*chain.from_iterable(json.loads(line)["requests"] for line in lines)]
    assert len(names) == len({*names}) == 17, "each once"
