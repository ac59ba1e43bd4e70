"""Tell every Python process of a rehearsal that its GPU is a T4; this folder has to be the first of PYTHONPATH.

Taken away: bfloat16 units, flash attention (flex attention needs no word: qnb asks for the capability), and memory
beyond 15 GiB. Triton and torch.compile still build for the card that it is. Speed stays that card's.
"""

import sys
from importlib import abc, util
from types import ModuleType

MEMORY_BYTES = 15 * 2**30
BUILDERS = ("triton", "torch._dynamo", "torch._inductor")  # modules that have to know the card as it is


def take_from_torch(torch: ModuleType) -> None:
    """Patch what programs ask about the card; nothing here makes a context on it."""
    cuda = torch.cuda
    capability, hold = cuda.get_device_capability, cuda.set_per_process_memory_fraction

    def get_device_capability(device=None):
        asking = sys._getframe(1).f_globals["__name__"]
        return capability(device) if asking.startswith(BUILDERS) else (7, 5)

    def set_per_process_memory_fraction(fraction, device=None):
        total = cuda.get_device_properties(cuda.current_device()).total_memory
        hold(min(fraction, MEMORY_BYTES / total), device)

    cuda.get_device_capability = get_device_capability
    cuda.set_per_process_memory_fraction = set_per_process_memory_fraction
    cuda.is_bf16_supported = lambda including_emulation=True: including_emulation
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    cuda._lazy_call(lambda: set_per_process_memory_fraction(1.0))  # once there is a context


def take_from_dynamo(interface: ModuleType) -> None:
    interface.CudaInterface.is_bf16_supported = staticmethod(lambda including_emulation=False: including_emulation)


def take_from_step(decode_step: ModuleType) -> None:
    decode_step.BACKENDS = decode_step.BACKENDS[1:]


CHANGES = {
    "torch": take_from_torch,
    "torch._dynamo.device_interface": take_from_dynamo,
    "qnb.speed.decode_step": take_from_step,
}


class Changing(abc.MetaPathFinder):
    """Change a module once it has been imported."""

    def find_spec(self, name, path, target=None):
        if (change := CHANGES.pop(name, None)) is None:
            return None
        if (spec := util.find_spec(name)) is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Changing())
