"""A study: what its methods measure is what its results, tables and report show."""

import pytest
import torch
import transformers
from tiny_models import TINY, save_tiny

from qnb import InputError, Study
from qnb.precision import PRECISIONS
from qnb.quantize import sources
from qnb.speed import device_peaks


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


LONG = {**TINY, "max_position_embeddings": 2048}
FAMILIES = {
    "opt": transformers.OPTConfig(**LONG, ffn_dim=128, word_embed_proj_dim=64),
    "mamba": transformers.MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, state_size=8),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_the_whole_way(family, tmp_path, monkeypatch):
    monkeypatch.setattr(device_peaks, "measure_peaks", lambda _: device_peaks.DevicePeaks(1e9))  # takes seconds
    study = Study(str(save_tiny(tmp_path / "model", FAMILIES[family])), "bf16,nf4", tmp_path / "study", device="cpu")
    assert study.quantize().reload_identical.tolist() == [True, True]
    scores = study.accuracy("sample_arithmetic", limit=2)
    assert set(scores.precision) == {"bf16", "nf4"} and scores.value.between(0, 1).all()
    study.divergence("sample", ppl_tokens=64, ppl_context=32)
    workload = study.workload("bs1", requests=1, prompt_tokens=8, new_tokens=3)
    assert study.perf_bs1(workload, engines="eager").total_s.gt(0).sum() == 2
    assert study.session.ledger.failures() == []


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
