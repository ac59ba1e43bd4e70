"""Watch a device while a block of code runs: utilization, memory, power, clocks, energy, and who else is at work.

A GPU is read through NVML, a CPU through this process. NVML's utilization is the share of time in which any kernel
ran, not how much of the GPU worked. Its memory is the whole device's, so what was in use before is subtracted:
containers such as Colab's hide the memory of single processes. The thread reads counters only, never the model.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pynvml
import torch

from qnb.flags import Flag
from qnb.memory import MIB
from qnb.provenance import WAITING

Reading = dict[str, float]

LOOK_BACK_S = 1.0  # NVML's utilization and power are means over up to this long before a reading (NVML reference)
WATCHED_S = 2.0  # the least a workload lasts, repeated if need be, so that these means and joules are its own
LEAST_ENERGY_STEPS = 5  # times the energy counter must move in a window before a difference of it means anything
LEAST_ENERGY_SHARE = 0.95  # of a window that the counter's readings must cover for its joules to be the window's
CPU_SHARED_PCT = 10.0  # of the CPU used by other processes, from which on a row is flagged
NVML_PROBES: dict[str, Callable[[Any], float]] = {
    "utilization_pct": lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
    "memory_mib": lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).used / MIB,
    "power_w": lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
    "energy_j": lambda gpu: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000,
    "throttle": lambda gpu: pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu),
    # a process counts once it holds a context: containers hide which processes those are, not how many
    "gpu_processes": lambda gpu: len(pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)) - int(os.getenv(WAITING, "0")),
}
SUMMED = {"memory_mib", "power_w", "energy_j"}  # over the GPUs of a model that is spread; of the others, the largest
METRICS = (*NVML_PROBES, "process_memory_mib", "others_cpu_pct")
# NVML's bits (nvmlClocksEventReasons) that say the clocks are held below what the work asks for: software power cap,
# hardware slowdown, software and hardware thermal slowdown, hardware power brake
THROTTLE_BITS = 0x4 | 0x8 | 0x20 | 0x40 | 0x80


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a window saw. None where the monitor does not tell.

    Sources: the NVML API reference (utilization rates, memory info, power usage, clock info, total energy); psutil.
    """

    monitor: str  # "nvml" for a GPU, or "process"
    missing_samples: int = 0  # readings that lack what others have
    duration_s: float
    utilization_pct: float | None = None  # mean, of the GPU or of all cores
    peak_used_memory_mib: float | None = None  # above the baseline, of the whole device or of this process
    power_w: float | None = None  # mean
    clock_mhz: float | None = None  # mean, streaming multiprocessors
    energy_j: float | None = None  # of the whole device
    energy_s: float | None = None  # between the energy counter's first and last reading
    throttle: int = 0  # those of `THROTTLE_BITS` that were set at any time
    gpu_processes: float | None = None  # most at once, this one included
    others_cpu_pct: float | None = None  # mean, of all the host's cores, used by other processes


def flags_of(usage: Usage) -> list[Flag]:
    """Return what makes a window unlike an undisturbed one."""
    conditions = {
        Flag.THROTTLED: usage.throttle,
        Flag.GPU_SHARED: (usage.gpu_processes or 0) > 1,
        Flag.CPU_SHARED: (usage.others_cpu_pct or 0) > CPU_SHARED_PCT,
        Flag.SAMPLES_MISSING: usage.missing_samples,
        Flag.TOO_SHORT: usage.monitor == "nvml" and usage.duration_s < LOOK_BACK_S,
    }
    return [flag for flag, holds in conditions.items() if holds]


class Sensor:
    """Reads torch devices, and what other processes use of the cores that this one may use, which launch kernels.

    A GPU's metrics come from NVML alone: where it fails, they stay empty. On a CPU they are this process's share of
    its cores and its resident set.

    Attributes
    ----------
    monitor
        As in `Usage`.
    note
        What a reader of its rows should know; "" for nothing.
    """

    def __init__(self, *devices: str | torch.device) -> None:
        gpus = [device for device in map(torch.device, devices) if device.type == "cuda"]
        self.monitor = "nvml" if gpus else "process"
        self._gpus = [gpu for gpu in map(_nvml_handle, gpus) if gpu is not None]
        self._process, self._cores = psutil.Process(), [*range(psutil.cpu_count() or 1)]
        with suppress(Exception):  # not every system tells
            self._cores = self._process.cpu_affinity()
        refused = sorted(NVML_PROBES.keys() - self.sample().keys())  # psutil's first answers are of no time at all
        self.note = f"NVML does not tell {', '.join(refused)}" if refused and gpus else ""

    def sample(self) -> Reading:
        """Return each metric now; shares of the CPU are of the time since the last call. What fails is missing."""
        reading: Reading = {}
        for name, probe in NVML_PROBES.items() if self._gpus else ():
            with suppress(Exception):  # whatever a driver raises, or tells that is no number
                reading[name] = float((sum if name in SUMMED else max)(map(probe, self._gpus)))
        with suppress(Exception):  # a container may hide the host
            own_pct = min(100.0, self._process.cpu_percent() / len(self._cores))  # of a moment it may read more
            all_pct = psutil.cpu_percent(percpu=True)
            reading["others_cpu_pct"] = max(0.0, fmean(all_pct[core] for core in self._cores) - own_pct)
            if self.monitor == "process":
                reading |= {"utilization_pct": own_pct, "process_memory_mib": self._process.memory_info().rss / MIB}
        return reading


def _nvml_handle(device: torch.device) -> Any:
    """Return what NVML knows a GPU by; None where it knows none."""
    for kind in ("GPU", "MIG"):  # MIG is a part of a GPU; by UUID, so that CUDA_VISIBLE_DEVICES cannot mislead
        with suppress(Exception):  # there is no NVML, it knows no such GPU, or torch does not tell its UUID
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
            return pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")
    return None


def used_memory_mib(*devices: str | torch.device) -> float:
    """Return the memory of devices in use without what torch's allocator holds unused; NaN where no sensor tells.

    Read before a model is loaded, it is the baseline: the model is loaded into what the allocator still holds.
    """
    reading = Sensor(*devices).sample()
    memory_mib = reading.get("memory_mib", reading.get("process_memory_mib", math.nan))
    for device in map(torch.device, devices):
        if device.type == "cuda":
            memory_mib -= (torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / MIB
    return memory_mib


class Window:
    """Take a reading every `period_s` seconds in a thread while the block runs, the last one after it.

    A reading that fails is counted and raises nothing: what is timed goes on.

    Parameters
    ----------
    sensor
        What is read.
    period_s
        Seconds between two readings.
    baseline_mib
        Memory in use before the model was loaded, subtracted from the peak; NaN where it is unknown.
    """

    def __init__(self, sensor: Sensor, period_s: float = 0.1, baseline_mib: float = 0.0) -> None:
        self._sensor, self._period_s, self._baseline_mib = sensor, period_s, baseline_mib
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="qnb-monitor", daemon=True)
        self.readings: list[Reading] = []  # each with t_s, seconds since the thread began

    def __enter__(self) -> Window:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        """Take all readings in one thread: psutil's shares are of the time since that thread asked before."""
        began_s, is_last = perf_counter(), False
        while not is_last:
            is_last = self._stop.is_set()
            reading: Reading = {"t_s": perf_counter() - began_s}
            with suppress(Exception):  # a broken sensor must not break a measurement
                reading |= self._sensor.sample()
            self.readings.append(reading)
            self._stop.wait(self._period_s)

    @property
    def usage(self) -> Usage:
        """Means and peaks over the closed window.

        A mean weighs each reading by the time since the one before: the last may follow at once. The first reading is
        of the time before the window, and so are NVML's rates for a second.
        """
        metrics = pd.DataFrame(self.readings, columns=["t_s", *METRICS], dtype=float).set_index("t_s")
        weights_s = metrics.notna().mul(metrics.index.to_series().diff(), axis=0)
        if self._sensor.monitor == "nvml":
            weights_s.loc[metrics.index < LOOK_BACK_S, ["utilization_pct", "power_w"]] = 0.0
        mean, most, told = (metrics * weights_s).sum() / weights_s.sum(), metrics.max(), metrics.notna().sum(axis=1)
        energy_j, energy_s = _energy(metrics.energy_j.dropna(), metrics.index[-1])
        values = {
            **mean[["utilization_pct", "clock_mhz", "others_cpu_pct"]],
            "power_w": mean.power_w if math.isnan(energy_j) else energy_j / energy_s,
            "peak_used_memory_mib": most[["memory_mib", "process_memory_mib"]].max() - self._baseline_mib,
            "gpu_processes": most.gpu_processes,
            "energy_j": energy_j,
            "energy_s": energy_s,
        }
        return Usage(
            monitor=self._sensor.monitor,
            missing_samples=int((told < max(1, told.max())).sum()),  # a reading that failed has nothing but its time
            duration_s=float(metrics.index[-1]),
            throttle=int(np.bitwise_or.reduce(metrics.throttle.fillna(0).astype(int))) & THROTTLE_BITS,
            **{name: None if math.isnan(value) else float(value) for name, value in values.items()},
        )


def _energy(counter_j: pd.Series, duration_s: float) -> tuple[float, float]:
    """Return the joules and seconds between the first and last reading of a counter, by time; NaN where there is none.

    The joules are NaN in a window in which the counter was lost, or that was too short for its steps.
    """
    if counter_j.empty:
        return math.nan, math.nan
    energy_s, steps = counter_j.index[-1] - counter_j.index[0], counter_j.diff().iloc[1:].ne(0).sum()
    is_whole = energy_s >= max(LOOK_BACK_S, LEAST_ENERGY_SHARE * duration_s) and steps >= LEAST_ENERGY_STEPS
    return counter_j.iloc[-1] - counter_j.iloc[0] if is_whole else math.nan, energy_s
