"""The largest batch that fits.

Memory grows as a line in the batch size: weights and workspace, plus cache and activations for each row. Two small
probes find the line, the third goes near where it meets the limit, and the bracket between the largest batch that
fitted and the smallest that did not closes from there. A probe is a real run; nothing is taken on trust.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qnb.error import InputError

# torch's own class, the driver's text, and cuBLAS's: the three names of one event
_OUT_OF_MEMORY = ("out of memory", "cublas_status_alloc_failed", "cublas_status_not_initialized")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that device memory ran out."""
    import torch

    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


@dataclass(frozen=True, slots=True)
class Probe:
    """One trial: whether the batch fitted and the memory it took."""

    batch_size: int
    fits: bool
    memory_mib: float | None  # None where memory ran out before it could be read


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest batch found, and how."""

    batch_size: int
    limit_mib: float
    capped: bool  # the cap, not the memory, ended the search
    probes: tuple[Probe, ...]


def largest(
    try_batch: Callable[[int], float | None],
    limit_mib: float,
    cap: int,
    tolerance: float = 0.02,
    most_probes: int = 12,
) -> Largest:
    """Find the largest batch size in 1..`cap` whose memory stays within `limit_mib`.

    Parameters
    ----------
    try_batch
        Runs one batch and returns the memory it took in MiB, or None when memory ran out.
    limit_mib
        The memory there is.
    cap
        The largest batch worth having, such as the number of requests.
    tolerance
        The search ends when the bracket is narrower than this share of the batch that fits.
    most_probes
        The search ends after so many probes with the largest batch that did fit.

    Raises
    ------
    InputError
        `cap` is below 1, or not even one row fits.
    """
    if cap < 1:
        raise InputError(f"the largest batch to try is {cap}; give at least 1")
    probes: list[Probe] = []
    good, bad = 0, cap + 1

    def probe(batch_size: int) -> None:
        nonlocal good, bad
        memory_mib = try_batch(batch_size)
        fits = memory_mib is not None and memory_mib <= limit_mib
        probes.append(Probe(batch_size, fits, memory_mib))
        if fits:
            good = max(good, batch_size)
        else:
            bad = min(bad, batch_size)

    probe(1)
    if good == 0:
        needed = probes[0].memory_mib
        took = "more than there is" if needed is None else f"{needed:,.0f} MiB"
        raise InputError(
            f"one request takes {took} where {limit_mib:,.0f} MiB are allowed; shorten the prompts, "
            "ask for fewer new tokens, or raise the limit"
        )
    while bad - good > (step := max(1, int(good * tolerance))) and len(probes) < most_probes:
        probe(_next(probes, limit_mib, good, bad, step))
    return Largest(good, limit_mib, good == cap, tuple(probes))


def _next(probes: list[Probe], limit_mib: float, good: int, bad: int, step: int) -> int:
    """Choose the next batch size strictly inside the bracket."""
    known = sorted((p.batch_size, p.memory_mib) for p in probes if p.memory_mib is not None)
    if len(known) < 2:
        aim = min(8, (good + bad) // 2)
    else:
        (low, low_mib), (high, high_mib) = known[-2:]
        slope = (high_mib - low_mib) / (high - low)
        # a reading coarser than a row has no slope: double; two small probes are not trusted further than 64-fold
        aim = int(min(high + (limit_mib - high_mib) / slope, 64 * good)) if slope > 0 else 2 * good
        if aim <= good:  # the line ends here: one step up closes the bracket
            aim = good + step
        elif aim >= bad:  # nothing failed yet: the whole of what was asked; else the line is no help in the bracket
            aim = (good + bad) // 2 if any(not p.fits for p in probes) else bad - 1
    return max(good + 1, min(aim, bad - 1))
