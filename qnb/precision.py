"""The formats, as data: each one's settings of the library that quantizes, and its colour and marker in all figures.

A weight stored in b bits costs b/8 bytes of memory and of bandwidth. What it is *multiplied* in is a separate choice.
LLM.int8 multiplies int8 by int8 and keeps outlier columns in 16 bit (Dettmers et al. 2022). The 4-bit formats are
unpacked to their compute type before every product (Dettmers et al. 2023). Only linear layers inside the blocks are
quantized: embeddings, norms and the output head stay in 16 bit. Here that is bfloat16, and a study may replace it by
the type that its device has units for. torchao's formats need that package. Its 8-bit ones quantize a product's inputs
too, row by row. A checkpoint that was made elsewhere is a format too, named by its label. Models are quantized, saved
and loaded by `qnb.quantize.checkpoint`. No other module branches on a format's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from qnb.errors import InputError, check_choice

if TYPE_CHECKING:
    import torch
    from transformers.utils.quantization_config import QuantizationConfigMixin

# by library: its class of settings in transformers, and the argument for modules that stay as they are
CONFIGS = {
    "bitsandbytes": ("BitsAndBytesConfig", "llm_int8_skip_modules"),
    "torchao": ("TorchAoConfig", "modules_to_not_convert"),
}


@dataclass(frozen=True, slots=True)
class Precision:
    """One way to store and multiply a model's weights."""

    name: str
    dtype: str  # torch type of everything that is not quantized
    color: str  # its colour in every figure
    marker: str  # its symbol in every figure, as Plotly names it
    label: str  # its name where there is room
    meaning: str
    quantization: dict[str, Any] = field(default_factory=dict, hash=False)  # arguments of its library's settings
    bits: float = 0.0  # about those of a quantized weight in a file, with its constants
    library: str = "bitsandbytes"  # that quantizes
    product: str = ""  # the type that it multiplies in, where inputs are quantized too
    capability: tuple[int, int] | None = None  # of a GPU, the least that runs it; None where a CPU does too
    multiples: tuple[int, int] = (1, 1)  # of a layer's outputs and inputs, that its kernels take
    weight: str = ""  # the class of its weights once loaded, where a library may leave all of them as they were
    kernels: str = ""  # a pattern in the names of a GPU's kernels that multiply in it, where others may stand in
    origin: str = ""  # of a checkpoint that was made elsewhere: a folder, a GGUF file, or a hub id
    style: int = 0  # of its colour and marker, among those of checkpoints made elsewhere

    @property
    def quantized(self) -> bool:
        """Whether a library replaces the linear layers' weights."""
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
        """About the bits of a weight in a file, with constants; what was made elsewhere takes no file of ours."""
        return self.shared_bits + 0.8 * self.bits if self.quantized else 5 * self.shared_bits

    @property
    def shared_bits(self) -> float:
        """Of `file_bits`, those of the fifth of all weights that no format quantizes."""
        return 0.0 if self.origin else 0.2 * (32 if self.dtype == "float32" else 16)

    @property
    def compute_dtype(self) -> str:
        """The torch type that most products are computed in; of LLM.int8, that of its outlier columns."""
        return self.product or str(self.quantization.get("bnb_4bit_compute_dtype", self.dtype))

    @property
    def threshold(self) -> float:
        """The magnitude from which LLM.int8 multiplies an input column in 16 bit; 0 where it has no outlier path."""
        return float(self.quantization.get("llm_int8_threshold", 0.0))

    @property
    def checkpoint(self) -> str:
        """The name of its checkpoints: its own, and the 16-bit type where a quantized format has not bfloat16."""
        return f"{self.name}-{self.dtype}" if self.quantized and self.dtype != "bfloat16" else self.name

    def in_half(self, dtype: str) -> Precision:
        """Return a quantized format with another type in bfloat16's place; any other format as it is.

        One that needs a GPU from Ampere on stays in bfloat16, which its kernels want. So does any of torchao's where
        float16 is asked for: a product of int8 is rounded to it before the weights' scales bring it into its range.
        """
        if not self.quantized or self.capability or (self.library, dtype) == ("torchao", "float16"):
            return self
        quantization = {name: dtype if value == "bfloat16" else value for name, value in self.quantization.items()}
        return replace(self, dtype=dtype, quantization=quantization)

    def config(self, skipped_modules: list[str] | None = None) -> QuantizationConfigMixin:
        """Return the ``quantization_config`` of a quantized format, for ``from_pretrained``.

        `skipped_modules` stay as they are; None lets transformers choose.
        """
        import transformers

        name, skip = CONFIGS[self.library]
        config: QuantizationConfigMixin = getattr(transformers, name).from_dict({**self.quantization})
        setattr(config, skip, skipped_modules)
        return config


def _int8(threshold: float) -> tuple[dict[str, Any], float]:
    return {"load_in_8bit": True, "llm_int8_threshold": threshold}, 8.5


def _four_bit(kind: str, compute: str, **options: Any) -> tuple[dict[str, Any], float]:
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": compute}
    return {**settings, **options}, 4.75


def _torchao(name: str, bits: float, **settings: Any) -> tuple[dict[str, Any], float, str]:
    """Return torchao's own record of its settings, which `TorchAoConfig` reads and writes.

    Its settings for torch.compile would change how every other format of the process is compiled.
    """
    record = {"_type": name, "_version": 2, "_data": {"set_inductor_config": False, **settings}}
    return {"quant_type": {"default": record}}, bits, "torchao"


def _member(kind: str, value: Any) -> dict[str, Any]:
    return {"_type": kind, "_data": value}


_FORMATS = (
    Precision("fp32", "float32", "#4d4d4d", "circle", "FP32", "32-bit floats, the reference"),
    Precision("bf16", "bfloat16", "#1f4e9c", "square", "BF16", "bfloat16, as most models are released: the baseline"),
    Precision("fp16", "float16", "#3d9be9", "diamond", "FP16", "half precision"),
    Precision("int8", "bfloat16", "#e08214", "triangle-up", "INT8", "LLM.int8, outliers above 6.0 kept in 16 bit",
              *_int8(6.0)),
    Precision("int8-no-outliers", "bfloat16", "#fdb863", "triangle-down", "INT8 (no outlier path)",
              "LLM.int8 without the outlier path (threshold 0)", *_int8(0.0)),
    Precision("int4", "bfloat16", "#b2182b", "cross", "INT4 (FP4 weights, FP32 compute)",
              "FP4, float32 compute: load_in_4bit=True alone, the paper's INT4", *_four_bit("fp4", "float32")),
    Precision("fp4", "bfloat16", "#d6604d", "x", "FP4", "FP4, 16-bit compute", *_four_bit("fp4", "bfloat16")),
    Precision("nf4", "bfloat16", "#1b7837", "star", "NF4", "NF4, 16-bit compute", *_four_bit("nf4", "bfloat16")),
    Precision("nf4-dq", "bfloat16", "#7fbf7b", "hexagon", "NF4 (double quantization)",
              "NF4 with double quantization, 16-bit compute",
              *_four_bit("nf4", "bfloat16", bnb_4bit_use_double_quant=True)),
    Precision("int8-dynamic", "bfloat16", "#a6761d", "triangle-left", "INT8 (dynamic)",
              "int8 weights and inputs with one scale per row, by torchao",
              *_torchao("Int8DynamicActivationInt8WeightConfig", 8.0),
              product="int8", multiples=(8, 8), weight="Int8Tensor",
              kernels=r"gemm_(s8|i8|int8)|i16832|i8816|i8i32|imma|nvjet_(sm\d+_)?[bi]{2}|triton_"),
    Precision("fp8", "bfloat16", "#41b6c4", "triangle-right", "FP8",
              "float8 weights and inputs with one scale per row, by torchao",
              *_torchao("Float8DynamicActivationFloat8WeightConfig", 8.0, granularity=_member("PerRow", {}),
                        kernel_preference=_member("KernelPreference", "TORCH")),
              product="float8_e4m3fn", capability=(8, 9), weight="Float8Tensor",
              kernels=r"e4m3|nvjet_(sm\d+_)?qq|triton_"),
    Precision("int4-hqq", "bfloat16", "#f768a1", "octagon", "INT4 (HQQ)",
              "int4 weights in groups of 64 with scales found by HQQ, 16-bit compute, by torchao",
              *_torchao("Int4WeightOnlyConfig", 4.5, group_size=64,
                        int4_packing_format=_member("Int4PackingFormat", "TILE_PACKED_TO_4D"),
                        int4_choose_qparams_algorithm=_member("Int4ChooseQParamsAlgorithm", "HQQ")),
              capability=(8, 0), weight="Int4TilePackedTo4dTensor", kernels=r"tinygemm"),
)  # fmt: skip
PRECISIONS = {precision.name: precision for precision in _FORMATS}
BUILT_IN = frozenset(PRECISIONS)
BASELINE = "bf16"
PAPER = ("bf16", "fp16", "int8", "int4")
STUDY = (*PAPER, "nf4")
TORCHAO = tuple(name for name, precision in PRECISIONS.items() if precision.library == "torchao")
ALL = tuple(name for name in PRECISIONS if name not in TORCHAO)  # that a plain installation runs on any device
GROUPS: dict[str, tuple[str, ...]] = {"study": STUDY, "paper": PAPER, "all": ALL, "torchao": TORCHAO}
ORIGIN = "checkpoint:"  # before a folder, a GGUF file or a hub id, and after a label with "="
# colours and markers of checkpoints that were made elsewhere, beside those above
_STYLES = (("#762a83", "pentagon"), ("#01665e", "hourglass"), ("#8c510a", "bowtie"), ("#c51b7d", "star-square"),
           ("#5e4fa2", "diamond-tall"), ("#878787", "hexagram"))  # fmt: skip
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


def parse(names: str | Iterable[str], rows: Iterable[Mapping[str, Any]] = ()) -> tuple[Precision, ...]:
    """Return the precisions named, in their order, once each.

    Parameters
    ----------
    names
        Names separated by commas or spaces, or a list of names; ``"study"`` and ``"paper"`` stand for the default
        five and the paper's four, ``"all"`` for the nine that need no further package, ``"torchao"`` for the three
        that need torchao. ``checkpoint:you/model-AWQ`` is a checkpoint that was made elsewhere, and
        ``AWQ=checkpoint:...`` gives it a label.
    rows
        Of the study: checkpoints that it knows keep their colours.

    Raises
    ------
    InputError
        A name is unknown or none is given, or a label is taken.
    """
    recall(rows := [row for row in rows if row.get("origin")])
    known, parsed = {row["precision"]: row["style"] for row in rows}, list[str]()
    labels: dict[str, tuple[str, str]] = {}  # (label, origin) by the label in small letters
    for word in listed(names):
        if ORIGIN in word:
            label, origin = _label(word)
            if labels.setdefault(label.lower(), (label, origin)) != (label, origin):
                raise InputError(f"two checkpoints are called {label!r}; give one another label before '='")
            parsed.append(label)
        else:
            parsed += GROUPS.get(word.lower()) or [_known(word)]
    if not parsed:
        raise InputError(f"no precision was given; name some of: {', '.join(PRECISIONS)}")
    for label, origin in labels.values():
        known.setdefault(label, next(style for style in count() if style not in known.values()))
        _register(label, origin, known[label])
    return tuple(PRECISIONS[name] for name in dict.fromkeys(parsed))


def _known(word: str) -> str:
    """Return a format's name, or a label that was given before."""
    name = word if word in PRECISIONS else word.lower()
    elsewhere = f"mine={ORIGIN}PATH (a checkpoint made elsewhere; in a list where PATH has a space or comma)"
    check_choice("precision", name, [*PRECISIONS, elsewhere])
    return name


def recall(rows: Iterable[Mapping[str, Any]]) -> None:
    """Let checkpoints made elsewhere, which a study's rows name, be found in `PRECISIONS` in the colours they had."""
    for row in sorted((row for row in rows if row.get("origin")), key=lambda row: row["style"]):
        if row["precision"] not in BUILT_IN:
            _register(row["precision"], row["origin"], row["style"])


def _label(word: str) -> tuple[str, str]:
    """Return the label and the origin of a checkpoint that was made elsewhere."""
    label, _, origin = word.partition(ORIGIN)
    label = label.removesuffix("=") or origin.partition("@")[0].rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    if not origin or not re.fullmatch(r"\w[\w.-]*", label, re.ASCII):
        raise InputError(
            f"{word} names no checkpoint, or has no label of letters, digits, '.', '_' and '-'; "
            f"give a folder, a GGUF file or a hub id, such as AWQ={ORIGIN}you/model-AWQ"
        )
    if label.lower() in {*BUILT_IN, *GROUPS, "published"}:
        raise InputError(
            f"{label!r} is the name of a format; give the checkpoint a label, as in mine={ORIGIN}{origin}"
        )
    return label, origin


def _register(label: str, origin: str, style: int) -> None:
    """Put a label behind all others."""
    (color, _), (_, marker) = _STYLES[style % len(_STYLES)], _STYLES[(style + style // len(_STYLES)) % len(_STYLES)]
    PRECISIONS.pop(label, None)
    PRECISIONS[label] = Precision(
        label, "as saved", color, marker, label, f"made elsewhere: {origin}", origin=origin, style=style
    )


def title(name: str) -> str:
    """Return a format's name as sentences write it: a label stays as it was given."""
    return name if name in PRECISIONS and PRECISIONS[name].origin else name.upper()
