"""What a format needs to run here, and what a loaded model's layers really multiply by.

A library may leave a layer as it was, or multiply in another type where its own kernels refuse, without a word.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from qnb.device import Device
from qnb.errors import InputError
from qnb.precision import Precision

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PLAIN = {"bfloat16", "float16", "float32"}
SEQUENCES = (1, 16, 64)  # of one token each, that are traced: kernels differ by the number of rows


def check_runnable(precision: Precision, device: Device) -> None:
    """Refuse a format that cannot be made or run here, before anything is.

    Raises
    ------
    InputError
        A package is missing, or the GPU's compute capability is too low.
    """
    if precision.quantized and not find_spec(precision.library):
        raise InputError(f"precision {precision.name!r} needs `pip install {precision.library}`; others work without")
    if precision.capability and tuple(device.capability) < precision.capability:
        needs, has = (".".join(map(str, each)) for each in (precision.capability, device.capability))
        here = f"{device.name} has {has if device.kind == 'cuda' else 'none'}"
        raise InputError(f"precision {precision.name!r} needs capability {needs} or later, and {here}; leave it out")


def linear_layers(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """Yield the layers that multiply by a matrix, without the output head."""
    head = model.get_output_embeddings()
    for module in model.modules():
        is_leaf = not any(module.children())  # a whole model may be named after its linear attention
        if module is not head and is_leaf and re.search("Linear|Conv1D", type(module).__name__):
            yield module


def main_kind(model: PreTrainedModel) -> str:
    """Return what most layers multiply by that are quantized, such as "4-bit, MarlinLinear"; else their plain type."""
    kinds = Counter(map(_kind, linear_layers(model)))
    return max(kinds, key=lambda kind: (kind not in PLAIN, kinds[kind]), default="")


def _kind(layer: torch.nn.Module) -> str:
    """Return what a layer multiplies by: a plain type, or the bits and the class of its library."""
    import torch

    weight: Any = getattr(layer, "weight", None)
    is_plain = type(layer) is torch.nn.Linear or type(layer).__name__ == "Conv1D"
    if is_plain and type(getattr(weight, "data", None)) is torch.Tensor:
        return str(weight.dtype).removeprefix("torch.")
    bits = getattr(layer, "bits", None) or {"Params4bit": 4, "Int8Params": 8}.get(type(weight).__name__)
    kind = type(layer if type(layer) is not torch.nn.Linear else weight)
    name = f"{kind.__module__.partition('.')[0]} {kind.__name__}"
    return f"{bits}-bit, {name}" if bits else name


def ran_as(model: PreTrainedModel, precision: Precision) -> str:
    """Return what a format's layers multiply by; on a GPU, also where other kernels stand in for a format's own.

    Raises
    ------
    RuntimeError
        No layer is quantized.
    """
    kind = main_kind(model)
    if precision.weight not in kind:
        raise RuntimeError(f"{precision.library} quantized no layer of this model: they are {kind}")
    if model.device.type != "cuda":
        return kind
    stand_ins = {count: stand_in(precision.kernels, _trace(model, count)) for count in SEQUENCES}
    own = ", ".join(str(count) for count, name in stand_ins.items() if not name)
    others = [f"{name} at {count}" for count, name in stand_ins.items() if name]
    return f"{kind} ({'; '.join([f'its own kernels at {own} sequences'] * bool(own) + others)})"


def stand_in(pattern: str, kernels: Sequence[tuple[str, float]]) -> str:
    """Return the kernel that takes longest where none multiplies in a format; "" where one does.

    Parameters
    ----------
    pattern
        Of names of kernels that do; empty where nothing else can stand in.
    kernels
        Name and seconds of each.
    """
    if not pattern or any(re.search(pattern, name) for name, _ in kernels):
        return ""
    seconds = defaultdict[str, float](float)
    for name, time_s in kernels:
        seconds[re.sub(r"^void |[<(].*", "", name)] += time_s  # without template and arguments
    return max(seconds, key=lambda name: seconds[name], default="no kernel")


def kernel_times_s(trace: torch.profiler.profile) -> list[tuple[str, float]]:
    """Return the name and the seconds of each kernel of a trace, in no order."""
    from torch.autograd import DeviceType

    events = (event for event in trace.events() or () if event.device_type == DeviceType.CUDA)
    own = (event for event in events if not getattr(event, "is_user_annotation", False))
    times_s = ((event.name, event.time_range.elapsed_us() / 1e6) for event in own)
    return [(name, time_s) for name, time_s in times_s if not name.startswith(("Memcpy", "Memset"))]


def _trace(model: PreTrainedModel, sequences: int) -> list[tuple[str, float]]:
    """Return the kernels of one token's forward for some sequences."""
    import torch

    ids = torch.zeros(sequences, 1, dtype=torch.long, device=model.device)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # a profiler's first trace misses kernels
        with torch.profiler.profile(activities=activities) as trace, torch.inference_mode():
            model(ids)
            torch.cuda.synchronize(model.device)
    return kernel_times_s(trace)
