"""Notebook 01's stages: checkpoints and pushes, as a user asks for them."""

import pandas as pd
import pytest

from qnb import InputError
from qnb.quantize import hub, stages
from qnb.session import Session


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A session whose bf16 checkpoint is one small file, and whose int8 checkpoint cannot be made."""
    session = Session("smollm2-135m", "bf16, int8", tmp_path / "study", device="cpu")

    def make(precision):
        if precision.name == "int8":
            raise RuntimeError("does not fit")
        (tmp_path / "bf16").mkdir(exist_ok=True)
        (tmp_path / "bf16" / "model.safetensors").write_bytes(bytes(2**20))
        session.append(session.key("quantize", precision))
        return tmp_path / "bf16"

    monkeypatch.setattr(session, "checkpoint", make)
    return session


def test_what_cannot_be_made_is_recorded_and_the_others_go_on(session):
    stages.quantize(session)
    assert [row["precision"] for row in session.ledger.rows("quantize")] == ["bf16"]
    assert [(row["precision"], row["error"]) for row in session.ledger.failures()] == [("int8", "RuntimeError")]


def test_a_dry_run_lists_repository_files_and_size(session, monkeypatch):
    monkeypatch.setattr(hub, "_talking", None)  # nothing may ask the hub
    (row,) = stages.push(session, stages.PushOptions("me/llama"), lambda precision: f"# {precision.name}")
    assert row == {"precision": "bf16", "repository": "me/llama-bf16", "private": True, "commit": "",
                   "files": "model.safetensors README.md", "total_mib": 1 + 6 / 2**20}  # fmt: skip
    assert pd.read_csv(session.folder / "push.csv").files.tolist() == [row["files"]]
    assert stages.push(session, stages.PushOptions(""), str) == []


def test_a_push_that_cannot_be_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for options, expected in ((("a b/c",), "'a b/c' is no name"), (("me/x", True, False), "needs a hub token")):
        with pytest.raises(InputError, match=expected):
            stages.PushOptions(*options)
