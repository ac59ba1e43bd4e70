"""A decode step of many rows at fixed addresses, captured as a CUDA graph and replayed for every token.

Launching a model's kernels from Python takes longer than running them. Shapes: B rows, L slots of the KV cache,
H KV heads, G query heads that share a KV head, S head size, V vocabulary.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qnb.accuracy.backbone import Backbone
from qnb.capture import SlotCache, capture
from qnb.memory import is_out_of_memory, places

GROUPED = "qnb_grouped"
CAPTURING = {"cuda"}  # kinds of devices
MIN_STEPS = 32  # fewer are not worth capturing


def attend_grouped(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Any:
    """Attend as ``sdpa`` does for one token a row, without a copy of keys and values for every query's head."""
    groups = query.reshape(len(query), key.shape[1], -1, query.shape[-1])  # (B, H*G, 1, S) -> (B, H, G, S)
    no_module: Any = SimpleNamespace(is_causal=False)
    attended, _ = sdpa_attention_forward(no_module, groups, key, value, mask, **options)
    return attended.transpose(1, 2).reshape(len(query), 1, -1, value.shape[-1]), None  # (B, 1, H*G, S)


AttentionInterface.register(GROUPED, attend_grouped)


@contextmanager
def grouped_attention(config: Any) -> Iterator[None]:
    """Let a model that attends by ``sdpa`` attend by `attend_grouped` within the block."""
    before = config._attn_implementation
    config._attn_implementation = GROUPED if before == "sdpa" else before
    try:
        yield
    finally:
        config._attn_implementation = before


def may_be_captured(backbone: Backbone, past: Cache, new_tokens: int) -> bool:
    """Return whether capturing steps is worth it, and possible as far as is known without running one."""
    is_on_one = backbone.device.type in CAPTURING and len(places(backbone.model)) == 1
    return is_on_one and isinstance(past, SlotCache) and new_tokens >= MIN_STEPS


class CapturedStep:
    """One more token a row: reads the tokens chosen last and chooses the next ones.

    Attention reads the whole cache under a mask that hides what is to come.
    """

    def __init__(self, backbone: Backbone, past: SlotCache, visible: Tensor) -> None:
        """Prepare a step over a cache; `visible` (B, L) are the tokens to attend to."""
        rows = len(visible)
        self._backbone, self._past = backbone, past
        self._mask = backbone.attention_mask(visible[:, None, None])  # (B, 1, 1, L)
        self._ids, self._positions = (backbone.integers([[0]] * rows) for _ in range(2))  # (B, 1) each
        self._slot = backbone.integers([0])
        self._chosen: tuple[Tensor, Tensor] = (self._ids, self._ids)
        self._graph: Any = None

    def __call__(self, ids: Tensor, positions: Tensor, slot: int) -> tuple[Tensor, Tensor] | None:
        """Read tokens (B, 1) into a slot of the cache; return the likeliest next ones and their logits, (B, 1) each.

        None where the step cannot be captured. What it wrote until then is written again by any other step.
        """
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        self._slot.fill_(slot)
        with torch.cuda.device(self._backbone.device), grouped_attention(self._backbone.config):
            if self._graph is None and not self._capture():
                return None
            self._graph.replay()
        chosen, logits = self._chosen
        return chosen.clone(), logits.clone()

    def _capture(self) -> bool:
        """Capture the step; return whether that went well.

        Before, it runs once where the host must not wait for the device, which no graph captures. LLM.int8 waits for
        its outlier columns. A wait that is found here leaves no half-made graph behind.
        """
        before = torch.cuda.get_sync_debug_mode()
        try:
            with warnings.catch_warnings(action="ignore"):  # torch says that it does not see every wait
                torch.cuda.set_sync_debug_mode("error")
            self._run()
            torch.cuda.set_sync_debug_mode(before)
            self._graph = capture(self._run)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return self._graph is not None

    def _run(self) -> None:
        self._past.slots, self._past.attended = self._slot, self._mask.shape[3]
        self._mask.index_fill_(3, self._slot, 0.0)
        options = {"attention_mask": self._mask, "position_ids": self._positions, "use_cache": True}
        hidden, _ = self._backbone.run(self._ids, self._past, **options)
        logits = self._backbone.project(hidden[:, -1])  # (B, V)
        chosen = logits.argmax(-1, keepdim=True)
        self._chosen = chosen, logits.gather(-1, chosen)
