"""What a decode step waits for, from three shares of its time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

# of a decode step the GPU's own part, and what its least work would take; each by the columns whose ratio it is
SHARES = {
    "gpu_busy_pct": ("kernel_s_per_token", "tpot_s"),
    "mbu_pct": ("achieved_bytes_per_s", "limit_bytes_per_s"),
    "mfu_pct": ("achieved_flop_per_s", "limit_flop_per_s"),
}
BUSY = 0.75  # a decode step whose kernels ran for less than this share of it waited for launches
NEAR = 0.5  # a roof is named where what both ask for explains this share of a step


def bound(kernels: float | None, bandwidth: float | None, compute: float | None) -> str | None:
    """Name what bounds a decode step; None where that cannot be told.

    ``"launch"``: its kernels ran for less than three quarters of it. Else there are two roofs, the bytes it must move
    against a copy's and its operations against a large product's: the nearer, ``"bandwidth"`` or ``"compute"``, where
    both together explain half of the step. Where they do not, ``"kernels"``: what these do beyond the least work, or
    how they do it. Where they cannot be timed, as on a CPU, that is not told.

    Parameters
    ----------
    kernels
        The share of the step in which kernels ran, None where they were not traced.
    bandwidth, compute
        The shares that reading, and computing, would take at the device's measured limits; None where not known.
    """
    if bandwidth is None:
        return None
    if kernels is not None and kernels < BUSY:
        return "launch"
    if bandwidth + (compute or 0.0) >= NEAR:
        return "compute" if compute is not None and compute > bandwidth else "bandwidth"
    return "kernels" if kernels is not None else None


def shares(row: Mapping[str, Any]) -> list[float | None]:
    """Return the shares that `bound` takes, from the columns of a performance row; None where not measured."""
    pairs = [(row.get(done), row.get(limit)) for done, limit in SHARES.values()]
    return [done / limit if pd.notna(done) and pd.notna(limit) and limit else None for done, limit in pairs]
