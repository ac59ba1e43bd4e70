"""What is asked is built and tokenized once, found again by all it follows from, and asked anew when that changes."""

import json

import pandas as pd
import pytest
import yaml
from lm_eval.api.task import ConfigurableTask, Task

from qnb import InputError
from qnb.accuracy import request_cache as questions
from qnb.accuracy import scorer
from qnb.accuracy.tasks import Evaluator


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


@pytest.fixture
def nothing_is_built(monkeypatch):
    """Returns a function after which requests cannot be built, nor texts encoded."""

    def forbid():
        def fail(*_, **__):
            raise AssertionError("built again")

        monkeypatch.setattr(Task, "build_all_requests", fail)
        monkeypatch.setattr(ConfigurableTask, "fewshot_context", fail)
        monkeypatch.setattr(scorer.SharedContextLM, "_encode_together", lambda self, texts: fail() if texts else {})

    return forbid


@pytest.mark.parametrize("task", ["sample_easy", "sample_exam", "sample_arithmetic"])
def test_a_later_run_reads_what_an_earlier_one_built(task, tiny, tmp_path, nothing_is_built):
    """Choices, a group, and generation with examples; in one process, and read from the file by another evaluator."""
    bare, first = Evaluator(task, 3), Evaluator(task, 3, requests=tmp_path)
    expected, built = bare.evaluate(*tiny, task), first.evaluate(*tiny, task)
    nothing_is_built()
    shared, read = first.evaluate(*tiny, task), Evaluator(task, 3, requests=tmp_path).evaluate(*tiny, task)
    for result in (built, shared, read):
        assert result.items.equals(expected.items) and result.scores == expected.scores
        assert result.data_sha256 == expected.data_sha256
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".jsonl" and {json.loads(line)["task"] for line in file.open()} == set(expected.items.task)


def test_another_limit_tokenizer_or_data_are_other_files(tiny, tmp_path, monkeypatch):
    requests, data = tmp_path / "requests", arc(tmp_path / "data")
    one = Evaluator("arc_easy", 1, data_dir=data, requests=requests).evaluate(*tiny, "arc_easy")
    two = Evaluator("arc_easy", 2, data_dir=data, requests=requests).evaluate(*tiny, "arc_easy")
    assert len(list(requests.iterdir())) == 2 and (len(one.items), len(two.items)) == (1, 2)
    assert {score.of for score in one.scores} == {2} and {score.items for score in one.scores} == {1}
    arc(tmp_path / "data", ("What falls from clouds?", "What do goats eat?"))
    changed = Evaluator("arc_easy", 2, data_dir=data, requests=requests).evaluate(*tiny, "arc_easy")
    assert changed.data_sha256 != two.data_sha256 and len(list(requests.iterdir())) == 3
    assert changed.items.loglikelihoods.tolist() != two.items.loglikelihoods.tolist()
    monkeypatch.setattr(questions, "tokenizer_sha256", lambda tokenizer: "another")
    Evaluator("arc_easy", 2, data_dir=data, requests=requests).evaluate(*tiny, "arc_easy")
    assert len(list(requests.iterdir())) == 4


def test_a_damaged_file_is_built_anew(tiny, tmp_path):
    expected = Evaluator("sample_easy", 3, requests=tmp_path).evaluate(*tiny, "sample_easy")
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    for wrong in (whole[: len(whole) // 2], whole.splitlines()[0] + "\n", "[1]\n"):
        file.write_text(wrong)
        again = Evaluator("sample_easy", 3, requests=tmp_path).evaluate(*tiny, "sample_easy")
        assert again.items.equals(expected.items) and file.read_text() == whole


def test_padding_a_batch_does_not_change_the_tokenizer(tiny):
    tokenizer = tiny[1]
    before = questions.tokenizer_sha256(tokenizer)
    tokenizer(["a", "a longer text"], padding=True)
    assert questions.tokenizer_sha256(tokenizer) == before


def test_a_missing_split_is_named(tmp_path):
    evaluator = Evaluator("arc_easy", data_dir=arc(tmp_path, splits=("train", "validation")))
    with pytest.raises(InputError, match=r"'test'.*there: train, validation"):
        evaluator.build("arc_easy")
