"""A study: what its methods measure is what its results, tables and report show."""

import shutil

import pytest
import torch

from qnb import InputError, Study
from qnb.precision import PRECISIONS
from qnb.quantize import checkpoint, sources
from qnb.speed import benchmark
from qnb.speed.engines import Eager


@pytest.fixture
def study(smoke, tmp_path):
    """A study of two formats whose checkpoints are made and of which nothing else was measured."""
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(smoke[0] / "checkpoints")
    shutil.copy(smoke[0] / "study.json", folder)
    lines = (smoke[0] / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_bytes(b"".join(line for line in lines if b'"stage": "quantize"' in line))
    return Study("smollm2-135m", "bf16,int8", folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "owner", "name", "measure"),
    [
        ("accuracy", checkpoint, "load", lambda study: study.accuracy("sample_easy", 2)),
        ("batch", Eager, "generate",
         lambda study: study.perf_maxbatch(study.workload("maxbatch", 2, 8, 2, "sample"), 2000)),
        ("perf", benchmark, "run", lambda study: study.perf_bs1(study.workload("bs1", 2, 8, 2, "sample"))),
    ],
    ids=["when loading", "in every probe", "in a timed run"],
)  # fmt: skip
def test_out_of_memory_costs_that_format_alone(stage, owner, name, measure, study, monkeypatch, capsys):
    """Only int8 failed, in one line; asked again with room it is measured, and nothing else is."""
    works = getattr(owner, name)

    def fails(first, *rest, **options):
        model = getattr(first, "_model", first)  # of an engine
        if getattr(model, "is_quantized", False) or "int8" in getattr(first, "name", ""):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return works(first, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        measure(study)
    failures = study.session.ledger.failures()
    reasons = {(row["stage"], row["precision"], row["reason"].partition(":")[0]) for row in failures}
    assert reasons == {(f"{stage}.failed", "int8", "out of memory")}
    said = capsys.readouterr().out
    assert "int8" in said and "could not be measured (out of memory" in said
    assert {row["precision"] for row in study.session.ledger.rows(stage)} == {"bf16"}
    assert "int8" not in set(study.results().maxbatch.precision)
    before = study.session.ledger.path.read_bytes()
    again = Study("smollm2-135m", "bf16,int8", study.folder)
    measure(again)
    assert again.session.ledger.failures() == []
    assert {row["precision"] for row in again.session.ledger.rows(stage)} == {"bf16", "int8"}
    assert b'"precision": "bf16"' not in again.session.ledger.path.read_bytes()[len(before) :]


def test_a_request_that_does_not_fit_is_refused_with_what_there_was(source, tmp_path):
    study = Study("smollm2-135m", "bf16", tmp_path)
    with pytest.raises(InputError, match=r"memory_mib is 1: out of memory: one request takes .*1 MiB"):
        study.perf_maxbatch(study.workload("maxbatch", 2, 4, 2, "sample"), 1)


def test_results_follow_the_ledger(tmp_path):
    study = Study("smollm2-135m", "bf16", tmp_path)
    assert study.results() is study.results() and study.results().rows == ()
    study.session.ledger.append({"stage": "lengths", "fingerprint": "x", "counts": [1]})
    assert len(study.results().rows) == 1
    with pytest.raises(InputError, match="table5"):
        study.table("table5")


def test_all_formats_of_the_ledger_are_in_every_table(studied):
    """A run of fewer formats shows what others were measured in the same folder."""
    fewer = Study(precisions="nf4", output=studied.folder)
    assert fewer.table("table3_bs1").equals(studied.table("table3_bs1"))
    order = [name for name in PRECISIONS if name in set(fewer.table("table3_bs1").precision)]
    assert list(dict.fromkeys(fewer.table("table3_bs1").precision)) == order


@pytest.mark.gpu
def test_a_gpu_times_both_engines_alone_and_together(tmp_path, monkeypatch):
    """The stages of 03 and 04 as their notebooks run them."""
    from qnb.speed import engines

    monkeypatch.setattr(engines, "COMPILE_OPTIONS", None)  # kernels have their own test
    study = Study(sources.EMBEDDED, "bf16,int8,nf4", tmp_path / "study")
    work = study.workload("bs1", 4, 16, 12, "sample")
    alone, together, swept = study.perf_bs1(work, 1), study.perf_maxbatch(work), study.sweep(work, 2)
    for frame in (alone, together):
        timed = frame.dropna(subset=["throughput_rps"])
        pairs = set(zip(timed.precision, timed.engine, strict=True))
        assert pairs == {(p, e) for p in ("bf16", "nf4") for e in ("eager", "cuda_graph")} | {("int8", "eager")}
        assert timed.peak_allocated_mib.notna().any()
        assert set(timed.bound.dropna()) <= {"launch", "bandwidth", "compute", "kernel_inefficiency"}
        missing = frame[frame.engine.eq("cuda_graph") & frame.precision.eq("int8")]
        assert missing.note.str.contains("outlier").all()
    assert (together.dropna(subset=["throughput_rps"]).batch_size == 4).all()
    assert torch.cuda.memory_reserved() < 2**26, "no model stays"
    assert set(swept.batch_size) == {1, 2} and study.results().bs1.kernel_s_per_token.notna().any()
    assert not study.session.ledger.failures()
