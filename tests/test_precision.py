"""Precisions against the libraries' own reading of their arguments."""

import torch

from qnb import precision


def test_names_and_groups_keep_their_order_once():
    assert [p.name for p in precision.parse("nf4, bf16 nf4")] == ["nf4", "bf16"]
    assert [p.name for p in precision.parse("paper")] == ["bf16", "fp16", "int8", "int4"]
    assert [p.name for p in precision.parse(["study"])] == ["bf16", "fp16", "int8", "int4", "nf4"]


def test_formats_are_what_the_libraries_mean_by_them():
    """INT4 is what load_in_4bit alone means. Another type in bfloat16's place changes quantized formats alone."""
    from transformers import BitsAndBytesConfig

    stock, ours = BitsAndBytesConfig(load_in_4bit=True), precision.PRECISIONS["int4"].config()
    assert ours.to_dict() == stock.to_dict()
    assert precision.PRECISIONS["fp16"].torch_dtype is torch.float16 and not precision.PRECISIONS["fp16"].quantized
    for name, each in precision.PRECISIONS.items():
        half = each.in_half("float16")
        follows = each.quantized and each.library != "torchao"  # whose kernels want bfloat16, or overflow in float16
        assert (half == each) is not follows and half.checkpoint == name + "-float16" * follows
        if "load_in_4bit" in half.quantization:
            compute = torch.float32 if name == "int4" else torch.float16
            assert (half.config().bnb_4bit_compute_dtype, half.torch_dtype) == (compute, torch.float16)
    assert precision.PRECISIONS["int8"].config().to_dict() == BitsAndBytesConfig(load_in_8bit=True).to_dict()


def test_colours_markers_and_labels_are_distinct():
    for field in ("color", "marker", "label"):
        values = [getattr(precision.PRECISIONS[name], field) for name in precision.BUILT_IN]
        assert len(set(values)) == len(values), field
