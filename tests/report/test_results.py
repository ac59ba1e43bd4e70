"""A ledger becomes frames: medians over passes, one order, the newest workload."""

import pytest

from qnb.ledger import Ledger
from qnb.report.results import BESIDE, SPEED, Results


def timed(precision="bf16", total_s=1.0, repeat=0, day=1, **fields):
    """Return a pass; one without a time is an engine that cannot run."""
    row = {"stage": "perf", "setting": "bs1", "precision": precision, "engine": "eager", "repeat": repeat,
           "fingerprint": "f", "batch_size": 1, "measured_at": f"2026-01-0{day}", "requests": 4, "new_tokens": 2,
           "total_s": total_s, "flags": []}  # fmt: skip
    return {**row, **({"batch_s": [total_s / 4] * 4, "tpot_s": total_s / 8} if total_s else {}), **fields}


def read(folder, *rows):
    ledger = Ledger(folder)
    for row in rows:
        ledger.append(row)
    return Results.read(ledger)


def test_passes_are_reduced_to_medians_with_their_range_and_all_flags(tmp_path):
    """4 requests in 1, 2 and 4 s; kernels, 1 of the 2 ms of each token, were traced in the first pass alone."""
    peaks = {"bytes_per_step": 1.0, "peak_bytes_per_s": 8.0}
    (row,) = read(
        tmp_path,
        timed(total_s=1.0, flags=["throttled"], kernel_s_per_token=0.125, **peaks),
        timed(total_s=2.0, repeat=1, flags=["cpu_shared"], **peaks),
        timed(total_s=4.0, repeat=2, flags=["throttled"], **peaks),
    ).bs1.to_dict("records")
    assert (row["throughput_rps"], row["throughput_spread_pct"], row["passes"]) == (2, 300, 3)
    assert row["flags"] == ["throttled", "cpu_shared"]
    assert (row["gpu_busy_pct"], row["mbu_pct"], row["bound"]) == (50, 50, "launch")  # of the median token, 250 ms


def test_percentiles_of_batch_latency_are_medians_over_passes(tmp_path):
    """Batches of 1 to 5 s, and a pass of twice as many seconds: 95 % of the way is 4.8 and 9.6 s."""
    seconds = [5.0, 1.0, 2.0, 4.0, 3.0]
    study = read(tmp_path, timed(batch_s=seconds), timed(repeat=1, batch_s=[2 * each for each in seconds]))
    (row,) = study.bs1.to_dict("records")
    assert (row["latency_p50_s"], row["batch_latency_s"]) == (4.5, 4.5)
    assert (row["latency_p95_s"], row["latency_p99_s"]) == pytest.approx((7.2, 7.44))


def test_formats_stand_in_one_order_and_engines_that_cannot_run_among_the_passes(tmp_path):
    study = read(
        tmp_path,
        timed("nf4"),
        timed("bf16", engine="cuda_graph"),
        timed("int8", None, engine="cuda_graph", note="cannot be captured"),
        timed("bf16"),
        {"stage": "perf.failed", "precision": "fp32", "setting": "bs1", "reason": "out of memory"},
    )
    names = list(zip(study.bs1.precision, study.bs1.engine, strict=True))
    assert names == [("bf16", "eager"), ("bf16", "cuda_graph"), ("nf4", "eager")]
    assert study.passes.precision.tolist() == ["bf16", "bf16", "int8", "nf4"]
    assert [row["reason"] for row in study.failures] == ["out of memory"] and study.precisions == ["bf16", "nf4"]


def test_only_the_newest_workload_is_shown_and_no_pass_of_an_earlier_run(tmp_path):
    study = read(tmp_path, timed(fingerprint="old"), timed(total_s=3.0, repeat=1), timed(total_s=2.0, day=2))
    assert study.passes.total_s.tolist() == [2.0]
    assert read(tmp_path, timed(total_s=5.0, repeat=1, day=3)).passes.total_s.tolist() == [2.0, 5.0]


def test_every_frame_of_speeds_has_all_columns(tmp_path, study):
    for each in (Results.read(Ledger(tmp_path)), study):
        assert all({*SPEED, *BESIDE} <= set(frame) for frame in (each.bs1, each.passes, each.sweep, each.speed))


def test_bits_per_weight_are_of_all_weights_and_the_quantized_share_stands_beside(tmp_path):
    row = {"stage": "quantize", "fingerprint": "f", "parameters": 100, "embedding_bytes": 40, "linear_bytes": 150,
           "other_bytes": 10, "quantized_parameters": 0, "quantized_bytes": 0}  # fmt: skip
    nf4 = {"precision": "nf4", "linear_bytes": 150 - 20 + 6, "quantized_parameters": 10, "quantized_bytes": 6}
    checkpoints = read(tmp_path, {**row, "precision": "bf16"}, {**row, **nf4}).checkpoints
    assert checkpoints.bits_per_weight.tolist() == [16, 8 * 186 / 100]
    assert checkpoints.quantized_pct.tolist() == [0, 10]
    assert checkpoints.bits_per_quantized_weight.fillna(0).tolist() == [0, 4.8]
    assert checkpoints.weights_mib.tolist() == [200 / 2**20, 186 / 2**20]
