"""A study: what its methods measure is what its results, tables and report show."""

import pytest
import torch

from qnb import InputError, Study
from qnb.precision import PRECISIONS
from qnb.quantize import sources


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
