"""Measure the peaks of a device: the rates of the simplest work there is, which a decode step is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from time import sleep
from typing import Any

import torch
from torch.utils.benchmark import Timer

from qnb.flags import Flag
from qnb.memory import MIB
from qnb.speed.monitor import LOOK_BACK_S, Sensor, Window, flags_of

# sizes that fill a device without taking long: MiB copied, rows of a square product
SIZES = {"cuda": (1024, 8192), "cpu": (64, 512)}
TYPES = ("float32", "float16", "bfloat16", "int8")
FP8 = "float8_e4m3fn"  # of a GPU
IDLE_S = 1.5


@dataclass(frozen=True, slots=True)
class DevicePeaks:
    """The rates that a device reaches at most, and its power when idle."""

    copy_bytes_per_s: float | None = None  # read and written, by a copy larger than any cache
    matmul_flop_per_s: dict[str, float] = field(default_factory=dict)  # of a square product, by type; int8 counts too
    idle_power_w: float | None = None  # of a GPU that waits with a context on it
    flags: tuple[Flag, ...] = ()  # whether other processes used the device meanwhile

    def columns(self, flops_by_type: Mapping[str, float] | None) -> dict[str, Any]:
        """Return what a timed row keeps of the peaks; its operations are done one type after the other."""
        rates, flop_per_s = self.matmul_flop_per_s, None
        if flops_by_type and flops_by_type.keys() <= rates.keys():
            least_s = sum(flops / rates[name] for name, flops in flops_by_type.items())
            flop_per_s = sum(flops_by_type.values()) / least_s
        peaks = {"peak_bytes_per_s": self.copy_bytes_per_s, "peak_flop_per_s": flop_per_s}
        return {**peaks, "idle_power_w": self.idle_power_w}


def measure_peaks(device: torch.device | str) -> DevicePeaks:
    """Measure a GPU's power when idle, then a copy, then square products; float32 is what PyTorch does by default."""
    device = torch.device(device)
    copied_mib, side = SIZES[device.type]
    flop_per_s = {}
    with Window(Sensor(device)) as window:
        idle_power_w = _idle_power_w(device) if device.type == "cuda" else None
        source = torch.ones(copied_mib * MIB, dtype=torch.uint8, device=device)
        copy_s = _fastest_s(partial(torch.empty_like(source).copy_, source))
        scale = torch.ones((), device=device)
        scaled = partial(torch._scaled_mm, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)
        functions: dict[str, Any] = {"int8": torch._int_mm, FP8: scaled}
        for name in (*TYPES, *([FP8] if device.type == "cuda" else [])):
            matrix = torch.ones(side, side, device=device).to(getattr(torch, name))
            multiply = functions.get(name, torch.mm)
            with suppress(RuntimeError, ValueError):  # the device has no such product
                # transposed, as layers have it: the int8 units take the right matrix by columns, or crawl
                flop_per_s[name] = 2 * side**3 / _fastest_s(partial(multiply, matrix, matrix.t()))
    disturbance = Flag.GPU_SHARED if device.type == "cuda" else Flag.CPU_SHARED
    flags = tuple(flag for flag in flags_of(window.usage) if flag == disturbance)
    return DevicePeaks(2 * copied_mib * MIB / copy_s, flop_per_s, idle_power_w, flags)


def _idle_power_w(device: torch.device) -> float | None:
    """Return the mean power of a GPU that nothing runs on; None where it is not told."""
    torch.zeros(1, device=device)  # a context keeps the clocks from falling
    torch.cuda.synchronize(device)
    sleep(LOOK_BACK_S)
    with Window(Sensor(device)) as window:
        sleep(IDLE_S)
    return window.usage.power_w


def _fastest_s(work: Callable[[], Any]) -> float:
    """Return the fastest of several runs, in seconds."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=0.2).times)
