"""Capture work as a CUDA graph, which is replayed without Python launching its kernels; a KV cache that can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

WARM_UP_STEPS = 2  # runs before one is captured


def capture(work: Callable[[], Any], pool: Any = None) -> torch.cuda.CUDAGraph:
    """Capture `work`, after runs in which kernels are compiled and libraries allocate their workspaces.

    They run on the stream that torch captures on: cuBLAS keeps a workspace for every stream that it ever saw.
    Graphs of one `pool` share memory.
    """
    graph = torch.cuda.CUDAGraph()
    captured: Any = torch.cuda.graph(graph, pool=pool)
    main, side = torch.cuda.current_stream(), captured.capture_stream
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_STEPS):
            work()
    main.wait_stream(side)
    with torch.cuda.stream(main), captured:
        work()
    return graph


def cache_name(forward: Callable[..., Any]) -> str:
    """Return what a model's forward calls its KV cache: the last two are names until transformers 5.24."""
    accepted = signature(forward).parameters
    return next((each for each in ("cache", "cache_params") if each in accepted), "past_key_values")


class SlotCache(DynamicCache):
    """A transformers cache in memory that stays: it writes to some slots and attends to the first `attended` slots.

    It has no layers of its own, so transformers takes it for an empty one: a mask and positions have to be given.
    transformers' `DynamicLayer` copies the whole cache for each token, and its `StaticLayer` drops no rows.

    Parameters
    ----------
    buffers
        Each layer's keys and values, (B, H, L, S) each.
    slots
        (T,), where the next tokens' keys and values go.
    """

    def __init__(self, buffers: Sequence[tuple[Tensor, Tensor]], slots: Any = None, attended: int = 0) -> None:
        super().__init__()
        self.buffers, self.slots, self.attended = list(buffers), slots, attended

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Write new keys and values, (B, H, T, S) each; return those that are attended to."""
        for buffer, states in zip(self.buffers[layer_idx], (key_states, value_states), strict=True):
            buffer.index_copy_(2, self.slots.to(buffer.device), states)
        return tuple(buffer[:, :, : self.attended] for buffer in self.buffers[layer_idx])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Drop all rows but these, a layer at a time: there may be no memory for a second cache."""
        for place, layer in enumerate(self.buffers):
            keys, values = (buffer[indices.to(buffer.device)] for buffer in layer)
            self.buffers[place] = keys, values
