"""What one decode step costs: the bytes and operations it needs at least, counted, and the GPU's kernels, traced.

The count is made from the loaded tensors and shapes. The trace is a pass of its own: its wall clock carries the
profiler's cost.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from qnb.memory import MIB, kv_cache_bytes_per_token, release
from qnb.quantize.checkpoint import count_weights
from qnb.speed.engines import Engine, Prompts

TRACED_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a decode step reads and computes, and the memory that takes. None where it is not counted or traced."""

    weights_mib: float | None = None
    kv_cache_mib: float | None = None  # of the whole batch, when its last token is there
    bytes_per_step: float | None = None  # of the step in the middle of the new tokens
    flops_by_type: dict[str, float] | None = None  # by the type that multiplies
    kernel_s_per_token: float | None = None  # on a GPU
    kernels_per_token: float | None = None


def count_work(model: PreTrainedModel, batch_size: int, prompt_tokens: int, new_tokens: int) -> Work:
    """Count a decode step of a batch.

    Weights are read once, whatever the batch. An embedding that is not also the output head counts one row per
    request. Keys and values are those of the prompt and half the new tokens. A product of (B, K) and (K, N) counts
    2BKN.

    Models without attention keep no keys and values, and fused experts are not all read: for both, what depends on
    that is None.
    """
    weights, config = count_weights(model), model.config.get_text_config()
    work = Work(weights_mib=weights.total_mib)
    # 1) keys and values
    try:
        values_per_token, heads = kv_cache_bytes_per_token(config, 1), config.num_attention_heads
    except AttributeError:  # no attention
        return work
    token_bytes = values_per_token * model.dtype.itemsize
    work = replace(work, kv_cache_mib=batch_size * (prompt_tokens + new_tokens) * token_bytes / MIB)
    if any(parameter.dim() > 2 for parameter in model.parameters()):  # fused experts
        return work
    # 2) bytes
    seen_tokens = batch_size * (prompt_tokens + new_tokens / 2)
    bytes_per_step = weights.total_mib * MIB + seen_tokens * token_bytes
    embedding: Any = model.get_input_embeddings().weight  # (V, E)
    head = model.get_output_embeddings()
    if head is None or embedding.data_ptr() != head.weight.data_ptr():
        bytes_per_step += batch_size * embedding[0].nbytes - weights.embedding_bytes
    # 3) operations
    flops_by_type = _weight_flops(model, batch_size)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    # queries times keys and shares times values: 2 x 2 x layers x heads x head size for each token seen
    flops_by_type[_type_name(model.dtype)] += 2 * seen_tokens * values_per_token * heads / kv_heads
    return replace(work, bytes_per_step=bytes_per_step, flops_by_type=dict(flops_by_type))


def _weight_flops(model: PreTrainedModel, batch_size: int) -> dict[str, float]:
    """Return the operations of a step's products with weights, by the type that multiplies."""
    flops_by_type: dict[str, float] = defaultdict(float)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        for weight in module.parameters(recurse=False):
            packed = getattr(weight, "quant_state", None)
            shape = weight.shape if packed is None else packed.shape
            if len(shape) == 2:
                compute_type = (getattr(module, "compute_dtype", None) or model.dtype) if packed else weight.dtype
                flops_by_type[_type_name(compute_type)] += 2 * batch_size * shape.numel()
    return flops_by_type


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def trace_kernels(work: Work, engine: Engine, prompts: Prompts, new_tokens: int, device: torch.device) -> Work:
    """Return `work` with the kernels of the decode steps in the middle of the new tokens, traced.

    Two generations are traced, the second a few steps longer. It runs more kernels, and the extra ones belong to its
    last steps: their times are summed. Subtracting the times of the two would be wrong, because the clocks change
    between them.

    Raises
    ------
    RuntimeError
        No kernel of a decode step was seen.
    """
    release()  # what generations left in pieces
    steps = min(TRACED_STEPS, new_tokens - 1)
    before = 1 + (new_tokens - 1 - steps) // 2
    _kernel_times_s(engine, prompts, 1, device)  # a profiler's first trace misses kernels
    shorter, longer = (_kernel_times_s(engine, prompts, tokens, device) for tokens in (before, before + steps))
    kernels = len(longer) - len(shorter)
    if kernels < 1:
        raise RuntimeError("the profiler saw no kernel of a decode step")
    return replace(work, kernel_s_per_token=sum(longer[-kernels:]) / steps, kernels_per_token=kernels / steps)


def _kernel_times_s(engine: Engine, prompts: Prompts, new_tokens: int, device: torch.device) -> list[float]:
    """Return the duration of each kernel of one generation, in the order in which they began."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        engine.generate(prompts, new_tokens)
        torch.cuda.synchronize(device)
    kernels = [
        event
        for event in trace.events() or ()
        if event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return [event.time_range.elapsed_us() / 1e6 for event in sorted(kernels, key=lambda each: each.time_range.start)]
