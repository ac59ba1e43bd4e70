"""The built-in sample data: well-formed items, right sums, balanced answers, and tasks that lm-eval can build."""

import ast
import contextlib
import json
import operator
import re
from collections import Counter
from pathlib import Path

import pytest

import qnb

DATA = Path(qnb.__file__).parent / "data"
TASKS = DATA / "tasks"
EXAM = tuple(f"sample_exam_{part}" for part in ("humanities", "social_sciences", "stem", "other"))
QUESTIONS = ("sample_easy", "sample_hard", *EXAM)
CHOICES = (*QUESTIONS, "sample_completion")
ARITHMETIC = ("sample_arithmetic", "sample_arithmetic_fewshot")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def items(name):
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def choice_items(name):
    """(text, choices, gold index) of each item."""
    keys = ("context", "endings", "label") if name == "sample_completion" else ("question", "choices", "answer")
    rows = items(name)
    assert all(set(row) == set(keys) for row in rows)
    return [tuple(row[key] for key in keys) for row in rows]


def calculate(expression):
    """Value of an expression of whole numbers, ``+``, ``-`` and ``*``."""

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(f"not a sum of whole numbers: {expression}")

    return value(ast.parse(expression, mode="eval").body)


def test_no_file_is_unaccounted_for():
    assert {path.stem for path in TASKS.glob("*.jsonl")} == {*CHOICES, *ARITHMETIC}
    assert {path.stem for path in TASKS.glob("*.yaml")} == {*CHOICES, "sample_arithmetic", "sample_exam"}


@pytest.mark.parametrize("name", ["sample_easy", "sample_hard", "sample_completion", "sample_arithmetic"])
def test_enough_items(name):
    assert len(items(name)) >= 40


def test_the_exam_has_four_equal_parts():
    counts = [len(items(name)) for name in EXAM]
    assert sum(counts) >= 40 and len(set(counts)) == 1


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    for text, choices, gold in choice_items(name):
        assert text == text.strip() and text
        assert len(choices) == 4 and all(choice == choice.strip() and choice for choice in choices), text
        assert len({choice.lower() for choice in choices}) == 4, text
        assert type(gold) is int and 0 <= gold < 4, text


@pytest.mark.parametrize("name", CHOICES)
def test_gold_positions_are_balanced_from_the_first_item_on(name):
    golds = [gold for *_, gold in choice_items(name)]
    for end in range(4, len(golds) + 1):
        counts = Counter(golds[:end])
        assert max(counts[i] for i in range(4)) - min(counts[i] for i in range(4)) <= 2
    assert len({tuple(golds[i : i + 4]) for i in range(0, len(golds), 4)}) > 1, "a fixed order gives answers away"


@pytest.mark.parametrize("name", CHOICES)
def test_the_longest_choice_is_no_giveaway(name):
    longest = [max(map(len, choices)) == len(choices[gold]) for _, choices, gold in choice_items(name)]
    assert sum(longest) / len(longest) <= 0.6


def test_no_question_is_asked_twice():
    texts = [text for name in CHOICES for text, *_ in choice_items(name)]
    texts += [row["question"] for name in ARITHMETIC for row in items(name)]
    plain = Counter(re.sub(r"\W+", " ", text.lower()).strip() for text in texts)
    assert [text for text, times in plain.items() if times > 1] == []


@pytest.mark.parametrize("name", ARITHMETIC)
def test_sums(name):
    for row in items(name):
        assert set(row) == {"question", "answer", "check"}
        worked, _, final = row["answer"].partition(" #### ")
        assert int(final) == calculate(row["check"]) > 0, row
        left, _, right = re.search(r"(\d+ [-+*] \d+) (=) (\d+)", worked).groups()
        assert left.replace(" ", "") == row["check"] and right == final, row
        # every number of the sum stands in the question
        missing = set(re.findall(r"\d+", row["check"])) - set(re.findall(r"\d+", row["question"]))
        assert not missing, row


@pytest.mark.parametrize("expression", ["__import__('os')", "2**9", "1.5+1", "True+1", "-1"])
def test_the_calculator_refuses_anything_else(expression):
    with pytest.raises(ValueError, match="not a sum"):
        calculate(expression)


def test_text():
    paragraphs = (DATA / "text.txt").read_text(encoding="utf-8").strip().split("\n\n")
    assert len(paragraphs) >= 20 and len(set(paragraphs)) == len(paragraphs)
    for paragraph in paragraphs:
        assert "\n" not in paragraph and paragraph == paragraph.strip()
        assert len(paragraph.split()) >= 100, paragraph[:60]


def test_lm_eval_builds_the_tasks(tmp_path, monkeypatch):
    import datasets
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    names = ["sample_easy", "sample_hard", "sample_completion", "sample_arithmetic", "sample_exam"]
    with contextlib.chdir(TASKS):
        built = TaskManager(include_path=str(TASKS), include_defaults=False).load(names)
        tasks = built["tasks"]
        assert set(tasks) == {*CHOICES, "sample_arithmetic"} and set(built["groups"]) == {"sample_exam"}
        for name, task in tasks.items():
            docs = list(task.test_docs())
            assert docs == items(name)
            assert task.config.metadata["version"] == 1.0 and task.config.task_alias
            if name in CHOICES:
                for doc, (text, choices, gold) in zip(docs, choice_items(name), strict=True):
                    assert text in task.doc_to_text(doc)
                    assert task.doc_to_choice(doc) == choices and int(task.doc_to_target(doc)) == gold
        task = tasks["sample_arithmetic"]
        prompt = task.fewshot_context(next(iter(task.test_docs())), num_fewshot=task.config.num_fewshot)
    shots = items("sample_arithmetic_fewshot")
    parts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in shots[:3]]
    question = items("sample_arithmetic")[0]["question"]
    assert prompt == "\n\n".join([*parts, f"Question: {question}\nAnswer:"])
