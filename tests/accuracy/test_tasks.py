"""Tasks against stock lm-eval on the same model and items, and against a hand count of the items."""

import json
import math
from collections import Counter
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import evaluate
import lm_eval
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.api.task import Task as LMEvalTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import BloomConfig

from qnb import InputError
from qnb.accuracy import tasks
from qnb.accuracy.evaluate import AccuracyOptions, Evaluation, accuracy
from qnb.accuracy.statistics import pack, unpack
from qnb.accuracy.tasks import Task, draw
from qnb.session import Session


def score(model, task, limit=None, scorer="qnb"):
    return Evaluation([task], {task.name: limit}, scorer, 8).evaluate(task, *model)


def stock(model, task, index=None, **options):
    """Results of lm-eval left to itself."""
    lm = HFLM(pretrained=model[0], tokenizer=model[1], batch_size=8)
    index = index or TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=[task], task_manager=index, bootstrap_iters=0, **options)


def test_arc_easy_equals_stock_lm_eval(tiny, hub, monkeypatch, capfd):
    """24 items by lm-eval left to itself, and by either scorer here: equal accuracy, equal answers, no bars."""
    task = Task("arc_easy", hub)
    results = [score(tiny, task, 24, scorer) for scorer in ("hf", "qnb")]
    assert "it/s" not in capfd.readouterr().err
    drawn = draw("arc_easy", 2376, 24)
    monkeypatch.chdir(hub)
    expected = stock(tiny, "arc_easy", tasks._index(), samples={"arc_easy": drawn})
    correct = {sample["doc_id"]: bool(sample["acc"]) for sample in expected["samples"]["arc_easy"]}
    for result in results:
        scores = {score.metric: score for score in result.scores}
        for metric in ("acc", "acc_norm"):
            assert scores[metric].value == expected["results"]["arc_easy"][f"{metric},none"]
        assert (scores["acc"].n_items, scores["acc"].n_total, scores["acc"].group) == (24, 2376, False)
        assert dict(zip(result.items.doc_id, result.items.correct, strict=True)) == correct
        assert scores["p_correct"].value == pytest.approx(results[0].items.p_correct.mean(), abs=1e-5)


def test_items_are_drawn_in_one_order():
    few, more = draw("arc_easy", 100, 10), draw("arc_easy", 100, 40)
    assert set(few) < set(more) and len(more) == 40 and few == sorted(few) != list(range(10))
    assert draw("arc_hard", 100, 10) != few and draw("arc_easy", 100, None) == list(range(100))


def test_scores_by_hand(tiny):
    """A group of four subjects, and generations that are read in two ways."""
    exam, arithmetic = (score(tiny, Task(f"sample_{name}"), 2) for name in ("exam", "arithmetic"))
    assert {score.task for score in exam.scores if score.group} == {"sample_exam"} and exam.items.task.nunique() == 4
    assert set(arithmetic.items["filter"]) == {"strict-match", "flexible-extract"} and len(arithmetic.items) == 4
    assert {score.n_items for score in arithmetic.scores} == {2} and arithmetic.scores[0].shots == 3
    one_item = score(tiny, Task("sample_exam"), 1)  # all right or all wrong in each subject
    assert all(0 < score.stderr < 1 for score in one_item.scores if score.metric == "acc" and not score.group)


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


def test_a_template_is_parsed_once_for_all_items_of_a_part(monkeypatch):
    from lm_eval.utils import env

    task, parsed, parse = Task("sample_exam"), Counter(), env.from_string

    def counted(template):
        parsed[template] += 1
        return parse(template)

    monkeypatch.setattr(env, "from_string", counted)
    assert task.pairs(8) and 0 < max(parsed.values()) <= len(task.sizes)


def test_changed_data_are_other_data(form, tiny, tmp_path):
    form({"acc": {}}, **CHOICE)
    path, before, same = tmp_path / "rows.jsonl", Task("form"), Task("form")
    path.write_text(path.read_text().replace("river", "fire"))
    after = Task("form")
    assert before.data_sha256(1) != before.data_sha256(2) == same.data_sha256(2) != after.data_sha256(2)
    likelihoods = [score(tiny, task, 2).items.loglikelihoods.tolist() for task in (before, after)]
    assert likelihoods[0] != likelihoods[1]


def test_missing_data_are_named(form, tmp_path):
    with pytest.raises(InputError, match=f"arc_easy.*{tmp_path}"):
        Task("arc_easy", tmp_path)
    form({"acc": {}}, **CHOICE, test_split="absent")
    with pytest.raises(InputError, match=r"'form'.*'absent'"):
        Task("form")


def test_names_are_unfolded_and_unknown_ones_refused():
    assert tasks.names("sample") == tuple(tasks.TASKS["sample"])
    assert tasks.check("arc_easy, gsm8k") == tasks.check(["arc_easy", "gsm8k"]) == ("arc_easy", "gsm8k")
    assert tasks.check("ai2_arc arc_easy") == ("arc_challenge", "arc_easy")  # a tag
    with pytest.raises(InputError, match="arc_easy"):
        tasks.check("arc_eazy")
    with pytest.raises(InputError, match="no task"):
        tasks.check(" ")


def longest(doc, results):
    return {"longest": len(results[0])}


def has_no_package(*values):
    raise FileNotFoundError("no script squad_v2")


TEXT = {"output_type": "generate_until", "doc_to_target": "right",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6}}  # fmt: skip
CHOICE = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "place"}
SHARE, PERPLEXITIES = ("%", True), ("word_perplexity", "byte_perplexity", "bits_per_byte")


@pytest.fixture
def form(tmp_path, monkeypatch):
    """Returns a function that configures a task over six made-up documents, which `Task` then loads by any name."""
    words = ["green stone", "ship", "old"]
    rows = [{"n": n, "q": f"the river {n} paints", "choices": words, "place": n % 3, "right": words[n % 3],
             "zero": "0", "places": [0, 2], "contexts": ["the a green", "the b green"],
             "empty": ["ship", "old" if n != 3 else ""], "long": " green" if n != 4 else " long" * 3000}
            for n in range(6)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def configure(metrics, **config):
        config = {"task": "form", "dataset_path": "json", "test_split": "test", "doc_to_text": "{{q}}",
                  "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, **config,
                  "metric_list": [{"metric": name, **more} for name, more in metrics.items()]}  # fmt: skip
        index = SimpleNamespace(load=lambda names: TaskManager(include_defaults=False).load([config]))
        monkeypatch.setattr(tasks, "_index_with", lambda name: index)
        return config

    return configure


MEAN = {"aggregation": "mean", "higher_is_better": True}
LESS = {"aggregation": "mean", "higher_is_better": False}
FORMS = {
    "choices": (CHOICE, {"acc": {}, "acc_bytes": {}, "mcc": {}, "brier_score": {}, "acc_mutual_info": {}},
                {"mcc": ("mcc", True), "brier_score": ("brier score", False)}),
    "choices named by their text": ({**CHOICE, "doc_to_choice": "choices", "doc_to_target": "right"}, {"acc": {}}, {}),
    "several right choices": ({**CHOICE, "doc_to_target": "places"}, {"acc": {}}, {}),
    "a context a choice": ({**CHOICE, "doc_to_text": "{{n % 2}}", "doc_to_choice": "{{contexts}}",
                            "doc_to_target": "{{right}}"}, {"acc": {}}, {}),
    "probabilities": ({**CHOICE, "process_results": lambda doc, results: {
        "acc": 1 / sum(math.exp(value - results[0][0]) for value, _ in results)}}, {"acc": MEAN}, {}),
    "one text": ({"output_type": "loglikelihood", "doc_to_target": "zero"}, {"perplexity": {}, "acc": {}},
                 {"perplexity": ("perplexity", False)}),
    "running text": ({"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "q"},
                     {name: {} for name in PERPLEXITIES},
                     {name: (name.replace("_", " "), False) for name in PERPLEXITIES}),
    "generated text": (TEXT, {"exact_match": {}, "bleu": {}, "ter": {}},
                       {"bleu": ("bleu", True), "ter": ("ter", False)}),
    "points of 100": ({**TEXT, "process_results": lambda doc, results: {
                          "acc": 100.0 * (len(results[0]) % 2), "bleu_acc": len(results[0]) % 2, "rouge1": 0.25}},
                      {"acc": MEAN, "bleu_acc": LESS, "rouge1": MEAN},
                      {"acc": ("acc", True), "bleu_acc": ("%", False), "rouge1": ("rouge1", True)}),
    "sampled text": ({**TEXT, "process_results": longest, "repeats": 2,
                      "generation_kwargs": {"until": ["."], "max_gen_toks": 6, "do_sample": True, "temperature": 0.7}},
                     {"longest": MEAN}, {"longest": ("longest", True)}),
    "an aggregation of its own": ({**TEXT, "process_results": longest},
                                  {"longest": {"aggregation": max, "higher_is_better": False}},
                                  {"longest": ("longest", False)}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_task_of_any_form_has_stocks_scores_in_the_units_that_it_declares(name, form, tiny):
    config, metrics, units = FORMS[name]
    expected = stock(tiny, form(metrics, **config))["results"]["form"]
    result = score(tiny, Task("form"))
    scores = {each.metric: each for each in result.scores if each.metric != "p_correct"}
    assert scores.keys() == metrics.keys()
    for metric, each in scores.items():
        assert (each.unit, each.higher_is_better) == units.get(metric, SHARE)
        assert each.value == pytest.approx(expected[f"{metric},none"], rel=1e-3)
    assert {each.n_items for each in result.scores} == {6} and result.bad_items == 0
    if config["output_type"] == "multiple_choice":
        rights = [[int(place) for place in gold.split(", ")] for gold in result.items.gold]
        assert rights == [{"a context a choice": [n % 2], "several right choices": [0, 2]}.get(name, [n % 3])
                          for n in range(6)]  # fmt: skip
        chances = [sum(math.exp(row[place]) for place in right) / sum(map(math.exp, row))
                   for right, row in zip(rights, result.items.loglikelihoods, strict=True)]  # fmt: skip
        own = name == "probabilities"  # the task's own code says what is right
        picks = zip(result.items.picked, result.items.gold, strict=True)
        assert own or result.items.correct.tolist() == [picked in gold.split(", ") for picked, gold in picks]
        assert result.items.p_correct.isna().all() if own else list(result.items.p_correct) == pytest.approx(chances)
        assert all(len(row) == (2 if name == "a context a choice" else 3) for row in result.items.loglikelihoods)
        packed, right = pack(result.items), result.items.p_correct.astype(float).tolist()
        assert unpack(packed).p_correct.tolist() == pytest.approx(right, rel=1e-6, nan_ok=True)
        assert packed.columns.difference(result.items.columns).tolist() == ["has_gold"]


@pytest.mark.parametrize(
    ("bad", "config", "metric"),
    [(2, {**TEXT, "process_results": lambda doc, _: {"exact_match": {}[2] if doc["n"] == 2 else 1.0}},
      {"exact_match": MEAN}),
     (1, {**TEXT, "process_results": lambda doc, _: {"score": math.nan if doc["n"] == 1 else 3.5}}, {"score": MEAN}),
     (5, {**TEXT, "doc_to_text": "{{ q if n < 5 else q.a.b }}"}, {"exact_match": {}}),
     (2, {**TEXT, "doc_to_target": "{{ q if n != 2 else q.a.b }}"}, {"exact_match": {}}),
     (3, {**CHOICE, "doc_to_choice": "{{empty}}", "doc_to_target": 0, "target_delimiter": ""}, {"acc": {}}),
     (4, {"output_type": "loglikelihood", "doc_to_target": "long"}, {"perplexity": {}})],
)  # fmt: skip
@pytest.mark.parametrize("scorer", ["qnb", "hf"])
def test_one_bad_item_costs_that_item_and_is_counted(scorer, bad, config, metric, form, tiny):
    """It fails, is no number, cannot be asked or judged, is empty, or too long; the others score as in stock."""
    expected = stock(tiny, form(metric, **config), samples={"form": [n for n in range(6) if n != bad]})
    result = score(tiny, Task("form"), scorer=scorer)
    (name,) = metric
    (value,) = (each for each in result.scores if each.metric == name)
    assert value.value == pytest.approx(expected["results"]["form"][f"{name},none"], rel=1e-3)
    assert (value.n_items, value.n_total, result.bad_items) == (5, 6, 1) and bad not in set(result.items.doc_id)


@pytest.mark.parametrize(
    "config",
    [{"doc_to_text": "{{ q if n == 0 else q.a.b }}"},
     {"process_results": lambda doc, results: {"exact_match": float(len(results[0].split()[1]) > 0)}}],
)  # fmt: skip
def test_a_task_is_not_refused_for_its_first_items_or_the_stand_ins_text(config, form, tiny):
    form({"exact_match": MEAN}, **{**TEXT, **config})
    result = score(tiny, Task("form"))
    assert 0 < result.scores[0].n_items == 6 - result.bad_items


def test_a_groups_score_is_the_mean_of_its_items_without_bad_ones(form, tiny, tmp_path, monkeypatch):
    """Of the five items of each part all, two and none are good: lm-eval's weighted means are plain means."""
    config, metrics = form({"acc": {}}, **CHOICE), {"aggregate_metric_list": [{"metric": "acc"}]}
    few, none = ({**config, "task": part, "doc_to_text": f"{{{{ q if n < {count} else q.a.b }}}}"}
                 for part, count in (("few", 2), ("none", 1)))  # fmt: skip
    outer = {"group": "outer", **metrics, "task": [config, {"group": "inner", **metrics, "task": [few, none]}]}
    (tmp_path / "outer.yaml").write_text(json.dumps(outer))
    index = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(tasks, "_index_with", lambda name: index)
    result = score(tiny, Task("outer"), 5)
    acc = {each.task: each for each in result.scores if each.metric == "acc" and each.group}
    assert 0 < acc["outer"].value == pytest.approx(result.items.correct.mean()) and result.bad_items == 8
    counts = {name: (each.n_items, each.n_total, each.unit) for name, each in acc.items()}
    assert counts == {"outer": (7, 18, "%"), "outer::inner": (2, 12, "%")}


def test_a_metric_that_was_no_share_stays_none(form, tiny):
    """Of six items only the last to be drawn has its 100 points."""
    form({"acc": MEAN}, **TEXT, process_results=lambda doc, _: {"acc": 100.0 * (doc["n"] == 2)})
    task = Task("form")
    assert [score(tiny, task, limit).scores[0].unit for limit in (None, 2)] == ["acc", "acc"]


@pytest.mark.parametrize(
    ("config", "metric", "text"),
    [({"generation_kwargs": {"max_gen_toks": 2048}}, {"exact_match": {}}, "2048"),
     ({"unsafe_code": True}, {"exact_match": {}}, "programs"),
     ({"process_results": has_no_package}, {"exact_match": MEAN}, "none of 6 items.*no script squad_v2"),
     ({}, {"bypass": {"aggregation": "bypass"}}, "no metric"),
     ({"process_results": longest},
      {"longest": {"aggregation": has_no_package, "higher_is_better": True}}, "no script squad_v2")],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused_before_any_work(config, metric, text, form, source, tmp_path, monkeypatch):
    form(metric, **{**TEXT, **config})
    session = Session("smollm2-135m", "bf16", tmp_path / "study")
    monkeypatch.setattr(session, "config", BloomConfig())  # names no window; lm-eval's then is 2048
    monkeypatch.setattr(session.tokenizer, "model_max_length", int(1e30))
    monkeypatch.setattr(tasks, "_look_up", lambda name: [name])
    with pytest.raises(InputError, match=f"'form'.*{text}"):
        accuracy(session, AccuracyOptions("form"))
    assert not (session.folder / "checkpoints").exists()


def test_a_task_that_asks_in_two_ways_scores_as_in_stock(tiny, tmp_path, monkeypatch):
    """SQuAD 2 asks for a text and a log-likelihood; in place of its metric, a script on the hub, both are added."""
    home = tmp_path / "lighteval" / "squad_v2"
    home.mkdir(parents=True)
    rows = [{"id": str(n), "title": "T", "context": "the river is green", "question": "which ?",
             "answers": {"text": ["green"] * (n % 2), "answer_start": [13] * (n % 2)}} for n in range(6)]  # fmt: skip
    for split in ("train", "validation"):
        (home / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def compute(predictions, references):
        assert [each["id"] for each in predictions] == [each["id"] for each in references]
        texts = sum(len(each["prediction_text"]) for each in predictions)
        return {"exact": texts, "f1": sum(math.log(each["no_answer_probability"]) for each in predictions)}

    index = TaskManager(include_path=Path(lm_eval.__file__).parent / "tasks" / "squadv2", include_defaults=False)
    monkeypatch.setattr(tasks, "_index_with", lambda name: index)
    monkeypatch.setattr(evaluate, "load", lambda name: SimpleNamespace(compute=compute))
    results = [score(tiny, Task("squadv2", tmp_path), scorer=scorer) for scorer in ("qnb", "hf")]
    monkeypatch.chdir(tmp_path)
    expected = stock(tiny, "squadv2", index)["results"]["squadv2"]
    for result in results:
        scores = {each.metric: each for each in result.scores}
        assert scores["exact"].value == expected["exact,none"] > 0
        assert scores["f1"].value == pytest.approx(expected["f1,none"], rel=1e-4)
        assert (scores["f1"].unit, scores["f1"].n_items, result.bad_items) == ("f1", 6, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_without_units_are_formed_wide_and_rounded_once(dtype, monkeypatch):
    import torch

    from qnb import patches

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
