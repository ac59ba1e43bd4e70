"""A model card is one that the hub can load, with the study's scores, and what a row says in it stays text."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from qnb.precision import PRECISIONS
from qnb.report import model_card, recommend
from qnb.report.results import Results
from qnb.report.tables import build


def test_a_card_holds_scores_as_the_hub_reads_them(study):
    card = ModelCard(model_card.card(study, PRECISIONS["int4"]))
    assert card.data.base_model == "example/one-billion" and "bitsandbytes" in card.data.tags
    shown = build(study, "table1_accuracy").set_index("task").int4_pct / 100
    scores = {score.dataset_config: score.metric_value for score in card.data.eval_results[:2]}
    assert scores == pytest.approx({"ARC-Easy": shown["arc_easy"], "ARC-Challenge": shown["arc_challenge"]})
    assert json.dumps(card.data.to_dict())
    assert "5.369 bits per weight" in card.text  # 640 MiB of 1,000 million weights
    assert "80.00 % of the 1,000,000,000 parameters are quantized, to 2.711 bits" in card.text
    assert f"Verdict on example/one-billion: {recommend.summary(study).words[3]}" in card.text


def test_a_card_says_what_was_left_out(study):
    left_out = [{"<experts> fused into one tensor": 200_000_000}] * len(study.checkpoints)
    checkpoints = study.checkpoints.assign(left_out=left_out, dtype="float16")
    text = model_card.card(replace(study, checkpoints=checkpoints), PRECISIONS["nf4"])
    assert "# one-billion-nf4-float16" in text and "all others are in float16" in text
    assert "200,000,000 parameters, &lt;experts&gt; fused" in text and "<experts" not in text


@pytest.mark.parametrize(
    ("model", "base", "text"),
    [("example/one-billion@0123abc", "example/one-billion", "(commit 0123abc) converted to **int4**"),
     ("shape:llama-3.2-1b", None, "random weights"),
     ("<script>alert(1)</script>/x\"onload='2", None, "&lt;script&gt;alert(1)")],
)  # fmt: skip
def test_a_card_names_its_model_as_text(model, base, text, study):
    card = ModelCard(model_card.card(replace(study, model=model), PRECISIONS["int4"]))
    assert card.data.base_model == base and text in card.text and "<script" not in card.text


def test_a_card_of_nothing_measured_is_a_card():
    card = ModelCard(model_card.card(Results("", "HuggingFaceTB/SmolLM2-135M-Instruct", ""), PRECISIONS["nf4"]))
    assert "Nothing was measured yet." in card.text and card.data.base_model.startswith("HuggingFaceTB/")
