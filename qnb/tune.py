"""How torch.compile is to time the kernels that it chooses among, so that a step built anew takes the same time.

torch.compile builds a kernel in several shapes and keeps the one that was timed fastest. Its own timing takes the
least of up to a hundred runs, each after the GPU's cache was overwritten; on an H100 steps whose kernels were chosen
so took 1.24 to 1.31 ms in FP16 and 1.25 to 1.59 in NF4, built three times each. Here the GPU never waits for a launch,
the cache is filled by reading, which leaves nothing to be written back while the kernel runs, and the mean of the
faster half counts: 1.09 to 1.10 and 1.14 ms (outputs/reference). Which of the three does it was not taken apart.

What was chosen is kept in torch.compile's cache on disk (`TORCHINDUCTOR_CACHE_DIR`), by whatever timing, and not
chosen again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch

RUNS = 20  # of a kernel, each timed; the faster half counts
# How long the GPU is kept busy first: 2 ms at 2 GHz, or longer where launching took longer. A processor that is slower
# than the last is timed with the kernel.
LEADS_CYCLES = (2**22, 2**25, 2**28)


def kernel_ms(launch: Callable[[], Any], **_: Any) -> float:
    """Return what kernels take the GPU, in ms, when nothing of what they read is in its cache.

    Parameters
    ----------
    launch
        Launches them on the current stream and waits for nothing.
    """
    launch()
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    others = torch.zeros(2 * cache_bytes // 4, device="cuda")  # read: what is written must leave the cache later
    for cycles in LEADS_CYCLES:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        for start, end in events:
            others.sum()
            start.record()
            launch()
            end.record()
        waited = not events[0][0].query()  # all were launched before the first one started
        torch.cuda.synchronize()
        if waited:
            break
    del others
    torch.cuda.empty_cache()  # what timing took is no part of what a run needs
    times_ms = sorted(start.elapsed_time(end) for start, end in events)
    return fmean(times_ms[: RUNS // 2])


@contextmanager
def steadily() -> Iterator[None]:
    """Let torch.compile time kernels with `kernel_ms` meanwhile, in all threads; use it in one at a time.

    A PyTorch without a place for that goes on as before.
    """
    with ExitStack() as stack:
        with suppress(ImportError, AttributeError):
            from torch._inductor.runtime.benchmarking import benchmarker

            stack.enter_context(patch.object(benchmarker, "benchmark_gpu", kernel_ms))
        yield
