"""Count what one decode step has to do at least: bytes read and operations, from the loaded tensors and shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from qnb.memory import MIB, kv_cache_bytes_per_token
from qnb.quantize.checkpoint import Weights, count_weights


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a decode step reads and computes, and the memory that takes. None where the architecture is not counted."""

    weights_mib: float | None = None
    kv_cache_mib: float | None = None  # of the whole batch, when its last token is there
    bytes_per_step: float | None = None  # of the step in the middle of the new tokens
    flops_by_type: dict[str, float] | None = None  # by the type that multiplies


def count_work(model: PreTrainedModel, batch_size: int, prompt_tokens: int, new_tokens: int) -> Work:
    """Count a decode step of a batch.

    Weights are read once whatever the batch. Of an embedding that is not the output head too, a row a request is read.
    Keys and values are those of the prompt and half the new tokens. A product of (B, K) and (K, N) counts 2BKN.

    Models without attention keep no keys and values, and fused experts are not all read: for both, what depends on
    that is None.
    """
    weights, config = count_weights(model), model.config.get_text_config()
    work = Work(weights_mib=weights.total_mib)
    try:
        values_per_token, heads = kv_cache_bytes_per_token(config, 1), config.num_attention_heads
    except AttributeError:  # no attention
        return work
    token_bytes = values_per_token * model.dtype.itemsize
    work = replace(work, kv_cache_mib=batch_size * (prompt_tokens + new_tokens) * token_bytes / MIB)
    if any(parameter.dim() > 2 for parameter in model.parameters()):  # fused experts
        return work
    seen_tokens = batch_size * (prompt_tokens + new_tokens / 2)
    flops_by_type = _weight_flops(model, batch_size)
    # queries times keys and shares times values: 2 x 2 x layers x heads x head size for each token seen
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    name = _type_name(model.dtype)
    flops_by_type[name] = flops_by_type.get(name, 0.0) + 2 * seen_tokens * values_per_token * heads / kv_heads
    bytes_per_step = _weight_bytes(model, weights, batch_size) + seen_tokens * token_bytes
    return replace(work, bytes_per_step=bytes_per_step, flops_by_type=flops_by_type)


def _weight_bytes(model: PreTrainedModel, weights: Weights, batch_size: int) -> float:
    """Return the bytes of weights that a step reads."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert isinstance(embedding, torch.Tensor)
    is_tied = head is not None and embedding.data_ptr() == head.weight.data_ptr()
    embedding_bytes = (
        weights.embedding_bytes if is_tied else batch_size * embedding.shape[1] * embedding.element_size()
    )
    return weights.linear_bytes + weights.other_bytes + embedding_bytes


def _weight_flops(model: PreTrainedModel, batch_size: int) -> dict[str, float]:
    """Return the operations of a step's products with weights, by the type that multiplies."""
    flops_by_type: dict[str, float] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        for weight in module.parameters(recurse=False):
            packed = getattr(weight, "quant_state", None)
            shape = weight.shape if packed is None else packed.shape
            if len(shape) == 2:
                compute_type = (getattr(module, "compute_dtype", None) or model.dtype) if packed else weight.dtype
                name = _type_name(compute_type)
                flops_by_type[name] = flops_by_type.get(name, 0.0) + 2.0 * batch_size * shape.numel()
    return flops_by_type


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
