"""Precisions against the libraries' own reading of their arguments."""

import pytest
import torch

from qnb import precision
from qnb.errors import InputError


def test_names_and_groups_keep_their_order_once():
    assert [p.name for p in precision.parse("nf4, bf16 nf4")] == ["nf4", "bf16"]
    assert [p.name for p in precision.parse("paper")] == ["bf16", "fp16", "int8", "int4"]
    assert [p.name for p in precision.parse(["study"])] == ["bf16", "fp16", "int8", "int4", "nf4"]


@pytest.mark.parametrize(("given", "expected"), [("int9", "int8"), ("q5", "choose from"), ("", "no precision")])
def test_unknown_precision_names_the_alternatives(given, expected):
    with pytest.raises(InputError, match=expected):
        precision.parse(given)


def test_int4_is_what_load_in_4bit_alone_means():
    from transformers import BitsAndBytesConfig

    stock, ours = BitsAndBytesConfig(load_in_4bit=True), precision.PRECISIONS["int4"].config()
    assert ours.to_dict() == stock.to_dict()
    assert precision.PRECISIONS["int8"].config().to_dict() == BitsAndBytesConfig(load_in_8bit=True).to_dict()


def test_plain_types_carry_no_quantization():
    assert precision.PRECISIONS["fp16"].config() is None
    assert precision.PRECISIONS["fp16"].torch_dtype is torch.float16


def test_stored_bits_follow_the_block_layout():
    # 64 weights of 4 bits and one float32; doubly: 64 of 4, one byte, and a float32 a 256 blocks
    assert precision.PRECISIONS["nf4"].bits == (64 * 4 + 32) / 64
    assert precision.PRECISIONS["nf4-dq"].bits == pytest.approx((64 * 4 + 8 + 32 / 256) / 64, abs=1e-3)


def test_colours_are_distinct():
    colors = [p.color for p in precision.PRECISIONS.values()]
    assert len(set(colors)) == len(colors)
