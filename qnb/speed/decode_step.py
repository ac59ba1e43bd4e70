"""One decode step of a Llama-like model, lean enough to be bound by memory, and prompts read by the same layers.

A token's step reads every weight once; all else should cost nothing beside it. The model's own forward runs about 700
kernels, most of them tiny. Here projections of one input are one product, the residual, norm, rotary and activation
work between two products is left to torch.compile as one kernel each, query heads that share keys are attended to
together without repeating those, and only the last position meets the output head. Quantized products stay
bitsandbytes' own kernels: their blocks (4 bit) and rows (INT8) run along the input, so rows of several matrices laid
below each other give bit for bit what each gives alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from qnb.speed.autotune import steadily
from qnb.speed.batch_search import is_out_of_memory
from qnb.speed.fused import AMPERE, VARIANTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # one block: RMS norm, rotary grouped attention, gated SiLU
ROTARIES = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on how long the text is
# an additive mask keeps the flash kernels away; cuDNN's would plan anew for every length
ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CPU_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
FEW_ROWS = 8  # a batch of so many or fewer gives an attention kernel too few blocks to keep a GPU busy
PART = 256  # scores that are compared at once
BLOCK = 32  # slots that flex attention reads at once
LAUNCH = {"num_warps": 4, "num_stages": 3}  # of its kernel
HEAD_BYTES = range(32, 257)  # heads for which its tiles fit the shared memory of any GPU from Ampere on


class Plain(NamedTuple):
    """An unquantized linear layer, or several of one input with their rows below each other."""

    weight: torch.Tensor  # (N, K)
    bias: torch.Tensor | None  # (N,)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W' + b, (B, K) -> (B, N)."""
        return functional.linear(x, self.weight, self.bias)


class FourBit(NamedTuple):
    """The same, packed by bitsandbytes: two weights a byte and a maximum a block of one row's inputs."""

    packed: torch.Tensor  # (N*K/2, 1), uint8
    absmax: torch.Tensor  # (N*K/blocksize,), float32; of the maxima's own blocks where those are quantized
    bias: torch.Tensor | None
    shape: tuple[int, int]  # (N, K)
    blocksize: int
    kind: str  # "nf4" or "fp4"
    compute: torch.dtype | None  # what is multiplied in; None is the input's type
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # maxima in 8 bit, their code, their offset

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W' + b, (B, K) -> (B, N), as `bitsandbytes.nn.Linear4bit` computes it."""
        wide = x if self.compute is None else x.to(self.compute)
        codes, code, offset = self.nested or (None, None, None)
        bias = None if self.bias is None else self.bias.to(wide.dtype)
        out = torch.ops.bitsandbytes.gemm_4bit.default(
            wide, self.packed, self.shape, self.absmax, self.blocksize, self.kind,
            bias=bias, absmax_8bit=codes, absmax_code=code, absmax_offset=offset,
        )  # fmt: skip
        return out.to(x.dtype)


class EightBit(NamedTuple):
    """The same as LLM.int8 without the outlier path: int8 rows, each with its maximum."""

    rows: torch.Tensor  # (N, K), int8
    scale: torch.Tensor  # (N,), float32
    bias: torch.Tensor | None

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W' + b, (B, K) -> (B, N), as `bitsandbytes.nn.Linear8bitLt` computes it at threshold 0."""
        codes, maxima, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(x.to(torch.float16), 0.0)
        # on CUDA the kernel writes float16 and casts afterwards: leave that cast to be fused with what follows
        dtype = torch.float16 if x.is_cuda else x.dtype
        out = torch.ops.bitsandbytes.int8_scaled_mm.default(
            codes, self.rows, maxima, self.scale, bias=self.bias, dtype=dtype
        )
        return out.to(x.dtype)


Product = Plain | FourBit | EightBit
Caches = Sequence[tuple[torch.Tensor, torch.Tensor]]  # a layer's keys and values
Angles = tuple[torch.Tensor, torch.Tensor]  # cosines and sines by position
Chosen = tuple[torch.Tensor, torch.Tensor]  # logits and the token chosen by them


class Layer(NamedTuple):
    """A decoder layer's weights; products of one input stand together, joined into one where that is exact."""

    before: torch.Tensor  # norm, (D,)
    qkv: tuple[Product, ...]
    query_norm: torch.Tensor | None  # (head size,), Qwen 3
    key_norm: torch.Tensor | None
    output: Product
    after: torch.Tensor  # norm, (D,)
    gate_up: tuple[Product, ...]
    down: Product


class Shape(NamedTuple):
    """What a layer must know of the configuration."""

    kv_heads: int
    groups: int  # query heads that share one key head
    head_size: int
    scaling: float
    epsilon: float


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Normalize the last axis in float32, as the model's own norms do."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn heads (B, ..., size) by their row's angles, (B, 1..., size)."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def together(products: tuple[Product, ...], x: torch.Tensor) -> torch.Tensor:
    """Return the outputs of products of one input beside each other, (B, K) -> (B, all rows)."""
    parts = [product.multiply(x) for product in products]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def by_kernel(
    query: torch.Tensor,  # (B, key heads, groups, size)
    keys: torch.Tensor,  # (B, key heads, L, size)
    values: torch.Tensor,
    mask: torch.Tensor,  # (B, 1, 1, L), 0 or -inf
    blocks: torch.Tensor,  # (1,), int32, of `BLOCK` slots: none beyond them is seen by any row
    scaling: float,
) -> torch.Tensor:
    """Attend with one token a row by PyTorch's kernel, (B, key heads, groups, size).

    Queries of one key head stand where a sequence's would: no key is repeated, in memory or in reading. All L slots
    are read, seen or not.
    """
    return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)


def by_reductions(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    blocks: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attend as `by_kernel` does, by reductions in float32.

    For torch.compile alone, which spreads each of them over the whole GPU and keeps none of the products in memory:
    for one row on an H100 this takes two fifths of the time of PyTorch's kernel, which gives each key head one block.
    """
    products = query[:, :, :, None].float() * keys[:, :, None].float()  # (B, key heads, groups, L, size)
    scores = products.sum(-1) * scaling + mask  # (B, key heads, groups, L)
    shares = torch.softmax(scores, -1)
    return (shares[..., None] * values[:, :, None].float()).sum(-2).to(query.dtype)


def by_blocks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    blocks: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attend as `by_kernel` does, by flex attention, which reads the blocks that are in use and no others.

    For torch.compile alone and many rows. Sixteen layers of Llama-3.2-1B's shape, 1,384 rows of 240 slots each, take
    PyTorch's kernel 7.7 ms on an H100, and this one 3.9 where all slots are in use: near the time that reading takes.
    """
    groups, length = query.shape[2], keys.shape[2]
    order = torch.arange(-(-length // BLOCK), dtype=torch.int32, device=query.device)
    used = BlockMask.from_kv_blocks(
        blocks.view(1, 1, 1), order.view(1, 1, 1, -1), BLOCK_SIZE=(_rows_of_a_block(groups), BLOCK),
        seq_lengths=(groups, length), compute_q_blocks=False,
    )  # fmt: skip

    def masked(score: torch.Tensor, row: Any, head: Any, group: Any, slot: Any) -> torch.Tensor:
        return score + mask[row, 0, 0, slot]

    tiles: Any = {"BLOCK_M": _rows_of_a_block(groups), "BLOCK_N": BLOCK, **LAUNCH}
    return flex_attention(query, keys, values, masked, used, scaling, kernel_options=tiles)


def _rows_of_a_block(groups: int) -> int:
    """Return how many queries a kernel's block takes: a power of two, and no fewer than tensor cores multiply."""
    return max(16, 1 << (groups - 1).bit_length())


def project(
    hidden: torch.Tensor,  # (..., D)
    weights: Layer,
    shape: Shape,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries (..., heads, size), keys and values (..., key heads, size), not yet turned by their positions."""
    flat = together(weights.qkv, rms_norm(hidden, weights.before, shape.epsilon).reshape(-1, hidden.shape[-1]))
    heads = flat.view(*hidden.shape[:-1], -1, shape.head_size)
    query, key, value = heads.split((shape.kv_heads * shape.groups, shape.kv_heads, shape.kv_heads), -2)
    if weights.query_norm is not None and weights.key_norm is not None:
        query = rms_norm(query, weights.query_norm, shape.epsilon)
        key = rms_norm(key, weights.key_norm, shape.epsilon)
    return query, key, value


def mix(
    hidden: torch.Tensor,  # (..., D)
    seen: torch.Tensor,  # what the heads attended to, in the same order, whatever its shape
    weights: Layer,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add what was seen to hidden states; returns them and what is still to be added, (..., D) each."""
    hidden = hidden + weights.output.multiply(seen.reshape(hidden.numel() // hidden.shape[-1], -1)).view_as(hidden)
    flat = rms_norm(hidden, weights.after, epsilon).reshape(-1, hidden.shape[-1])
    gate, up = together(weights.gate_up, flat).chunk(2, -1)
    return hidden, weights.down.multiply(functional.silu(gate) * up).view_as(hidden)


def layer(
    hidden: torch.Tensor,  # (B, D), before the last product's output is added
    delta: torch.Tensor,  # (B, D), that output
    weights: Layer,
    keys: torch.Tensor,  # (B, key heads, L, size), written at `slot`
    values: torch.Tensor,
    cos: torch.Tensor,  # (B, 1, size)
    sin: torch.Tensor,
    slot: torch.Tensor,  # (1,)
    mask: torch.Tensor,  # (B, 1, 1, L), 0 or -inf
    blocks: torch.Tensor,  # (1,), in use
    shape: Shape,
    attend: Callable[..., torch.Tensor],  # one of the three above
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one decoder layer for one token a row; returns hidden states and what is still to be added to them."""
    hidden = hidden + delta
    query, key, value = project(hidden, weights, shape)
    keys.index_copy_(2, slot, rotate(key, cos, sin)[:, :, None])
    values.index_copy_(2, slot, value[:, :, None])
    query = query.reshape(len(hidden), shape.kv_heads, shape.groups, shape.head_size)
    seen = attend(rotate(query, cos[:, None], sin[:, None]), keys, values, mask, blocks, shape.scaling)
    return mix(hidden, seen, weights, shape.epsilon)


def keep(
    hidden: torch.Tensor,  # (B, T, D), before the last product's output is added
    delta: torch.Tensor,  # (B, T, D), that output
    weights: Layer,
    keys: torch.Tensor,  # (B, key heads, T, size), written
    values: torch.Tensor,
    cos: torch.Tensor,  # (B or 1, T, 1, size)
    sin: torch.Tensor,
    shape: Shape,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write whole prompts' keys and values; returns hidden states and queries, (B, T, heads, size), not yet turned."""
    hidden = hidden + delta
    query, key, value = project(hidden, weights, shape)
    keys.copy_(rotate(key, cos, sin).transpose(1, 2))
    values.copy_(value.transpose(1, 2))
    return hidden, query


def read(
    hidden: torch.Tensor,
    delta: torch.Tensor,
    weights: Layer,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mask: torch.Tensor | None,  # (B, 1, T, T), whether a token sees another; None where each sees all before it
    shape: Shape,
    shared: bool,  # whether the kernels for no mask know heads that share keys
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one decoder layer for whole prompts; returns hidden states and what is still to be added to them."""
    hidden, query = keep(hidden, delta, weights, keys, values, cos, sin, shape)
    query = rotate(query, cos, sin).transpose(1, 2)  # (B, heads, T, size)
    if mask is None and shared:
        seen = functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=shape.scaling, enable_gqa=True
        )
    else:
        all_keys, all_values = (held.repeat_interleave(shape.groups, 1) for held in (keys, values))
        seen = functional.scaled_dot_product_attention(
            query, all_keys, all_values, attn_mask=mask, is_causal=mask is None, scale=shape.scaling
        )
    return mix(hidden, seen.transpose(1, 2), weights, shape.epsilon)


def read_last(
    hidden: torch.Tensor,
    delta: torch.Tensor,
    weights: Layer,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mask: torch.Tensor | None,
    shape: Shape,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the last layer as `read` does; of what follows keys and values each prompt's last token alone, (B, D)."""
    hidden, query = keep(hidden, delta, weights, keys, values, cos, sin, shape)
    query = rotate(query[:, -1:], cos[:, -1:], sin[:, -1:])
    query = query.reshape(len(hidden), shape.kv_heads, shape.groups, shape.head_size)
    seen = functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=None if mask is None else mask[:, :, -1:], scale=shape.scaling
    )
    return mix(hidden[:, -1], seen, weights, shape.epsilon)


def layout(width: int, start: torch.Tensor | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return positions, (B or 1, T), and whether a token sees another, (B, 1, T, T), of prompts padded on the left.

    Parameters
    ----------
    width
        T, padding included.
    start
        (B,), the slots of padding before each row; None where there is none: then there is no mask, and each token
        sees all before it.
    device
        Where the results are to be.
    """
    places = torch.arange(width, device=device)[None]  # (1, T)
    if start is None:
        return places, None
    seen = (places <= places.T) & (places >= start[:, None, None])
    seen |= places == places.T  # padding sees itself: nothing to attend to would be no number
    return (places - start[:, None]).clamp(min=0), seen[:, None]


def begin(
    embedding: torch.Tensor,  # (V, D)
    angles: tuple[torch.Tensor, torch.Tensor],  # cosines and sines by position, (L, size) each
    token: torch.Tensor,  # (B,)
    slot: torch.Tensor,  # (1,), where the token's keys go
    start: torch.Tensor,  # (B,), slots of padding before a row
    length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states (B, D), cosines and sines (B, 1, size), the mask (B, 1, 1, L), and blocks in use (1,)."""
    position = slot - start  # (B,)
    slots = torch.arange(length, device=token.device)
    seen = (slots <= slot) & (slots >= start[:, None])  # (B, L)
    mask = torch.zeros(seen.shape, dtype=embedding.dtype, device=token.device).masked_fill(~seen, float("-inf"))
    cos, sin = (angle[position][:, None] for angle in angles)
    return embedding[token], cos, sin, mask[:, None, None], (slot // BLOCK + 1).to(torch.int32)


def finish(
    hidden: torch.Tensor,
    delta: torch.Tensor,
    norm: torch.Tensor,  # (D,)
    head: Product,
    barred: torch.Tensor,  # (V,), 0, or -inf for an end of sequence
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits, (B, V), and the likeliest token that may come, (B,)."""
    logits = head.multiply(rms_norm(hidden + delta, norm, epsilon))
    return logits, likeliest(logits + barred)


def likeliest(scores: torch.Tensor) -> torch.Tensor:
    """Return the first of the highest scores, (B, V) -> (B,): that of each part, then that of all parts.

    torch.compile gives a row's argmax one block of the GPU: of 128,256 scores it takes an H100 23 us, and in parts 4.
    """
    if left := -scores.shape[-1] % PART:
        scores = functional.pad(scores, (0, left), value=float("-inf"))
    best, place = scores.unflatten(-1, (-1, PART)).max(-1)  # (B, V/PART)
    part = best.argmax(-1, keepdim=True)  # (B, 1)
    return (part * PART + place.gather(-1, part))[:, 0]


class Parts(NamedTuple):
    """What a step is made of, and the reading of prompts before it."""

    begin: Callable[..., Any] = begin
    layer: Callable[..., Any] = layer
    read: Callable[..., Any] = read
    read_last: Callable[..., Any] = read_last
    finish: Callable[..., Any] = finish

    def compiled(self, options: dict[str, Any]) -> Parts:
        """Return the parts with the work between products fused, each compiled once."""
        return Parts(*(torch.compile(part, fullgraph=True, **options) for part in self))


class Lean:
    """A model's weights as the lean layers want them; its own layers go on working, on the same memory.

    Parameters
    ----------
    model
        A loaded model that `unknown` has nothing against.
    options
        What torch.compile is given for the work between products of a step of few rows; None leaves all of it
        uncompiled. What is compiled for more rows, or reads prompts, serves any number of them and is not tuned: the
        first number might be a small one.

    Attributes
    ----------
    note
        Why nothing is compiled though it should be; "" where all is well.
    """

    def __init__(self, model: PreTrainedModel, options: dict[str, Any] | None = None) -> None:
        inner: Any = model.base_model
        config = model.config
        first = inner.layers[0].self_attn
        kv_heads = config.num_key_value_heads
        self.shape = Shape(
            kv_heads, config.num_attention_heads // kv_heads, first.head_dim, first.scaling, config.rms_norm_eps
        )
        self.embedding = inner.embed_tokens.weight.detach()
        self.norm = inner.norm.weight.detach()
        self.layers = [_layer(block) for block in inner.layers]
        self.head = join([model.get_output_embeddings()])[0]
        self._rotary = inner.rotary_emb
        self._backends = ATTENTION if self.embedding.is_cuda else CPU_ATTENTION
        # flash and cuDNN's attention, which know heads that share keys
        self._shared = self.embedding.element_size() == 2 and _is_ampere(self.embedding.device)
        self.note = ""
        self._few = self._many = Parts()
        if options is not None:
            self._few, self._many = Parts().compiled(options), Parts().compiled({})

    @property
    def _compiled(self) -> bool:
        """Whether torch.compile builds the work between products."""
        return self._few.layer is not layer

    def _run(self, work: Callable[..., Chosen], *given: Any) -> Chosen:
        """Return what `work` returns; where torch.compile cannot build it, all runs uncompiled from now on.

        What was done before it failed is done again: the same is written to the same places. Memory that runs out
        meanwhile is not the compiler's fault.
        """
        timed = steadily() if self._compiled else nullcontext()
        with torch._dynamo.config.patch(recompile_limit=VARIANTS), timed:
            try:
                return work(*given)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                if is_out_of_memory(error):
                    raise
                reason = " ".join(str(error).split())[:200]
        self._few = self._many = Parts()
        self.note = f"its small kernels are not fused, as torch.compile failed: {reason}"
        return work(*given)

    def _parts_for(self, rows: int) -> Parts:
        """Return what a step of so many rows is made of."""
        return self._few if rows <= FEW_ROWS else self._many

    def _attention(self, rows: int) -> Callable[..., torch.Tensor]:
        """Return how to attend in a batch of so many rows."""
        if not self._compiled:  # the others are for compiled layers
            return by_kernel
        if rows <= FEW_ROWS:
            return by_reductions
        head_bytes = self.shape.head_size * self.embedding.element_size()
        return by_blocks if _is_ampere(self.embedding.device) and head_bytes in HEAD_BYTES else by_kernel

    def angles(self, length: int) -> Angles:
        """Return the rotary cosines and sines of positions up to `length`, (L, head size) each."""
        positions = torch.arange(length, device=self.embedding.device)[None]
        cos, sin = self._rotary(self.embedding[:1, None], positions)  # (1, L, size)
        return cos[0], sin[0]

    def step(
        self,
        token: torch.Tensor,
        slot: torch.Tensor,
        start: torch.Tensor,
        caches: Caches,
        angles: Angles,
        barred: torch.Tensor,
    ) -> Chosen:
        """Read one token a row; return the next one's logits, (B, V), and the token itself, (B,).

        Parameters
        ----------
        token
            (B,), the last token of each row.
        slot
            (1,), where its keys and values go, the same for every row.
        start
            (B,), the slots of padding before each row.
        caches
            A layer's keys and values, (B, key heads, L, head size) each, written in place.
        angles
            From `angles`, for at least L positions.
        barred
            (V,), added to the logits before the token is chosen.
        """
        return self._run(self._step, token, slot, start, caches, angles, barred)

    def _step(
        self, token: torch.Tensor, slot: torch.Tensor, start: torch.Tensor, caches: Caches, angles: Angles,
        barred: torch.Tensor,
    ) -> Chosen:  # fmt: skip
        length, attend, parts = caches[0][0].shape[2], self._attention(len(token)), self._parts_for(len(token))
        with sdpa_kernel(self._backends):
            _any_rows(token, start)
            hidden, cos, sin, mask, blocks = parts.begin(self.embedding, angles, token, slot, start, length)
            delta = torch.zeros_like(hidden)
            for weights, (keys, values) in zip(self.layers, caches, strict=True):
                _any_rows(hidden, delta, keys, values, cos, sin, mask)
                hidden, delta = parts.layer(
                    hidden, delta, weights, keys, values, cos, sin, slot, mask, blocks, self.shape, attend
                )
            _any_rows(hidden, delta)
            return parts.finish(hidden, delta, self.norm, self.head, barred, self.shape.epsilon)

    def read(
        self, ids: torch.Tensor, start: torch.Tensor | None, caches: Caches, angles: Angles, barred: torch.Tensor
    ) -> Chosen:
        """Read prompts padded on the left; return the next token's logits, (B, V), and the token itself, (B,).

        Parameters
        ----------
        ids
            (B, T).
        start
            (B,), the slots of padding before each row; None where there is none, which is faster.
        caches
            As of `step`; the first T slots are written.
        angles, barred
            As of `step`.
        """
        return self._run(self._read, ids, start, caches, angles, barred)

    def _read(
        self, ids: torch.Tensor, start: torch.Tensor | None, caches: Caches, angles: Angles, barred: torch.Tensor
    ) -> Chosen:
        width = ids.shape[1]
        places, mask = layout(width, start, ids.device)
        cos, sin = (angle[places][:, :, None] for angle in angles)
        hidden = self.embedding[ids]  # (B, T, D)
        delta = torch.zeros_like(hidden)
        for place, (weights, held) in enumerate(zip(self.layers, caches, strict=True), 1):
            keys, values = (one[:, :, :width] for one in held)
            _any_rows(hidden, delta, keys, values, cos, sin, *([] if mask is None else [mask]))
            given = hidden, delta, weights, keys, values, cos, sin, mask, self.shape
            last = place == len(self.layers)
            hidden, delta = self._many.read_last(*given) if last else self._many.read(*given, self._shared)
        _any_rows(hidden, delta)  # (B, D)
        return self._parts_for(len(ids)).finish(hidden, delta, self.norm, self.head, barred, self.shape.epsilon)


def _is_ampere(device: torch.device) -> bool:
    """Return whether a device is an NVIDIA GPU of that generation or a later one."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= AMPERE


def _any_rows(*tensors: torch.Tensor) -> None:
    """Have what is compiled for more than a few rows serve any number of them."""
    for tensor in tensors:
        if len(tensor) > FEW_ROWS:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _layer(block: Any) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return Layer(
        before=block.input_layernorm.weight.detach(),
        qkv=join([attention.q_proj, attention.k_proj, attention.v_proj]),
        query_norm=None if query_norm is None else query_norm.weight.detach(),
        key_norm=None if key_norm is None else key_norm.weight.detach(),
        output=join([attention.o_proj])[0],
        after=block.post_attention_layernorm.weight.detach(),
        gate_up=join([mlp.gate_proj, mlp.up_proj]),
        down=join([mlp.down_proj])[0],
    )


def join(modules: Sequence[Any]) -> tuple[Product, ...]:
    """Return linear layers of one input as one product, or one each where joining would change a bit of the result.

    The layers keep working: their weights become views of the joined ones, so nothing is held twice. Doubly quantized
    4-bit layers stay apart: their maxima are relative to a mean that each matrix has of its own.
    """
    if all(type(module) is torch.nn.Linear for module in modules):
        return (Plain(_rows([module.weight for module in modules]), _biases(modules)),)
    from bitsandbytes.nn import Linear4bit

    if isinstance(modules[0], Linear4bit):
        states = [module.weight.quant_state for module in modules]
        alike = {(s.shape[1], s.blocksize, s.quant_type, s.nested, s.shape[1] % s.blocksize) for s in states}
        if len(modules) > 1 and (len(alike) > 1 or states[0].nested or states[0].shape[1] % states[0].blocksize):
            return tuple(product for module in modules for product in join([module]))
        return (_four_bit(modules, states),)
    for module in modules:
        if module.weight.CB is not None:  # what the layer itself does before its first product
            module.init_8bit_state()
    rows = _rows([module.weight for module in modules])
    scale = _rows([module.state.SCB for module in modules])
    for module, weight, maxima in zip(modules, *(_parts(tensor, modules) for tensor in (rows, scale)), strict=True):
        module.state.CB, module.state.SCB = weight, maxima
    return (EightBit(rows, scale, _biases(modules)),)


def _four_bit(modules: Sequence[Any], states: Sequence[Any]) -> FourBit:
    state, rows = states[0], sum(each.shape[0] for each in states)
    packed = _rows([module.weight for module in modules])
    nested = None
    if state.nested:
        nested, absmax = (state.absmax, state.state2.code, state.offset), state.state2.absmax
    else:
        absmax, done = torch.cat([each.absmax for each in states]), 0
        for each in states:
            each.absmax = absmax[done : done + len(each.absmax)]
            done += len(each.absmax)
    return FourBit(packed.view(-1, 1), absmax, _biases(modules), (rows, state.shape[1]), state.blocksize,
                   state.quant_type, modules[0].compute_dtype, nested)  # fmt: skip


def _rows(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Lay tensors below each other; parameters among them become views of the result."""
    if len(tensors) == 1:
        return tensors[0].detach()
    joined, done = torch.cat([tensor.detach() for tensor in tensors]), 0
    for tensor in tensors:
        if isinstance(tensor, torch.nn.Parameter):
            tensor.data = joined[done : done + len(tensor)]
        done += len(tensor)
    return joined


def _parts(joined: torch.Tensor, modules: Sequence[Any]) -> list[torch.Tensor]:
    return list(joined.split([module.out_features for module in modules]))


def _biases(modules: Sequence[Any]) -> torch.Tensor | None:
    found = [module.bias for module in modules]
    if all(bias is None for bias in found):
        return None
    like = next(bias for bias in found if bias is not None)
    return torch.cat([like.new_zeros(module.out_features) if bias is None else bias.detach()
                      for module, bias in zip(modules, found, strict=True)])  # fmt: skip


def narrow(model: PreTrainedModel, length: int) -> str:
    """Return why not every token attends to all before it in a text of `length` tokens; nothing where each does."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < length:
        return f"attention is limited to the last {window} tokens"
    return ""


def unknown(model: PreTrainedModel) -> str:
    """Return why the lean step cannot stand for this model's own forward; nothing where it can."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"the lean step knows {', '.join(FAMILIES)}, not {config.model_type}"
    rotary = getattr(getattr(model.base_model, "rotary_emb", None), "rope_type", "")
    if rotary not in ROTARIES:
        return f"rotary angles of type {rotary!r} depend on the text's length"
    if config.hidden_act not in ("silu", "swish"):
        return f"the lean step computes silu, not {config.hidden_act}"
    states = [state for weight in model.parameters() if (state := getattr(weight, "quant_state", None)) is not None]
    if states and not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        return "4-bit products need bitsandbytes 0.50 or newer"
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        return "the 4-bit weights were packed anew for this CPU"
    return ""
