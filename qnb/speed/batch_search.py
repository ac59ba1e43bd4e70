"""Search the largest batch that fits in memory.

Every probe is a real run. A batch fits when torch's allocator can serve it, and the allocator counts what it
*reserved*: whole segments of 2 or 20 MiB or more, also where a live tensor holds only a part of one. The next probe is
where the line through the two largest probes meets the limit. A batch past that point may still fit, because the
allocator then gives back segments that are wholly free. No line predicts how many; live tensors set the upper bound.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from qnb.quantize.runtime import linear_layers

OUT_OF_MEMORY, WHEN_TIMED = "out of memory", "out of memory when timed"
TOLERANCE = 0.01  # the search ends when the true maximum can be larger by no more than this share
MAX_PROBES = 10


@dataclass(frozen=True, slots=True)
class Probe:
    """One trial of a batch: whether it fitted, and the memory it took."""

    batch_size: int
    fits: bool
    reserved_mib: float | None = None  # what the limit is for: the allocator's peak reserved, or the process's growth
    live_mib: float | None = None  # the tensors' own peak
    squeezed: bool = False  # the allocator gave cached memory back, so `reserved_mib` says only that the batch fitted
    idle_mib: float = 0.0  # live before the run: the weights
    room_mib: float | None = None  # free before the run, including what the process held
    ended: str = ""  # why it did not run: `OUT_OF_MEMORY` or `WHEN_TIMED`


TryBatch = Callable[[int], Probe]


@dataclass(frozen=True, slots=True)
class LargestBatch:
    """The largest batch that fitted, and the probes that found it."""

    batch_size: int
    limit_mib: float
    capped: bool  # the cap ended the search, not the memory
    probes: tuple[Probe, ...]

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Read a search back from its ledger row."""
        return cls(row["batch_size"], row["limit_mib"], row["capped"], tuple(Probe(**each) for each in row["probes"]))

    def smaller(self) -> Self:
        """Return a smaller batch to time, after this one fitted in the search but ran out of memory when it was timed.

        The batch must be 2 or more. It shrinks by 1 % at first, and by twice as much each further time, because
        another process may hold much of the memory.
        """
        times = sum(probe.ended == WHEN_TIMED for probe in self.probes)
        less = max(1, int(self.batch_size * min(0.5, TOLERANCE * 2**times)))
        probes = (*self.probes, Probe(self.batch_size, False, ended=WHEN_TIMED))
        return replace(self, batch_size=_round_down(self.batch_size - less), capped=False, probes=probes)


def find_largest_batch(try_batch: TryBatch, limit_mib: float, cap: int) -> LargestBatch:
    """Find the largest batch size in 1..`cap` that fits, with at most `MAX_PROBES` probes.

    Parameters
    ----------
    try_batch
        Runs one batch, leaves memory as it was, and reports what the batch took.
    limit_mib
        The memory allowed; a probe that finds less room lowers it.
    cap
        The largest batch worth having, such as the number of requests.

    Raises
    ------
    MemoryError
        Not even one request fits.
    """
    probes: list[Probe] = []
    fits, fails, size = 0, cap + 1, 1
    while fails - 1 - fits > int(TOLERANCE * fits) and len(probes) < MAX_PROBES:
        probe = try_batch(size)
        probes.append(probe)
        limit_mib = min(limit_mib, probe.room_mib or limit_mib)
        fits, fails = (size, fails) if probe.fits else (fits, size)
        if not fits:
            needs = f"one request takes more than the {limit_mib:,.0f} MiB that are allowed"
            raise MemoryError(f"{needs}; shorten the prompts, ask for fewer new tokens, or raise the limit")
        size = _next_batch_size(probes, limit_mib, fits, fails)
    return LargestBatch(fits, limit_mib, fits == cap, tuple(probes))


def _next_batch_size(probes: Sequence[Probe], limit_mib: float, fits: int, fails: int) -> int:
    """Choose a batch size above `fits`, the largest that fitted, and below `fails`, the smallest that did not."""
    weights = Probe(0, True, probes[0].idle_mib, probes[0].idle_mib)
    # 1) follow reserved memory to the limit
    size = _meets_limit([weights, *(probe for probe in probes if not probe.squeezed)], limit_mib, "reserved_mib")
    # 2) past that point, go a sixth of the way to where live tensors alone fill the memory
    ceiling = _meets_limit([weights, *probes], limit_mib, "live_mib")
    least = fits + int(TOLERANCE * fits) + 1  # the search ends if this fails
    size = int(max(size, least, fits + (ceiling - fits) / 6))
    # 3) stay in the bracket; nearer to its upper end, as a batch that does not fit fails early
    if size < fails:
        return max(fits + 1, _round_down(size))
    return fails - 1 if all(probe.fits for probe in probes) else (fits + 2 * fails) // 3


def _meets_limit(probes: Sequence[Probe], limit_mib: float, reading: str) -> float:
    """Return the batch size at which the line through the last two that fitted meets the limit; 0 without two."""
    readings = [(probe.batch_size, getattr(probe, reading)) for probe in probes if probe.fits]
    points = [(batch_size, mib) for batch_size, mib in readings if mib is not None]
    if len(points) < 2:
        return 0.0
    (low, low_mib), (high, high_mib) = points[-2:]
    if high_mib <= low_mib:  # a reading coarser than a row
        return 8.0 * high
    return high + (limit_mib - high_mib) * (high - low) / (high_mib - low_mib)


def _round_down(batch_size: int) -> int:
    """Round down to a multiple of the largest power of two within the tolerance.

    Tensors of such batches fill whole segments of the allocator, so that a freed segment can hold the next tensor.
    """
    return batch_size - batch_size % 2 ** max(0, int(TOLERANCE * batch_size).bit_length() - 1)


def sweep_sizes(largest: int) -> tuple[int, ...]:
    """Return the batch sizes 1, 2, 4 ... and `largest`."""
    return (*(2**power for power in range((largest - 1).bit_length())), largest)


def int32_rows(config: Any, prompt_tokens: int) -> int:
    """Return how many prompts a model's widest layer turns into outputs that 32 bits count.

    bitsandbytes' INT8 kernels count a layer's outputs so (csrc/cuda/int8.cu), and end the process beyond.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(config)
    weights: Any = [layer.weight for layer in linear_layers(model)]
    return int((2**31 - 1) // (prompt_tokens * max(max(weight.shape) for weight in weights)))
