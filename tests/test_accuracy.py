"""Accuracy against stock lm-eval on the same checkpoint and items, and against a hand count of the items."""

import contextlib
import math
import random
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest

from qnb import Study
from qnb.accuracy import evaluate as asking
from qnb.accuracy import tasks as accuracy
from qnb.accuracy.tasks import Evaluator, Result, Score
from qnb.errors import InputError
from qnb.precision import PRECISIONS, parse
from qnb.quantize import checkpoint as model
from qnb.report import tables as table


@pytest.fixture(scope="module")
def bf16(checkpoint):
    folder, _ = checkpoint("bf16")
    return model.load(folder, PRECISIONS["bf16"], "cpu"), model.load_tokenizer(folder)


def test_arc_easy_equals_stock_lm_eval(tiny, hub, monkeypatch):
    """24 items, scored by lm-eval left to itself: by its own scorer and by ours the same accuracy, the same picks."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    evaluator = Evaluator("arc_easy", 24, 8, hub, scorer="hf")
    ours, shared = (each.evaluate(*tiny, "arc_easy") for each in (evaluator, Evaluator("arc_easy", 24, 8, hub)))
    drawn = evaluator.drawn("arc_easy")
    assert sorted(ours.items.doc_id) == drawn["arc_easy"]
    monkeypatch.chdir(hub)
    network, tokenizer = tiny
    stock = lm_eval.simple_evaluate(
        HFLM(pretrained=network, tokenizer=tokenizer, batch_size=8), tasks=["arc_easy"], samples=drawn,
        bootstrap_iters=0, task_manager=accuracy._manager("arc_easy"),
    )  # fmt: skip
    right = {sample["doc_id"]: bool(sample["acc"]) for sample in stock["samples"]["arc_easy"]}
    for result in (ours, shared):
        scores = {score.metric: score for score in result.scores}
        assert scores["acc"].value == stock["results"]["arc_easy"]["acc,none"]
        assert scores["acc_norm"].value == stock["results"]["arc_easy"]["acc_norm,none"]
        assert scores["acc"].items == len(result.items) == 24 and scores["acc"].of == 2376
        assert dict(zip(result.items.doc_id, result.items.correct, strict=True)) == right
        assert scores["p_correct"].value == pytest.approx(ours.items.p_correct.mean(), abs=1e-5)


def test_items_are_drawn_in_one_order():
    few, more = accuracy.draw("arc_easy", 100, 10), accuracy.draw("arc_easy", 100, 40)
    assert more[:10] == few and len(set(more)) == 40 and few != sorted(few)
    assert accuracy.draw("arc_hard", 100, 10) != few


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
    alone = Evaluator("sample_exam", 1, 8).evaluate(*bf16, "sample_exam")
    assert all(0 < score.stderr < 1 for score in alone.scores if score.metric == "acc" and not score.group)


def test_one_row_at_a_time_nothing_changes_in_sixteen_bit(bf16):
    """Other than LLM.int8, a row does not depend on its neighbours beyond rounding."""
    one, eight = (Evaluator("sample_easy", 8, size, scorer="hf").evaluate(*bf16, "sample_easy").items
                  for size in (1, 8))  # fmt: skip
    for a, b in zip(one.loglikelihoods, eight.loglikelihoods, strict=True):
        assert a == pytest.approx(b, abs=0.5)


def test_names_are_unfolded_and_unknown_ones_refused():
    assert accuracy.names("sample") == accuracy.TASKS["sample"]
    assert accuracy.check("arc_easy, gsm8k") == accuracy.check(["arc_easy", "gsm8k"]) == ("arc_easy", "gsm8k")
    assert accuracy.check("ai2_arc arc_easy") == ("arc_challenge", "arc_easy")  # a tag
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


class Guesses:
    """Stands for a model: log-likelihoods drawn from the request itself."""

    rank, world_size = 0, 1

    def loglikelihood(self, requests):
        return [(random.Random("".join(request.args)).uniform(-9, 0), False) for request in requests]


def test_groups_weigh_their_items_as_lm_eval_weighs_them(hub, monkeypatch):
    """Every question of MMLU: what the paired table counts is lm-eval's own aggregate, for all and for each group."""
    monkeypatch.setattr(Evaluator, "_lm", lambda *_: Guesses())
    evaluator = Evaluator("mmlu", data_dir=hub, scorer="hf")
    result = evaluator.evaluate(SimpleNamespace(device=SimpleNamespace(type="cpu")), None, "mmlu")
    scores = [
        {name: getattr(score, name) for name in Score.__slots__} for score in result.scores if score.metric == "acc"
    ]
    row = {"task": "mmlu", "limit": "all", "scores": scores, "groups": result.groups}
    rows = [{"precision": name, **row} for name in ("bf16", "int8")]
    made = table.change(pd.DataFrame(rows), lambda row: result.items).set_index("task")
    groups = {score["task"]: score for score in scores if score["group"]}
    assert set(groups) == {"mmlu", "mmlu_humanities", "mmlu_stem", "mmlu_other", "mmlu_social_sciences"}
    for name, score in groups.items():
        assert made.accuracy_pct[name] == pytest.approx(100 * score["value"], abs=1e-6)
        assert made["items"][name] == score["items"] == score["of"]
    assert made["items"]["mmlu"] == 14042


@pytest.fixture
def paced(source, tmp_path, monkeypatch):
    """Returns a function that makes a study whose models take so many seconds an item, by a clock that is moved."""
    now = [0.0]
    monkeypatch.setattr(asking, "perf_counter", lambda: now[0])

    def make(**seconds):
        made, loaded = Study("smollm2-135m", list(seconds), tmp_path), []

        def on(precision, measure):
            loaded.append(precision.name)
            now[0] += 1
            return measure(precision.name, 0.0)

        def evaluate(self, network, tokenizer, task, kept=None):
            now[0] += self.limit * seconds[network]
            drawn = accuracy.draw(task, self.asked(task).sizes[task], self.limit)
            items = pd.DataFrame({"task": task, "doc_id": sorted(drawn), "filter": "none", "correct": True})
            score = Score(task, "acc", "none", 1.0, 0.1, self.limit, self.asked(task).sizes[task], 0, False)
            return Result((score,), items, "data", {})

        monkeypatch.setattr(made, "on", on)
        monkeypatch.setattr(Evaluator, "evaluate", evaluate)
        return made, loaded, now

    return make


def test_a_budget_buys_every_precision_the_same_items(paced):
    """2 and 8 s an item, 5 minutes: 4 items each take 42 s, and 0.9 of the 256 s that then remain buy 23 - 2 more."""
    made, _, now = paced(bf16=2, int8=8)
    made.accuracy("sample_easy", minutes=5)
    rows = made.frame("accuracy")
    assert rows.limit.tolist() == [23, 23] and rows.minutes.tolist() == [5, 5] and now[0] <= 300
    ids = [made.items(row).doc_id.tolist() for row in rows.to_dict("records")]
    assert ids[0] == ids[1] == sorted(accuracy.draw("sample_easy", 48, 23))
    assert made.scores()[["items", "of"]].to_numpy().tolist() == [[23, 48], [23, 48]]
    spent, before = now[0], (made.folder / "ledger.jsonl").read_bytes()
    made.accuracy("sample_easy", minutes=5)
    assert now[0] == spent and (made.folder / "ledger.jsonl").read_bytes() == before
    made.precisions, made.overwrite = parse("int8"), True  # asked anew alone, it gets what the others had
    made.accuracy("sample_easy", minutes=5)
    assert now[0] > spent and made.frame("accuracy").limit.tolist() == [23]


def test_a_budget_that_is_large_enough_buys_all_and_a_limit_holds(paced):
    made, _, _ = paced(bf16=0.1)
    made.accuracy("sample_easy", minutes=60)
    assert made.frame("accuracy").limit.tolist() == [48]
    made.accuracy("sample_easy", limit=10, minutes=60)
    assert made.frame("accuracy").limit.tolist() == [10]


def test_an_interrupted_budget_goes_on_with_the_items_it_had_chosen(paced, monkeypatch):
    made, loaded, now = paced(bf16=2, int8=8)
    on = made.on

    def failing(precision, measure):
        if len(loaded) == 3:
            raise KeyboardInterrupt
        return on(precision, measure)

    monkeypatch.setattr(made, "on", failing)
    with pytest.raises(KeyboardInterrupt):
        made.accuracy("sample_easy", minutes=5)
    monkeypatch.setattr(made, "on", on)
    now[0] += 10_000  # the machine was off
    made.accuracy("sample_easy", minutes=5)
    assert made.frame("accuracy").limit.tolist() == [23, 23] and loaded == ["bf16", "int8", "bf16", "int8"]


def test_drift_is_a_row_a_scorer(source, tiny, tmp_path, monkeypatch, capsys):
    """In float32 nothing moves but rounding, by either scorer."""
    made = Study("smollm2-135m", "bf16", tmp_path)
    monkeypatch.setattr(made, "on", lambda precision, measure: measure(tiny[0], 0.0))
    found = made.drift("sample_arithmetic, sample_easy", 3).set_index("scorer")
    assert set(found.index) == set(accuracy.SCORERS) and set(found.task) == {"sample_easy"}
    assert (found["items"] == 3).all() and (found.choices == 12).all() and (found.max_abs_logprob_diff < 1e-3).all()
    assert (found.answers_changed == 0).all() and (tmp_path / "tables" / "drift.csv").exists()
    other = Study("smollm2-135m", "bf16", tmp_path / "other")
    assert other.drift("sample_arithmetic", 3).empty and "names none of choices" in capsys.readouterr().out


def test_drift_by_hand():
    usual = pd.DataFrame({"task": "t", "doc_id": [0, 1], "filter": "none", "picked": ["0", "1"],
                          "correct": [True, True], "loglikelihoods": [[-1.0, -2.0], [-3.0, -1.0]]})  # fmt: skip
    alone = usual.assign(picked=["0", "0"], correct=[True, False], loglikelihoods=[[-1.0, -2.5], [-1.0, -1.5]])
    made = accuracy.moved(usual, alone)
    assert (made.items, made.choices, made.answers_changed) == (2, 4, 1)
    assert (made.mean_abs_logprob_diff, made.max_abs_logprob_diff, made.accuracy_change_pp) == (0.75, 2.0, -50)


def test_a_model_without_a_tokenizer_is_refused_before_anything_is_made(source, tmp_path):
    local = tmp_path / "model"
    shutil.copytree(
        source.path, local, ignore=lambda folder, names: [n for n in names if "token" in n or "vocab" in n]
    )
    with pytest.raises(InputError, match="tokenizer"):
        Study(str(local), "bf16", tmp_path / "study").accuracy("sample_easy", 1)
    assert not (tmp_path / "study" / "checkpoints").exists()


@pytest.mark.parametrize("kind", ["MULTIMODAL", "UNSAFE_CODE"])
def test_what_cannot_be_asked_here_is_refused(kind, monkeypatch):
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, kind, True, raising=False)
    with pytest.raises(InputError, match="leave it out"):
        Evaluator("sample_easy", 1).build("sample_easy")


@pytest.mark.parametrize("minutes", [-1, "5", math.nan, math.inf, True])
def test_a_budget_that_is_none_is_refused(minutes, tmp_path):
    with pytest.raises(InputError, match="minutes"):
        Study("smollm2-135m", "bf16", tmp_path).accuracy("sample_easy", minutes=minutes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_without_units_are_formed_wide_and_rounded_once(dtype, monkeypatch):
    import torch

    draw = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(size, generator=draw).to(getattr(torch, dtype)) for size in ((16, 64), (32, 64)))
    exact = (rows.double() @ weight.double().T).to(rows.dtype)
    monkeypatch.setattr(accuracy, "cpu_types", lambda: set())
    with accuracy.wide_products("cpu"):
        found = torch.nn.functional.linear(rows, weight)
    assert found.dtype == rows.dtype and (found != exact).float().mean() < 0.01  # a sum in float32 turns a near tie
    native = torch.nn.functional.linear
    monkeypatch.setattr(accuracy, "cpu_types", lambda: {dtype})
    with accuracy.wide_products("cpu"):
        assert torch.equal(torch.nn.functional.linear(rows, weight), native(rows, weight))
