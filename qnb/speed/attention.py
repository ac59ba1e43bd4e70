"""Attention of one decode step over a fixed KV cache, in three ways, and the positions and masks around it.

Shapes: B rows, T prompt tokens, L slots of the cache, H KV heads, G query heads that share a KV head, S head size.
Prompts are padded on the left, so that every row writes its next key to the same slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

AMPERE = 8  # the first compute capability with bfloat16 units
FLEX_BLOCK = 32  # slots that flex attention reads at once
FLEX_LAUNCH = {"num_warps": 4, "num_stages": 3}
FLEX_HEAD_BYTES = range(32, 257)  # heads whose tiles fit the shared memory of every GPU from Ampere on

KV = tuple[Tensor, ...]  # a layer's keys and values, (B, H, L, S) each
Angles = tuple[Tensor, ...]  # rotary cosines and sines by position, (L, S) each; none where a model has its own


class State(NamedTuple):
    """What decode steps read and write at fixed addresses: the KV cache, where rows stand in it, and constants."""

    layers: Sequence[KV]
    padding: Tensor  # (B,), slots of padding before each row
    slot: Tensor  # (1,), where the next token's keys and values go, the same for every row
    length: int  # L
    angles: Angles
    suppressed: Tensor  # (V,), added to the logits before a token is chosen

    def rows(self, first: int, last: int) -> State:
        """Return the state of rows `first` to `last`, in the same memory."""
        layers = [tuple(part[first:last] for part in kv) for kv in self.layers]
        return self._replace(layers=layers, padding=self.padding[first:last])


class Position(NamedTuple):
    """Where one token a row stands, the same for every layer."""

    cos: Tensor  # (B, 1, S)
    sin: Tensor  # (B, 1, S)
    mask: Tensor  # (B, 1, 1, L), 0 or -inf
    blocks: Tensor  # (1,), int32, blocks of `FLEX_BLOCK` slots in use: no row attends to a later one


# queries (B, H, G, S), a layer's keys and values, where the tokens stand -> (B, H, G, S)
Attend = Callable[[Tensor, KV, Position], Tensor]


def is_ampere(device: torch.device) -> bool:
    """Return whether a device is an NVIDIA GPU of the Ampere generation or a later one."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= AMPERE


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Normalize the last axis in float32, as the model's own norms do."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings to heads (B, ..., S), with cosines and sines (B, 1..., S) of each row's position."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def layout(slots: Tensor, padding: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return positions, (B, T), of tokens, and the slots that each attends to, (B, 1, T, L).

    Parameters
    ----------
    slots
        (T,), where the tokens' keys and values stand, the same for every row.
    padding
        (B,), slots of padding before each row.
    length
        L.
    """
    keys = torch.arange(length, device=slots.device)  # (L,)
    visible = (keys <= slots[:, None]) & (keys >= padding[:, None, None])  # (B, T, L)
    visible |= keys == slots[:, None]  # padding attends to itself: the softmax of nothing is not a number
    return (slots - padding[:, None]).clamp(min=0), visible[:, None]


def attend_sdpa(query: Tensor, kv: KV, position: Position) -> Tensor:
    """Attend with one token a row, (B, H, G, S), by PyTorch's kernel.

    The queries of one KV head stand where the tokens of a sequence would: no key is repeated, in memory or in reading.
    All L slots are read, whether a row attends to them or not.
    """
    return functional.scaled_dot_product_attention(query, *kv, attn_mask=position.mask)


def attend_reductions(query: Tensor, kv: KV, position: Position) -> Tensor:
    """Attend as `attend_sdpa` does, by reductions in float32; to be compiled, for a few rows.

    torch.compile spreads each reduction over the whole GPU and keeps no product in memory. For one row on an H100 that
    takes two fifths of the time of PyTorch's kernel, which gives each KV head one thread block.
    """
    keys, values = kv
    products = query[:, :, :, None].float() * keys[:, :, None].float()  # (B, H, G, L, S)
    scores = products.sum(-1) * query.shape[-1] ** -0.5 + position.mask  # (B, H, G, L)
    shares = torch.softmax(scores, -1)
    return (shares[..., None] * values[:, :, None].float()).sum(-2).to(query.dtype)  # (B, H, G, S)


def attend_flex(query: Tensor, kv: KV, position: Position) -> Tensor:
    """Attend as `attend_sdpa` does, by flex attention, which reads only the blocks in use; to be compiled.

    Sixteen layers of Llama-3.2-1B's shape with 1,384 rows of 240 slots take PyTorch's kernel 7.7 ms on an H100. Flex
    attention takes 3.9 ms with all slots in use, near the time of reading them.
    """
    groups, length, mask = query.shape[2], kv[0].shape[2], position.mask
    tile_rows = max(16, 1 << (groups - 1).bit_length())  # a power of two, and no fewer than tensor cores multiply
    order = torch.arange(-(-length // FLEX_BLOCK), dtype=torch.int32, device=query.device)
    in_use = BlockMask.from_kv_blocks(
        position.blocks.view(1, 1, 1), order.view(1, 1, 1, -1), BLOCK_SIZE=(tile_rows, FLEX_BLOCK),
        seq_lengths=(groups, length), compute_q_blocks=False,
    )  # fmt: skip

    def add_mask(score: Tensor, row: Any, head: Any, group: Any, slot: Any) -> Tensor:
        return score + mask[row, 0, 0, slot]

    tiles: Any = {"BLOCK_M": tile_rows, "BLOCK_N": FLEX_BLOCK, **FLEX_LAUNCH}
    return flex_attention(query, *kv, add_mask, in_use, kernel_options=tiles)


def attend_large_batch(head_bytes: int, device: torch.device) -> Attend:
    """Return the fastest way for a compiled step to attend with more than a few rows, by the bytes of one head."""
    return attend_flex if is_ampere(device) and head_bytes in FLEX_HEAD_BYTES else attend_sdpa
