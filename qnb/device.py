"""What this machine is: device, memory, 16-bit types, library versions."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnb import __version__
from qnb.errors import InputError
from qnb.memory import MIB
from qnb.provenance import REPLAY

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CHOICE = "QNB_DEVICE"  # the environment's variable for what "auto" means
LIMIT = "QNB_MEMORY_MIB"  # the one for how much of its memory a device has, to rehearse a smaller one
WEIGHTS_SHARE = 0.8  # of a device's memory, that weights may take; the rest is for working tensors and the KV cache
LIBRARIES = ("torch", "transformers", "bitsandbytes", "lm_eval", "datasets", "accelerate")


@dataclass(frozen=True, slots=True)
class Device:
    """The device a study runs on."""

    kind: str  # "cuda" or "cpu"
    name: str
    memory_mib: float
    bf16: str  # "native", or "emulated" where the hardware has no bfloat16 units
    driver: str  # "" without a GPU
    index: int = 0  # of the GPU, as torch counts those it sees
    capability: tuple[int, int] = (0, 0)  # of a GPU: what it can compute with
    spread: int = 1  # GPUs, from the first one on, that one model is spread over; on a CPU, the memory and the disk

    @property
    def place(self) -> str:
        """Its name for torch."""
        return f"cuda:{self.index}" if self.kind == "cuda" else self.kind

    @property
    def places(self) -> tuple[str, ...]:
        """The names of all that a model is spread over."""
        is_spread = self.kind == "cuda" and self.spread > 1
        return tuple(f"cuda:{index}" for index in range(self.spread)) if is_spread else (self.place,)

    @property
    def device_map(self) -> dict[str, Any]:
        """How transformers places a model: on this device, or by layers over several."""
        if self.spread == 1:
            return {"device_map": self.place}
        places = range(self.spread) if self.kind == "cuda" else ["cpu"]
        most = f"{int(WEIGHTS_SHARE * self.memory_mib)}MiB"
        return {"device_map": "auto", "max_memory": dict.fromkeys(places, most)}

    @property
    def half(self) -> str:
        """The 16-bit type that quantized formats compute in here; float32 on a CPU without bfloat16 units."""
        return "bfloat16" if self.bf16 == "native" else "float16" if self.kind == "cuda" else "float32"

    def facts(self, versions: Mapping[str, str]) -> dict[str, str]:
        """Return what people ask of a device, beside the versions of the libraries that use it."""
        driver = f", driver {self.driver or 'not known'}" if self.kind == "cuda" else ""
        return {
            "device": f"{self.name}, {self.memory_mib / 1024:.1f} GiB{driver}",
            "bfloat16": self.bf16,
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        }

    def use(self) -> None:
        """Let torch mean it where it says ``"cuda"``. On a GPU this makes a context, hundreds of MiB of its memory."""
        if self.kind == "cuda":
            import torch

            torch.cuda.set_device(self.index)


def detect(wanted: str = "auto") -> Device:
    """Describe a device; nothing is put on it.

    Parameters
    ----------
    wanted
        ``"cpu"``, ``"cuda"``, ``"cuda:1"`` for the second GPU, or ``"auto"``: what the variable QNB_DEVICE
        names, else the first GPU, else the CPU.

    Raises
    ------
    InputError
        There is no such device.
    """
    if replayed := os.environ.get(REPLAY):
        return Device(**json.loads(replayed))
    wanted = os.environ.get(CHOICE, wanted) if wanted == "auto" else wanted
    if not isinstance(wanted, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", wanted):
        raise InputError(f"device is {wanted!r}; give 'auto', 'cpu', 'cuda', or 'cuda:1' for the second GPU")
    index, limit_mib = int(wanted.partition(":")[2] or 0), float(os.environ.get(LIMIT, "inf"))
    if wanted != "cpu":
        import torch  # names the GPUs; NVML only reads them

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if index < gpus:
            card = torch.cuda.get_device_properties(index)
            capability = torch.cuda.get_device_capability(f"cuda:{index}")
            bf16 = "emulated" if capability < (8, 0) else "native"
            memory_mib = min(limit_mib, card.total_memory / MIB)
            return Device("cuda", card.name, memory_mib, bf16, _driver(), index, capability)
    if wanted.startswith("cuda"):
        seen = f"{gpus or 'no'} NVIDIA GPU{'s' * (gpus > 1)}"
        raise InputError(f"device is {wanted!r}, and PyTorch sees {seen} here; take 'auto'")
    import psutil

    bf16 = "native" if "bfloat16" in cpu_types() else "emulated"
    memory_mib = min(limit_mib, psutil.virtual_memory().total / MIB)
    return Device("cpu", host(), memory_mib, bf16, "")


def recorded(row: Mapping[str, Any]) -> Device:
    """Return the device that a ledger's row was measured on."""
    kind = "cpu" if row["device"] == row.get("host") else "cuda"
    return Device(kind, row["device"], row.get("device_memory_mib", 0.0), row["bf16"], row["driver"])


def is_before_ampere(place: torch.device | str) -> bool:
    """Return whether a device is a GPU without units for bfloat16, and without flash attention."""
    import torch

    return torch.device(place).type == "cuda" and torch.cuda.get_device_capability(place) < (8, 0)


def is_emulated(model: PreTrainedModel) -> bool:
    """Return whether a model is in bfloat16 on a GPU without units for it; torch.compile then refuses it."""
    return str(model.dtype) == "torch.bfloat16" and is_before_ampere(model.device)


def cpu_types() -> set[str]:
    """Return the 16-bit types that the CPU has units for."""
    flags = set(_cpu_field("flags").split())
    units = {"bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}, "float16": {"avx512_fp16", "amx_fp16"}}
    return {name for name, known in units.items() if known & flags}


def host() -> str:
    """Return the CPU's model and its cores: eager rows depend on how fast it launches kernels."""
    return f"{_cpu_field('model name') or platform.machine()}, {os.cpu_count()} cores"


def _cpu_field(name: str) -> str:
    path = Path("/proc/cpuinfo")  # of Linux
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _driver() -> str:
    """Return the NVIDIA driver's version, or nothing where NVML does not answer."""
    with suppress(Exception):  # nothing depends on it; some answers are no text
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    return ""


def versions() -> dict[str, str]:
    """Return the versions that decide what is measured; "absent" for a library that is not installed."""
    found = {"qnb": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
