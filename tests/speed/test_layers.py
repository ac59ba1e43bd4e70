"""Joined products give bit for bit what each layer gives alone, and hold nothing twice."""

import copy

import pytest
import torch
from bitsandbytes import nn
from torch.nn import functional

from qnb.speed.layers import attend_flex, attend_large_batch, attend_sdpa, join, multiply_4bit, multiply_8bit

X = torch.randn(3, 128)


def quantized(rows, kind="nf4", nested=False):
    if kind == "int8":
        return nn.Linear8bitLt(128, rows, bias=False, has_fp16_weights=False).to("cpu").eval()
    layer = nn.Linear4bit(128, rows, compute_dtype=torch.float32, quant_type=kind, compress_statistics=nested)
    return layer.to("cpu").requires_grad_(False).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "multiply"), [("nf4", multiply_4bit), ("fp4", multiply_4bit), ("int8", multiply_8bit)]
)
def test_joined_layers_give_each_layers_bits(kind, multiply):
    """An INT8 layer's own forward gives the same; in 4 bit the CPU's keeps maxima in 16 bit."""
    modules, x = [quantized(rows, kind) for rows in (64, 32, 96)], X.bfloat16() if kind == "int8" else X

    def alone():
        forwards = [module if kind == "int8" else join([module])[0].multiply for module in modules]
        return torch.cat([forward(x) for forward in forwards], 1)

    expected = alone()
    (joined,) = join(modules)
    assert joined.function is multiply and torch.equal(joined.multiply(x), expected)
    assert torch.equal(alone(), expected)  # in joined memory
    packed = next(each for each in joined.weights if isinstance(each, torch.Tensor))
    assert modules[1].weight.data_ptr() == packed.data_ptr() + modules[0].weight.numel()


def test_doubly_quantized_layers_and_layers_of_different_kinds_stay_apart():
    modules = [quantized(64, nested=True), quantized(32, nested=True)]
    for product, module in zip(join(modules), copy.deepcopy(modules), strict=True):
        assert torch.allclose(product.multiply(X), module(X), atol=0.05)  # the CPU's kernel keeps maxima in 16 bit
    plain = torch.nn.Linear(128, 32)
    products = join([plain, quantized(64)])
    assert [product.function for product in products] == [functional.linear, multiply_4bit]
    assert torch.equal(products[0].multiply(X), plain(X))
    assert len(join([plain, torch.nn.Linear(128, 32, bias=False)])) == 2


@pytest.mark.parametrize(("capability", "attend"), [((7, 5), attend_sdpa), ((8, 0), attend_flex)])
def test_only_gpus_from_ampere_on_take_flex_attention(capability, attend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attend_large_batch(128, torch.device("cuda")) is attend
    assert attend_large_batch(512, torch.device("cuda")) is attend_large_batch(128, torch.device("cpu")) is attend_sdpa
