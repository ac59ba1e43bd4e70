"""A study remembers its model, chooses counts, and shows what was asked last."""

import pytest
import torch

from qnb import InputError, Study, study
from qnb.device import Device


def test_a_model_changed_in_place_is_noticed(source, tmp_path):
    import shutil
    from pathlib import Path

    local, output = tmp_path / "model", tmp_path / "study"
    shutil.copytree(source.path, local)
    assert Study(str(local), output=output).source.fingerprint == Study(str(local), output=output).source.fingerprint
    weights = next(Path(local).glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match="changed since"):
        _ = Study(str(local), output=output).source


def test_counts(tmp_path):
    made = Study("smollm2-135m", output=tmp_path)
    made.device = Device("cpu", "a machine", 1024, "emulated", "")
    assert made.count("limit", "auto") == study.AUTO["cpu"]["limit"] and made.count("limit", "7") == 7
    for wrong in (0, -1, "many", 1.5, True):
        with pytest.raises(InputError, match="limit"):
            made.count("limit", wrong)


def test_a_batch_that_runs_out_of_memory_when_timed_is_made_smaller(source, tmp_path, monkeypatch):
    """The search is believed at first; the timed pass fails above 30 rows, and what fitted is what is kept."""
    from qnb import batch, benchmark

    made = Study("smollm2-135m", "bf16", tmp_path)
    monkeypatch.setattr(made, "on", lambda precision, measure: measure(None, 0.0))
    monkeypatch.setattr(made, "_settle", lambda precision: None)
    monkeypatch.setattr(benchmark, "largest_batch", lambda *rest: batch.Largest(32, 100.0, True, ()))

    def run(network, workload, batch_size, engine, base_mib, **_):
        if batch_size > 30:
            raise torch.cuda.OutOfMemoryError("simulated")
        from qnb.monitor import Usage

        usage = Usage("process", 0, 1.0)
        return benchmark.Run(engine, batch_size, 32, 4, 2, 1.0, (1.0,), 1.0, 1.0, usage)

    monkeypatch.setattr(benchmark, "run", run)
    monkeypatch.setattr(benchmark, "measure_limits", lambda device: benchmark.Limits(1e9, {}, None))
    workload = made.workload("maxbatch", 32, 4, 2, "sample")
    (row,) = made.perf_maxbatch(workload, 32).to_dict("records")
    assert row["batch_size"] == 30 and not row["capped"]
    (found,) = made.frame("batch").to_dict("records")
    assert found["batch_size"] == 30
    assert [(probe["batch_size"], probe["fits"]) for probe in found["probes"]] == [(32, False), (31, False)]
