"""The accuracy stages: budgets by a clock that is moved, batch sensitivity against a hand count, refused input."""

import json
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from qnb import InputError, budget
from qnb.accuracy import evaluate
from qnb.accuracy.answer_cache import AnswerCache
from qnb.accuracy.evaluate import AccuracyOptions, Evaluation, accuracy, batch_sensitivity
from qnb.accuracy.scorer import SharedContextLM
from qnb.accuracy.statistics import unpack
from qnb.accuracy.tasks import Score, TaskResult, draw
from qnb.precision import parse
from qnb.session import Session


@pytest.fixture
def paced(source, tmp_path, monkeypatch):
    """Returns a function that makes a session whose models take so many seconds an item, by a clock that is moved.

    One of None cannot be loaded.
    """
    now = [0.0]
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(budget, "SHARES", {"02": 1.0})
    monkeypatch.setattr(budget, "PLANNED_PART", 1.0)

    def make(minutes=0, **seconds):
        session, loads = Session("smollm2-135m", list(seconds), tmp_path, minutes=minutes), []

        @contextmanager
        def loaded(precision):
            loads.append(precision.name)
            now[0] += 1
            if seconds[precision.name] is None:
                raise RuntimeError("no kernel image")
            yield precision.name

        def score(self, task, model, tokenizer, answers_path=None):
            items = pd.concat(pd.DataFrame({"task": part, "doc_id": draw(part, size, self.limits[task.name])})
                              for part, size in task.sizes.items()).assign(filter="none", correct=True)  # fmt: skip
            now[0] += len(items) * seconds[model]
            score = Score(task.name, "acc", "none", 1.0, 0.1, len(items), task.n_items(None), 0, False)
            return TaskResult((score,), items, answer_s=len(items) * seconds[model])

        monkeypatch.setattr(session, "loaded", loaded)
        monkeypatch.setattr(Evaluation, "evaluate", score)
        return session, loads, now

    return make


def limits(session):
    return {row["precision"]: row["limit"] for row in session.ledger.rows("accuracy")}


def test_a_budget_buys_every_format_the_same_items(paced):
    """2 and 8 s an item, 5 minutes: 4 items each take 42 s, and 0.95 of the 256 s that then remain buy 24."""
    session, _, now = paced(minutes=5, bf16=2, int8=8)
    options = AccuracyOptions("sample_easy")
    accuracy(session, options)
    rows = session.ledger.rows("accuracy")
    assert limits(session) == {"bf16": 24, "int8": 24} and now[0] <= 300 and {row["minutes"] for row in rows} == {5}
    ids = [pd.read_parquet(session.folder / row["items_file"]).doc_id.tolist() for row in rows]
    assert ids[0] == ids[1] == draw("sample_easy", 48, 24)
    (sitting,) = session.ledger.rows("sitting")
    assert sitting["taken_s"] == now[0]
    spent, before = now[0], session.ledger.path.read_bytes()
    accuracy(session, options)
    assert now[0] == spent and session.ledger.path.read_bytes() == before
    again = Session("smollm2-135m", "int8", session.folder, overwrite=True, minutes=5)  # alone, it gets what both had
    again.loaded = session.loaded
    accuracy(again, options)
    assert now[0] > spent and limits(again) == {"bf16": 24, "int8": 24}
    accuracy(session, AccuracyOptions("sample_easy", limit=10))
    assert limits(session) == {"bf16": 10, "int8": 10}


def test_a_format_that_fails_leaves_the_others_their_budget(paced):
    session, loads, _ = paced(minutes=5, bf16=2, fp16=None)
    options = AccuracyOptions("sample_easy")
    accuracy(session, options)
    accuracy(session, options)
    assert limits(session) == {"bf16": 48} and loads == ["bf16", "fp16"] * 2 + ["fp16"]  # which is tried again
    assert evaluate.planned_items(session, options) == []
    (failure,) = session.ledger.failures()
    assert failure["precision"] == "fp16" and "no kernel image" in failure["reason"]
    session.precisions = parse("fp16")
    with pytest.raises(RuntimeError, match="no kernel image"):
        accuracy(session, options)


def test_an_interrupted_budget_goes_on_with_the_items_it_had_chosen(paced, monkeypatch):
    session, loads, now = paced(minutes=5, bf16=2, int8=8)
    load = session.loaded

    def interrupted(precision):
        if len(loads) == 3:
            raise KeyboardInterrupt
        return load(precision)

    with monkeypatch.context() as patched:
        patched.setattr(session, "loaded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            accuracy(session, AccuracyOptions("sample_easy"))
    now[0] += 10_000  # the machine was off
    accuracy(session, AccuracyOptions("sample_easy"))
    assert limits(session) == {"bf16": 24, "int8": 24} and loads == ["bf16", "int8", "bf16", "int8"]


def test_a_round_asks_what_is_new_and_int8_all_again(answering, monkeypatch):
    """A budget's rounds of 3 and of 5 items end with the scores that 5 items have at once, and leave no file."""
    rounds, asked, score = [{"sample_easy": 5}, {}], [], SharedContextLM._score_tokens

    def score_tokens(self, requests, *options):
        answers = AnswerCache(self._answers_path, [request[0] for request in requests], self._in_rounds)
        asked.append(len(answers.asked))
        return score(self, requests, *options)

    monkeypatch.setattr(SharedContextLM, "_score_tokens", score_tokens)
    monkeypatch.setattr(evaluate, "_next_round", lambda *_: rounds.pop(0))
    monkeypatch.setattr(evaluate, "_first_limit", lambda *_: 3)
    answering.precisions, answering._minutes = parse("bf16,int8"), 5
    accuracy(answering, AccuracyOptions("sample_easy"))
    assert asked == [12, 12, 8, 20] and not list((answering.folder / "items").glob("*.answers"))
    row, _ = answering.ledger.rows("accuracy")
    in_rounds = unpack(pd.read_parquet(answering.folder / row["items_file"]))
    once = Session("smollm2-135m", "bf16", answering.folder / "once")
    once.loaded = answering.loaded
    accuracy(once, AccuracyOptions("sample_easy", limit=5))
    (row,) = once.ledger.rows("accuracy")
    at_once = unpack(pd.read_parquet(once.folder / row["items_file"]))
    assert (in_rounds.doc_id == at_once.doc_id).all()
    assert np.vstack(in_rounds.loglikelihoods) == pytest.approx(np.vstack(at_once.loglikelihoods), abs=1e-3)


def test_items_that_are_gone_are_measured_again(paced):
    session, loads, _ = paced(bf16=1, nf4=1)
    options = AccuracyOptions("sample_easy", limit=3)
    accuracy(session, options)
    row = session.ledger.rows("accuracy")[-1]
    (session.folder / row["items_file"]).write_bytes(b"changed")
    accuracy(session, options)
    accuracy(session, options)
    assert loads == ["bf16", "nf4", "nf4"] and row["precision"] == "nf4"


def test_a_row_holds_its_scores_and_items(answering, tmp_path):
    accuracy(answering, AccuracyOptions("sample_easy", limit=3))
    (row,) = answering.ledger.rows("accuracy")
    items = unpack(pd.read_parquet(tmp_path / row["items_file"]))
    scores = {score["metric"]: score for score in row["scores"]}
    assert set(scores) == {"acc", "acc_norm", "p_correct"} and scores["acc"]["value"] == items.correct.mean()
    assert items.p_correct.mean() == pytest.approx(scores["p_correct"]["value"], rel=1e-6)
    assert (row["limit"], row["scorer"], row["batch_size"], row["groups"]) == (3, "qnb", None, {})
    assert (row["bad_items"], scores["acc"]["unit"], scores["acc"]["higher_is_better"]) == (0, "%", True)
    assert not list((tmp_path / "items").glob("*.answers")) and json.loads(answering.ledger.path.read_text()) == row


def test_batch_sensitivity_is_a_row_a_scorer(answering, capsys):
    """In float32 nothing moves but rounding, by either scorer."""
    batch_sensitivity(answering, AccuracyOptions("sample_arithmetic", 3))
    assert not answering.ledger.path.exists() and "sample_arithmetic" in capsys.readouterr().out
    batch_sensitivity(answering, AccuracyOptions("sample_arithmetic, sample_easy", 3))
    rows = answering.ledger.rows("batch_sensitivity")
    assert {row["setting"] for row in rows} == set(evaluate.SCORERS)
    for row in rows:
        assert row["task"] == "sample_easy"
        assert (row["n_items"], row["n_choices"], row["answers_changed"]) == (3, 12, 0)
        assert row["max_abs_logprob_diff"] < 1e-3


def test_a_budget_buys_batch_sensitivity_of_the_scorer_in_use_alone(answering):
    answering._minutes = 5
    batch_sensitivity(answering, AccuracyOptions("sample_easy", 3, scorer="hf"))
    assert [row["setting"] for row in answering.ledger.rows("batch_sensitivity")] == ["hf"]


def test_answers_that_an_earlier_process_kept_took_their_time_too(answering, monkeypatch):
    monkeypatch.setattr(evaluate, "kept_s", lambda path: 100.0)
    accuracy(answering, AccuracyOptions("sample_easy", limit=3))
    (row,) = answering.ledger.rows("accuracy")
    assert row["evaluate_s"] > 100


def test_batch_sensitivity_by_hand():
    usual = pd.DataFrame({"picked": ["0", "1"], "correct": [True, True],
                          "loglikelihoods": [[-1.0, -2.0], [-3.0, -1.0]]})  # fmt: skip
    alone = usual.assign(picked=["0", "0"], correct=[True, False], loglikelihoods=[[-1.0, -2.5], [-1.0, -1.5]])
    compared = evaluate.compare_items(usual, alone)
    assert (compared["n_items"], compared["n_choices"], compared["answers_changed"]) == (2, 4, 1)
    assert compared["mean_abs_logprob_diff"] == 0.75 and compared["max_abs_logprob_diff"] == 2
    assert compared["accuracy_change_pp"] == -50
    unshared = [each.assign(correct=None) for each in (usual, alone)]
    assert evaluate.compare_items(*unshared)["accuracy_change_pp"] is None


def test_a_model_without_a_tokenizer_is_refused_before_anything_is_made(source, tmp_path):
    kept = shutil.ignore_patterns("*token*", "*vocab*")
    local = shutil.copytree(source.path, tmp_path / "model", ignore=kept)
    with pytest.raises(InputError, match="tokenizer"):
        accuracy(Session(str(local), "bf16", tmp_path / "study"), AccuracyOptions("sample_easy", 1))
    assert not (tmp_path / "study" / "checkpoints").exists()
