"""What a budget of minutes allows of the speed stages: requests, new tokens, largest batches and a sweep.

Costs are estimated from the device's peaks, and from what the first passes at batch size 1 took.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tqdm.auto import tqdm

from qnb.budget import Clock
from qnb.ledger import Row
from qnb.precision import Precision

if TYPE_CHECKING:
    from qnb.session import Session
    from qnb.speed.device_peaks import DevicePeaks
    from qnb.speed.passes import Series

PASS_S, LEAST_REQUESTS = 2.0, 3  # that a pass at batch size 1 fills, if no launch is waited for; at least so many
LEAST_NEW_TOKENS = 25  # of a large batch
BATCHES_RUN = 6  # largest batches' times that a search and a timing take, or a size of a sweep
REACHED_SHARE = 0.6  # of the device's peak, in large batches


class Shape(NamedTuple):
    """The size of a workload."""

    requests: int
    prompt_tokens: int
    new_tokens: int


def fewer_requests(session: Session, peaks: DevicePeaks, most: Shape, left_s: float) -> Shape:
    """Return a workload for batch size 1 with as many requests as fill a short pass; time left buys more passes."""
    if not peaks.copy_bytes_per_s:
        return most
    request_s = most.new_tokens * session.source.weights_bytes / peaks.copy_bytes_per_s
    return most._replace(requests=min(most.requests, max(LEAST_REQUESTS, math.ceil(PASS_S / request_s))))


def fewer_new_tokens(session: Session, peaks: DevicePeaks, most: Shape, left_s: float) -> Shape:
    """Return a workload for the largest batch, all requests of it, with as many new tokens as the time allows."""
    shape, engines = most, 2 if session.device.kind == "cuda" else 1
    while shape.new_tokens // 2 >= LEAST_NEW_TOKENS:
        if engines * sum(search_s(session, each, peaks, shape) for each in session.precisions) <= left_s:
            break
        shape = shape._replace(new_tokens=shape.new_tokens // 2)
    return shape


def search_s(session: Session, precision: Precision, peaks: DevicePeaks, shape: Shape) -> float:
    """Return about how long a format takes to find its largest batch and to time it, with one engine.

    Large batches are bound by arithmetic. A token takes about as many operations as 16-bit weights have bytes.
    """
    rate = peaks.matmul_flop_per_s.get(session.pinned(precision).compute_dtype, math.inf)
    flops = session.source.weights_bytes * shape.requests * (shape.prompt_tokens + shape.new_tokens)
    return BATCHES_RUN * flops / rate / REACHED_SHARE


def largest_batches(all_series: Sequence[Series], cap: int, clock: Clock) -> Iterator[Series]:
    """Yield the series whose largest batch there is time to find and to time; name the others.

    Every format comes with one engine, before those that take longest come with another.
    """
    engines = list(dict.fromkeys(each.engine for each in all_series))
    planned = []
    for each in all_series:
        shape, row = Shape(cap, len(each.workload.longest), each.workload.new_tokens), _first_pass(each)
        beside_s = row["pass_s"] - row["total_s"] if row else 0.0  # warming up and compiling
        cost_s = search_s(each.session, each.precision, each.peaks, shape) + 2 * beside_s
        planned.append((cost_s * (1 + engines.index(each.engine)), cost_s, each))
    timing_s, left_out = 0.0, []
    for _, cost_s, each in sorted(planned, key=lambda plan: plan[0]):
        if timing_s + cost_s <= clock.left_s or each.session.decided(each.batch_key):
            timing_s += cost_s / 2
            yield each
        else:
            left_out.append(each)
    _name("largest batch", left_out)


def affordable_sweep(swept: Sequence[Series], left_s: float) -> list[Series]:
    """Return the sizes of those formats and engines that can be swept in the time left, the fastest first."""
    costs_s: dict[tuple[str, str], float] = defaultdict(float)
    for each in swept:
        row = None if each.session.ledger.find(each.key) else _first_pass(each)
        costs_s[each.name] += BATCHES_RUN * row["total_s"] / row["requests"] if row else 0.0
    affordable = set()
    for name in sorted(costs_s, key=lambda name: costs_s[name]):
        left_s -= costs_s[name]
        affordable |= {name} if left_s >= 0 or not costs_s[name] else set()
    _name("sweep", [each for each in swept if each.name not in affordable])
    return [each for each in swept if each.name in affordable]


def _first_pass(series: Series) -> Row | None:
    """Return the first pass of a format and engine at batch size 1, if it was timed."""
    rows = (row for row in series.session.ledger.rows("perf") if row["setting"] == "bs1" and row["repeat"] == 0)
    return next((row for row in rows if (row["precision"], row["engine"]) == series.name and row.get("total_s")), None)


def _name(what: str, left_out: Sequence[Series]) -> None:
    """Say what there is no time for."""
    if left_out:
        names = ", ".join(dict.fromkeys(" with ".join(each.name) for each in left_out))
        minutes = left_out[0].session.minutes
        tqdm.write(f"no {what} of {names}: {minutes:g} minutes do not suffice; give more to add it")
