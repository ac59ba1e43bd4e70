"""Windows over a fake sensor, the process, and NVML where there is a GPU."""

import gc
import time

import pytest

from qnb.monitor import ProcessSensor, Window, sensor


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


@pytest.mark.gpu
def test_nvml_reads_the_device_torch_uses():
    import torch

    sense = sensor("cuda")
    assert sense.source == "nvml"
    before = sense.sample()["memory_mib"]
    ballast = torch.zeros(512 * 2**20, dtype=torch.uint8, device="cuda")
    assert len(ballast) and sense.sample()["memory_mib"] - before >= 512
