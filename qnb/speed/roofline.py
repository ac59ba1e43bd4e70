"""Derive from a timed row what is not stored: throughput, energy, utilization, and what a decode step waits for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np

LAUNCH_BOUND_PCT = 75.0  # kernels that run for less than this share of a step leave it waiting for launches
NEAR_PEAK_PCT = 50.0  # a peak is named where bandwidth and arithmetic together explain this share of a step


def derived(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that follow from one pass's row, by name; None where a part is missing.

    ``seconds_per_request`` is the paper's "average latency". A request waits for its whole batch:
    ``batch_latency_s``. ``mbu_pct`` and ``mfu_pct`` hold the step's least bytes and operations against the device's
    measured peaks. ``peak_memory_mib`` of a GPU is its allocator's, which counts no other process.
    """
    requests, new_tokens, total_s = _numbers(row, "requests", "new_tokens", "total_s")
    energy_j, energy_s, idle_power_w = _numbers(row, "energy_j", "energy_s", "idle_power_w")
    step_s, bytes_per_step, kernel_s = _numbers(row, "tpot_s", "bytes_per_step", "kernel_s_per_token")
    peak_bytes_per_s, peak_flop_per_s = _numbers(row, "peak_bytes_per_s", "peak_flop_per_s")
    memory = "peak_used_memory_mib" if row.get("monitor") == "process" else "peak_allocated_mib"
    flops_by_type, batch_s = row.get("flops_by_type"), row.get("batch_s")
    batch_s = batch_s if isinstance(batch_s, list | tuple) else [math.nan]
    flops = sum(flops_by_type.values()) if isinstance(flops_by_type, Mapping) else math.nan
    above_idle_j = energy_j - idle_power_w * energy_s
    values = {
        "throughput_rps": requests / total_s,
        "throughput_tps": requests * new_tokens / total_s,
        "seconds_per_request": total_s / requests,
        "batch_latency_s": median(batch_s),
        **{f"latency_p{share}_s": float(np.percentile(batch_s, share)) for share in (50, 95, 99)},
        "batch_spread_pct": 100 * (max(batch_s) / min(batch_s) - 1) if len(batch_s) > 1 else math.nan,
        "peak_memory_mib": _numbers(row, memory)[0],
        "energy_j_per_request": energy_j / requests,
        "energy_j_per_token": energy_j / (requests * new_tokens),
        "energy_above_idle_j_per_request": above_idle_j / requests,
        "energy_above_idle_j_per_token": above_idle_j / (requests * new_tokens),
        "flops_per_step": flops,
        "mbu_pct": 100 * bytes_per_step / step_s / peak_bytes_per_s,
        "mfu_pct": 100 * flops / step_s / peak_flop_per_s,
        "gpu_busy_pct": 100 * kernel_s / step_s,
    }
    columns = {name: None if math.isnan(value) else value for name, value in values.items()}
    return {**columns, "bound": bound(columns)}


def bound(row: Mapping[str, Any]) -> str | None:
    """Name what bounds a row's decode step, from its shares of the peaks; None where that cannot be told.

    - ``"launch"``: kernels ran for less than three quarters of it. The rest is Python launching them.
    - ``"bandwidth"`` or ``"compute"``: the higher of MBU and MFU, where both together make half of the step.
    - ``"kernel_inefficiency"``: neither. The kernels do more than the least work, or do it slowly. This is told only
      where kernels were traced.
    """
    gpu_busy_pct, mbu_pct, mfu_pct = row["gpu_busy_pct"], row["mbu_pct"], row["mfu_pct"]
    if mbu_pct is None:
        return None
    if gpu_busy_pct is not None and gpu_busy_pct < LAUNCH_BOUND_PCT:
        return "launch"
    if mbu_pct + (mfu_pct or 0.0) >= NEAR_PEAK_PCT:
        return "compute" if mfu_pct is not None and mfu_pct > mbu_pct else "bandwidth"
    return "kernel_inefficiency" if gpu_busy_pct is not None else None


def _numbers(row: Mapping[str, Any], *names: str) -> list[float]:
    """Return values of a row, NaN where one is missing: what is computed from it is then missing too."""
    return [math.nan if row.get(name) is None else row[name] for name in names]
