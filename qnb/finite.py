"""Outputs that are not finite: count them and raise, so that no number is made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class NotFiniteError(ArithmeticError):
    """A model's outputs are infinite or undefined, so nothing can be measured of it."""


def check_finite(outputs: torch.Tensor, what: str, model: PreTrainedModel | None = None) -> None:
    """Raise if a model's outputs are not all finite; waits for the device.

    Parameters
    ----------
    outputs
        Numbers of any shape.
    what
        What they are, in the plural.
    model
        Whose they are. Without it, the type that the model computes in is taken to be that of `outputs`.

    Raises
    ------
    NotFiniteError
        Some are infinite or undefined. The text says how many of how many, what they are, and what to do.
    """
    import torch

    bad = outputs.numel() - int(torch.isfinite(outputs).sum())
    if not bad:
        return
    dtype = model.dtype if model else outputs.dtype
    cause, advice = f"{str(dtype).removeprefix('torch.')} fails in this model", "check the model's weights"
    if dtype == torch.float16:
        is_quantized = getattr(model, "is_quantized", False)
        cause, advice = "FP16 overflows in this model", "give half bfloat16" if is_quantized else "take bf16 instead"
    elif getattr(model, "is_loaded_in_8bit", False):  # bitsandbytes casts what it multiplies by INT8 to float16
        cause, advice = "the FP16 inputs of 8-bit layers overflow in this model", "take another format"
    raise NotFiniteError(f"{cause}: {bad:,} of {outputs.numel():,} outputs are not finite ({what}); {advice}")
