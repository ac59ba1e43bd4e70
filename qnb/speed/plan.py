"""Plan what a budget of minutes allows of the speed stages: requests, new tokens, largest batches and a sweep.

Costs are estimated from the device's peaks, and from what the first passes at batch size 1 took.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from qnb.ledger import Row
from qnb.precision import Precision

if TYPE_CHECKING:
    from qnb.session import Session
    from qnb.speed.device_peaks import DevicePeaks
    from qnb.speed.passes import Series

FIRST_PASS_SHARE = 0.35  # of the time left, for the requests of the first passes at batch size 1
LEAST_REQUESTS = 3
LEAST_NEW_TOKENS = {"bs1": 50, "maxbatch": 25}
BATCHES_RUN = 4  # batches' times that a search and a timing take, or a size of a sweep
REACHED_SHARE = 0.6  # of the device's peak, in large batches
# where nothing was timed: launching a token's kernels, and what a pass takes beside its requests, with compiling
LAUNCH_S, BESIDE_S = 0.03, {"eager": 10.0, "cuda_graph": 30.0}


class Shape(NamedTuple):
    """The size of a workload."""

    requests: int
    prompt_tokens: int
    new_tokens: int


def fewer_requests(session: Session, peaks: DevicePeaks, most: Shape, left_s: float) -> Shape:
    """Return a workload for batch size 1 with as many requests as first passes have time for; more passes follow.

    Where that is too few, each gets fewer new tokens.
    """
    if not peaks.copy_bytes_per_s:
        return most
    read_s = 2 * session.source.parameters / peaks.copy_bytes_per_s
    step_s = max(read_s, _launch_s(session)) + (read_s if session.device.kind == "cuda" else 0.0)  # of each engine
    affordable_tokens = FIRST_PASS_SHARE * left_s / (len(session.precisions) * step_s)
    new_tokens = most.new_tokens
    while LEAST_REQUESTS * new_tokens > affordable_tokens and new_tokens // 2 >= LEAST_NEW_TOKENS["bs1"]:
        new_tokens //= 2
    requests = min(most.requests, max(LEAST_REQUESTS, math.floor(affordable_tokens / new_tokens)))
    return most._replace(requests=requests, new_tokens=new_tokens)


def _launch_s(session: Session) -> float:
    """Return about how long launching a forward's kernels takes: as long as one short row took in notebook 02."""
    rows = [row for row in session.ledger.rows("batch_sensitivity") if row["device"] == session.device.name]
    times_s = [row["alone_s"] / row["n_items"] for row in rows if row["setting"] == "qnb" and row.get("alone_s")]
    return median(times_s) if times_s else LAUNCH_S


def fewer_new_tokens(session: Session, peaks: DevicePeaks, most: Shape, left_s: float) -> Shape:
    """Return a workload for the largest batch, all requests of it, with as many new tokens as the time allows."""
    shape, runs = most, BATCHES_RUN * (2 if session.device.kind == "cuda" else 1)  # of two engines
    while shape.new_tokens // 2 >= LEAST_NEW_TOKENS["maxbatch"]:
        if runs * sum(batch_s(session, each, peaks, shape) for each in session.precisions) <= left_s:
            break
        shape = shape._replace(new_tokens=shape.new_tokens // 2)
    return shape


def batch_s(session: Session, precision: Precision, peaks: DevicePeaks, shape: Shape) -> float:
    """Return about how long one large batch takes: it is bound by arithmetic, two operations a parameter and token."""
    rates, usual = peaks.matmul_flop_per_s, peaks.matmul_flop_per_s.get(session.half, math.inf)
    rate = rates.get(session.pinned(precision).compute_dtype, usual)
    tokens = shape.requests * (shape.prompt_tokens + shape.new_tokens)
    return 2 * session.source.parameters * tokens / rate / REACHED_SHARE


def is_affordable(series: Series, missing: Sequence[Series], left_s: float) -> bool:
    """Return whether there is time for a search and a timing, beside those of quicker series that are missing too.

    A captured step counts as if it took twice as long, so that all formats are timed with some engine first. Without
    a budget there is time for all, and nothing is estimated.
    """
    if math.isinf(left_s):
        return True
    costs_s = {each.name: 0.0 if each.why_unavailable() else batches_s(each, each.asked["cap"]) + 2 * _beside_s(each)
               for each in missing}  # fmt: skip

    def rank_s(each: Series) -> float:
        return costs_s[each.name] * (2 if each.engine == "cuda_graph" else 1)

    for each in sorted(missing, key=rank_s):
        if each.passes or each.is_late:
            continue
        if not each.is_unsearched:  # it is timed in any case
            left_s -= costs_s[each.name] / 2
        elif rank_s(each) < rank_s(series) and costs_s[each.name] <= left_s:
            left_s -= costs_s[each.name]
    return costs_s[series.name] <= left_s


def leave_out_late(swept: Sequence[Series], left_s: float) -> None:
    """Mark the batch sizes that cannot be swept in the time left as late; quick ones are chosen first."""
    if math.isinf(left_s):
        return
    late: set[tuple[str, str]] = set()
    for each in sorted(swept, key=_sweep_s):
        cost_s = _sweep_s(each)
        cost_s += _beside_s(each) if cost_s and each.size == 1 else 0.0  # the first one is loaded and compiled
        each.is_late = each.name in late or (cost_s > 0 and cost_s > left_s)
        if each.is_late:
            late.add(each.name)  # with all its larger sizes
        else:
            left_s -= cost_s


def _sweep_s(series: Series) -> float:
    """Return how long a size of a sweep takes: by arithmetic, or by the launches of a request if longer."""
    if series.session.counts(series.key) or series.why_unavailable():
        return 0.0
    row = _first_pass(series)
    request_s = row["total_s"] / row["requests"] if row else LAUNCH_S * series.workload.new_tokens
    return max(batches_s(series, series.size), BATCHES_RUN * request_s)


def batches_s(series: Series, batch_size: int) -> float:
    """Return how long a search and a timing of a format and engine take, or a size of a sweep, by arithmetic alone."""
    shape = Shape(batch_size, len(series.workload.longest), series.workload.new_tokens)
    return BATCHES_RUN * batch_s(series.session, series.precision, series.peaks, shape)


def _beside_s(series: Series) -> float:
    """Return how long a pass of a format and engine takes beside its requests, with compiling."""
    row = _first_pass(series)
    return max(0.0, row.get("pass_s", 0.0) - row["total_s"]) if row else BESIDE_S[series.engine]


def _first_pass(series: Series) -> Row | None:
    """Return the first pass of a format and engine at batch size 1, if it was timed."""
    rows = (row for row in series.session.ledger.rows("perf") if row["setting"] == "bs1" and row["repeat"] == 0)
    return next((row for row in rows if (row["precision"], row["engine"]) == series.name and row.get("total_s")), None)
