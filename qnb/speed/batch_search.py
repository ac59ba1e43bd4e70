"""The largest batch that fits, and what a batch size costs and gives.

A batch fits when torch's allocator can serve it, and the allocator counts what it *reserved*: whole segments of 2 or
20 MiB or more, also where a live tensor holds only a part of one. So the line through two small probes is fitted to
the peak it reserved, no flatter than that of the live tensors, and meets the limit where the batch stops fitting. Past
that point the allocator gives back the segments that are wholly free and tries again; how far that carries is not on
any line. It never carries to where the live tensors alone would fill the memory: that line is the ceiling. A probe is
a real run, near the limit two: a batch that fits only into memory that nothing has used yet is none to work with. No
line is believed.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from math import ceil, inf, sqrt
from multiprocessing import connection, get_context, parent_process
from time import perf_counter
from typing import Any

from qnb.errors import InputError

# torch's own class, the driver's text, and cuBLAS's: the three names of one event
_OUT_OF_MEMORY = ("out of memory", "cublas_status_alloc_failed", "cublas_status_not_initialized")
OUT_OF_MEMORY, DIED = "out of memory", "its process died"
GRAIN_MIB = 20  # of a reading: the segment torch reserves for a tensor of 1 to 10 MiB
# Steps past the line's end, in tolerances: segments given back carry up to some 4 % further, and three close in on it.
_BEYOND = (1.0, 2.0, 1.5, 1.0)
# Where a line was too hopeful, the next batch is less by one in so many of what failed or, if nearer, of what is open.
_BACK, _BACK_OPEN = 10, 3
FAR = 5  # times the largest batch tried: towards what a line foresees beyond, half the way is gone first
FRAGMENTED = 1.5  # live tensors leave room for so many times the rows: most of what is reserved can be given back


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that device memory ran out, or came of one that does, as a recording's end may."""
    import torch

    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if any(text in str(error).lower() for text in _OUT_OF_MEMORY):
        return True
    return error.__context__ is not None and is_out_of_memory(error.__context__)


@dataclass(frozen=True, slots=True)
class Probe:
    """One trial of a batch: whether it fitted, near a GPU's limit twice, and what was read."""

    batch_size: int
    fits: bool
    memory_mib: float | None = None  # what the limit is for: the allocator's peak reserved, or the process's growth
    live_mib: float | None = None  # the tensors' own peak; less than this can never do
    squeezed: bool = False  # the allocator gave cached memory back to go on, so `memory_mib` says only that it fitted
    idle_mib: float = 0.0  # live before the run: the weights
    room_mib: float | None = None  # all there was for the run, what was held included
    took_s: float | None = None  # for both where it ran twice
    ended: str = ""  # why it did not run: out of memory, or its process died


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest batch found, and how."""

    batch_size: int
    limit_mib: float
    capped: bool  # the cap, not the memory, ended the search
    probes: tuple[Probe, ...]

    @property
    def search_gap_pct(self) -> float:
        """By how many percent the true maximum may be larger.

        It is taken to be below the smallest batch that did not fit, though one above may fit by the pieces of memory
        that happen to be free, and no larger than where live tensors alone, as they grew between the two largest
        batches that fitted, would fill the memory.
        """
        if self.capped:
            return 0.0
        bad = min((probe.batch_size for probe in self.probes if not probe.fits), default=inf)
        ceiling = _meets(_fitting(self.probes), self.limit_mib, "live_mib")
        return 100 * max(0.0, min(bad - 1, ceiling) / self.batch_size - 1)


def largest(
    try_batch: Callable[[int], Probe],
    limit_mib: float,
    cap: int,
    cliff: int = 0,
    tolerance: float = 0.01,
    most_probes: int = 6,
) -> Largest:
    """Find the largest batch size in 1..`cap` that fits.

    Parameters
    ----------
    try_batch
        Runs one batch, leaves memory as it found it, and says what it took.
    limit_mib
        The memory there is; a probe that finds less room than that lowers it.
    cap
        The largest batch worth having, such as the number of requests.
    cliff
        The last batch size before something other than memory is expected to fail; tried after a probe that died.
    tolerance
        The search ends when the true maximum can be larger than what is found by no more than this share.
    most_probes
        The search ends after so many probes with the largest batch that did fit; `Largest.search_gap_pct` says how much is
        left open.

    Raises
    ------
    InputError
        `cap` is below 1.
    MemoryError
        Not even one row fits.
    RuntimeError
        One row ends its process.
    """
    if cap < 1:
        raise InputError(f"the largest batch to try is {cap}; give at least 1")
    probes = [try_batch(1)]
    if probes[0].ended == DIED:
        raise RuntimeError(f"one request did not run: {DIED}")
    limit_mib = min(limit_mib, probes[0].room_mib or limit_mib)
    if not probes[0].fits:
        took = probes[0].memory_mib
        needs = f"takes {took:,.0f} MiB" if took is not None else "takes more than there is"
        raise MemoryError(
            f"one request {needs} where {limit_mib:,.0f} MiB are allowed; shorten the prompts, ask for fewer new "
            "tokens, or raise the limit"
        )
    good, bad = 1, cap + 1
    while bad - 1 - good > int(good * tolerance) and len(probes) < most_probes:
        aim = _next(probes, limit_mib, good, bad, tolerance, cliff)
        size = max(good + 1, min(aim, bad - 1))
        probe = try_batch(size if aim in (cap, cliff) else _even(size, good, bad, tolerance))
        probes.append(probe)
        limit_mib = min(limit_mib, probe.room_mib or limit_mib)
        good = max(good, probe.batch_size) if probe.fits else good
        bad = bad if probe.fits else min(bad, probe.batch_size)
    return Largest(good, limit_mib, good == cap, tuple(probes))


def smaller(batch_size: int, ran: Iterable[int], tolerance: float = 0.01) -> int:
    """Return what to time where `batch_size`, 2 or more, ran in the search and not again: less memory may be free.

    An even number that is less by the tolerance or a little more, or what `ran` in the search in between.
    """
    less = batch_size - max(1, int(batch_size * tolerance))
    even = max(1, less - less % _grain(less, tolerance))
    return max((size for size in ran if even <= size < batch_size), default=even)


def _next(probes: Sequence[Probe], limit_mib: float, good: int, bad: int, tolerance: float, cliff: int) -> int:
    """Choose the next batch size; the caller keeps it strictly inside the bracket."""
    fits = _fitting(probes)
    clean = [probe for probe in fits if not probe.squeezed and probe.memory_mib is not None]
    failed = [probe for probe in probes if not probe.fits]
    middle, closing = (good + bad) // 2, good + int(good * tolerance) + 1  # what does not fit there ends the search
    if probes[-1].ended == DIED and good < cliff < bad:
        return cliff
    if failed and good == cliff:
        return closing
    if len(probes) == 1:
        return _second(probes[0], limit_mib, bad - 1)
    ceiling = _meets(fits, limit_mib, "live_mib")
    aim = _meets(clean, limit_mib, "memory_mib", "live_mib") if len(clean) > 1 else 0.0
    if FRAGMENTED * aim < ceiling < inf:  # a line says little here: halve the ratio between what fits and what cannot
        return int(sqrt(max(good, aim) * min(bad, ceiling)))
    if not aim:
        return middle if failed else 4 * good
    if not failed and min(aim, bad) > FAR * good:  # so far ahead a line may miss by much: half the way first
        return int(min(aim, bad) / 2)
    stride = max(int(aim * tolerance), 1)
    if closing <= aim < bad:
        return int(min(aim, bad / (1 + tolerance))) if failed else int(aim)  # what fits there ends the search as well
    if aim >= bad:  # the line was too hopeful, or reaches beyond the cap
        back = max(stride, min(bad // _BACK, (bad - good) // _BACK_OPEN))
        return max(middle, bad - back) if failed else bad - 1
    beyond = sum(probe.batch_size * (1 + tolerance) >= aim for probe in fits)  # the line ends here
    further = good + int(stride * _BEYOND[min(beyond, 3)]) + 1
    return min(middle, further) if failed else further


def _fitting(probes: Sequence[Probe]) -> list[Probe]:
    """Return the probes that fitted, the largest last."""
    return sorted((probe for probe in probes if probe.fits), key=lambda probe: probe.batch_size)


def _even(batch_size: int, good: int, bad: int, tolerance: float) -> int:
    """Round down to a multiple of the largest power of two within the tolerance that takes nothing from the probe.

    Tensors of such batches fill whole segments, and segments given back serve the next one: by the allocator's rules
    they fit up to some 3 % beyond the first odd batch that does not. What is above `good`, or what would end the
    search if it fitted, stays so.
    """
    ending = ceil((bad - 1) / (1 + tolerance))
    least = ending if batch_size >= ending else good + 1
    grain = _grain(batch_size, tolerance)
    while batch_size - batch_size % grain < least:
        grain //= 2
    return batch_size - batch_size % grain


def _grain(batch_size: int, tolerance: float) -> int:
    return int(2 ** max(0, int(batch_size * tolerance).bit_length() - 1))


def _second(first: Probe, limit_mib: float, cap: int) -> int:
    """Choose the second batch size from one row's memory: half of what fits by it, or a third by its live tensors.

    What one row adds to the idle memory holds everything a run needs once, so it is at least what a further row adds;
    of live tensors it is little more, and what is reserved adds to that with the rows.
    """
    assert first.memory_mib is not None
    room_mib = limit_mib - first.memory_mib
    row_mib, live_mib = first.memory_mib - first.idle_mib, (first.live_mib or 0) - first.idle_mib
    if row_mib * (cap - 1) <= room_mib:
        return cap
    return max(8, int(1 + max(room_mib / row_mib / 2, room_mib / live_mib / 3 if live_mib > 0 else 0)))


def _meets(probes: Sequence[Probe], limit_mib: float, *readings: str) -> float:
    """Return where the line through the two largest probes meets the limit.

    The line goes through the first reading and rises as fast as any of them: what is reserved may stay the same for a
    while, until tensors fill the gaps in it, and then rises with them.
    """
    known = [probe for probe in probes if getattr(probe, readings[0]) is not None]
    if len(known) < 2:
        return inf
    low, high = known[-2:]
    read = [(getattr(low, name), getattr(high, name)) for name in readings]
    rise_mib = max(after - before for before, after in read if before is not None and after is not None)
    if rise_mib <= 0:  # a reading coarser than a row
        return 8.0 * high.batch_size
    return high.batch_size + (limit_mib - read[0][1]) * (high.batch_size - low.batch_size) / rise_mib


class Apart:
    """A `try_batch` in a process of its own, for batches that may end it; a new process takes the next batch.

    Running out of memory kills nothing. What does: bitsandbytes leaves by ``exit(1)`` when a launch fails, and its
    INT8 kernels count a layer's outputs in 32 bits (csrc/cuda/int8.cu), so 2**31 of them, which fit a large GPU, end
    the process; and after an illegal access a CUDA context never works again.

    Parameters
    ----------
    begin
        Called once in the new process, with `arguments`; returns the `try_batch`. Both must be picklable.
    """

    def __init__(self, begin: Callable[..., Callable[[int], Probe]], *arguments: Any) -> None:
        self._begin = begin
        self._arguments = arguments
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, batch_size: int) -> Probe:
        """Run one batch there; what it raises is raised here."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, get_context("spawn"), _prepare, (self._begin, self._arguments))
        started = perf_counter()
        try:
            with _no_main():  # the process is started by the first batch
                answer = self._pool.submit(_serve, batch_size)
            return answer.result()
        except BrokenProcessPool:
            self.close()
            return Probe(batch_size, False, took_s=perf_counter() - started, ended=DIED)

    def close(self) -> None:
        """End the process, and with it give back all its memory."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


@contextmanager
def _no_main() -> Iterator[None]:
    """Let a process start without running the caller's script again: a plain one would begin its study anew there."""
    main: dict[str, Any] = vars(sys.modules["__main__"])
    kept: dict[str, Any] = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.pop("__file__", None)
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(kept)


_try_here: Callable[[], Callable[[int], Probe]]  # in an `Apart`'s process alone


def _prepare(begin: Callable[..., Callable[[int], Probe]], arguments: tuple[Any, ...]) -> None:
    """Keep what to begin with until the first batch: an error then is raised to the caller, here it would be lost."""
    global _try_here
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _try_here = cache(partial(begin, *arguments))


def _end_with_parent() -> None:
    """Give the device's memory back where the process that asked was killed: it can no longer say so."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _serve(batch_size: int) -> Probe:
    try:
        return _try_here()(batch_size)
    except RuntimeError:
        if not _works():
            os._exit(1)
        raise


def _works() -> bool:
    """Return whether this process's CUDA context, if it has one, still answers."""
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def sweep(largest_batch: int) -> tuple[int, ...]:
    """Return the batch sizes 1, 2, 4 ... and `largest_batch`.

    Raises
    ------
    InputError
        `largest_batch` is below 1.
    """
    if largest_batch < 1:
        raise InputError(f"the largest batch of a sweep is {largest_batch}; give at least 1")
    return (*(2**power for power in range((largest_batch - 1).bit_length())), largest_batch)


def knee(batch_sizes: Sequence[int], throughput_rps: Sequence[float], batch_latency_s: Sequence[float]) -> int | None:
    """Return the batch size with the most throughput a second of latency, the smallest of equals; None at the largest.

    This is the knee after Kleinrock ("Power and deterministic rules of thumb for probabilistic problems in computer
    communications", ICC 1979): below it a larger batch raises throughput by a greater share than latency, above it
    latency by the greater one. Where a batch takes a fixed time and a time a row, it is where the two are equal. Where
    the largest has the most the knee was not come to.

    Raises
    ------
    InputError
        There is no batch size, or not a throughput and a latency for each.
    """
    if not len(batch_sizes) == len(throughput_rps) == len(batch_latency_s) or not batch_sizes:
        raise InputError(
            f"{len(batch_sizes)} batch sizes, {len(throughput_rps)} throughputs and {len(batch_latency_s)} latencies; "
            "give one of each for at least one batch size"
        )
    rows = sorted(zip(batch_sizes, throughput_rps, batch_latency_s, strict=True))
    most = max(rows, key=lambda row: row[1] / row[2])
    return most[0] if most[0] < rows[-1][0] else None


@dataclass(frozen=True, slots=True)
class Line:
    """Memory as a line in the batch size, for rows of one length."""

    fixed_mib: float
    row_mib: float
    row_tokens: int  # prompt and new tokens of the rows it was fitted to
    rows: int = 0  # of the larger batch it was fitted to
    rise_mib: float = inf  # between the two

    def largest(self, tokens: int, limit_mib: float) -> int:
        """Return how many rows of `tokens` tokens fit, a row's memory being taken as proportional to its tokens."""
        return int((limit_mib - self.fixed_mib) / (self.row_mib * tokens / self.row_tokens))

    def estimate_error_pct(self, limit_mib: float) -> float:
        """Return by how many percent `largest` may be wrong for its readings' grain; 0 where one is at the limit."""
        beyond = 1 - self.rows * self.row_mib / (limit_mib - self.fixed_mib)
        return 100 * abs(beyond) * GRAIN_MIB / self.rise_mib


def fit(probes: Sequence[Probe], row_tokens: int) -> Line:
    """Return the line through the two largest probes whose reading is the run's own.

    Raises
    ------
    InputError
        There are not two such probes, or they differ by no more than a reading's grain.
    """
    read = [(p.batch_size, p.memory_mib) for p in probes if p.fits and not p.squeezed and p.memory_mib is not None]
    if len(read) > 1:
        (low, low_mib), (high, high_mib) = sorted(read)[-2:]
        rise_mib = high_mib - low_mib
        if rise_mib > GRAIN_MIB:
            row_mib = rise_mib / (high - low)
            return Line(high_mib - row_mib * high, row_mib, row_tokens, high, rise_mib)
    raise InputError(
        f"no line: {len(read)} of {len(probes)} probes tell their own memory, and two must be over {GRAIN_MIB} MiB "
        "apart; search with a higher cap"
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """Requests cut into batches that fit: how many, how large, and how much of them is padding."""

    order: str
    examples: int
    longest_tokens: int  # of the prompts
    largest_batch: int  # of the longest prompt: the one size that every batch may have
    batches: int
    mean_batch: float
    padding_pct: float  # of the prompt tokens processed


def plans(prompt_tokens: Sequence[int], new_tokens: int, line: Line, limit_mib: float, bucket: int = 64) -> list[Plan]:
    """Cut requests into batches in three orders, each batch as large as its longest prompt admits.

    The number of requests does not enter the largest batch: it follows from the longest prompt. What the order
    changes is what the other batches can be. *unsorted* takes requests as they come; a batch's longest prompt is not
    known before, so all have the size that the longest of all admits. *bucketed* puts prompts of up to `bucket`,
    2 `bucket` ... tokens together, in batches that the bucket's longest admits. *sorted* goes from the longest down.

    Parameters
    ----------
    prompt_tokens
        Each prompt's length in tokens, in the order of arrival.
    new_tokens
        Asked of every request.
    line
        The memory of a batch.
    limit_mib
        The memory there is.
    bucket
        The width of a bucket in tokens.

    Raises
    ------
    InputError
        There is no prompt, `bucket` is below 1, or the longest prompt does not fit.
    """
    if not prompt_tokens or bucket < 1:
        raise InputError(f"{len(prompt_tokens)} prompts in buckets of {bucket} tokens; give at least one of each")
    longest = max(prompt_tokens)
    size = line.largest(longest + new_tokens, limit_mib)
    if size < 1:
        raise InputError(f"a prompt of {longest} tokens needs more than {limit_mib:,.0f} MiB; shorten it")
    buckets: dict[int, list[int]] = {}
    for tokens in prompt_tokens:
        buckets.setdefault(-(-tokens // bucket), []).append(tokens)

    def cut(rows: Sequence[int], widest: int | None = None) -> list[Sequence[int]]:
        made, at = [], 0
        while at < len(rows):
            made.append(rows[at : at + line.largest((widest or rows[at]) + new_tokens, limit_mib)])
            at += len(made[-1])
        return made

    orders = {
        "unsorted": cut(prompt_tokens, longest),
        "bucketed": [batch for _, rows in sorted(buckets.items()) for batch in cut(rows, max(rows))],
        "sorted": cut(sorted(prompt_tokens, reverse=True)),
    }
    return [_plan(order, batches, longest, size) for order, batches in orders.items()]


def _plan(order: str, batches: Sequence[Sequence[int]], longest: int, size: int) -> Plan:
    examples = sum(map(len, batches))
    padded = sum(len(batch) * max(batch) for batch in batches)
    padding_pct = 100 * (1 - sum(map(sum, batches)) / padded)
    return Plan(order, examples, longest, size, len(batches), examples / len(batches), padding_pct)
