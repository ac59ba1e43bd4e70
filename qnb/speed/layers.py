"""Layers of a decode step: products of packed weights, norms, rotary angles, and attention over a fixed KV cache.

A step is bound by reading weights, and one large product reads them faster than three small ones. Quantized products
stay bitsandbytes' own kernels. Their blocks (4 bit) and rows (INT8) run along the input, so the rows of several
matrices below each other give bit for bit what each matrix gives alone.

Shapes: B rows, T prompt tokens, L slots of the cache, D hidden size, K inputs and N outputs of a product,
V vocabulary, H KV heads, G query heads that share a KV head, S head size. Prompts are padded on the left, so that
every row writes its next key to the same slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from qnb.device import is_before_ampere

FLEX_BLOCK = 32  # slots that flex attention reads at once
INT8_ROWS = 32  # of inputs, that PyTorch's int8 kernel gets at least
FP8_ROWS = 512  # of inputs, up to which cuBLAS multiplies faster where the scales follow
TILES = ["qdata", "scale_and_zero"]  # what tinygemm reads of a weight in int4
FLEX_HEAD_BYTES = range(32, 257)  # heads whose tiles fit the shared memory of every GPU from Ampere on

KV = tuple[Tensor, Tensor]  # a layer's keys and values, (B, H, L, S) each
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
        layers = [(keys[first:last], values[first:last]) for keys, values in self.layers]
        return self._replace(layers=layers, padding=self.padding[first:last])


class Position(NamedTuple):
    """Where T tokens a row stand, the same for every layer; T is 1 in a decode step."""

    cos: Tensor  # (B, T, S)
    sin: Tensor  # (B, T, S)
    mask: Tensor  # (B, 1, T, L), 0 or -inf
    blocks: Tensor  # (T,), int32, blocks of `FLEX_BLOCK` slots that each reads: no row attends to a later one


class Layer(NamedTuple):
    """A decoder layer's weights; products of one input stand together, joined into one where that is exact."""

    input_norm: Tensor  # (D,)
    qkv: tuple[Product, ...]
    qk_norms: tuple[Tensor, ...]  # of queries and keys in Qwen 3, (S,) each
    output: Product
    post_attention_norm: Tensor  # (D,)
    gate_up: tuple[Product, ...]
    down: Product

    @classmethod
    def of(cls, block: Any) -> Layer:
        """Join the products of a model's decoder layer."""
        attn, mlp = block.self_attn, block.mlp
        qk_norms = (getattr(attn, name).weight.detach() for name in ("q_norm", "k_norm") if hasattr(attn, name))
        return cls(
            input_norm=block.input_layernorm.weight.detach(),
            qkv=join([attn.q_proj, attn.k_proj, attn.v_proj]),
            qk_norms=tuple(qk_norms),
            output=join([attn.o_proj])[0],
            post_attention_norm=block.post_attention_layernorm.weight.detach(),
            gate_up=join([mlp.gate_proj, mlp.up_proj]),
            down=join([mlp.down_proj])[0],
        )


class Product(NamedTuple):
    """x W' + b of one layer, or of several below each other: a function of x, and the weights that it takes."""

    function: Callable[..., Tensor]  # `functional.linear`, or one of the `multiply_` functions below
    weights: tuple[Any, ...]

    def multiply(self, x: Tensor) -> Tensor:
        """Return x W' + b, (B, K) -> (B, N)."""
        return self.function(x, *self.weights)


def multiply_4bit(x: Tensor, compute_dtype: torch.dtype, *weights: Any) -> Tensor:
    """Return x W' + b, (B, K) -> (B, N), as `bitsandbytes.nn.Linear4bit` computes it, with weights of `_join_4bit`."""
    return torch.ops.bitsandbytes.gemm_4bit.default(x.to(compute_dtype), *weights).to(x.dtype)


def multiply_8bit(x: Tensor, rows: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W' + b, (B, K) -> (B, N), as `bitsandbytes.nn.Linear8bitLt` computes it without the outlier path.

    `rows` are (N, K), int8, and `scale` the largest weight of each, (N,), float32.
    """
    codes, maxima, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(x.to(torch.float16), 0.0)
    # on CUDA the kernel writes float16 and casts afterwards: that cast is left to be fused with what follows
    dtype = torch.float16 if x.is_cuda else x.dtype
    out = torch.ops.bitsandbytes.int8_scaled_mm.default(codes, rows, maxima, scale, bias=bias, dtype=dtype)
    return out.to(x.dtype)


def multiply_torchao(x: Tensor, weight: Any, bias: Tensor | None, one: Tensor) -> Tensor:
    """Return x W' + b, (B, K) -> (B, N), as torchao computes it with a weight in 8 bit and inputs quantized by row.

    torch.compile makes a reduction of one row's product, which reads the codes as they are, as it does in 16 bit.
    PyTorch's int8 kernel takes no fewer than 17 rows: zeros stand below a few. Of a few rows in float8 the codes are
    multiplied first, with `one`, (), float32, for a scale: cuBLAS has a single kernel that scales by row, whose tiles
    of 128 rows leave most of a GPU idle.
    """
    from torchao.quantization.quantize_.common import _choose_quant_func_and_quantize_tensor

    rows, is_float8 = len(x), weight.qdata.is_floating_point()
    is_reduction = rows == 1 and torch.compiler.is_compiling()
    if not is_reduction and not (x.is_cuda and is_float8 and rows <= FP8_ROWS):
        is_short = x.is_cuda and not is_float8 and rows < INT8_ROWS
        x = functional.pad(x, (0, 0, 0, INT8_ROWS - rows)) if is_short else x
        return functional.linear(x, weight, bias)[:rows]
    codes: Any = _choose_quant_func_and_quantize_tensor(x, weight.act_quant_kwargs)
    if is_reduction:
        wide = torch.float32 if is_float8 else torch.int32
        products = (codes.qdata.to(wide) * weight.qdata.to(wide)).sum(-1, dtype=wide)  # (N,)
    else:
        options: Any = {"scale_a": one, "scale_b": one, "out_dtype": torch.float32, "use_fast_accum": True}
        products = torch._scaled_mm(codes.qdata, weight.qdata.t(), **options)  # (B, N)
    out = (products.float() * codes.scale.float() * weight.scale.flatten()).to(x.dtype)  # (B, N)
    return out if bias is None else out + bias


def multiply_all(products: Sequence[Product], x: Tensor) -> Tensor:
    """Return the outputs of products of one input beside each other, (B, K) -> (B, all outputs)."""
    outputs = [product.multiply(x) for product in products]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def join(modules: Sequence[Any]) -> tuple[Product, ...]:
    """Return linear layers of one input as one product, or one each where joining would change a bit of the result.

    The layers go on working: their weights become views of the joined ones, so nothing is held twice.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    if all(type(module) is torch.nn.Linear and hasattr(module.weight, "__tensor_flatten__") for module in modules):
        return _join_torchao(modules)
    if not all(isinstance(module, Linear4bit | Linear8bitLt) or _is_plain(module) for module in modules):
        return tuple(Product(module, ()) for module in modules)  # of another library, which multiplies itself
    if len(modules) > 1 and not _are_joinable(modules):
        return tuple(product for module in modules for product in join([module]))
    bias = None if modules[0].bias is None else _stack([module.bias for module in modules])
    if _is_plain(modules[0]):
        return (Product(functional.linear, (_stack([module.weight for module in modules]), bias)),)
    return (_join_4bit(modules, bias) if isinstance(modules[0], Linear4bit) else _join_8bit(modules, bias),)


def _is_plain(module: Any) -> bool:
    """Return whether a layer is PyTorch's own, with a weight that is a plain tensor."""
    return type(module) is torch.nn.Linear and type(module.weight.data) is Tensor


def _are_joinable(modules: Sequence[Any]) -> bool:
    """Return whether layers are of one kind, and each gives the same bits when its rows stand below another's.

    Doubly quantized 4-bit layers do not: their maxima are relative to a mean that each matrix has of its own.
    """
    states = [state for module in modules if (state := getattr(module.weight, "quant_state", None)) is not None]
    is_exact = not any(state.nested or state.shape[1] % state.blocksize for state in states)
    return is_exact and len({(type(module), module.bias is None) for module in modules}) == 1


def _join_4bit(modules: Sequence[Any], bias: Tensor | None) -> Product:
    states, dtype = [module.weight.quant_state for module in modules], modules[0].compute_dtype
    first, shape = states[0], (sum(state.shape[0] for state in states), states[0].shape[1])  # (N, K)
    packed = _stack([module.weight for module in modules]).view(-1, 1)  # (N*K/2, 1), two weights a byte
    # (N*K/blocksize,): the largest weight of each block of a row; with double quantization in 8 bit, and of these too
    absmax = first.state2.absmax if first.nested else _stack([state.absmax for state in states])
    nested = (first.absmax, first.state2.code, first.offset) if first.nested else ()
    bias = None if bias is None else bias.to(dtype)
    return Product(multiply_4bit, (dtype, packed, shape, absmax, first.blocksize, first.quant_type, bias, *nested))


def _join_8bit(modules: Sequence[Any], bias: Tensor | None) -> Product:
    for module in modules:
        if module.weight.CB is not None:  # what the layer itself does before its first product
            module.init_8bit_state()
    rows = _stack([module.weight for module in modules])
    scale = _stack([module.state.SCB for module in modules])
    for module in modules:
        module.state.CB = module.weight.data
    return Product(multiply_8bit, (rows, scale, bias))


def _join_torchao(modules: Sequence[Any]) -> tuple[Product, ...]:
    """Join weights of torchao whose codes and scales all stand in rows, or all in tinygemm's tiles of 8 rows.

    Scales of tiles stand in columns, and tinygemm takes no views of these: they are held twice, a byte for 16 weights.
    """
    if len({(type(module.weight), module.bias is None) for module in modules}) > 1:
        return tuple(product for module in modules for product in _join_torchao([module]))
    weights, biases = [module.weight for module in modules], [module.bias for module in modules]
    first, (names, _) = weights[0], weights[0].__tensor_flatten__()
    inputs = getattr(first, "act_quant_kwargs", None)  # how they are quantized
    is_symmetric = inputs and getattr(getattr(inputs, "mapping_type", None), "name", "SYMMETRIC") == "SYMMETRIC"
    is_in_rows = is_symmetric and all(getattr(first, name).shape[:1] == first.shape[:1] for name in names)
    is_tiled = names == TILES and all(len(weight) == 8 * len(weight.qdata) for weight in weights)
    settings: list[Any] = []
    if len(modules) > 1 and (is_in_rows or is_tiled):  # in tiles nothing is padded
        settings = [weight.__tensor_flatten__()[1] | {"shape": None} for weight in weights]
    one = torch.ones((), device=first.device)
    multiply, more = (multiply_torchao, (one,)) if is_in_rows else (functional.linear, ())
    if not settings or settings.count(settings[0]) < len(settings):
        pairs = zip(weights, biases, strict=True)
        return tuple(Product(multiply, (weight.detach(), bias, *more)) for weight, bias in pairs)
    parts = {name: [getattr(weight, name) for weight in weights] for name in names}
    joined = {name: torch.cat(each, 1) if name == TILES[1] else _stack(each) for name, each in parts.items()}
    shape = torch.Size([sum(map(len, weights)), first.shape[1]])  # (N, K)
    whole = type(first).__tensor_unflatten__(joined, settings[0] | {"shape": shape}, shape, (shape[1], 1))
    return (Product(multiply, (whole, None if biases[0] is None else _stack(biases), *more)),)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Lay tensors below each other in one; each becomes a view of its part, so that nothing is held twice."""
    if len(tensors) == 1:
        return tensors[0].detach()
    joined = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, joined.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = part
    return joined


# queries (B, H, G, S), a layer's keys and values, where the tokens stand -> (B, H, G, S)
Attend = Callable[[Tensor, KV, Position], Tensor]


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

    tiles: Any = {"BLOCK_M": tile_rows, "BLOCK_N": FLEX_BLOCK, "num_warps": 4, "num_stages": 3}
    return flex_attention(query, *kv, add_mask, in_use, kernel_options=tiles)


def attend_large_batch(head_bytes: int, device: torch.device) -> Attend:
    """Return the fastest way for a compiled step to attend with more than a few rows, by the bytes of one head."""
    has_room = device.type == "cuda" and not is_before_ampere(device) and head_bytes in FLEX_HEAD_BYTES
    return attend_flex if has_room else attend_sdpa
