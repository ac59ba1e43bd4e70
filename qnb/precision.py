"""What each precision means, as load arguments.

A weight stored in b bits costs b/8 bytes of memory and of bandwidth; what it is *multiplied* in is a separate
choice. LLM.int8 multiplies int8 by int8 and keeps outlier columns in 16 bit (Dettmers et al. 2022); the 4-bit
formats are unpacked to their compute type before every product (Dettmers et al. 2023). Only linear layers inside
the blocks are quantized: embeddings, norms and the output head stay in 16 bit. No other module branches on a name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from qnb.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig


@dataclass(frozen=True, slots=True)
class Precision:
    """One way to store and multiply a model's weights."""

    name: str
    dtype: str  # torch type of everything that is not quantized
    bits: float  # stored bits a quantized weight, block constants included
    color: str  # its colour in every figure
    meaning: str
    quantization: dict[str, Any] = field(default_factory=dict, hash=False)  # BitsAndBytesConfig arguments

    @property
    def quantized(self) -> bool:
        """Whether bitsandbytes replaces the linear layers."""
        return bool(self.quantization)

    @property
    def eight_bit(self) -> bool:
        """Whether linear layers multiply int8 by int8."""
        return bool(self.quantization.get("load_in_8bit"))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch type of everything that is not quantized."""
        import torch

        return getattr(torch, self.dtype)

    @property
    def threshold(self) -> float:
        """From what magnitude on LLM.int8 multiplies an input column in 16 bit; 0 where it keeps no outliers apart."""
        return float(self.quantization.get("llm_int8_threshold", 0.0))

    def config(self) -> BitsAndBytesConfig | None:
        """Return the ``quantization_config`` for ``from_pretrained``; None for plain types."""
        if not self.quantization:
            return None
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**self.quantization)


def _four_bit(kind: str, compute: str, **more: Any) -> dict[str, Any]:
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": compute, **more}


# Stored bits: bitsandbytes keeps a float32 maximum a row (INT8, about 0 bits) or a block of 64 weights (0.5 bit);
# double quantization stores that maximum in 8 bits and one float32 a 256 of them (0.127 bit).
PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp32", "float32", 32, "#4d4d4d", "32-bit floats, the reference"),
        Precision("bf16", "bfloat16", 16, "#1f4e9c", "bfloat16, as the model was released: the baseline"),
        Precision("fp16", "float16", 16, "#3d9be9", "half precision"),
        Precision(
            "int8", "bfloat16", 8, "#e08214", "LLM.int8, outliers above 6.0 kept in 16 bit",
            {"load_in_8bit": True, "llm_int8_threshold": 6.0},
        ),
        Precision(
            "int8-no-outliers", "bfloat16", 8, "#fdb863", "LLM.int8 without the outlier path (threshold 0)",
            {"load_in_8bit": True, "llm_int8_threshold": 0.0},
        ),
        Precision(
            "int4", "bfloat16", 4.5, "#b2182b", "FP4, float32 compute: load_in_4bit=True alone, the paper's INT4",
            _four_bit("fp4", "float32"),
        ),
        Precision("fp4", "bfloat16", 4.5, "#d6604d", "FP4, 16-bit compute", _four_bit("fp4", "bfloat16")),
        Precision("nf4", "bfloat16", 4.5, "#1b7837", "NF4, 16-bit compute", _four_bit("nf4", "bfloat16")),
        Precision(
            "nf4-dq", "bfloat16", 4.127, "#7fbf7b", "NF4 with double quantization, 16-bit compute",
            _four_bit("nf4", "bfloat16", bnb_4bit_use_double_quant=True),
        ),
    )
}  # fmt: skip
BASELINE = "bf16"
PAPER = ("bf16", "fp16", "int8", "int4")
STUDY = (*PAPER, "nf4")


def listed(names: str | Iterable[str]) -> list[str]:
    """Return names given as a list, or as one text with commas or spaces between them."""
    return names.replace(",", " ").split() if isinstance(names, str) else [str(name) for name in names]


def parse(names: str | Iterable[str]) -> tuple[Precision, ...]:
    """Return the precisions named, in their order, once each.

    Parameters
    ----------
    names
        Names separated by commas or spaces, or a list of names; ``"study"`` and ``"paper"`` stand for the default
        five and the paper's four.

    Raises
    ------
    InputError
        A name is unknown or none is given.
    """
    words = listed(names)
    groups = {"study": STUDY, "paper": PAPER, "all": tuple(PRECISIONS)}
    names = [name for word in words for name in groups.get(word.lower(), (word.lower(),))]
    if not names:
        raise InputError(f"no precision was given; name some of: {', '.join(PRECISIONS)}")
    for name in names:
        if name not in PRECISIONS:
            near = get_close_matches(name, PRECISIONS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"precision {name!r} is unknown; choose from {', '.join(PRECISIONS)}{hint}")
    return tuple(PRECISIONS[name] for name in dict.fromkeys(names))
