"""What this machine is, and what it can run."""

from __future__ import annotations

import shutil

from qnb import device
from qnb.device import Device
from qnb.provenance import ROOT

GIB = 2**30
NEEDED_GIB = 2  # of memory and of disk, for the demo


def doctor() -> int:
    """Print what this machine is and what it can run; return 1 when it cannot run the demo."""
    versions = device.versions()
    if absent := [name for name, version in versions.items() if version == "absent"]:
        print(f"cannot run the demo: {', '.join(absent)} not installed; pip install -r requirements.txt")
        return 1
    import psutil
    from huggingface_hub import get_token

    from qnb.quantize import checkpoint, sources

    here = device.detect()
    free = {"memory": psutil.virtual_memory().available / GIB, "disk": shutil.disk_usage(ROOT).free / GIB}
    with checkpoint.quiet():
        quantizes = can_quantize(here.place)
    problems = [f"{gib:.1f} GiB of {what} are free, the demo needs {NEEDED_GIB}"
                for what, gib in free.items() if gib < NEEDED_GIB]  # fmt: skip
    if not quantizes:
        problems.append("bitsandbytes cannot quantize on this device")
    facts = {
        "device": f"{here.name}, {here.memory_mib / 1024:.1f} GiB",
        "driver": here.driver or "no GPU",
        "bfloat16": here.bf16,
        "memory free": f"{free['memory']:.1f} GiB",
        "disk free": f"{free['disk']:.1f} GiB",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "hub token": "present" if get_token() else "absent",
        "embedded model": "in the cache" if sources.embedded_is_cached() else "fetched from PyPI on first use, 93 MB",
        "bitsandbytes": "quantizes here" if quantizes else "does not quantize here",
        "can run": "nothing" if problems else _suitable(here),
    }
    for name, fact in facts.items():
        print(f"{name:15} {fact}")
    for problem in problems:
        print(f"cannot run the demo: {problem}")
    return 1 if problems else 0


def can_quantize(place: str) -> bool:
    """Return whether bitsandbytes can quantize a matrix on a device and multiply by it."""
    import torch

    ones = torch.ones(64, 64, device=place)
    try:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(ones, quant_type="nf4")
        return bool(torch.equal(functional.dequantize_4bit(packed, state), ones))
    except (ImportError, RuntimeError, NotImplementedError, OSError):
        return False


def _suitable(here: Device) -> str:
    """Return the studies that a device is fit for, in words."""
    if here.kind == "cpu":
        return "profiles demo and smoke; colab and paper want a GPU"
    largest = int(here.memory_mib / 1024 / 2.5)  # 16-bit weights, and a batch's cache and activations beside them
    return f"every profile; BF16 models up to about {largest} billion parameters"
