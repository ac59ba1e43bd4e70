"""Windows over fake sensors, the process, and NVML where there is a GPU."""

import gc
import math
import mmap
import threading
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pynvml
import pytest
import torch

from qnb.flags import Flag
from qnb.speed import monitor
from qnb.speed.monitor import Sensor, Window, flags_of


def fake(sample=dict, monitor="process"):
    return SimpleNamespace(monitor=monitor, sample=sample, note="")


def usage_of(readings, monitor="process", baseline_mib=0.0):
    """What a window that saw `readings` tells; they are a second apart where they tell no time."""
    window = Window(fake(monitor=monitor), baseline_mib=baseline_mib)
    window.readings = [{"t_s": float(place), **reading} for place, reading in enumerate(readings)]
    return window.usage


def test_means_weigh_each_readings_time_and_the_peak_is_above_the_baseline():
    """The first reading is of the time before, and the last may come right after another."""
    readings = [{"t_s": t_s, "others_cpu_pct": pct, "memory_mib": mib}
                for t_s, pct, mib in ((0.0, 90.0, 140.0), (1.0, 4.0, 130.0), (1.01, 100.0, 130.0))]  # fmt: skip
    usage = usage_of(readings, baseline_mib=100)
    assert usage.others_cpu_pct == pytest.approx((4 + 1) / 1.01)
    assert (usage.peak_used_memory_mib, usage.utilization_pct, usage.duration_s) == (40, None, 1.01)
    assert usage_of(readings, baseline_mib=math.nan).peak_used_memory_mib is None


def test_a_sensor_that_fails_midway_costs_readings_which_one_thread_takes():
    """In psutil shares begin for each thread apart."""
    threads, readings = [], iter([{"memory_mib": 1.0}])
    with Window(fake(lambda: threads.append(threading.get_ident()) or next(readings)), 0.01) as window:
        time.sleep(0.05)
    assert window.usage.missing_samples == len(window.readings) - 1 >= 2
    assert len(set(threads)) == 1 and threading.get_ident() not in threads
    assert usage_of([{}, {}]).missing_samples == 2


def test_a_process_that_holds_a_gpu_context_and_waits_disturbs_nothing(monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda gpu: ["this one", "01's kernel"])
    monkeypatch.setenv(monitor.WAITING, "1")
    assert monitor.NVML_PROBES["gpu_processes"](None) == 1


@pytest.mark.parametrize(
    ("readings", "energy_j", "energy_s"),
    [
        ([{"energy_j": 100.0 + 10 * place} for place in range(7)], 60, 6),
        ([{"energy_j": 100.0 + 10 * (place // 3)} for place in range(7)], None, 6),  # too few steps of the counter
        ([{"power_w": 50.0}] * 7, None, None),
        ([{"energy_j": 10.0 * place} if place % 2 else {} for place in range(44)], 420, 42),
        ([{"energy_j": 10.0 * place} if place < 22 else {} for place in range(44)], None, 21),  # of half the window
    ],
)
def test_energy_is_the_counters_difference_where_it_moved_often_enough(readings, energy_j, energy_s):
    usage = usage_of(readings)
    assert (usage.energy_j, usage.energy_s) == (energy_j, energy_s)


def test_nvml_rates_of_the_first_second_are_left_out():
    """Idle before, at work within: what NVML tells in the first second is of both."""
    readings = [{"t_s": place / 10, "utilization_pct": min(100.0, 10.0 * place), "power_w": min(600.0, 60.0 * place),
                 "others_cpu_pct": 7.0} for place in range(21)]  # fmt: skip
    usage = usage_of(readings, "nvml")
    assert (usage.utilization_pct, usage.power_w) == pytest.approx((100, 600)) and flags_of(usage) == []
    counted = [{**reading, "energy_j": 50.0 * place} for place, reading in enumerate(readings)]
    whole = usage_of(counted, "nvml")
    assert (whole.energy_j, whole.energy_s, whole.power_w) == (1000, 2, 500)  # of the whole window
    short = usage_of(counted[:9], "nvml")
    assert (short.utilization_pct, short.power_w, short.energy_j) == (None, None, None)
    assert short.others_cpu_pct == pytest.approx(7) and flags_of(short) == [Flag.TOO_SHORT]


@pytest.mark.parametrize(
    ("readings", "throttle", "flags"),
    [
        ([{"throttle": 1.0, "gpu_processes": 1.0, "power_w": 50.0}] * 3, 0, []),  # 1: idle, no throttling
        ([{"throttle": bits, "gpu_processes": 2} for bits in (4, 65)], 4 | 64, [Flag.THROTTLED, Flag.GPU_SHARED]),
        ([{"throttle": 1}, {}, {"throttle": 0}], 0, [Flag.SAMPLES_MISSING]),
        ([{"others_cpu_pct": pct} for pct in (90.0, 30.0, 50.0)], 0, [Flag.CPU_SHARED]),
        ([{"others_cpu_pct": pct} for pct in (90.0, 4.0, 6.0)], 0, []),
    ],
)  # fmt: skip
def test_what_disturbed_a_window_is_flagged_and_what_held_its_clocks_down_is_kept(readings, throttle, flags):
    usage = usage_of(readings)
    assert (usage.throttle, flags_of(usage)) == (throttle, flags)


def test_the_process_sensor_sees_this_process_grow():
    """Fresh pages, which no freed memory of an earlier test can stand for."""
    gc.collect()  # what garbage there is goes now, not between the two readings
    sensor = Sensor("cpu")
    before_mib = sensor.sample()["process_memory_mib"]
    with mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1
        ends = time.monotonic() + 5  # some kernels count a process's memory once in a while
        while (grown_mib := sensor.sample()["process_memory_mib"] - before_mib) < 40 and time.monotonic() < ends:
            time.sleep(0.05)
    assert sensor.monitor == "process" and 40 < grown_mib < 90


refuse = Mock(side_effect=pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose NVML refuses everything, and knows it by the name that a part of a GPU has."""
    names = [name for name in dir(pynvml) if name.startswith("nvmlDeviceGet")]
    for name in names:
        monkeypatch.setattr(pynvml, name, refuse)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    handles = {"MIG-1-2": "handle"}
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda name: handles.get(name) or refuse())


@pytest.mark.parametrize("error", [pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED), OSError(), UnicodeError()])
@pytest.mark.parametrize("name", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetMemoryInfo"])
def test_a_gpu_without_nvml_has_no_number_of_the_cpu_in_its_columns(name, error, gpu, monkeypatch):
    monkeypatch.setattr(pynvml, name, Mock(side_effect=error))
    with Window(Sensor("cuda"), 0.01, monitor.used_memory_mib("cuda")) as window:
        time.sleep(0.02)
    usage = window.usage
    assert usage.monitor == "nvml" and usage.others_cpu_pct is not None
    assert (usage.utilization_pct, usage.peak_used_memory_mib, usage.power_w) == (None,) * 3
    assert "memory_mib" in Sensor("cuda").note and Flag.SAMPLES_MISSING not in flags_of(usage)


def test_nvml_tells_what_it_can_and_the_hosts_cpu_beside(gpu, monkeypatch):
    """Energy is refused at first, power later; utilization is no number."""
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda _: SimpleNamespace(gpu="[N/A]"))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda _: SimpleNamespace(used=5 * 2**20))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda _: 70_000)
    sensor = Sensor("cuda")
    reading = sensor.sample()
    assert reading.pop("others_cpu_pct") >= 0 and reading == {"memory_mib": 5, "power_w": 70}
    assert "energy_j" in sensor.note and "power_w" not in sensor.note
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", refuse)
    assert "power_w" not in sensor.sample()


def test_the_baseline_leaves_out_what_the_allocator_holds_unused(monkeypatch):
    """The next model is loaded into it."""
    monkeypatch.setattr(monitor, "Sensor", lambda device: fake(lambda: {"memory_mib": 3000.0}))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200 * 2**20)
    assert monitor.used_memory_mib("cuda:0") == 2200 and monitor.used_memory_mib("cpu") == 3000
    monkeypatch.setattr(monitor, "Sensor", lambda device: fake())
    assert math.isnan(monitor.used_memory_mib("cuda:0"))


@pytest.mark.gpu
def test_nvml_reads_the_device_that_torch_uses():
    sensor = Sensor("cuda")
    assert sensor.monitor == "nvml" and sensor.note == ""
    before_mib = sensor.sample()["memory_mib"]
    ballast = torch.zeros(512 * 2**20, dtype=torch.uint8, device="cuda")
    assert len(ballast) and sensor.sample()["memory_mib"] - before_mib >= 512


@pytest.mark.gpu
def test_nvml_power_and_energy_agree():
    """Two sources of one number: the counter, and readings that look back a second."""
    matrix, until = torch.randn(8192, 8192, device="cuda"), time.monotonic() + 4
    with Window(Sensor("cuda"), 0.05) as window:
        while time.monotonic() < until:
            matrix @ matrix
            torch.cuda.synchronize()
    usage = window.usage
    assert usage.missing_samples == 0
    if usage.energy_s is not None:
        powers_w = [reading["power_w"] for reading in window.readings if reading["t_s"] >= 1.5]
        assert usage.power_w == pytest.approx(sum(powers_w) / len(powers_w), rel=0.15)
