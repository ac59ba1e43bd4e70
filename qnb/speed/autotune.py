"""How torch.compile is to time the kernels that it chooses among, so that a step built anew takes the same time.

torch.compile builds a kernel in several shapes and keeps the one that was timed fastest. By its own timing, the least
of up to a hundred runs, each after the GPU's cache was overwritten, steps built anew differed by 5 to 28 % on the GPUs
of outputs/reference. Here the GPU is kept busy until all is launched, so that a slow processor is not timed with it,
and the cache is filled by reading, which leaves nothing to be written back while the kernel runs: they differed by 1 %
at most. The H200's `tune.csv` has steps built with either alone.

What was chosen is kept in torch.compile's cache on disk (`TORCHINDUCTOR_CACHE_DIR`), by whatever timing, and not
chosen again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch

RUNS = 20  # of a kernel, each timed; the least counts
# How long the GPU is kept busy first: 2 ms at 2 GHz, or longer where launching took longer. A processor that is slower
# than the last is timed with the kernel.
LEADS_CYCLES = (2**22, 2**25, 2**28)


def kernel_ms(
    launch: Callable[[], Any],
    *,
    leads_cycles: Sequence[int] = LEADS_CYCLES,
    fill: Callable[[torch.Tensor], Any] = torch.sum,
    **_: Any,
) -> float:
    """Return what kernels take the GPU, in ms, when nothing of what they read is in its cache.

    Parameters
    ----------
    launch
        Launches them on the current stream and waits for nothing.
    leads_cycles
        How long the GPU is kept busy first, each longer than the last, until it was long enough.
    fill
        Fills the cache with the tensor that it is given; what it writes must leave the cache later.
    """
    launch()
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    others = torch.zeros(2 * cache_bytes // 4, device="cuda")
    for cycles in leads_cycles:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        for start, end in events:
            fill(others)
            start.record()
            launch()
            end.record()
        waited = not events[0][0].query()  # all were launched before the first one started
        torch.cuda.synchronize()
        if waited:
            break
    del others
    torch.cuda.empty_cache()  # what timing took is no part of what a run needs
    return min(start.elapsed_time(end) for start, end in events)


@contextmanager
def steadily(timing: Callable[..., float] = kernel_ms) -> Iterator[None]:
    """Let torch.compile time kernels with `kernel_ms`, or another, meanwhile, in all threads; use it in one at a time.

    A PyTorch without a place for that goes on as before.
    """
    with ExitStack() as stack:
        with suppress(ImportError, AttributeError):
            from torch._inductor.runtime.benchmarking import benchmarker

            stack.enter_context(patch.object(benchmarker, "benchmark_gpu", timing))
        yield
