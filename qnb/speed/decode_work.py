"""Count the bytes and operations that a decode step needs at least, and trace a GPU's kernels.

The trace is a pass of its own, because its wall clock carries the profiler's cost.
"""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel

from qnb.memory import MIB, release
from qnb.quantize.checkpoint import LoadedTensor, count_weights, loaded_tensors
from qnb.quantize.runtime import kernel_times_s, linear_layers, stand_in
from qnb.speed.decode_step import run_model
from qnb.speed.engines import Clock, Engine, Prompts

TRACED_STEPS = 8
# what configurations call the number of experts, and how many of them a token takes
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")
MATRICES = ("weight", "gate_up_proj", "down_proj")  # names of parameters that inputs are multiplied by


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
    """Count a decode step of a batch, from the tensors of a loaded model.

    Weights are read once, whatever the batch. Of experts and of an embedding's rows, the expected number of distinct
    ones is read. Keys and values are those of the prompt and half the new tokens, or of a layer's window. A recurrent
    state is read and written. A product of (B, K) and (K, N) counts 2BKN operations. Each token is multiplied by its
    own experts.

    Raises
    ------
    RuntimeError
        A layer packs its matrix into tensors of other shapes, or the configuration does not tell how many experts a
        token takes.
    """
    if packed := [layer for layer in linear_layers(model) if not hasattr(layer, "weight")]:
        raise RuntimeError(f"{type(packed[0]).__name__} does not tell what it reads")
    loaded_mib = weights_mib(model)
    cache: Any = DynamicCache(config=model.config)
    with torch.inference_mode():
        run_model(model, cache, input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
    flops_by_type, bytes_per_step, kv_bytes = defaultdict[str, float](float), 0.0, 0.0
    # 1) products with weights
    for each in loaded_tensors(model):
        share = _share_of_a_token(each, model)
        bytes_per_step += each.bytes * (1 - (1 - share) ** batch_size)
        is_lookup = isinstance(each.module, torch.nn.Embedding) and share < 1
        if each.tensor.dim() > 1 and not is_lookup and each.name.endswith(MATRICES):
            flops_by_type[_product_type(each, model)] += 2 * batch_size * share * each.parameters
    # 2) keys and values: queries are multiplied by keys, and shares by values; query heads share a KV head
    heads = getattr(model.config.get_text_config(), "num_attention_heads", 0)
    for layer in (layer for layer in cache.layers if getattr(layer, "keys", None) is not None):
        window = getattr(layer, "sliding_window", None) or math.inf
        token_bytes = batch_size * (layer.keys.nbytes + layer.values.nbytes)  # keys are (1, H, 1, S)
        seen_bytes = min(prompt_tokens + new_tokens / 2, window) * token_bytes
        bytes_per_step += seen_bytes
        kv_bytes += min(prompt_tokens + new_tokens, window) * token_bytes
        groups = max(1, heads / layer.keys.shape[1])
        flops_by_type[_type_name(layer.keys.dtype)] += 2 * groups * seen_bytes / layer.keys.itemsize
    # 3) recurrent states
    states = [getattr(layer, name, None) for layer in cache.layers for name in ("conv_states", "recurrent_states")]
    bytes_per_step += 2 * batch_size * sum(state.nbytes for state in tree_leaves(states) if state is not None)
    return Work(
        weights_mib=loaded_mib,
        kv_cache_mib=kv_bytes / MIB or None,
        bytes_per_step=bytes_per_step,
        flops_by_type=dict(flops_by_type),
    )


_weights_mib: WeakKeyDictionary[PreTrainedModel, float] = WeakKeyDictionary()


def weights_mib(model: PreTrainedModel) -> float:
    """Return what a model's weights take, counted once: on some CPUs the first product packs 4-bit weights closer."""
    if model not in _weights_mib:
        _weights_mib[model] = count_weights(model).total_mib
    return _weights_mib[model]


def _share_of_a_token(weight: LoadedTensor, model: PreTrainedModel) -> float:
    """Return the share of a tensor that one token reads: a row of an embedding, its own experts, or all."""
    if ".experts." in weight.name:
        config = model.config.get_text_config()
        told = [[getattr(config, name, None) for name in names] for names in (CHOSEN, EXPERTS)]
        chosen, count = (next(filter(None, numbers), 0) for numbers in told)
        if not (chosen and count):
            raise RuntimeError(f"{config.model_type} does not tell how many of its experts a token takes")
        return float(chosen / count)
    is_head = weight.tensor is getattr(model.get_output_embeddings(), "weight", None)
    return 1 / len(weight.tensor) if isinstance(weight.module, torch.nn.Embedding) and not is_head else 1.0


def _product_type(weight: LoadedTensor, model: PreTrainedModel) -> str:
    """Return the type that a matrix is multiplied in; a tensor in 4 bit does not say."""
    if getattr(weight.tensor, "quant_state", None) or weight.tensor.dtype == torch.int32:
        return _type_name(getattr(weight.module, "compute_dtype", None) or model.dtype)
    return _type_name(weight.tensor.dtype)


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
