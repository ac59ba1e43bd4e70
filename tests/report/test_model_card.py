"""A model card is one that the hub can load, with the study's scores, and what a row says in it stays text."""

import json
from dataclasses import replace

import example
import pytest
import yaml
from huggingface_hub import ModelCard

from qnb.ledger import Ledger
from qnb.precision import PRECISIONS
from qnb.report import model_card
from qnb.report.results import Results
from qnb.report.tables import build


def head(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_holds_scores_as_the_hub_reads_them(studied, tmp_path):
    path = model_card.write(studied.results(), PRECISIONS["int4"], tmp_path)
    assert path == tmp_path / "int4" / "README.md"
    data = head(path.read_text())
    assert data["base_model"] == "example/one-billion" and "bitsandbytes" in data["tags"]
    scores = {each["dataset"]["config"]: each["metrics"][0]["value"] for each in data["model-index"][0]["results"][:2]}
    shown = build(studied.results(), "table1_accuracy").set_index("task").int4_pct / 100
    assert scores == pytest.approx({"ARC-Easy": shown["arc_easy"], "ARC-Challenge": shown["arc_challenge"]})
    card = ModelCard(path.read_text())
    assert card.data.eval_results and json.dumps(card.data.to_dict())
    assert "2.711 bits per quantized weight" in card.text  # 271,088,640 bytes of 800 million weights


def test_a_card_names_the_commit_and_random_weights(studied):
    fetched = replace(studied.results(), model="example/one-billion@0123abc")  # as a model of the hub is called
    text = model_card.card(fetched, PRECISIONS["int4"])
    assert head(text)["base_model"] == "example/one-billion"
    assert "example/one-billion (commit 0123abc) converted to **int4**" in text
    text = model_card.card(replace(fetched, model="shape:llama-3.2-1b"), PRECISIONS["int4"])
    assert "base_model" not in text and "random weights" in text


def test_what_a_model_is_called_stays_text(tmp_path):
    folder = example.write(tmp_path / "study", "<script>alert(1)</script>/x\"onload='2", ("bf16", "int8"), ("eager",))
    text = model_card.card(Results.read(Ledger(folder)), PRECISIONS["int8"])
    assert "alert(1)" in text and "<script" not in text.split("---\n", 2)[2] and "base_model" not in head(text)


def test_a_card_of_nothing_measured_is_a_card():
    text = model_card.card(Results("", "HuggingFaceTB/SmolLM2-135M-Instruct", ""), PRECISIONS["nf4"])
    assert "Nothing was measured yet." in text and head(text)["base_model"].startswith("HuggingFaceTB/")
