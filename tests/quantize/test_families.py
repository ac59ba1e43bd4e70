"""Families of models: each goes the whole way in two formats, and nothing that can be measured of it is lost."""

import pytest
import transformers
from tiny_models import TINY, save_tiny

from qnb import Study
from qnb.speed import device_peaks

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
