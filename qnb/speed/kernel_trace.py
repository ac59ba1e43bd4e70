"""Trace the GPU's kernels of one decode step, in a pass of its own: its wall clock carries the profiler's cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qnb.speed.engines import Engine, Prompts

TRACED_STEPS = 8

Kernel = tuple[float, float]  # start and end, in seconds


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Kernels of one decode step; None where they were not traced."""

    kernel_s_per_token: float | None = None
    kernels_per_token: float | None = None


def trace_decode(engine: Engine, prompts: Prompts, new_tokens: int, device: torch.device) -> Trace:
    """Trace the decode steps in the middle of the new tokens.

    Two generations are traced, the second some steps longer. The difference in their number of kernels says how many
    of the second one's belong to its last steps, whose times are summed. The difference of their times would be no
    use: power changes the clocks between the two.

    Raises
    ------
    RuntimeError
        No kernel of a decode step was seen.
    """
    steps = min(TRACED_STEPS, new_tokens - 1)
    before = 1 + (new_tokens - 1 - steps) // 2
    _kernels(engine, prompts, 1, device)  # a profiler's first trace misses kernels
    shorter, longer = (_kernels(engine, prompts, tokens, device) for tokens in (before, before + steps))
    return last_steps(longer, len(longer) - len(shorter), steps)


def last_steps(kernels: Sequence[Kernel], count: int, steps: int) -> Trace:
    """Return what a step takes of the last `count` kernels, which are `steps` steps.

    Raises
    ------
    RuntimeError
        `count` is below 1.
    """
    if count < 1:
        raise RuntimeError("the profiler saw no kernel of a decode step")
    kernel_s = sum(end - start for start, end in kernels[-count:])
    return Trace(kernel_s_per_token=kernel_s / steps, kernels_per_token=count / steps)


def _kernels(engine: Engine, prompts: Prompts, new_tokens: int, device: torch.device) -> list[Kernel]:
    """Return the kernels of one generation in the order in which they began."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        engine.generate(prompts, new_tokens)
        torch.cuda.synchronize(device)
    return sorted(
        (event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in trace.events() or ()
        if event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset"))
    )
