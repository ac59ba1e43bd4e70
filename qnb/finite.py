"""Outputs that are not finite: count them and raise, so that no number is made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class NotFiniteError(ArithmeticError):
    """A model's outputs are infinite or undefined, so nothing can be measured of it."""


def check_finite(outputs: torch.Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """Raise if a model's outputs are not all finite; waits for the device.

    Parameters
    ----------
    outputs
        Numbers of any shape.
    what
        What they are, in the plural.
    dtype
        The type that the model computes in, where `outputs` were widened; None means that of `outputs`.

    Raises
    ------
    NotFiniteError
        Some are infinite or undefined. The text says how many of how many, what they are, and what to do.
    """
    import torch

    bad = outputs.numel() - int(torch.isfinite(outputs).sum())
    if not bad:
        return
    dtype = dtype or outputs.dtype
    cause, advice = f"{str(dtype).removeprefix('torch.')} fails in this model", "check the model's weights"
    if dtype == torch.float16:
        cause, advice = "FP16 overflows in this model", "take bf16 instead"
    raise NotFiniteError(f"{cause}: {bad:,} of {outputs.numel():,} outputs are not finite ({what}); {advice}")
