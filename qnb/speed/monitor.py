"""Watch a device while a block of code runs: utilization, memory, power, clocks, energy, and who else is at work.

A GPU is read through NVML, a CPU through this process. NVML's utilization is the share of time in which any kernel
ran, not how much of the GPU worked. Its memory is the whole device's, so what was in use before is subtracted:
containers such as Colab's hide the memory of single processes. The thread reads counters only, never the model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from qnb.columns import Flag
from qnb.memory import MIB

if TYPE_CHECKING:
    import torch

Reading = dict[str, float]

LOOK_BACK_S = 1.0  # NVML's utilization and power are means over up to this long before a reading (NVML reference)
LOOKING_BACK = ("utilization_pct", "power_w")
LEAST_ENERGY_STEPS = 5  # times the energy counter must move in a window before a difference of it means anything
LEAST_ENERGY_SHARE = 0.95  # of a window that the counter's readings must cover for its joules to be the window's
CPU_SHARED_PCT = 10.0  # of the CPU used by other processes, from which on a row is flagged
# NVML's bits (nvmlClocksEventReasons) that say the clocks are held below what the work asks for
THROTTLE_REASONS = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a window saw. None where the monitor does not tell.

    Sources: the NVML API reference (utilization rates, memory info, power usage, clock info, total energy); psutil.
    """

    monitor: str  # "nvml", "process", or "host": a GPU without NVML, of which nothing but the host's CPU is read
    samples: int
    duration_s: float
    utilization_pct: float | None = None  # mean, of the GPU or of all cores
    used_memory_mib: float | None = None  # mean above the baseline, of the whole device or of this process
    peak_used_memory_mib: float | None = None
    baseline_mib: float | None = None  # in use before the model was loaded
    power_w: float | None = None  # mean
    clock_mhz: float | None = None  # mean, streaming multiprocessors
    energy_j: float | None = None  # of the whole device
    energy_s: float | None = None  # between the energy counter's first and last reading
    throttle: tuple[str, ...] = ()  # why clocks were held down at any time
    gpu_processes: int | None = None  # most at once, this one included
    others_cpu_pct: float | None = None  # mean, of all the host's cores, used by other processes
    failed_readings: int = 0  # readings that told nothing
    missing_readings: dict[str, int] = field(default_factory=dict)  # by metric that failed at times


def flags_of(usage: Usage) -> list[Flag]:
    """Return what makes a window unlike an undisturbed one."""
    energy_lost = usage.failed_readings or "energy_j" in usage.missing_readings
    energy_short = usage.energy_s is not None and usage.energy_j is None and not energy_lost
    conditions = {
        Flag.THROTTLED: usage.throttle,
        Flag.GPU_SHARED: (usage.gpu_processes or 0) > 1,
        Flag.CPU_SHARED: (usage.others_cpu_pct or 0) > CPU_SHARED_PCT,
        Flag.SAMPLES_MISSING: usage.failed_readings or usage.missing_readings,
        Flag.TOO_SHORT: energy_short or (usage.monitor == "nvml" and usage.duration_s < LOOK_BACK_S),
    }
    return [flag for flag, holds in conditions.items() if holds]


class Window:
    """Take a reading every `period_s` seconds in a thread while the block runs.

    A reading that fails is counted and raises nothing: what is timed goes on.

    Parameters
    ----------
    sensor
        What is read.
    period_s
        Seconds between two readings.
    baseline_mib
        Memory in use before the model was loaded, subtracted from every reading; None where it is unknown.
    """

    def __init__(self, sensor: HostSensor, period_s: float = 0.1, baseline_mib: float | None = 0.0) -> None:
        self._sensor, self._period_s, self._baseline_mib = sensor, period_s, baseline_mib
        self._has_begun, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="qnb-monitor", daemon=True)
        self._opened_s = self._closed_s = 0.0
        self._failed_readings = 0
        self.readings: list[Reading] = []  # each with t_s, seconds since the window opened

    def __enter__(self) -> Window:
        self._opened_s = time.perf_counter()
        self._thread.start()
        self._has_begun.wait()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._closed_s = time.perf_counter()

    def _watch(self) -> None:
        """Take all readings in one thread: psutil's shares are of the time since that thread asked before."""
        self._read()
        self._has_begun.set()
        while not self._stop.wait(self._period_s):
            self._read()
        self._read()

    def _read(self) -> None:
        try:
            reading = self._sensor.sample()
        except Exception:  # any driver error: a broken sensor must not break a measurement
            self._failed_readings += 1
        else:
            self.readings.append({"t_s": time.perf_counter() - self._opened_s, **reading})

    @property
    def usage(self) -> Usage:
        """Means and peaks over the closed window."""
        energy_j, energy_s = self._energy()
        utilization_pct, baseline_mib, in_use_mib = self._mean("utilization_pct"), self._baseline_mib, []
        if baseline_mib is not None:
            in_use_mib = [memory_mib - baseline_mib for memory_mib in self._column("memory_mib")]
        names = sorted({name for reading in self.readings for name in reading})
        missing = {name: len(self.readings) - len(self._column(name)) for name in names}
        return Usage(
            monitor=self._sensor.monitor,
            samples=len(self.readings),
            duration_s=self._closed_s - self._opened_s,
            utilization_pct=None if utilization_pct is None else min(utilization_pct, 100.0),
            used_memory_mib=fmean(in_use_mib) if in_use_mib else None,
            peak_used_memory_mib=max(in_use_mib, default=None),
            baseline_mib=baseline_mib if "memory_mib" in names else None,
            power_w=energy_j / energy_s if energy_j and energy_s else self._mean("power_w"),
            clock_mhz=fmean(clocks_mhz) if (clocks_mhz := self._column("clock_mhz")) else None,
            energy_j=energy_j,
            energy_s=energy_s,
            throttle=throttle_reasons(self._column("throttle")),
            gpu_processes=int(max(counts)) if (counts := self._column("gpu_processes")) else None,
            others_cpu_pct=self._mean("others_cpu_pct"),
            failed_readings=self._failed_readings,
            missing_readings={name: number for name, number in missing.items() if number},
        )

    def _column(self, name: str) -> list[float]:
        return [reading[name] for reading in self.readings if name in reading]

    def _mean(self, name: str) -> float | None:
        """Return a mean that weighs each reading by the time since the one before: the last may follow at once.

        The first reading is of the time before the window, and so are NVML's rates for a second.
        """
        since_s = LOOK_BACK_S if self._sensor.monitor == "nvml" and name in LOOKING_BACK else 0.0
        weighted = [
            (now[name], now["t_s"] - before["t_s"])
            for before, now in pairwise(self.readings)
            if name in now and now["t_s"] >= since_s
        ]
        total_s = sum(seconds for _, seconds in weighted)
        return sum(value * seconds for value, seconds in weighted) / total_s if total_s else None

    def _energy(self) -> tuple[float | None, float | None]:
        """Return the joules and seconds between the counter's first and last reading.

        The joules are None in a window in which the counter was lost, or that was too short for its steps.
        """
        counter = [(reading["t_s"], reading["energy_j"]) for reading in self.readings if "energy_j" in reading]
        if not counter:
            return None, None
        (first_s, first_j), (last_s, last_j) = counter[0], counter[-1]
        least_s = max(LOOK_BACK_S, LEAST_ENERGY_SHARE * (self._closed_s - self._opened_s))
        steps = sum(after != before for (_, before), (_, after) in pairwise(counter))
        is_whole = last_s - first_s >= least_s and steps >= LEAST_ENERGY_STEPS
        return last_j - first_j if is_whole else None, last_s - first_s


def throttle_reasons(masks: Iterable[float]) -> tuple[str, ...]:
    """Return the names of the reasons set in any of NVML's masks."""
    bits = {bit for mask in masks for bit in THROTTLE_REASONS if int(mask) & bit}
    return tuple(name for bit, name in THROTTLE_REASONS.items() if bit in bits)


class HostSensor:
    """Reads what other processes use of the host's CPU, which launches a GPU's kernels."""

    monitor = "host"
    note = "NVML does not answer: utilization, memory in use, power, clocks and energy of the GPU are unknown"

    def __init__(self) -> None:
        import psutil

        self._process, self._cores = psutil.Process(), psutil.cpu_count() or 1
        self._machine_pct: Callable[[], float] = psutil.cpu_percent
        self._shares()  # psutil's first answers are of no time at all

    def _shares(self) -> tuple[float, float]:
        """Return the percent of all cores that this process and others used since the last call."""
        own_pct = min(100.0, self._process.cpu_percent() / self._cores)  # of a moment it may read more
        return own_pct, max(0.0, self._machine_pct() - own_pct)

    def sample(self) -> Reading:
        """Return others_cpu_pct since the last call."""
        return {"others_cpu_pct": self._shares()[1]}


class ProcessSensor(HostSensor):
    """Reads this process: its share of all cores, what others use of them, and its resident set."""

    monitor, note = "process", ""

    def sample(self) -> Reading:
        """Return utilization_pct and others_cpu_pct since the last call, and memory_mib now."""
        own_pct, others_pct = self._shares()
        memory_mib = self._process.memory_info().rss / MIB
        return {"utilization_pct": own_pct, "others_cpu_pct": others_pct, "memory_mib": memory_mib}


class NvmlSensor(HostSensor):
    """Reads one GPU through NVML, and what other processes use of the host's CPU.

    A metric that the device refuses at first is not asked again; one that fails later is missing from that reading
    only. A process counts once it holds a context on the device: containers hide which processes those are, not how
    many.

    Parameters
    ----------
    uuid
        The device's UUID as torch gives it, so that CUDA_VISIBLE_DEVICES cannot mislead; None takes the first.

    Raises
    ------
    pynvml.NVMLError
        NVML does not answer, or does not know the device.
    """

    monitor = "nvml"

    def __init__(self, uuid: str | None = None) -> None:
        import pynvml

        super().__init__()
        pynvml.nvmlInit()
        handle = self._handle(uuid) if uuid else pynvml.nvmlDeviceGetHandleByIndex(0)
        probes: dict[str, Callable[[], float]] = {
            "utilization_pct": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "memory_mib": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / MIB,
            "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "energy_j": lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000,
            "throttle": lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
            "gpu_processes": lambda: len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        }
        self._probes: dict[str, Callable[[], float]] = {}
        for name, probe in probes.items():
            with suppress(pynvml.NVMLError):
                probe()
                self._probes[name] = probe
        refused = sorted(probes.keys() - self._probes.keys())
        self.note = f"NVML does not tell {', '.join(refused)}" if refused else ""

    @staticmethod
    def _handle(uuid: str) -> Any:
        import pynvml

        bare = uuid.removeprefix("GPU-")
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{bare}")
        except pynvml.NVMLError:
            return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{bare}")  # a part of one

    def sample(self) -> Reading:
        """Return the metrics that this device has, without those that fail now.

        Raises
        ------
        OSError
            All of them fail.
        """
        import pynvml

        reading: Reading = {}
        for name, probe in self._probes.items():
            with suppress(pynvml.NVMLError):
                reading[name] = float(probe())
        if self._probes and not reading:
            raise OSError("NVML no longer answers")
        return reading | super().sample()


def open_sensor(device: str | torch.device) -> HostSensor:
    """Return the sensor for a torch device. A GPU's metrics come from NVML alone: where it fails, they stay empty."""
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return ProcessSensor()
    import pynvml

    try:
        return NvmlSensor(str(torch.cuda.get_device_properties(device).uuid))
    except (pynvml.NVMLError, AttributeError):  # torch does not tell the UUID of every GPU
        return HostSensor()


def used_memory_mib(device: str | torch.device) -> float | None:
    """Return the memory in use without what torch's allocator holds unused; None where no sensor tells.

    Read before a model is loaded, it is the baseline: the model is loaded into what the allocator still holds.
    """
    import torch

    try:
        memory_mib = open_sensor(device).sample().get("memory_mib")
    except OSError:
        return None
    if memory_mib is None or torch.device(device).type != "cuda":
        return memory_mib
    return memory_mib - (torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / MIB
