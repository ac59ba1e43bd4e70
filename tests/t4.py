"""A GPU that is told to be a T4, and what a T4 makes of the kernels that were compiled for another."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._dynamo.device_interface import CudaInterface
from torch.nn.attention import sdpa_kernel

from qnb.speed import decode_step, layers

SHARED_BYTES = 64 * 2**10  # shared memory of a block


@contextmanager
def a_t4():
    """Take bfloat16 units, flash attention and flex attention from a GPU; Triton still builds for it as it is."""
    import triton

    triton.runtime.driver.active.get_current_target()  # it keeps the function that it asks from then on
    own, without_flash = CudaInterface.get_compute_capability(), decode_step.BACKENDS[1:]
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(without_flash):
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        patch.setattr(CudaInterface, "get_compute_capability", lambda device=None: own)
        patch.setattr(CudaInterface, "is_bf16_supported", lambda including_emulation=False: including_emulation)
        patch.setattr(decode_step, "BACKENDS", without_flash)
        patch.setattr(layers, "attend_flex", None)
        yield


def shared_bytes():
    """Compile all kernels of Triton's cache for a T4, as they were tuned here; list the shared memory of each."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile as compile_kernel

    needed = []
    for kernel in sorted(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.ttir")):
        tuned = json.loads(kernel.with_suffix(".json").read_text())
        options = {name: tuned[name] for name in ("num_warps", "num_stages")}
        needed.append(compile_kernel(str(kernel), GPUTarget("cuda", 75, 32), options).metadata.shared)
    return needed
