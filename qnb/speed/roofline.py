"""Derive from a timed row what is not stored: throughput, energy, utilization, and what a decode step waits for."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

LAUNCH_BOUND_PCT = 75.0  # kernels that run for less than this share of a step leave it waiting for launches
NEAR_PEAK_PCT = 50.0  # a peak is named where bandwidth and arithmetic together explain this share of a step


def derived(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that follow from one pass's row, by name; None where a part is missing.

    ``seconds_per_request`` is the paper's "average latency". A request waits for its whole batch:
    ``batch_latency_s``. ``mbu_pct`` and ``mfu_pct`` hold the step's least bytes and operations against the device's
    measured peaks.
    """
    requests, total_s, step_s = (_number(row, name) for name in ("requests", "total_s", "tpot_s"))
    tokens = _product(requests, _number(row, "new_tokens"))
    energy_j = _number(row, "energy_j")
    idle_j = _product(_number(row, "idle_power_w"), _number(row, "energy_s"))
    above_idle_j = None if energy_j is None or idle_j is None else energy_j - idle_j
    flops_by_type = row.get("flops_by_type")
    flops = sum(flops_by_type.values()) if isinstance(flops_by_type, Mapping) and flops_by_type else None
    batch_s = row.get("batch_s")
    batch_s = batch_s if isinstance(batch_s, list | tuple) and batch_s else None
    values = {
        "throughput_rps": _ratio(requests, total_s),
        "throughput_tps": _ratio(tokens, total_s),
        "seconds_per_request": _ratio(total_s, requests),
        "batch_latency_s": median(batch_s) if batch_s else None,
        "batch_spread_pct": 100 * (max(batch_s) / min(batch_s) - 1) if batch_s and len(batch_s) > 1 else None,
        "peak_memory_mib": _number(row, _peak_column(row)),
        "energy_j_per_request": _ratio(energy_j, requests),
        "energy_j_per_token": _ratio(energy_j, tokens),
        "energy_above_idle_j_per_request": _ratio(above_idle_j, requests),
        "energy_above_idle_j_per_token": _ratio(above_idle_j, tokens),
        "flops_per_step": flops,
        "mbu_pct": _percent(_number(row, "bytes_per_step"), _product(step_s, _number(row, "peak_bytes_per_s"))),
        "mfu_pct": _percent(flops, _product(step_s, _number(row, "peak_flop_per_s"))),
        "gpu_busy_pct": _percent(_number(row, "kernel_s_per_token"), step_s),
    }
    return {**values, "bound": bound_of(values)}


def bound(gpu_busy_pct: float | None, mbu_pct: float | None, mfu_pct: float | None) -> str | None:
    """Name what bounds a decode step; None where that cannot be told.

    - ``"launch"``: kernels ran for less than three quarters of it. The rest is Python launching them.
    - ``"bandwidth"`` or ``"compute"``: the higher of MBU and MFU, where both together make half of the step.
    - ``"kernel_inefficiency"``: neither. The kernels do more than the least work, or do it slowly. This is told only
      where kernels were traced.
    """
    if mbu_pct is None:
        return None
    if gpu_busy_pct is not None and gpu_busy_pct < LAUNCH_BOUND_PCT:
        return "launch"
    if mbu_pct + (mfu_pct or 0.0) >= NEAR_PEAK_PCT:
        return "compute" if mfu_pct is not None and mfu_pct > mbu_pct else "bandwidth"
    return "kernel_inefficiency" if gpu_busy_pct is not None else None


def bound_of(row: Mapping[str, Any]) -> str | None:
    """Name what bounds a row's decode step, from its ``gpu_busy_pct``, ``mbu_pct`` and ``mfu_pct``."""
    return bound(*(_number(row, name) for name in ("gpu_busy_pct", "mbu_pct", "mfu_pct")))


def _peak_column(row: Mapping[str, Any]) -> str:
    """Return which peak is the row's: a GPU's is its allocator's, which counts no other process."""
    return "peak_used_memory_mib" if row.get("monitor") == "process" else "peak_allocated_mib"


def _number(row: Mapping[str, Any], name: str) -> float | None:
    """Return a value of `row`; None where it is missing or, as in a frame, NaN."""
    value = row.get(name)
    return None if value is None or value != value else value


def _product(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first * second


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _percent(part: float | None, whole: float | None) -> float | None:
    ratio = _ratio(part, whole)
    return None if ratio is None else 100 * ratio
