"""The formats, as data: how each stores and multiplies a model's weights, and its colour and marker in figures.

A weight stored in b bits costs b/8 bytes of memory and of bandwidth. What it is *multiplied* in is a separate choice.
LLM.int8 multiplies int8 by int8 and keeps outlier columns in 16 bit (Dettmers et al. 2022). The 4-bit formats are
unpacked to their compute type before every product (Dettmers et al. 2023). Only linear layers inside the blocks are
quantized: embeddings, norms and the output head stay in 16 bit. Here that is bfloat16, and a study may replace it by
the type that its device has units for. No other module branches on a format's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qnb.errors import InputError, unknown

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig


@dataclass(frozen=True, slots=True)
class Precision:
    """One way to store and multiply a model's weights."""

    name: str
    dtype: str  # torch type of everything that is not quantized
    color: str  # its colour in every figure
    marker: str  # its symbol in every figure, as Plotly names it
    label: str  # its name where there is room
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
    def file_bits(self) -> float:
        """About the bits of a weight in a file, with constants; a fifth of a quantized format's stay as they are."""
        bits = 32 if self.dtype == "float32" else 16
        return 0.2 * bits + 0.8 * (8.5 if self.eight_bit else 4.75) if self.quantized else bits

    @property
    def compute_dtype(self) -> str:
        """The torch type that most products are computed in; of LLM.int8, that of its outlier columns."""
        return str(self.quantization.get("bnb_4bit_compute_dtype", self.dtype))

    @property
    def threshold(self) -> float:
        """The magnitude from which LLM.int8 multiplies an input column in 16 bit; 0 where it has no outlier path."""
        return float(self.quantization.get("llm_int8_threshold", 0.0))

    @property
    def checkpoint(self) -> str:
        """The name of its checkpoints: its own, and the 16-bit type where a quantized format has not bfloat16."""
        return f"{self.name}-{self.dtype}" if self.quantized and self.dtype != "bfloat16" else self.name

    def in_half(self, dtype: str) -> Precision:
        """Return a quantized format with another type in bfloat16's place; any other format as it is."""
        if not self.quantized:
            return self
        quantization = {name: dtype if value == "bfloat16" else value for name, value in self.quantization.items()}
        return replace(self, dtype=dtype, quantization=quantization)

    def config(self) -> BitsAndBytesConfig:
        """Return the ``quantization_config`` of a quantized format, for ``from_pretrained``."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**self.quantization)


def _int8(threshold: float) -> dict[str, Any]:
    return {"load_in_8bit": True, "llm_int8_threshold": threshold}


def _four_bit(kind: str, compute: str, **options: Any) -> dict[str, Any]:
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": compute, **options}


_FORMATS = (
    Precision("fp32", "float32", "#4d4d4d", "circle", "FP32", "32-bit floats, the reference"),
    Precision("bf16", "bfloat16", "#1f4e9c", "square", "BF16", "bfloat16, as most models are released: the baseline"),
    Precision("fp16", "float16", "#3d9be9", "diamond", "FP16", "half precision"),
    Precision("int8", "bfloat16", "#e08214", "triangle-up", "INT8", "LLM.int8, outliers above 6.0 kept in 16 bit",
              _int8(6.0)),
    Precision("int8-no-outliers", "bfloat16", "#fdb863", "triangle-down", "INT8 (no outlier path)",
              "LLM.int8 without the outlier path (threshold 0)", _int8(0.0)),
    Precision("int4", "bfloat16", "#b2182b", "cross", "INT4 (FP4 weights, FP32 compute)",
              "FP4, float32 compute: load_in_4bit=True alone, the paper's INT4", _four_bit("fp4", "float32")),
    Precision("fp4", "bfloat16", "#d6604d", "x", "FP4", "FP4, 16-bit compute", _four_bit("fp4", "bfloat16")),
    Precision("nf4", "bfloat16", "#1b7837", "star", "NF4", "NF4, 16-bit compute", _four_bit("nf4", "bfloat16")),
    Precision("nf4-dq", "bfloat16", "#7fbf7b", "hexagon", "NF4 (double quantization)",
              "NF4 with double quantization, 16-bit compute",
              _four_bit("nf4", "bfloat16", bnb_4bit_use_double_quant=True)),
)  # fmt: skip
PRECISIONS = {precision.name: precision for precision in _FORMATS}
BASELINE = "bf16"
PAPER = ("bf16", "fp16", "int8", "int4")
STUDY = (*PAPER, "nf4")
HALVES = ("auto", "bfloat16", "float16")  # what may be asked for in bfloat16's place; "auto" suits the device


def listed(names: str | Iterable[str]) -> list[str]:
    """Return names given as a list, or as one text with commas or spaces between them.

    Raises
    ------
    InputError
        `names` is neither.
    """
    if not isinstance(names, Iterable):
        raise InputError(f"{names!r} is no name; give names in one text, with commas between them")
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
            raise unknown("precision", name, PRECISIONS)
    return tuple(PRECISIONS[name] for name in dict.fromkeys(names))
