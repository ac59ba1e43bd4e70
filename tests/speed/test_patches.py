"""torch.compile times kernels by what the GPU does, however slow the processor that launches them."""

import time

import pytest
import torch
from torch._inductor.runtime.benchmarking import benchmarker
from torch._inductor.utils import fresh_cache

from qnb import patches


def test_torch_compile_times_so_within_the_block_and_as_before_after_it():
    before = benchmarker.benchmark_gpu
    with pytest.raises(RuntimeError, match="within"), patches.steady_autotuning():
        assert benchmarker.benchmark_gpu is patches.kernel_time_ms
        raise RuntimeError("within")
    assert benchmarker.benchmark_gpu == before


@pytest.mark.gpu
def test_a_slow_processor_does_not_hide_which_kernel_is_faster():
    def launch_slowly(numbers):
        time.sleep(0.001)
        numbers.add_(1)

    tensors = [torch.zeros(mib << 18, device="cuda") for mib in (1, 64)]
    few_ms, many_ms = (patches.kernel_time_ms(lambda numbers=numbers: launch_slowly(numbers)) for numbers in tensors)
    assert few_ms < 0.05 and many_ms > 3 * few_ms


@pytest.mark.gpu
def test_what_is_compiled_is_tuned_so(monkeypatch):
    timed = []
    monkeypatch.setattr(patches, "kernel_time_ms", lambda launch, **_: timed.append(launch()) or 1.0)
    torch.compiler.reset()
    with fresh_cache(), patches.steady_autotuning():
        product = torch.compile(lambda x, w: (x @ w).relu(), options={"coordinate_descent_tuning": True})
        product(torch.ones(1, 2048, device="cuda"), torch.ones(2048, 2048, device="cuda"))
    assert len(timed) > 2
