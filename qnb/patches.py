"""All patches of libraries, each with its reason, its measured gain and the upstream issue."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from qnb.device import cpu_types

if TYPE_CHECKING:
    import torch

RUNS = 20  # timed runs of a kernel
# How long the GPU is kept busy first: 2 ms at 2 GHz, or longer where launching all runs takes longer.
BUSY_CYCLES = (2**22, 2**25, 2**28)


def cached_templates() -> AbstractContextManager[Any]:
    """Let lm-eval parse a task's Jinja template once within a block, not again for every item.

    - Gain: 5.6x on building ARC-Easy's requests and encoding them; 2.3x on MMLU's, where encoding takes most of it.
    - Upstream: https://github.com/EleutherAI/lm-evaluation-harness/issues/1286
    """
    from lm_eval.utils import env

    return patch.object(env, "from_string", cache(env.from_string))


def wide_products(device_kind: str) -> AbstractContextManager[Any]:
    """Form products of a 16-bit type that the CPU has no units for in float32, and round them once, within a block.

    A GPU's matrix units do the same with 16-bit inputs. bitsandbytes unpacks 4-bit weights into the same `linear`.

    - Gain: 1.9x on the five built-in tasks with SmolLM2-135M in float16, on a CPU with units for bfloat16 alone.
    - Upstream: https://github.com/pytorch/pytorch/issues/146508
    """
    import torch
    from torch.nn import functional

    slow_types = {torch.bfloat16, torch.float16} - {getattr(torch, name) for name in cpu_types()}
    if device_kind != "cpu" or not slow_types:
        return nullcontext()
    native = functional.linear

    def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = input.numel() // input.shape[-1]
        if input.dtype not in slow_types or rows < 8:  # few rows: reading the weights is the cost
            return native(input, weight, bias)
        product = native(input.float(), weight.float(), None if bias is None else bias.float())
        return product.to(input.dtype)

    return patch.object(functional, "linear", linear)


def kernel_time_ms(launch: Callable[[], Any], **_: Any) -> float:
    """Return the least time that kernels take the GPU, in ms, when its cache holds nothing of what they read.

    The GPU is kept busy until all runs are launched, so that a slow processor is not timed with it. The cache is
    filled by reading, which leaves nothing to be written back while a kernel runs.

    Parameters
    ----------
    launch
        Launches the kernels on the current stream and waits for nothing.
    """
    import torch

    launch()
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    filler = torch.zeros(2 * cache_bytes // 4, device="cuda")
    for cycles in BUSY_CYCLES:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        for start, end in events:
            torch.sum(filler)
            start.record()
            launch()
            end.record()
        all_launched_first = not events[0][0].query()
        torch.cuda.synchronize()
        if all_launched_first:
            break
    del filler
    torch.cuda.empty_cache()  # the timing's memory is no part of what a run needs
    return min(start.elapsed_time(end) for start, end in events)


def steady_autotuning() -> AbstractContextManager[Any]:
    """Let torch.compile time kernels with `kernel_time_ms` within a block, in all threads.

    torch.compile builds each kernel in several shapes and keeps the one it times fastest. Its own timing takes the
    least of up to a hundred runs, each after the GPU's cache was overwritten. That is too noisy for kernels of
    microseconds: it also counts slow launches and the cache's writing back. The kernels chosen stay in torch.compile's
    cache on disk (``TORCHINDUCTOR_CACHE_DIR``). A version of PyTorch that times elsewhere goes on as before.

    - Gain on an H200, ms a captured step of Llama-3.2-1B's shape over several builds, with the patch and without it:
      fp16 0.87 and 1.00 to 1.17 (1.15 to 1.35x), nf4 1.08 and 1.10 to 1.19. The builds differ by 1 % at most.
    - Upstream: https://github.com/pytorch/pytorch/pull/196413 ("the ranking among them is noise").
    """
    try:
        from torch._inductor.runtime.benchmarking import benchmarker
    except ImportError:
        return nullcontext()
    return patch.object(benchmarker, "benchmark_gpu", kernel_time_ms, create=True)
