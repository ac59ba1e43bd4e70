"""Products of a decode step: linear layers of one input, unquantized or packed by bitsandbytes, joined into one.

A step is bound by reading weights, and one large product reads them faster than three small ones. Quantized products
stay bitsandbytes' own kernels. Their blocks (4 bit) and rows (INT8) run along the input, so the rows of several
matrices below each other give bit for bit what each matrix gives alone. Shapes: B rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Plain(NamedTuple):
    """An unquantized product."""

    weight: Tensor  # (N, K)
    bias: Tensor | None  # (N,)

    @classmethod
    def of(cls, modules: Sequence[Any]) -> Plain:
        """Join `torch.nn.Linear` layers."""
        return cls(_stack([module.weight for module in modules]), _stack_biases(modules))

    def multiply(self, x: Tensor) -> Tensor:
        """Return x W' + b, (B, K) -> (B, N)."""
        return functional.linear(x, self.weight, self.bias)


class FourBit(NamedTuple):
    """A product packed by bitsandbytes: two weights a byte, and a maximum for each block of one row's weights."""

    packed: Tensor  # (N*K/2, 1), uint8
    absmax: Tensor  # (N*K/blocksize,), float32; with double quantization the maxima of the maxima's blocks
    bias: Tensor | None  # (N,)
    shape: tuple[int, int]  # (N, K)
    blocksize: int
    kind: str  # "nf4" or "fp4"
    compute_dtype: torch.dtype | None  # None multiplies in the input's type
    nested: tuple[Tensor, Tensor, Tensor] | None  # of double quantization: 8-bit maxima, their code, their offset

    @classmethod
    def of(cls, modules: Sequence[Any]) -> FourBit:
        """Join `bitsandbytes.nn.Linear4bit` layers of one kind; a doubly quantized one stands alone."""
        states = [module.weight.quant_state for module in modules]
        first = states[0]
        packed = _stack([module.weight for module in modules]).view(-1, 1)
        nested = (first.absmax, first.state2.code, first.offset) if first.nested else None
        absmax = first.state2.absmax if first.nested else _stack([state.absmax for state in states])
        shape = sum(state.shape[0] for state in states), first.shape[1]
        return cls(packed, absmax, _stack_biases(modules), shape, first.blocksize, first.quant_type,
                   modules[0].compute_dtype, nested)  # fmt: skip

    def multiply(self, x: Tensor) -> Tensor:
        """Return x W' + b, (B, K) -> (B, N), as `bitsandbytes.nn.Linear4bit` computes it."""
        wide = x if self.compute_dtype is None else x.to(self.compute_dtype)
        codes, code, offset = self.nested or (None, None, None)
        bias = None if self.bias is None else self.bias.to(wide.dtype)
        out = torch.ops.bitsandbytes.gemm_4bit.default(
            wide, self.packed, self.shape, self.absmax, self.blocksize, self.kind,
            bias=bias, absmax_8bit=codes, absmax_code=code, absmax_offset=offset,
        )  # fmt: skip
        return out.to(x.dtype)


class EightBit(NamedTuple):
    """An LLM.int8 product without the outlier path: int8 rows, each with its maximum."""

    rows: Tensor  # (N, K), int8
    scale: Tensor  # (N,), float32
    bias: Tensor | None  # (N,)

    @classmethod
    def of(cls, modules: Sequence[Any]) -> EightBit:
        """Join `bitsandbytes.nn.Linear8bitLt` layers of threshold 0."""
        for module in modules:
            if module.weight.CB is not None:  # what the layer itself does before its first product
                module.init_8bit_state()
        rows = _stack([module.weight for module in modules])
        scale = _stack([module.state.SCB for module in modules])
        for module in modules:
            module.state.CB = module.weight.data
        return cls(rows, scale, _stack_biases(modules))

    def multiply(self, x: Tensor) -> Tensor:
        """Return x W' + b, (B, K) -> (B, N), as `bitsandbytes.nn.Linear8bitLt` computes it at threshold 0."""
        codes, maxima, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(x.to(torch.float16), 0.0)
        # on CUDA the kernel writes float16 and casts afterwards: that cast is left to be fused with what follows
        dtype = torch.float16 if x.is_cuda else x.dtype
        out = torch.ops.bitsandbytes.int8_scaled_mm.default(
            codes, self.rows, maxima, self.scale, bias=self.bias, dtype=dtype
        )
        return out.to(x.dtype)


Product = Plain | FourBit | EightBit


def multiply_all(products: tuple[Product, ...], x: Tensor) -> Tensor:
    """Return the outputs of products of one input beside each other, (B, K) -> (B, all outputs)."""
    outputs = [product.multiply(x) for product in products]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def join(modules: Sequence[Any]) -> tuple[Product, ...]:
    """Return linear layers of one input as one product, or one each where joining would change a bit of the result.

    The layers go on working: their weights become views of the joined ones, so nothing is held twice.
    """
    if _are_joinable(modules):
        return (_product_of(modules),)
    return tuple(_product_of([module]) for module in modules)


def _are_joinable(modules: Sequence[Any]) -> bool:
    """Return whether layers are of one kind, and each gives the same bits when its rows stand below another's.

    Doubly quantized 4-bit layers do not: their maxima are relative to a mean that each matrix has of its own.
    """
    if len({(type(module), module.bias is None) for module in modules}) > 1:
        return False
    states = [state for module in modules if (state := getattr(module.weight, "quant_state", None)) is not None]
    kinds = {(state.shape[1], state.blocksize, state.quant_type) for state in states}
    return len(kinds) <= 1 and not any(state.nested or state.shape[1] % state.blocksize for state in states)


def _product_of(modules: Sequence[Any]) -> Product:
    from bitsandbytes.nn import Linear4bit

    if type(modules[0]) is torch.nn.Linear:
        return Plain.of(modules)
    return FourBit.of(modules) if isinstance(modules[0], Linear4bit) else EightBit.of(modules)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Lay tensors below each other in one; each becomes a view of its part, so that nothing is held twice."""
    if len(tensors) == 1:
        return tensors[0].detach()
    joined = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, joined.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = part
    return joined


def _stack_biases(modules: Sequence[Any]) -> Tensor | None:
    return None if modules[0].bias is None else _stack([module.bias for module in modules])
