"""Kernels are timed by what the GPU does, however slow the processor that launches them, and torch.compile asks."""

import itertools
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from qnb.speed import autotune as tune

KERNEL_MS = 0.003


class Device:
    """A GPU that does what it is given one after the other, and a processor that takes time to give it."""

    def __init__(self, launch_ms):
        self.launch_ms, self.now_ms, self.free_ms, self.leads, self.held = launch_ms, 0.0, 0.0, [], None

    def take(self, gpu_ms, launch_ms=None):
        self.now_ms += self.launch_ms if launch_ms is None else launch_ms
        self.free_ms = max(self.free_ms, self.now_ms) + gpu_ms
        return self.free_ms

    def sleep(self, cycles):
        self.leads.append(cycles)
        self.take(cycles / 2e6)

    def synchronize(self):
        self.now_ms = max(self.now_ms, self.free_ms)

    def event(self, enable_timing):
        return Event(self)

    def zeros(self, *_, **__):
        others = Others(self)
        self.held = weakref.ref(others)
        return others

    def empty_cache(self):
        assert self.held() is None
        self.held = None


class Others:
    def __init__(self, device):
        self.device = device

    def sum(self):
        self.device.take(0.04)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at_ms = self.device.take(0, 0.001)

    def query(self):
        return self.at_ms <= self.device.now_ms

    def elapsed_time(self, end):
        return end.at_ms - self.at_ms


def disturbed(device, times_ms):
    """A kernel that takes each of these times in turn."""
    times_ms = itertools.cycle(times_ms)
    return lambda: device.take(next(times_ms))


def outline(launch_ms, monkeypatch):
    device = Device(launch_ms)
    for name, value in {
        "Event": device.event, "synchronize": device.synchronize, "_sleep": device.sleep, "current_device": lambda: 0,
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=2**22), "empty_cache": device.empty_cache,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "zeros", device.zeros)
    return device


@pytest.mark.parametrize("launch_ms", [0.002, 0.02, 0.2, 2])
def test_a_kernels_time_does_not_hang_on_the_processor(launch_ms, monkeypatch):
    device = outline(launch_ms, monkeypatch)
    assert tune.kernel_ms(lambda: device.take(KERNEL_MS), fill=Others.sum) == pytest.approx(KERNEL_MS)
    assert device.held is None  # given back
    assert len(device.leads) == (1 if launch_ms <= 0.02 else 2 if launch_ms == 0.2 else 3)


def test_the_least_of_a_kernels_times_counts(monkeypatch):
    device = outline(0.002, monkeypatch)
    assert tune.kernel_ms(disturbed(device, [0.009, 0.005, 0.02, 0.007]), fill=Others.sum) == pytest.approx(0.005)


def test_without_a_lead_a_slow_processor_is_timed_with_the_kernel(monkeypatch):
    device = outline(0.2, monkeypatch)
    assert tune.kernel_ms(lambda: device.take(KERNEL_MS), leads_cycles=[0], fill=Others.sum) > 0.1
    assert device.leads == [0]


def test_a_processor_too_slow_to_be_waited_for_ends_the_trying(monkeypatch):
    device = outline(100, monkeypatch)
    assert tune.kernel_ms(lambda: device.take(KERNEL_MS), fill=Others.sum) > 50  # the launches
    assert device.leads == list(tune.LEADS_CYCLES)


def test_torch_compile_times_so_meanwhile_and_as_before_afterwards():
    from torch._inductor.runtime.benchmarking import benchmarker

    before = benchmarker.benchmark_gpu
    with pytest.raises(RuntimeError, match="meanwhile"), tune.steadily():
        assert benchmarker.benchmark_gpu is tune.kernel_ms
        raise RuntimeError("meanwhile")
    assert benchmarker.benchmark_gpu == before


@pytest.mark.parametrize("place", [None, SimpleNamespace(), SimpleNamespace(benchmarker=SimpleNamespace(other=1))])
def test_a_pytorch_without_that_place_goes_on(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._inductor.runtime.benchmarking", place)
    with tune.steadily():
        assert place is None or not hasattr(getattr(place, "benchmarker", None), "benchmark_gpu")


@pytest.mark.gpu
def test_a_slow_processor_does_not_hide_which_kernel_is_faster():
    def slowly(numbers):
        def launch():
            time.sleep(0.001)
            numbers.add_(1)

        return launch

    few_ms, many_ms = (tune.kernel_ms(slowly(torch.zeros(mib << 18, device="cuda"))) for mib in (1, 64))
    assert few_ms < 0.05 and many_ms > 3 * few_ms


@pytest.mark.gpu
def test_what_is_compiled_is_tuned_so():
    asked = []
    from torch._inductor.utils import fresh_cache

    torch.compiler.reset()
    with fresh_cache(), tune.steadily(lambda launch, **_: asked.append(launch()) or 1.0):
        product = torch.compile(lambda x, w: (x @ w).relu(), options={"coordinate_descent_tuning": True})
        product(torch.ones(1, 2048, device="cuda"), torch.ones(2048, 2048, device="cuda"))
    assert len(asked) > 2
