"""Windows over a fake sensor, the process, and NVML where there is a GPU."""

import gc
import threading
import time
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from qnb.speed.monitor import NvmlSensor, ProcessSensor, Window, sensor


def test_means_and_peaks_are_those_of_the_readings():
    values = iter(
        [{"utilization_pct": 90.0, "memory_mib": 110.0}] + [{"utilization_pct": 40.0, "memory_mib": 130.0}] * 99
    )
    with Window(lambda: next(values), "fake", period_s=0.01, baseline_mib=100) as window:
        time.sleep(0.06)
    usage = window.usage
    assert usage.source == "fake" and usage.samples == len(window.readings) >= 3
    assert usage.utilization_pct == 40  # the first reading looks back to before the window
    assert usage.peak_memory_mib == 30 and 10 < usage.memory_mib < 30
    assert usage.power_w is None and usage.failures == 0
    assert usage.duration_s == pytest.approx(0.06, abs=0.05)


def test_a_sensor_that_fails_midway_costs_readings_not_the_measurement():
    readings = iter([{"memory_mib": 1.0}])
    with Window(lambda: next(readings), "fake", period_s=0.01) as window:
        time.sleep(0.03)
    assert window.usage.samples == 1 and window.usage.failures >= 2


def test_an_error_inside_the_window_passes_through_and_ends_the_thread():
    window = Window(lambda: {}, "fake", period_s=0.01)
    with pytest.raises(KeyError), window:
        raise KeyError("x")
    assert not window._thread.is_alive()


def test_process_sensor_sees_this_process_grow():
    gc.collect()  # what garbage there is goes now, not between the two readings
    sense = ProcessSensor()
    before = sense.sample()["memory_mib"]
    ballast = bytearray(b"x") * (64 * 2**20)
    after = sense.sample()["memory_mib"]
    assert len(ballast) and 40 < after - before < 90


def test_without_a_gpu_the_process_is_watched():
    assert sensor("cpu").source == "process"


def window_over(readings):
    """A closed window that saw `readings`, a second apart."""
    window = Window(lambda: {}, "fake")
    window.readings = [{"t_s": float(place), **reading} for place, reading in enumerate(readings)]
    window._closed = float(len(readings) - 1)
    return window.usage


def test_energy_is_the_counters_difference_where_it_moved_often_enough():
    steps = window_over([{"energy_j": 100.0 + 10 * place} for place in range(7)])
    assert (steps.energy_j, steps.energy_s) == (60, 6)
    still = window_over([{"energy_j": 100.0 + 10 * (place // 3)} for place in range(7)])
    assert (still.energy_j, still.energy_s) == (None, 6)  # too few steps of the counter
    none = window_over([{"power_w": 50.0}] * 7)
    assert (none.energy_j, none.energy_s) == (None, None)
    broken = window_over([{"energy_j": 10.0 * place} if place % 2 else {} for place in range(44)])
    assert (broken.energy_j, broken.energy_s) == (420, 42)  # between the first and last reading that have it
    lost = window_over([{"energy_j": 10.0 * place} if place < 22 else {} for place in range(44)])
    assert lost.energy_j is None and lost.missing == {"energy_j": 22}  # half a window's joules are not the window's


def test_work_of_other_processes_is_flagged():
    """The first reading looks back to before the window."""
    busy = window_over([{"utilization_pct": 50.0, "others_pct": value} for value in (90.0, 30.0, 50.0)])
    assert busy.others_pct == 40 and busy.flags == ["other processes used 40 % of the CPU"]
    assert window_over([{"others_pct": value} for value in (90.0, 4.0, 6.0)]).flags == []


def test_one_thread_reads_from_start_to_end_and_each_reading_weighs_its_time():
    """A share begins, in psutil, for each thread apart; and the last reading may come right after another."""
    readers = []
    with Window(lambda: readers.append(threading.get_ident()) or {}, "fake", 0.01):
        time.sleep(0.05)
    assert len(readers) >= 3 and len(set(readers)) == 1 and threading.get_ident() not in readers
    window = Window(lambda: {}, "fake")
    window.readings = [{"t_s": t_s, "others_pct": value} for t_s, value in ((0.0, 90.0), (1.0, 4.0), (1.01, 100.0))]
    assert window.usage.others_pct == pytest.approx((4 + 1) / 1.01)


def nvml_over(readings, seconds):
    """What NVML's readings come to in a window of so many seconds."""
    window = Window(lambda: {}, "nvml")
    window.readings, window._closed = readings, seconds
    return window.usage


def test_rates_that_look_back_to_before_a_window_are_left_out():
    """Idle before, at work within: what NVML says in the first second is of both."""
    told = [{"t_s": place / 10, "utilization_pct": min(100.0, 10.0 * place), "power_w": min(600.0, 60.0 * place)}
            for place in range(21)]  # fmt: skip
    usage = nvml_over(told, 2.0)
    assert (usage.utilization_pct, usage.power_w) == pytest.approx((100, 600)) and usage.flags == []
    counted = nvml_over([{**reading, "energy_j": 50.0 * place} for place, reading in enumerate(told)], 2.0)
    assert (counted.energy_j, counted.energy_s, counted.power_w) == (1000, 2, 500)  # of the whole window
    short = nvml_over([{**reading, "energy_j": 50.0 * place} for place, reading in enumerate(told[:9])], 0.8)
    assert (short.utilization_pct, short.power_w, short.energy_j) == (None, None, None)
    assert short.flags == ["too short for utilization, power and energy"]


def test_a_sensor_that_dies_leaves_no_joules_of_a_part():
    window = Window(lambda: {}, "fake")
    window.readings = [{"t_s": place / 10, "energy_j": 10.0 * place} for place in range(12)]
    window._closed, window._failures = 2.2, 11
    assert window.usage.energy_s == pytest.approx(1.1) and window.usage.energy_j is None
    assert window.usage.flags == ["samples missing: 11 readings whole"]


def test_what_disturbed_a_window_is_flagged():
    calm = window_over([{"throttle": 1.0, "processes": 1.0, "power_w": 50.0}] * 3)  # 1: idle, no throttling
    assert calm.flags == [] and calm.throttle == () and calm.processes == 1
    usage = window_over([{"throttle": 4.0, "processes": 2.0}, {"throttle": 64.0}, {"processes": 1.0}])
    assert usage.throttle == ("software power cap", "hardware thermal slowdown")
    assert usage.missing == {"processes": 1, "throttle": 1}
    assert usage.flags == [
        "throttled: software power cap, hardware thermal slowdown",
        "another process used the GPU",
        "samples missing: processes in 1 of 3, throttle in 1 of 3",
    ]


def test_a_metric_that_fails_midway_is_missing_alone(monkeypatch):
    import pynvml

    class Gone(pynvml.NVMLError):
        def __new__(cls):
            return Exception.__new__(cls)

        def __init__(self):
            Exception.__init__(self)

    def refuse():
        raise Gone

    sense = object.__new__(NvmlSensor)
    sense.probes = {"memory_mib": lambda: 5.0, "power_w": refuse}
    assert sense.sample() == {"memory_mib": 5}
    sense.probes["memory_mib"] = refuse
    with pytest.raises(OSError, match="no more"):
        sense.sample()


def test_a_reading_of_the_process_costs_less_than_half_a_percent():
    sense, seconds = ProcessSensor(), []
    for _ in range(50):
        before = time.thread_time()
        sense.sample()
        seconds.append(time.thread_time() - before)
    assert median(seconds) < 0.005 * Window(lambda: {}, "fake")._period_s


@pytest.mark.gpu
def test_nvml_reads_the_device_torch_uses():
    import torch

    sense = sensor("cuda")
    assert sense.source == "nvml"
    before = sense.sample()["memory_mib"]
    ballast = torch.zeros(512 * 2**20, dtype=torch.uint8, device="cuda")
    assert len(ballast) and sense.sample()["memory_mib"] - before >= 512


@pytest.mark.gpu
def test_nvml_counts_energy_and_this_process():
    import torch

    matrix, sense = torch.randn(8192, 8192, device="cuda"), sensor("cuda")
    with Window(sense.sample, sense.source, 0.05) as window:
        until = time.monotonic() + 4
        while time.monotonic() < until:
            matrix @ matrix
            torch.cuda.synchronize()
    usage = window.usage
    assert usage.failures == 0 and usage.missing == {}
    if "energy_j" in sense.probes:  # two sources of one number: the counter, and readings that look back a second
        read = [reading["power_w"] for reading in window.readings if reading["t_s"] >= 1.5]
        assert usage.power_w == pytest.approx(sum(read) / len(read), rel=0.15)


def test_nvml_failing_at_start_leaves_the_process_to_be_watched(monkeypatch):
    """A driver is there and its library does not begin: what is watched is the process, and the source says so."""
    import pynvml

    def refuse():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0"))
    assert sensor("cuda").source == "process"


def test_a_part_of_a_gpu_is_found_by_its_own_kind_of_name(monkeypatch):
    import pynvml

    asked = []

    def find(name):
        asked.append(name)
        if name.startswith("GPU-"):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return "handle"

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", find)
    assert NvmlSensor._named("1-2") == "handle" and asked == ["GPU-1-2", "MIG-1-2"]


def test_memory_above_an_unknown_baseline_is_not_known():
    with Window(lambda: {"memory_mib": 5.0}, "nvml", 0.01, None) as window:
        pass
    assert window.usage.memory_mib is None and window.usage.peak_memory_mib is None
