"""A study is what was measured, or the command says what is not: a byte is flipped in a file of each kind."""

import shutil

import pytest
from conftest import command

from qnb.__main__ import main

KINDS = {
    "ledger.jsonl": "ledger.jsonl",
    "study.json": "study.json",
    "items": "items/*.parquet",
    "weights": "checkpoints/int8/model.safetensors",
    "tokenizer": "checkpoints/int8/tokenizer.json",
    "manifest": "checkpoints/bf16/manifest.json",
    "readings": "samples/perf.bs1.*.parquet",
    "what was asked": "requests/*.jsonl",
    "table as text": "tables/table3_bs1.md",
    "table": "tables/table1_accuracy.csv",
    "change": "tables/table2_change.csv",
    "performance": "tables/table4_maxbatch.csv",
    "divergence": "tables/divergence.csv",
    "plans": "tables/examples.csv",
    "what a table was built for": "tables/.table3_bs1.json",
}


@pytest.fixture(scope="module")
def study(smoke, tmp_path_factory):
    """A copy of the small study, for damage."""
    folder = tmp_path_factory.mktemp("verify") / "study"
    shutil.copytree(smoke[0], folder)
    return folder


@pytest.mark.slow
def test_an_untouched_study_is_as_it_was_measured(smoke):
    done = command("verify", str(smoke[0]))
    assert done.returncode == 0, done.stdout
    count, total = done.stdout.split(" parts")[0].split(" of ")
    assert count == total and int(total) >= 2 + 2 + 2 + 5  # ledger, study, items, checkpoints, tables


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_is_found(study, kind, capsys):
    path = sorted(study.glob(KINDS[kind]))[0]
    before = path.read_bytes()
    changed = bytearray(before)
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    try:
        assert main(["verify", str(study)]) == 1
        said = capsys.readouterr().out
        name = path.relative_to(study).as_posix().replace("/.", "/").removesuffix(".json")
        assert "FAILS" in said and name.split("/model")[0].split("/tokenizer")[0].split("/manifest")[0] in said
    finally:
        path.write_bytes(before)


@pytest.mark.slow
def test_what_is_gone_is_found(study, capsys):
    path = sorted(study.glob("items/*.parquet"))[0]
    path.rename(study / "elsewhere")
    assert main(["verify", str(study)]) == 1
    assert path.name in capsys.readouterr().out
    (study / "elsewhere").rename(path)


def test_a_folder_without_a_study_is_refused(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no study" in capsys.readouterr().err
