"""A study is what was measured, or `verify` says what is not: a byte is flipped in a file of each kind."""

import shutil

import example
import pytest

from qnb.__main__ import main
from qnb.ledger import Ledger, file_sha256
from qnb.quantize.checkpoint import replacing
from qnb.report.results import Results
from qnb.report.tables import TABLES, save
from qnb.report.verify import verify

KINDS = {
    "ledger": ("ledger.jsonl", "ledger.jsonl"),
    "items": ("items/*.parquet", "items/"),
    "weights": ("checkpoints/int8/model.safetensors", "checkpoints/int8"),
    "manifest": ("checkpoints/int8/manifest.json", "checkpoints/int8"),
    "samples": ("samples/*.parquet", "samples/"),
    "table": ("tables/table1_accuracy.csv", "tables/table1_accuracy.csv"),
    "table as text": ("tables/batch_plans.md", "tables/batch_plans.md"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The example study with a checkpoint and all tables."""
    folder = example.write(tmp_path_factory.mktemp("verify") / "study", precisions=("bf16", "int8"))
    with replacing(folder / "checkpoints" / "int8") as draft:
        (draft / "model.safetensors").write_bytes(b"weights")
    ledger = Ledger(folder)
    row = next(row for row in ledger.rows("quantize") if row["precision"] == "int8")
    ledger.append({**row, "manifest_sha256": file_sha256(folder / "checkpoints" / "int8" / "manifest.json")})
    for name in TABLES:
        save(Results.read(ledger), name)
    return folder


def problems(folder):
    return {finding.part: finding.problem for finding in verify(folder) if finding.problem}


def test_an_untouched_study_is_as_it_was_measured(folder, capsys):
    parts = [finding.part for finding in verify(folder)]
    assert problems(folder) == {} and len(set(parts)) == len(parts)
    for kind in ("ledger.jsonl", "items/", "samples/", "acc of arc_easy, int8", "checkpoints/int8", "tables/"):
        assert any(part.startswith(kind) for part in parts), kind
    assert main(["verify", str(folder)]) == 0 and f"{len(parts)} of {len(parts)}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_is_found(folder, kind, tmp_path):
    study = shutil.copytree(folder, tmp_path / "study")
    pattern, part = KINDS[kind]
    path = sorted(study.glob(pattern))[0]
    content = bytearray(path.read_bytes())
    content[-2 if kind == "ledger" else len(content) // 2] ^= 1  # the end of a line, so that it is no row
    path.write_bytes(content)
    assert any(name.startswith(part) for name in problems(study)), problems(study)


def test_a_score_that_its_items_do_not_give_and_a_file_that_is_gone_are_found(folder, tmp_path):
    study = shutil.copytree(folder, tmp_path / "study")
    ledger = Ledger(study)
    row = ledger.rows("accuracy")[0]
    (score,) = row["scores"]
    ledger.append({**row, "scores": [{**score, "value": score["value"] + 0.01}]})
    (study / ledger.rows("perf")[0]["samples_file"]).unlink()
    found = problems(study)
    assert f"acc of {row['task']}, {row['precision']}" in found and ledger.rows("perf")[0]["samples_file"] in found


def test_a_torn_last_line_is_named(folder, tmp_path):
    study = shutil.copytree(folder, tmp_path / "study")
    with (study / "ledger.jsonl").open("a") as file:
        file.write('{"stage": "perf", "prec')
    assert "torn" in problems(study)["ledger.jsonl"]


def test_a_folder_without_a_study_is_refused(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no study" in capsys.readouterr().err
