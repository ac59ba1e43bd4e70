"""Joined products give bit for bit what each layer gives alone, and hold nothing twice."""

import copy

import pytest
import torch
from bitsandbytes import nn

from qnb.speed.layers import join, multiply_4bit, multiply_8bit


def four_bit(rows, kind="nf4", nested=False):
    layer = nn.Linear4bit(
        128, rows, bias=True, compute_dtype=torch.float32, quant_type=kind, compress_statistics=nested
    )
    return layer.to("cpu").requires_grad_(False).eval()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_joined_4_bit_layers_give_each_layers_bits(kind):
    layers, x = [four_bit(rows, kind) for rows in (64, 32, 96)], torch.randn(3, 128)
    alone = torch.cat([join([layer])[0].multiply(x) for layer in layers], 1)
    (joined,) = join(layers)
    assert joined.function is multiply_4bit and torch.equal(joined.multiply(x), alone)
    parts = [join([layer])[0].multiply(x) for layer in layers]  # on the joined memory
    assert torch.equal(torch.cat(parts, 1), alone)
    assert layers[1].weight.data_ptr() == joined.weights[1].data_ptr() + layers[0].weight.numel()


def test_doubly_quantized_layers_stay_apart():
    layers, x = [four_bit(rows, nested=True) for rows in (64, 32)], torch.randn(3, 128)
    expected = [layer(x) for layer in copy.deepcopy(layers)]
    products = join(layers)
    assert len(products) == 2 and all(len(product.weights) == 10 for product in products)
    for product, want in zip(products, expected, strict=True):
        assert torch.allclose(product.multiply(x), want, atol=0.05)  # the CPU's own kernel keeps maxima in 16 bit


def test_joined_8_bit_layers_give_each_layers_bits():
    layers = [nn.Linear8bitLt(128, rows, bias=False, has_fp16_weights=False).to("cpu").eval() for rows in (64, 32)]
    x = torch.randn(3, 128).bfloat16()
    with torch.inference_mode():
        expected = torch.cat([layer(x) for layer in layers], 1)
    with torch.no_grad():
        (joined,) = join(layers)
        assert joined.function is multiply_8bit and torch.equal(joined.multiply(x), expected)
        assert torch.equal(torch.cat([layer(x) for layer in layers], 1), expected)
    assert layers[1].weight.data_ptr() == joined.weights[0].data_ptr() + layers[0].weight.numel()


def test_layers_of_different_kinds_stay_apart():
    plain, x = torch.nn.Linear(128, 32), torch.randn(3, 128)
    products = join([plain, four_bit(64)])
    assert [product.function for product in products] == [torch.nn.functional.linear, multiply_4bit]
    assert torch.equal(products[0].multiply(x), plain(x))
    assert len(join([plain, torch.nn.Linear(128, 32, bias=False)])) == 2
