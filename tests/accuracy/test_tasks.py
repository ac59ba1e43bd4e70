"""Tasks against stock lm-eval on the same model and items, and against a hand count of the items."""

import math
import random
from copy import deepcopy
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.api.task import Task as LMEvalTask

from qnb import InputError
from qnb.accuracy import tasks
from qnb.accuracy.evaluate import Evaluation
from qnb.accuracy.tasks import Task, draw


def score(model, task, limit, scorer="qnb"):
    return Evaluation([task], limit, scorer, 8).evaluate(task, *model)


def arc(folder, questions=("What falls from clouds?", "What do cows eat?"), splits=("train", "validation", "test")):
    """A folder laid out like the hub, with ARC-Easy's columns and made-up questions."""
    home = folder / "allenai" / "ai2_arc"
    (home / "ARC-Easy").mkdir(parents=True, exist_ok=True)
    choices = {"text": ["rain", "grass", "iron"], "label": ["A", "B", "C"]}
    rows = [{"id": str(number), "question": text, "choices": choices, "answerKey": "AB"[number % 2]}
            for number, text in enumerate(questions)]  # fmt: skip
    for split in splits:
        pd.DataFrame(rows).to_parquet(home / "ARC-Easy" / f"{split}.parquet")
    files = [{"split": split, "path": f"ARC-Easy/{split}.parquet"} for split in splits]
    head = {"configs": [{"config_name": "ARC-Easy", "data_files": files}]}
    (home / "README.md").write_text(f"---\n{yaml.safe_dump(head)}---\n")
    return folder


def test_arc_easy_equals_stock_lm_eval(tiny, hub, monkeypatch, capfd):
    """24 items by lm-eval left to itself, and by either scorer here: equal accuracy, equal answers, no bars."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    task = Task("arc_easy", hub)
    results = [score(tiny, task, 24, scorer) for scorer in ("hf", "qnb")]
    assert "it/s" not in capfd.readouterr().err
    drawn = draw("arc_easy", 2376, 24)
    monkeypatch.chdir(hub)
    stock = lm_eval.simple_evaluate(
        HFLM(pretrained=tiny[0], tokenizer=tiny[1], batch_size=8), tasks=["arc_easy"], samples={"arc_easy": drawn},
        bootstrap_iters=0, task_manager=tasks._index(),
    )  # fmt: skip
    expected = {sample["doc_id"]: bool(sample["acc"]) for sample in stock["samples"]["arc_easy"]}
    for result in results:
        scores = {score.metric: score for score in result.scores}
        assert scores["acc"].value == stock["results"]["arc_easy"]["acc,none"]
        assert scores["acc_norm"].value == stock["results"]["arc_easy"]["acc_norm,none"]
        assert (scores["acc"].n_items, scores["acc"].n_total, scores["acc"].group) == (24, 2376, False)
        assert dict(zip(result.items.doc_id, result.items.correct, strict=True)) == expected
        assert scores["p_correct"].value == pytest.approx(results[0].items.p_correct.mean(), abs=1e-5)


def test_items_are_drawn_in_one_order():
    few, more = draw("arc_easy", 100, 10), draw("arc_easy", 100, 40)
    assert set(few) < set(more) and len(more) == 40 and few == sorted(few) != list(range(10))
    assert draw("arc_hard", 100, 10) != few and draw("arc_easy", 100, None) == list(range(100))


def test_scores_by_hand(tiny):
    """Choices, a group of four subjects, and generations that are read in two ways."""
    easy, exam, arithmetic = (score(tiny, Task(f"sample_{name}"), 2) for name in ("easy", "exam", "arithmetic"))
    assert (easy.items.picked == easy.items.gold).tolist() == easy.items.correct.tolist()
    assert all(math.isclose(sum(probabilities), 1) for probabilities in easy.items.probabilities)
    gold = [item.probabilities[int(item.gold)] for item in easy.items.itertuples()]
    values = {score.metric: score.value for score in easy.scores}
    assert values["acc"] == easy.items.correct.mean() and values["p_correct"] == pytest.approx(sum(gold) / 2)
    assert {score.task for score in exam.scores if score.group} == {"sample_exam"} and exam.items.task.nunique() == 4
    assert set(arithmetic.items["filter"]) == {"strict-match", "flexible-extract"} and len(arithmetic.items) == 4
    assert {score.n_items for score in arithmetic.scores} == {2} and arithmetic.scores[0].shots == 3
    one_item = score(tiny, Task("sample_exam"), 1)  # all right or all wrong in each subject
    assert all(0 < score.stderr < 1 for score in one_item.scores if score.metric == "acc" and not score.group)


class Guesses:
    """Stands for a model: log-likelihoods drawn from the request itself."""

    rank, world_size, device = 0, 1, SimpleNamespace(type="cpu")

    def loglikelihood(self, requests):
        return [(random.Random("".join(request.args)).uniform(-9, 0), False) for request in requests]


def test_a_groups_score_is_the_mean_of_its_items(hub):
    """Every question of MMLU: lm-eval's weighted means are plain means over the items that are kept."""
    task = Task("mmlu", hub)
    result = task.evaluate(Guesses())
    groups = {score.task: score for score in result.scores if score.group and score.metric == "acc"}
    assert set(groups) == {"mmlu", "mmlu_humanities", "mmlu_stem", "mmlu_other", "mmlu_social_sciences"}
    for name, each in groups.items():
        items = result.items[result.items.task.isin(task.groups[name])]
        assert each.value == pytest.approx(items.correct.mean(), abs=1e-9)
        assert each.n_items == each.n_total == len(items)
    assert groups["mmlu"].n_items == 14042


@pytest.mark.parametrize("name", ["sample_easy", "sample_exam", "sample_arithmetic"])
def test_requests_are_built_once_and_answered_anew(name, tiny, monkeypatch):
    """A second model gets the first one's requests and none of its answers; another limit gets its own."""
    task, other = Task(name), (deepcopy(tiny[0]), tiny[1])
    for weight in other[0].parameters():
        weight.data = weight.data.flip(0)
    expected, expected_of_two = score(other, Task(name), 3), score(tiny, Task(name), 2)
    first = score(tiny, task, 3)
    with monkeypatch.context() as forbidden:
        for owner, method in ((LMEvalTask, "build_all_requests"), (ConfigurableTask, "fewshot_context")):
            forbidden.setattr(owner, method, lambda *_, **__: pytest.fail("built again"))
        second = score(other, task, 3)
    assert second.items.equals(expected.items) and second.scores == expected.scores
    assert second.items.equals(first.items) is (name == "sample_arithmetic")  # texts without a number read alike
    assert score(tiny, task, 2).items.equals(expected_of_two.items)


def test_changed_data_are_other_data(tiny, tmp_path):
    before = Task("arc_easy", arc(tmp_path))
    after = Task("arc_easy", arc(tmp_path, ("What falls from clouds?", "What do goats eat?")))
    assert before.data_sha256(2) != after.data_sha256(2) and before.data_sha256(1) != before.data_sha256(2)
    assert before.data_sha256(2) == Task("arc_easy", arc(tmp_path / "copy")).data_sha256(2)
    likelihoods = [score(tiny, task, 2).items.loglikelihoods.tolist() for task in (before, after)]
    assert likelihoods[0] != likelihoods[1]


def test_missing_data_are_named(tmp_path):
    with pytest.raises(InputError, match=f"arc_easy.*{tmp_path}"):
        Task("arc_easy", tmp_path)
    with pytest.raises(InputError, match="'test'"):
        Task("arc_easy", arc(tmp_path, splits=("train", "validation")))


def test_names_are_unfolded_and_unknown_ones_refused():
    assert tasks.names("sample") == tasks.TASKS["sample"]
    assert tasks.check("arc_easy, gsm8k") == tasks.check(["arc_easy", "gsm8k"]) == ("arc_easy", "gsm8k")
    assert tasks.check("ai2_arc arc_easy") == ("arc_challenge", "arc_easy")  # a tag
    with pytest.raises(InputError, match="arc_easy"):
        tasks.check("arc_eazy")
    with pytest.raises(InputError, match="no task"):
        tasks.check(" ")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_without_units_are_formed_wide_and_rounded_once(dtype, monkeypatch):
    import torch

    from qnb.accuracy import patches

    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(size, generator=generator).to(getattr(torch, dtype)) for size in ((16, 64), (32, 64)))
    exact, native = (rows.double() @ weight.double().T).to(rows.dtype), torch.nn.functional.linear
    monkeypatch.setattr(patches, "cpu_types", lambda: set())
    with patches.wide_products("cpu"):
        product = torch.nn.functional.linear(rows, weight)
    assert product.dtype == rows.dtype and (product != exact).float().mean() < 0.01  # float32 turns a near tie
    monkeypatch.setattr(patches, "cpu_types", lambda: {dtype})
    with patches.wide_products("cpu"):
        assert torch.equal(torch.nn.functional.linear(rows, weight), native(rows, weight))
    assert torch.nn.functional.linear is native
