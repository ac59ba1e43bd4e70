"""A study is what was measured, or `verify` says what is not: a byte is flipped in a file of each kind."""

import json
import shutil

import example
import pytest

from qnb import Study
from qnb.__main__ import main
from qnb.ledger import Ledger, file_sha256
from qnb.provenance import ROOT
from qnb.quantize.files import replacing
from qnb.report import widgets
from qnb.report.results import Results
from qnb.report.tables import TABLES, save
from qnb.report.verify import verify

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The example study with a checkpoint and all tables."""
    folder = example.write(tmp_path_factory.mktemp("verify") / "study", precisions=("bf16", "int8"))
    with replacing(folder / "checkpoints" / "int8-float16") as draft:
        (draft / "model.safetensors").write_bytes(b"weights")
    ledger = Ledger(folder)
    row = next(row for row in ledger.rows("quantize") if row["precision"] == "int8")
    digest = file_sha256(folder / "checkpoints" / "int8-float16" / "manifest.json")
    ledger.append({**row, "manifest_sha256": digest, "dtype": "float16"})
    for name in TABLES:
        save(Results.read(ledger), name)
    return folder


@pytest.fixture
def study(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "study")


def problems(study):
    return {finding.part: finding.problem for finding in verify(study) if finding.problem}


def test_an_untouched_study_is_as_it_was_measured(folder, capsys):
    parts = [finding.part for finding in verify(folder)]
    assert problems(folder) == {} and len(set(parts)) == len(parts)
    assert main(["verify", str(folder)]) == 0 and f"{len(parts)} of {len(parts)}" in capsys.readouterr().out


def test_a_study_sent_from_another_machine_is_checked_and_drawn_beside_the_kept_runs(study, capsys, monkeypatch):
    for path in study.iterdir():
        if path.name not in README.partition("t4.zip ")[2].partition("`")[0].split():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    ledger = Ledger(study).path
    rows = [{**json.loads(line), "device": "Tesla T4"} for line in ledger.read_text().splitlines()]
    ledger.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["verify", str(study)]) == 0 and main(["report", str(study)]) == 0
    assert "Tesla T4" in (study / "report.html").read_text(encoding="utf-8")
    monkeypatch.setattr(widgets, "REFERENCE", study.parent)
    choice = widgets.explorer(Study(output=study.parent / "mine")).children[0]
    assert f"reference: {study.name}" in choice.options


@pytest.mark.parametrize(
    "pattern",
    ["items/*.parquet", "samples/*.parquet", "tables/batch_plans.md", "checkpoints/*/model.safetensors",
     "checkpoints/*/manifest.json"],
)  # fmt: skip
def test_a_changed_byte_is_found(study, pattern):
    path = sorted(study.glob(pattern))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert any(part in str(path) for part in problems(study))


def test_a_changed_score_a_missing_file_and_a_torn_line_are_found(study):
    ledger = Ledger(study)
    row = ledger.rows("accuracy")[0]
    ledger.append({**row, "scores": [{**row["scores"][0], "value": 0.9}]})
    samples = ledger.rows("perf")[0]["samples_file"]
    (study / samples).unlink()
    with ledger.path.open("a") as file:
        file.write('{"stage": "perf", "prec')
    assert {"tables/table1_accuracy.csv", "ledger.jsonl", samples} <= set(problems(study))


def test_a_folder_without_a_study_is_refused(tmp_path, capsys):
    for path, words in ((tmp_path, "holds no study"), ("~nouser/x", "begins with an unknown user's home")):
        drawn = ["run", "--profile", "smoke", "--only", "05", "--output", str(path)]
        assert main(["verify", str(path)]) == main(["report", str(path)]) == main(drawn) == 2
        assert capsys.readouterr().err.count(words) == 3 and not [*tmp_path.iterdir()]
