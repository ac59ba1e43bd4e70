"""A window of samples over the device while something runs.

With an NVIDIA GPU the samples come from NVML; without one from the process itself. NVML's utilization is the share
of a short period in which any kernel ran, not how much of the GPU worked. Memory is the whole device's, less what
was in use when the window opened: containers such as Colab's hide the memory of single processes. NVML's utilization
and power are means over up to a second before a reading, and its energy counter moves in steps: a window of less than
a second has none of the three. The thread reads counters only, never the model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from types import TracebackType
from typing import Any

from qnb.device import MIB

Sample = dict[str, float]

SETTLED_S = 1.0  # what NVML's rates look back over at most (NVML API reference)
ENERGY_STEPS = 5  # times the energy counter must have moved in a window before a difference of it means anything
COVERED = 0.95  # of a window, by the energy counter, for its joules to be the window's
OTHERS_PCT = 10.0  # of the CPU in other hands, from which on a row says so
# NVML's bits (nvmlClocksEventReasons) that say the clocks are held below what the work asks for
THROTTLES = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


@dataclass(frozen=True, slots=True)
class Usage:
    """What a window saw; None where the source does not tell.

    Source: NVML API reference (utilization rates, memory info, power usage, clock info); psutil's process view.
    """

    source: str  # "nvml" or "process"
    samples: int
    duration_s: float
    utilization_pct: float | None = None  # mean; of the GPU, or of all the machine's cores
    memory_mib: float | None = None  # mean; device in use above the baseline, or resident set
    peak_memory_mib: float | None = None
    baseline_mib: float | None = None  # device in use when the window opened; 0 for a process
    power_w: float | None = None  # mean: energy by time where the counter told it, else of the readings
    clock_mhz: float | None = None  # mean, streaming multiprocessors
    energy_j: float | None = None  # of the whole device; None where its counter moved too few times
    energy_s: float | None = None  # seconds that the energy counter was read over; None where there is none
    throttle: tuple[str, ...] = ()  # why clocks were held down, at any sample
    processes: int | None = None  # most that used the GPU at once, this one among them
    others_pct: float | None = None  # mean of all the machine's cores, by other processes
    failures: int = 0  # readings of nothing at all
    missing: dict[str, int] = field(default_factory=dict)  # a metric that failed: in how many of the readings

    @property
    def flags(self) -> list[str]:
        """What makes this window unlike an undisturbed one."""
        found = [f"throttled: {', '.join(self.throttle)}"] if self.throttle else []
        if (self.processes or 0) > 1:
            found.append("another process used the GPU")
        if (self.others_pct or 0.0) > OTHERS_PCT:
            found.append(f"other processes used {self.others_pct:.0f} % of the CPU")
        gone = [f"{name} in {count} of {self.samples}" for name, count in self.missing.items()]
        if self.failures:
            gone.append(f"{self.failures} readings whole")
        if gone:
            found.append(f"samples missing: {', '.join(gone)}")
        if self.source == "nvml" and self.duration_s < SETTLED_S:
            found.append("too short for utilization, power and energy")
        elif (
            self.energy_s is not None
            and self.energy_j is None
            and not self.failures
            and "energy_j" not in self.missing
        ):
            found.append("too short for the energy counter")
        return found


BUSY_LIMITS = "the device's limits were measured on a busy machine"  # a row's flag: what bounds it is in doubt


def disturbed(flags: Any) -> bool:
    """Return whether a row's flags, a list or a table's text, say that other processes worked meanwhile."""
    text = "; ".join(map(str, flags)) if isinstance(flags, list) else flags
    return isinstance(text, str) and "other process" in text


class Window:
    """Samples `sample()` every `period_s` seconds in a thread between ``with`` and its end.

    Parameters
    ----------
    sample
        Returns one reading: any of utilization_pct, memory_mib, power_w, clock_mhz, energy_j, throttle, processes.
    source
        What `sample` reads, written into the usage.
    period_s
        Seconds between two samples.
    baseline_mib
        Memory in use before anything was loaded, subtracted from every reading.

    Raises
    ------
    Nothing: a reading that fails is counted in `Usage.failures`; what is timed goes on.
    """

    def __init__(
        self, sample: Callable[[], Sample], source: str, period_s: float = 0.1, baseline_mib: float | None = 0.0
    ) -> None:
        self._sample, self._source, self._period_s = sample, source, period_s
        self._baseline_mib = baseline_mib
        self._begun, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="qnb-monitor", daemon=True)
        self.readings: list[Sample] = []  # each with t_s, seconds since the window opened
        self._failures = 0
        self._opened = self._closed = 0.0

    def _read(self) -> None:
        try:
            reading = self._sample()
        except Exception:  # any driver error: a broken sensor must not break a measurement
            self._failures += 1
            return
        self.readings.append({"t_s": time.perf_counter() - self._opened, **reading})

    def _watch(self) -> None:
        """Read from start to end, in one thread: psutil's shares are of the time since that thread last asked."""
        self._read()
        self._begun.set()
        while not self._stop.wait(self._period_s):
            self._read()
        self._read()

    def __enter__(self) -> Window:
        self._opened = time.perf_counter()
        self._thread.start()
        self._begun.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._closed = time.perf_counter()

    @property
    def usage(self) -> Usage:
        """Means and peaks over the window."""

        def column(name: str) -> list[float]:
            return [reading[name] for reading in self.readings if reading.get(name) is not None]

        within_s = SETTLED_S if self._source == "nvml" else 0.0  # what is read before looks back to before the window

        def mean(name: str) -> float | None:
            """Weigh each reading by the time since the one before: the last may come right after another."""
            told = [(now[name], now["t_s"] - before["t_s"]) for before, now in pairwise(self.readings)
                    if name in now and now["t_s"] >= within_s]  # fmt: skip
            whole_s = sum(seconds for _, seconds in told)
            return sum(value * seconds for value, seconds in told) / whole_s if whole_s else None

        rate, power_w = mean("utilization_pct"), mean("power_w")
        base_mib = self._baseline_mib  # unknown: nothing can be said of what is above it
        memory = [] if base_mib is None else [value - base_mib for value in column("memory_mib")]
        energy_j, energy_s = self._energy()
        return Usage(
            source=self._source,
            samples=len(self.readings),
            duration_s=self._closed - self._opened,
            utilization_pct=None if rate is None else min(rate, 100.0),
            memory_mib=fmean(memory) if memory else None,
            peak_memory_mib=max(memory) if memory else None,
            baseline_mib=self._baseline_mib,
            power_w=energy_j / energy_s if energy_j and energy_s else power_w,
            clock_mhz=fmean(clock) if (clock := column("clock_mhz")) else None,
            energy_j=energy_j,
            energy_s=energy_s,
            throttle=throttles(column("throttle")),
            processes=int(max(processes)) if (processes := column("processes")) else None,
            others_pct=mean("others_pct"),
            failures=self._failures,
            missing={
                name: count
                for name in sorted({name for reading in self.readings for name in reading})
                if (count := len(self.readings) - len(column(name)))
            },
        )

    def _energy(self) -> tuple[float | None, float | None]:
        """Return the energy between the first and last reading that have it, and the seconds between them.

        None is told of a window that the counter was lost in, or that was too short for it.
        """
        read = [(reading["t_s"], reading["energy_j"]) for reading in self.readings if "energy_j" in reading]
        if not read:
            return None, None
        seconds = read[-1][0] - read[0][0]
        steps = sum(after != before for (_, before), (_, after) in pairwise(read))
        whole = seconds >= max(SETTLED_S, COVERED * (self._closed - self._opened))
        return (read[-1][1] - read[0][1] if whole and steps >= ENERGY_STEPS else None), seconds


def throttles(masks: Iterable[float]) -> tuple[str, ...]:
    """Return the names of the reasons set in any of NVML's masks."""
    seen = 0
    for mask in masks:
        seen |= int(mask)
    return tuple(name for bit, name in THROTTLES.items() if seen & bit)


class ProcessSensor:
    """Reads this process: share of all cores in use, and what others use of them; resident set."""

    source = "process"

    def __init__(self) -> None:
        import psutil

        self._process, self._cores = psutil.Process(), psutil.cpu_count() or 1
        self._process.cpu_percent()
        self._machine: Callable[[], float] = psutil.cpu_percent
        self._machine()

    def sample(self) -> Sample:
        """Return utilization_pct and others_pct since the last call, and memory_mib now."""
        mine = min(100.0, self._process.cpu_percent() / self._cores)  # of a moment it may read more
        return {
            "utilization_pct": mine,
            "others_pct": max(0.0, self._machine() - mine),
            "memory_mib": self._process.memory_info().rss / MIB,
        }


class NvmlSensor:
    """Reads one GPU through NVML; a metric the device refuses at first is not asked again.

    One that fails later is missing from that reading only. A process counts once it holds a context on the device;
    containers hide which processes those are, not how many.

    Parameters
    ----------
    uuid
        The device's UUID as torch gives it, so that CUDA_VISIBLE_DEVICES cannot mislead; None takes the first.

    Raises
    ------
    pynvml.NVMLError
        NVML or the device cannot be had.
    """

    source = "nvml"

    def __init__(self, uuid: str | None = None) -> None:
        import pynvml

        pynvml.nvmlInit()
        handle = self._named(uuid) if uuid else pynvml.nvmlDeviceGetHandleByIndex(0)
        probes: dict[str, Callable[[], float]] = {
            "utilization_pct": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "memory_mib": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / MIB,
            "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "energy_j": lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000,
            "throttle": lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
            "processes": lambda: len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        }
        self.probes: dict[str, Callable[[], float]] = {}
        for name, probe in probes.items():
            try:
                probe()
            except pynvml.NVMLError:
                continue
            self.probes[name] = probe

    @staticmethod
    def _named(uuid: str) -> Any:
        import pynvml

        bare = uuid.removeprefix("GPU-")
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{bare}")
        except pynvml.NVMLError:
            return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{bare}")  # a part of one

    def sample(self) -> Sample:
        """Return the metrics this device has, in the units their names say, without those that fail now."""
        import pynvml

        found: Sample = {}
        for name, probe in self.probes.items():
            with suppress(pynvml.NVMLError):
                found[name] = float(probe())
        if self.probes and not found:
            raise OSError("NVML answers no more")
        return found


def sensor(device: Any) -> ProcessSensor | NvmlSensor:
    """Return the sensor for a torch device: NVML on CUDA where a driver answers, else the process."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        import pynvml

        try:
            return NvmlSensor(str(torch.cuda.get_device_properties(device).uuid))
        except pynvml.NVMLError:
            pass
    return ProcessSensor()
