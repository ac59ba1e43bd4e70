"""Accuracy against stock lm-eval on the same checkpoint and items, and against a hand count of the items."""

import contextlib
import math

import pytest

from qnb import accuracy, model
from qnb.accuracy import Evaluator
from qnb.error import InputError
from qnb.precision import PRECISIONS


@pytest.fixture(scope="module")
def bf16(checkpoint):
    folder, _ = checkpoint("bf16")
    return model.load(folder, PRECISIONS["bf16"], "cpu"), model.load_tokenizer(folder)


def test_arc_easy_equals_stock_lm_eval(bf16, hub, monkeypatch):
    """24 items, scored by lm-eval left to itself: by its own scorer the same accuracy, the same items right."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    evaluator = Evaluator("arc_easy", 24, 8, hub, scorer="hf")
    ours, shared = (each.evaluate(*bf16, "arc_easy") for each in (evaluator, Evaluator("arc_easy", 24, 8, hub)))
    drawn = evaluator.drawn("arc_easy")
    assert sorted(ours.items.doc_id) == drawn["arc_easy"]
    monkeypatch.chdir(hub)
    network, tokenizer = bf16
    stock = lm_eval.simple_evaluate(
        HFLM(pretrained=network, tokenizer=tokenizer, batch_size=8), tasks=["arc_easy"], samples=drawn,
        bootstrap_iters=0,
    )  # fmt: skip
    scores = {score.metric: score for score in ours.scores}
    assert scores["acc"].value == stock["results"]["arc_easy"]["acc,none"]
    assert scores["acc"].items == len(ours.items) == 24
    right = {sample["doc_id"]: bool(sample["acc"]) for sample in stock["samples"]["arc_easy"]}
    assert dict(zip(ours.items.doc_id, ours.items.correct, strict=True)) == right
    assert (shared.items.picked == ours.items.picked).mean() > 0.95  # 16-bit rounding turns a near tie now and then
    (belief,) = (score for score in shared.scores if score.metric == "p_right")
    assert belief.value == pytest.approx(ours.items.p_right.mean(), abs=0.01)


def test_items_are_drawn_in_one_order():
    few, more = accuracy.draw("arc_easy", 100, 10), accuracy.draw("arc_easy", 100, 40)
    assert more[:10] == few and len(set(more)) == 40 and few != sorted(few)
    assert accuracy.draw("arc_hard", 100, 10) != few


def test_an_interrupted_task_goes_on_and_answers_the_same(bf16, tmp_path, monkeypatch):
    """Blocks of 8 requests; the model fails in the third; the second try asks only for what is missing."""
    from qnb import scorer

    monkeypatch.setattr(scorer, "BLOCK", 8)
    evaluator, kept = Evaluator("sample_easy", 8), tmp_path / "kept"
    whole = evaluator.evaluate(*bf16, "sample_easy", tmp_path / "whole")
    score, calls = scorer.SharedContextLM._loglikelihood_tokens, []

    def failing(self, requests, *rest, **options):
        calls.append(len(requests))
        if len(calls) == 3:
            raise RuntimeError("cut off")
        return score(self, requests, *rest, **options)

    monkeypatch.setattr(scorer.SharedContextLM, "_loglikelihood_tokens", failing)
    with pytest.raises(RuntimeError, match="cut off"):
        evaluator.evaluate(*bf16, "sample_easy", kept)
    kept.write_text(kept.read_text() + '{"torn')
    again = evaluator.evaluate(*bf16, "sample_easy", kept)
    assert calls == [8, 8, 8, 8, 8] and again.items.equals(whole.items)


def test_each_task_asks_its_own_items(bf16):
    evaluator = Evaluator("sample", 2, 8)
    results = {task: evaluator.evaluate(*bf16, task) for task in evaluator.tasks}
    again = evaluator.evaluate(*bf16, "sample_hard")
    assert again.items.equals(results["sample_hard"].items)
    for task, result in results.items():
        assert task in {score.task for score in result.scores}
        assert all(name.startswith(task) for name in result.items.task)
    exam = results["sample_exam"]
    groups = {score.task for score in exam.scores if score.group}
    assert groups == {"sample_exam"} and exam.items.task.nunique() == 4  # a group of four subjects
    choices = results["sample_easy"].items
    shares = choices.probabilities.map(sum)
    assert all(math.isclose(share, 1) for share in shares)
    assert (choices.picked == choices.gold).tolist() == choices.correct.tolist()
    (score,) = (score for score in results["sample_easy"].scores if score.metric == "acc")
    assert score.value == choices.correct.mean()
    arithmetic = results["sample_arithmetic"].items
    assert set(arithmetic["filter"]) == {"strict-match", "flexible-extract"} and len(arithmetic) == 4


def test_one_row_at_a_time_nothing_changes_in_sixteen_bit(bf16):
    """Other than LLM.int8, a row does not depend on its neighbours beyond rounding."""
    one, eight = (Evaluator("sample_easy", 8, size, scorer="hf").evaluate(*bf16, "sample_easy").items
                  for size in (1, 8))  # fmt: skip
    for a, b in zip(one.loglikelihoods, eight.loglikelihoods, strict=True):
        assert a == pytest.approx(b, abs=0.5)


def test_names_are_unfolded_and_unknown_ones_refused():
    assert accuracy.names("sample") == accuracy.TASKS["sample"]
    assert accuracy.check("arc_easy, gsm8k") == ("arc_easy", "gsm8k")
    with pytest.raises(InputError, match="arc_easy"):
        accuracy.check("arc_eazy")
    with pytest.raises(InputError, match="no task"):
        accuracy.check(" ")


@pytest.mark.parametrize("given", [{"limit": 0}, {"batch_size": -1}, {"data_dir": "/no/such/folder"}])
def test_bad_counts_and_folders_are_refused(given):
    with pytest.raises(InputError):
        Evaluator("sample", **given)


def test_a_folder_without_the_data_is_named(bf16, tmp_path):
    with contextlib.chdir(tmp_path), pytest.raises(InputError, match="arc_easy"):
        Evaluator("arc_easy", 2, 8, tmp_path).evaluate(*bf16, "arc_easy")
