"""The built-in tasks: well-formed items, right sums, balanced answers, and prompts that lm-eval makes of them."""

import json
import re
from collections import Counter

import pytest

from qnb.accuracy.tasks import Task
from qnb.prompts import DATA

EXAM = tuple(f"sample_exam_{part}" for part in ("humanities", "social_sciences", "stem", "other"))
CHOICES = ("sample_easy", "sample_hard", "sample_completion", *EXAM)
ARITHMETIC = ("sample_arithmetic", "sample_arithmetic_fewshot")


def items(name):
    lines = (DATA / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def choice_items(name):
    """(text, choices, gold index) of each item."""
    keys = ("context", "endings", "label") if name == "sample_completion" else ("question", "choices", "answer")
    return [tuple(row[key] for key in keys) for row in items(name)]


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_four_different_texts_whose_place_and_length_give_no_answer_away(name):
    for text, choices, gold in choice_items(name):
        assert all(part and part == part.strip() for part in (text, *choices)), text
        assert len({choice.lower() for choice in choices}) == len(choices) == 4, text
        assert type(gold) is int and 0 <= gold < 4, text
    golds = [gold for *_, gold in choice_items(name)]
    for end in range(4, len(golds) + 1):  # also where a limit takes the first
        counts = Counter(golds[:end])
        assert max(counts[i] for i in range(4)) - min(counts[i] for i in range(4)) <= 2
    assert len({tuple(golds[i : i + 4]) for i in range(0, len(golds), 4)}) > 1
    longest = [max(map(len, choices)) == len(choices[gold]) for _, choices, gold in choice_items(name)]
    assert sum(longest) / len(longest) <= 0.6


@pytest.mark.parametrize("name", ARITHMETIC)
def test_sums_are_right_and_stand_in_their_questions(name):
    for row in items(name):
        worked, _, final = row["answer"].partition(" #### ")
        left, sign, right, total = re.search(r"(\d+) ([-+*]) (\d+) = (\d+)", worked).groups()
        assert eval(left + sign + right) == int(total) == int(final) > 0, row
        assert row["check"] == left + sign + right and {left, right} <= set(re.findall(r"\d+", row["question"])), row


def test_lm_eval_makes_prompts_of_the_items():
    for name in (*CHOICES[:3], "sample_exam"):
        for part, task in Task(name)._parts.items():
            for doc, (text, choices, gold) in zip(task.eval_docs, choice_items(part), strict=True):
                assert text in task.doc_to_text(doc)
                assert task.doc_to_choice(doc) == choices and int(task.doc_to_target(doc)) == gold
    (task,) = Task("sample_arithmetic")._parts.values()
    prompt = task.fewshot_context(task.eval_docs[0], num_fewshot=task.config.num_fewshot)
    shots = items("sample_arithmetic_fewshot")[:3]
    examples = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in shots]
    assert prompt == "\n\n".join([*examples, f"Question: {items('sample_arithmetic')[0]['question']}\nAnswer:"])
