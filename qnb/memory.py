"""Memory: recognise that it ran out, give it back, limit it, read the host's peak, and count the KV cache's bytes."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from qnb.device import Device

MIB = 2**20
ROOM_BYTES = 6 << 30  # of a GPU, which models that are kept leave to work in
# the texts of torch, the driver and cuBLAS for one event
_OUT_OF_MEMORY = ("out of memory", "cublas_status_alloc_failed", "cublas_status_not_initialized")
planned_bytes = 0  # free memory that batches are planned for, where several workers share a study; 0: what is free
captures: WeakSet[Any] = WeakSet()  # captured CUDA graphs, which must find cuBLAS's workspaces where they were
_kept: dict[Any, Any] | None = None  # models, within `models_kept`
_is_frozen = False  # whether what was imported is left out of collections
_host_peak_mib = 0.0  # the largest that was read, with children that have ended since


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether `error` says that memory ran out, or was raised while such an error was handled."""
    import torch

    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return any(text in str(error).lower() for text in _OUT_OF_MEMORY) or is_out_of_memory(error.__context__)


def places(model: PreTrainedModel) -> list[torch.device]:
    """Return the devices that a model is spread over, one for most."""
    import torch

    spread = {*(getattr(model, "hf_device_map", None) or {"": model.device}).values()} - {"disk"}
    names = (f"cuda:{each}" if isinstance(each, int) else str(each) for each in spread)
    return [torch.device(name) for name in sorted(names)]


def release(workspaces: bool = False) -> None:
    """Collect garbage, empty the GPU's cache, and return the heap's free pages to the system.

    Parameters
    ----------
    workspaces
        Free cuBLAS's workspaces too (32 MiB a stream on an H100), unless a captured step needs them. A workspace that
        stands between the pieces of a model's memory keeps all of it from the device.
    """
    import torch

    global _is_frozen
    gc.collect()
    # imported libraries stay: a collection need not walk through them again, which takes 0.2 s; a model may go
    if not _is_frozen and not (torch.cuda.is_initialized() and torch.cuda.memory_allocated()):
        _is_frozen = True
        gc.freeze()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if workspaces and not captures:
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def released() -> Iterator[None]:
    """Give memory back when the block ends, including what the frames of a failure hold.

    A notebook keeps its last traceback, and with it every local variable of a failed measurement.
    """
    try:
        yield
    except BaseException as error:
        failure: BaseException | None = error
        while failure is not None:
            clear_frames(failure.__traceback__)
            failure = failure.__context__  # "from" sets this one too
        raise
    finally:
        release(workspaces=True)


@contextmanager
def young_collections() -> Iterator[None]:
    """Collect young garbage alone while the block runs: a full collection walks through all requests of a task."""
    thresholds = gc.get_threshold()
    gc.set_threshold(*thresholds[:2], 2**31 - 1)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


@contextmanager
def models_kept() -> Iterator[None]:
    """Load each model once for all stages in the block: a GPU keeps as many as leave it room to work in.

    It keeps one where batches are planned for the memory beside it.
    """
    keep_models(True)
    try:
        yield
    finally:
        keep_models(False)


def keep_models(are_kept: bool) -> None:
    """Keep models from now on, as in `models_kept`, or give those that were kept back."""
    global _kept
    if are_kept:
        _kept = _kept or {}
    elif _kept is not None:
        _kept = None
        release(workspaces=True)


def kept(load: Callable[..., PreTrainedModel], folder: Path, precision: Any, device: Device) -> PreTrainedModel:
    """Return what `load` returns; within `models_kept`, return it again for the same arguments."""
    key = folder, precision, device
    if _kept is None or device.kind == "cpu":
        return load(*key)
    if key not in _kept:
        import torch

        needed_bytes = ROOM_BYTES + sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if _kept and (planned_bytes or free_bytes(torch.device(device.place)) < needed_bytes):
            _kept.clear()
            release()
        _kept[key] = load(*key)
    return _kept[key]


@contextmanager
def limited(device_memory_mib: float, allowed_mib: float) -> Iterator[None]:
    """Hold the GPU's allocator to `allowed_mib` within the block; 0 leaves it the whole device."""
    if not allowed_mib:
        yield
        return
    import torch

    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed_mib / device_memory_mib))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that may still be allocated: free memory and the allocator's unused, up to its limit."""
    if device.type != "cuda":
        import psutil

        return int(psutil.virtual_memory().available)
    import torch

    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    return int(min(free + torch.cuda.memory_reserved(device), allowed) - torch.cuda.memory_allocated(device))


def bytes_for_batches(device: torch.device) -> int:
    """Return the bytes that batches are planned for: the free ones, or what all workers of a study plan for."""
    return planned_bytes or free_bytes(device)


def host_peak_mib() -> float:
    """Return the most of the host's memory that this process and its children held, in MiB; 0 where Linux is absent.

    It is the sum of each one's own peak of resident memory, which is the peak of their sum or more. A child counts if
    it was alive at a call. `getrusage` is no way to count those that ended: a child begins with its parent's peak.
    """
    global _host_peak_mib
    import psutil

    process, peak_kib = psutil.Process(), 0
    for each in (process, *process.children(recursive=True)):
        with suppress(OSError):  # it has ended, or this is not Linux
            status = Path(f"/proc/{each.pid}/status").read_text(encoding="utf-8")
            peak_kib += sum(map(int, re.findall(r"VmHWM:\s*(\d+) kB", status)))
    _host_peak_mib = max(_host_peak_mib, peak_kib / 1024)
    return _host_peak_mib


def describe_host(peak_mib: float) -> str:
    """Return how much memory this host has, and how much of a host's a study took at most; 0 where none was read."""
    import psutil

    total = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    return f"{total}; the study took at most {peak_mib / 1024:.1f} GiB" if peak_mib else total


def kv_cache_bytes_per_token(config: PretrainedConfig, bytes_per_value: int) -> int:
    """Return the bytes that one token's keys and values take in all layers: 2 x layers x KV heads x head size.

    Raises
    ------
    AttributeError
        The model has no attention heads, as a state-space model.
    """
    text = config.get_text_config()
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * kv_heads * head_size * bytes_per_value)
