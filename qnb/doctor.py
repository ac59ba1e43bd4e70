"""What this machine is, and what it can run."""

import shutil

from qnb import device
from qnb.provenance import ROOT

NEEDED_GIB = 2  # of memory and of disk, for the demo


def doctor() -> int:
    """Print what this machine is and what it can run; return 1 when it cannot run the demo."""
    if absent := [name for name, version in device.versions().items() if version == "absent"]:
        print(f"cannot run the demo: {', '.join(absent)} not installed; pip install -r requirements.txt")
        return 1
    import psutil
    from huggingface_hub import get_token

    from qnb.quantize import checkpoint, sources

    here = device.detect()
    free_gib = {"memory": psutil.virtual_memory().available / 2**30, "disk": shutil.disk_usage(ROOT).free / 2**30}
    problems = [f"{gib:.1f} GiB of {what} are free, the demo needs {NEEDED_GIB}"
                for what, gib in free_gib.items() if gib < NEEDED_GIB]  # fmt: skip
    with checkpoint.quiet():
        if not can_quantize(here.place):
            problems.append("bitsandbytes cannot quantize on this device")
    can_run = "profiles demo and smoke; colab and paper want a GPU"
    if here.kind == "cuda":  # 16-bit weights, and a batch's cache and activations beside them
        can_run = f"every profile; BF16 models up to about {here.memory_mib / 1024 / 2.5:.0f} billion parameters"
    facts = {
        **here.facts(device.versions()),
        **{f"{what} free": f"{gib:.1f} GiB" for what, gib in free_gib.items()},
        "hub token": "present" if get_token() else "absent",
        "built-in model": "in the cache" if sources.embedded_is_cached() else "fetched from PyPI on first use, 93 MB",
        "can run": "nothing" if problems else can_run,
    }
    print("\n".join(f"{name:15} {fact}" for name, fact in facts.items()))
    for problem in problems:
        print(f"cannot run the demo: {problem}")
    return 1 if problems else 0


def can_quantize(place: str) -> bool:
    """Return whether bitsandbytes can quantize a matrix on a device and multiply by it."""
    import torch

    try:
        from bitsandbytes import functional

        ones = torch.ones(64, 64, device=place)
        packed, state = functional.quantize_4bit(ones, quant_type="nf4")
        return bool(torch.equal(functional.dequantize_4bit(packed, state), ones))
    except (ImportError, RuntimeError, AssertionError, OSError):
        return False
