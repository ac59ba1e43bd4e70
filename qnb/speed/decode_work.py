"""Count the bytes and operations that a decode step needs at least, and trace a GPU's kernels.

A step runs for the count. Its operations tell what they read of the loaded tensors, whatever class a layer has. The
trace is a pass of its own, because its wall clock carries the profiler's cost.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel

from qnb.memory import MIB, release
from qnb.quantize.checkpoint import LoadedTensor, count_weights, loaded_tensors
from qnb.quantize.runtime import kernel_times_s, stand_in
from qnb.speed.decode_step import run_model
from qnb.speed.engines import Clock, Engine, Prompts

TRACED_STEPS = 8
LOOKUPS = {torch.ops.aten.embedding, torch.ops.aten.index, torch.ops.aten.index_select}  # read what they return
CONSTANT = torch.ops.aten.sum  # of a matrix: a step need not read it for that


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a decode step reads and computes, and the memory that takes.

    A value is None where it is not counted or traced.
    """

    weights_mib: float | None = None
    kv_cache_mib: float | None = None  # of the whole batch, when its last token is there
    bytes_per_step: float | None = None  # of the step in the middle of the new tokens
    flops_by_type: dict[str, float] | None = None  # by the type that multiplies
    kernel_s_per_token: float | None = None  # on a GPU
    kernels_per_token: float | None = None
    stand_in: str = ""  # the kernel that takes longest, where none multiplies in the format


def count_work(model: PreTrainedModel, batch_size: int, prompt_tokens: int, new_tokens: int) -> Work:
    """Count a decode step of a batch, from one that runs for one token.

    Weights are read once, whatever the batch. Of experts and of an embedding's rows, the expected number of distinct
    ones is read. Keys and values are those of the prompt and half the new tokens, or of a layer's window. A recurrent
    state is read and written. A product of (B, K) and (K, N) counts 2BKN operations. Each token is multiplied by its
    own experts.
    """
    weights = count_weights(model)  # of a checkpoint: on some CPUs the first product packs 4-bit weights closer
    cache: Any = DynamicCache(config=model.config)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        for _ in range(2):  # the second is a decode step
            step = _Step(model)
            with step, register_module_forward_hook(step.note_module):
                run_model(model, cache, input_ids=token)
    # 1) products with weights
    flops_by_type = defaultdict(float, {name: batch_size * flops for name, flops in step.flops_by_type.items()})
    bytes_per_step, kv_bytes = step.weight_bytes(batch_size), 0.0
    # 2) recurrent states, and keys and values
    heads = getattr(model.config.get_text_config(), "num_attention_heads", 0)
    for layer in cache.layers:
        states = [getattr(layer, name, None) for name in ("conv_states", "recurrent_states")]
        bytes_per_step += 2 * batch_size * sum(state.nbytes for state in tree_leaves(states) if state is not None)
        keys = getattr(layer, "keys", None)  # (1, H, T, S)
        if keys is not None:
            window = getattr(layer, "sliding_window", None) or math.inf
            token_bytes = (keys.nbytes + layer.values.nbytes) / keys.shape[2]
            seen_bytes = batch_size * min(prompt_tokens + new_tokens / 2, window) * token_bytes
            bytes_per_step += seen_bytes
            kv_bytes += batch_size * min(prompt_tokens + new_tokens, window) * token_bytes
            # Queries are multiplied by keys, and shares by values. Query heads share a KV head.
            groups = max(1, heads / keys.shape[1])
            flops_by_type[_type_name(keys.dtype)] += 2 * groups * seen_bytes / keys.itemsize
    return Work(
        weights_mib=weights.total_mib,
        kv_cache_mib=kv_bytes / MIB or None,
        bytes_per_step=bytes_per_step,
        flops_by_type=dict(flops_by_type),
    )


class _Step(TorchDispatchMode):
    """Adds up, within a block, what operations read of a model's weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model_dtype = model.dtype
        # By their memory: views, transposed matrices and single experts share it, and layers that were joined.
        self._weights = {_memory(each.tensor): each for each in loaded_tensors(model)}
        self._modules_run, self._memory_read = set[torch.nn.Module](), set[int]()
        self._read_bytes: dict[str, float] = defaultdict(float)  # by role
        self.flops_by_type: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and add what it reads."""
        returned = function(*args, **(kwargs or {}))
        outputs = [each for each in tree_leaves(returned) if isinstance(each, Tensor)]

        for tensor in tree_leaves((args, kwargs)) if outputs and function.overloadpacket != CONSTANT else ():
            weight = self._weight_of(tensor)
            if weight and not self._weight_of(outputs[0]):  # A view reads nothing.
                self._add(weight, tensor, function, outputs[0])
        return returned

    def note_module(self, module: torch.nn.Module, *_: Any) -> None:
        """Note that a module's forward has run."""
        self._modules_run.add(module)

    def _weight_of(self, tensor: Any) -> LoadedTensor | None:
        return self._weights.get(_memory(tensor)) if isinstance(tensor, Tensor) else None

    def _add(self, weight: LoadedTensor, tensor: Tensor, function: Any, out: Tensor) -> None:
        """Add one read. A lookup reads what it returns."""
        is_lookup = function.overloadpacket in LOOKUPS
        share = (out if is_lookup else tensor).numel() / weight.tensor.numel()

        if tensor.dim() == 3 and out.dim() == 2:  # Each row is multiplied by its own matrix of a stack.
            share *= min(1, len(out) / len(tensor))
        self._memory_read.add(_memory(tensor))
        self._read_bytes[_role(weight)] += share * weight.bytes

        if weight.tensor.dim() > (2 if is_lookup else 1) and torch.Tag.pointwise not in function.tags:
            # A tensor in 4 bit does not say in which type it is multiplied.
            dtype = weight.tensor.dtype
            if getattr(weight.tensor, "quant_state", None) or dtype == torch.int32:
                dtype = getattr(weight.module, "compute_dtype", None) or self._model_dtype
            self.flops_by_type[_type_name(dtype)] += 2 * share * weight.parameters

    def weight_bytes(self, batch_size: int) -> float:
        """Return the bytes of weights that a batch reads.

        Where a token reads a part, other tokens read others.

        Raises
        ------
        RuntimeError
            A layer has run whose matrix no operation has read: its kernel is none of PyTorch's.
        """
        stored_bytes, total = Counter[str](), 0.0
        for memory, weight in self._weights.items():
            stored_bytes[_role(weight)] += weight.bytes
            if weight.tensor.dim() > 1 and weight.module in self._modules_run and memory not in self._memory_read:
                raise RuntimeError(f"what reads {weight.name} is not seen")

        for role, read_bytes in self._read_bytes.items():
            unread = max(0, 1 - read_bytes / stored_bytes[role])
            total += max(read_bytes, stored_bytes[role] * (1 - unread**batch_size))
        return total


def _role(weight: LoadedTensor) -> str:
    """Return a weight's name without its last number: the layers, or a layer's experts, share it."""
    return re.sub(r"(.*\.)\d+\.", r"\1*.", weight.name)


def _memory(tensor: Tensor) -> int:
    """Return where a tensor's memory begins; 0 of torchao's, which wraps tensors that have some."""
    return 0 if hasattr(tensor, "__tensor_flatten__") else tensor.untyped_storage().data_ptr()


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def trace_kernels(
    work: Work, engine: Engine, prompts: Prompts, new_tokens: int, device: torch.device, pattern: str = ""
) -> Work:
    """Return `work` with the kernels of a few decode steps in the middle of the new tokens, traced.

    `pattern` is of `qnb.precision.Precision.kernels`.

    Raises
    ------
    RuntimeError
        No kernel of a decode step was seen.
    """
    release()  # what generations left in pieces
    steps = min(TRACED_STEPS, new_tokens - 1)
    before = 1 + (new_tokens - 1 - steps) // 2

    # A profiler's first trace misses kernels.
    for first, last in ((1, 2), (before, before + steps)):
        with ExitStack() as running:  # a trace also ends where the generation fails
            tracer = _Tracer(device, first, last, running)
            engine.generate(prompts, last, tracer)
    kernels = kernel_times_s(tracer.trace)
    if not kernels:
        raise RuntimeError("the profiler saw no kernel of a decode step")
    kernel_s, name = sum(time_s for _, time_s in kernels), stand_in(pattern, kernels)
    return replace(work, kernel_s_per_token=kernel_s / steps, kernels_per_token=len(kernels) / steps, stand_in=name)


class _Tracer(Clock):
    """Traces a generation from its new token `first` to `last`. It waits for the device at both."""

    def __init__(self, device: torch.device, first: int, last: int, running: ExitStack) -> None:
        self._device, self._first, self._last, self._running = device, first, last, running
        self._tokens, self.trace = -1, profile(activities=[ProfilerActivity.CUDA])  # before the start
        super().__init__(device)

    def tick(self, *_: Any, **__: Any) -> bool:
        """Count a token; begin or end the trace."""
        self._tokens += 1
        if self._tokens in (self._first, self._last):
            torch.cuda.synchronize(self._device)
        if self._tokens == self._first:
            self._running.enter_context(self.trace)
        elif self._tokens == self._last:
            self._running.close()
        return False
