"""Products of a decode step: linear layers of one input, unquantized or packed by bitsandbytes, joined into one.

A step is bound by reading weights, and one large product reads them faster than three small ones. Quantized products
stay bitsandbytes' own kernels. Their blocks (4 bit) and rows (INT8) run along the input, so the rows of several
matrices below each other give bit for bit what each matrix gives alone. Shapes: B rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Product(NamedTuple):
    """x W' + b of one layer, or of several below each other: a function of x, and the weights that it takes."""

    function: Callable[..., Tensor]  # `functional.linear`, `multiply_4bit` or `multiply_8bit`
    weights: tuple[Any, ...]

    def multiply(self, x: Tensor) -> Tensor:
        """Return x W' + b, (B, K) -> (B, N)."""
        return self.function(x, *self.weights)


def multiply_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, nested: tuple[Tensor, ...], bias: Tensor | None,
    shape: tuple[int, int], blocksize: int, kind: str, compute_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return x W' + b, (B, K) -> (B, N), as `bitsandbytes.nn.Linear4bit` computes it.

    `packed` are two weights of kind ``"nf4"`` or ``"fp4"`` a byte, (N*K/2, 1), and `shape` is (N, K). `absmax` is
    the largest weight of each block of a row, (N*K/blocksize,), float32. With double quantization `nested` holds these
    in 8 bit, their code and their offset, and `absmax` the largest of each block of them; else it holds None thrice.
    """
    wide, (codes, code, offset) = x.to(compute_dtype), nested
    bias = None if bias is None else bias.to(compute_dtype)
    out = torch.ops.bitsandbytes.gemm_4bit.default(
        wide, packed, shape, absmax, blocksize, kind,
        bias=bias, absmax_8bit=codes, absmax_code=code, absmax_offset=offset,
    )  # fmt: skip
    return out.to(x.dtype)


def multiply_8bit(x: Tensor, rows: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W' + b, (B, K) -> (B, N), as `bitsandbytes.nn.Linear8bitLt` computes it without the outlier path.

    `rows` are (N, K), int8, and `scale` the largest weight of each, (N,), float32.
    """
    codes, maxima, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(x.to(torch.float16), 0.0)
    # on CUDA the kernel writes float16 and casts afterwards: that cast is left to be fused with what follows
    dtype = torch.float16 if x.is_cuda else x.dtype
    out = torch.ops.bitsandbytes.int8_scaled_mm.default(codes, rows, maxima, scale, bias=bias, dtype=dtype)
    return out.to(x.dtype)


def multiply_all(products: Sequence[Product], x: Tensor) -> Tensor:
    """Return the outputs of products of one input beside each other, (B, K) -> (B, all outputs)."""
    outputs = [product.multiply(x) for product in products]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def join(modules: Sequence[Any]) -> tuple[Product, ...]:
    """Return linear layers of one input as one product, or one each where joining would change a bit of the result.

    The layers go on working: their weights become views of the joined ones, so nothing is held twice.
    """
    from bitsandbytes.nn import Linear4bit

    if len(modules) > 1 and not _are_joinable(modules):
        return tuple(product for module in modules for product in join([module]))
    bias = None if modules[0].bias is None else _stack([module.bias for module in modules])
    if type(modules[0]) is torch.nn.Linear:
        return (Product(functional.linear, (_stack([module.weight for module in modules]), bias)),)
    return (_join_4bit(modules, bias) if isinstance(modules[0], Linear4bit) else _join_8bit(modules, bias),)


def _are_joinable(modules: Sequence[Any]) -> bool:
    """Return whether layers are of one kind, and each gives the same bits when its rows stand below another's.

    Doubly quantized 4-bit layers do not: their maxima are relative to a mean that each matrix has of its own.
    """
    if len({(type(module), module.bias is None) for module in modules}) > 1:
        return False
    states = [state for module in modules if (state := getattr(module.weight, "quant_state", None)) is not None]
    kinds = {(state.shape[1], state.blocksize, state.quant_type) for state in states}
    return len(kinds) <= 1 and not any(state.nested or state.shape[1] % state.blocksize for state in states)


def _join_4bit(modules: Sequence[Any], bias: Tensor | None) -> Product:
    states = [module.weight.quant_state for module in modules]
    first, packed = states[0], _stack([module.weight for module in modules]).view(-1, 1)
    absmax = first.state2.absmax if first.nested else _stack([state.absmax for state in states])
    nested = (first.absmax, first.state2.code, first.offset) if first.nested else (None, None, None)
    shape = sum(state.shape[0] for state in states), first.shape[1]
    weights = packed, absmax, nested, bias, shape, first.blocksize, first.quant_type, modules[0].compute_dtype
    return Product(multiply_4bit, weights)


def _join_8bit(modules: Sequence[Any], bias: Tensor | None) -> Product:
    for module in modules:
        if module.weight.CB is not None:  # what the layer itself does before its first product
            module.init_8bit_state()
    rows = _stack([module.weight for module in modules])
    scale = _stack([module.state.SCB for module in modules])
    for module in modules:
        module.state.CB = module.weight.data
    return Product(multiply_8bit, (rows, scale, bias))


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Lay tensors below each other in one; each becomes a view of its part, so that nothing is held twice."""
    if len(tensors) == 1:
        return tensors[0].detach()
    joined = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, joined.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = part
    return joined
