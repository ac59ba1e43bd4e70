"""Notebook 01's stages: checkpoints and pushes, as a user asks for them."""

from contextlib import nullcontext

import pandas as pd
import pytest
import torch
import transformers
from tiny_models import save_tiny

from qnb import InputError, Study, prompts
from qnb.device import Device
from qnb.quantize import checkpoint, hub, stages
from qnb.session import Session


@pytest.mark.parametrize(("word", "is_made"), [("fox", False), ("#", True)], ids=["in the proof", "later"])
def test_a_quantized_format_that_overflows_in_float16_goes_on_in_bfloat16(word, is_made, tmp_path, monkeypatch):
    monkeypatch.setattr(Device, "half", "float16")
    model, folder = str(save_tiny(tmp_path / "model")), tmp_path / "study"
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    network.model.embed_tokens.weight.data[checkpoint.load_tokenizer(model)(word)["input_ids"][0]] = 1e5
    network.save_pretrained(model)
    monkeypatch.setattr(prompts, "paragraphs", lambda *_: ["# one two three " * 9])
    study = Study(model, "bf16,fp16,nf4", folder)
    study.quantize(), study.divergence("sample", 100, 50)
    types = {(row["stage"], row["precision"]): row["dtype"] for row in study.session.ledger.rows()}
    measured = {(stage, name): "bfloat16" for stage in ("quantize", "divergence") for name in ("bf16", "nf4")}
    assert types == measured | ({("quantize", "fp16"): "float16"} if is_made else {})
    assert {row["precision"] for row in study.session.ledger.failures()} == {"fp16"}
    assert (folder / "checkpoints" / "nf4-float16").exists() is is_made
    again = Session(model, "int8,nf4", folder)
    assert [again.pinned(each).dtype for each in again.precisions] == ["float16", "bfloat16"]
    with nullcontext() if is_made else pytest.raises(RuntimeError, match="FP16 overflows"):
        Study(model, "nf4", tmp_path / "float16", half="float16").quantize()


def test_a_dry_run_lists_repository_files_and_size(tmp_path, monkeypatch):
    session = Session("smollm2-135m", "bf16", tmp_path / "study", device="cpu")
    (tmp_path / "bf16").mkdir()
    (tmp_path / "bf16" / "model.safetensors").write_bytes(bytes(2**20))
    monkeypatch.setattr(session, "checkpoint", lambda precision, is_new: tmp_path / "bf16")
    monkeypatch.setattr(hub, "_talking", None)  # nothing may ask the hub
    (row,) = stages.push(session, stages.PushOptions("me/llama"), lambda precision: f"# {precision.name}")
    assert row == {"precision": "bf16", "repository": "me/llama-bf16", "private": True, "commit": "",
                   "files": "model.safetensors README.md", "total_mib": 1 + 6 / 2**20}  # fmt: skip
    assert pd.read_csv(session.folder / "push.csv").files.tolist() == [row["files"]]
    assert stages.push(session, stages.PushOptions(""), str) == []


def test_a_push_without_a_token_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(InputError, match="needs a hub token"):
        stages.PushOptions("me/x", True, dry_run=False)
