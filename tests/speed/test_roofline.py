"""Derived columns against a hand count, and what bounds a step by its shares."""

import math

import pytest

from qnb.speed.roofline import bound, derived

# ten batches of one request, four tokens each; a step of 2 ms
ROW = {"requests": 10, "new_tokens": 4, "total_s": 0.08, "batch_s": [0.008] * 9 + [0.010], "tpot_s": 0.002,
       "monitor": "nvml", "energy_j": 120.0, "energy_s": 2.0, "idle_power_w": 10.0, "bytes_per_step": 1e9,
       "peak_bytes_per_s": 1e12, "flops_by_type": {"float16": 6e10, "int8": 4e10}, "peak_flop_per_s": 1e14,
       "kernel_s_per_token": 0.0018, "peak_allocated_mib": 700.0, "peak_used_memory_mib": 900.0}  # fmt: skip


def test_derived_columns_are_those_of_a_hand_count():
    expected = {
        "throughput_rps": 125, "throughput_tps": 500, "seconds_per_request": 0.008, "batch_latency_s": 0.008,
        "latency_p50_s": 0.008, "latency_p95_s": 0.0091, "latency_p99_s": 0.00982,
        "batch_spread_pct": 25, "peak_memory_mib": 700, "energy_j_per_request": 12, "energy_j_per_token": 3,
        "energy_above_idle_j_per_request": 10, "energy_above_idle_j_per_token": 2.5, "flops_per_step": 1e11,
        "mbu_pct": 50, "mfu_pct": 50, "gpu_busy_pct": 90,
    }  # fmt: skip
    values = derived(ROW)
    assert values.pop("bound") == "bandwidth" and values == pytest.approx(expected)


def test_what_is_missing_leaves_its_columns_empty():
    missing = derived({"batch_size": 2, "note": "cannot run"})
    assert set(missing) == set(derived(ROW)) and set(missing.values()) == {None}
    as_in_a_frame = derived(ROW | {"energy_j": math.nan, "flops_by_type": math.nan, "kernel_s_per_token": math.nan})
    assert as_in_a_frame["energy_j_per_token"] is as_in_a_frame["mfu_pct"] is as_in_a_frame["gpu_busy_pct"] is None
    assert as_in_a_frame["bound"] == "bandwidth"
    # the reading of a whole GPU counts other processes: it stands for no allocator's
    for monitor, memory_mib in (("nvml", None), ("process", 900)):
        assert derived(ROW | {"monitor": monitor, "peak_allocated_mib": None})["peak_memory_mib"] == memory_mib


@pytest.mark.parametrize(
    ("shares_pct", "name"),
    [
        ((20, 10, 10), "launch"),
        ((90, 50, 0.1), "bandwidth"),
        ((90, 25, 25), "bandwidth"),  # half the bandwidth, half the arithmetic
        ((90, 25, 26), "compute"),
        ((90, 10, 10), "kernel_inefficiency"),
        ((None, 67, None), "bandwidth"),
        ((None, 10, 10), None),  # far from every peak, and nothing traced
        ((90, None, 60), None),
    ],
)
def test_what_bounds_a_step_is_named(shares_pct, name):
    assert bound(dict(zip(("gpu_busy_pct", "mbu_pct", "mfu_pct"), shares_pct, strict=True))) == name
