"""Joined products give bit for bit what each layer gives alone, and hold nothing twice."""

import copy

import pytest
import torch
from bitsandbytes import nn
from torch.nn import functional

from qnb.speed.layers import join, multiply_4bit, multiply_8bit

X = torch.randn(3, 128)


def four_bit(rows, kind="nf4", nested=False):
    layer = nn.Linear4bit(128, rows, compute_dtype=torch.float32, quant_type=kind, compress_statistics=nested)
    return layer.to("cpu").requires_grad_(False).eval()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_joined_4_bit_layers_give_each_layers_bits(kind):
    modules = [four_bit(rows, kind) for rows in (64, 32, 96)]
    alone = torch.cat([join([module])[0].multiply(X) for module in modules], 1)
    (joined,) = join(modules)
    assert joined.function is multiply_4bit and torch.equal(joined.multiply(X), alone)
    assert torch.equal(torch.cat([join([module])[0].multiply(X) for module in modules], 1), alone)  # joined memory
    assert modules[1].weight.data_ptr() == joined.weights[1].data_ptr() + modules[0].weight.numel()


def test_doubly_quantized_layers_and_layers_of_different_kinds_stay_apart():
    modules = [four_bit(64, nested=True), four_bit(32, nested=True)]
    for product, module in zip(join(modules), copy.deepcopy(modules), strict=True):
        assert torch.allclose(product.multiply(X), module(X), atol=0.05)  # the CPU's kernel keeps maxima in 16 bit
    plain = torch.nn.Linear(128, 32)
    products = join([plain, four_bit(64)])
    assert [product.function for product in products] == [functional.linear, multiply_4bit]
    assert torch.equal(products[0].multiply(X), plain(X))
    assert len(join([plain, torch.nn.Linear(128, 32, bias=False)])) == 2


@torch.no_grad()
def test_joined_8_bit_layers_give_each_layers_bits():
    modules = [nn.Linear8bitLt(128, rows, bias=False, has_fp16_weights=False).to("cpu").eval() for rows in (64, 32)]
    expected = torch.cat([module(X.bfloat16()) for module in modules], 1)
    (joined,) = join(modules)
    assert joined.function is multiply_8bit and torch.equal(joined.multiply(X.bfloat16()), expected)
    assert torch.equal(torch.cat([module(X.bfloat16()) for module in modules], 1), expected)
    assert modules[1].weight.data_ptr() == joined.weights[0].data_ptr() + modules[0].weight.numel()
