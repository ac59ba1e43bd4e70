"""What makes a timed row unlike an undisturbed one: flags that rows hold, and the words that are printed for them."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any, Self


class Described(StrEnum):
    """A value that rows and frames hold, with the text that is shown for it."""

    text: str

    def __new__(cls, value: str, text: str) -> Self:
        """Make a member of a value and its text."""
        member = str.__new__(cls, value)
        member._value_, member.text = value, text
        return member


class Flag(Described):
    """What makes a timed row unlike an undisturbed one. Rows hold the value; the words are printed only."""

    THROTTLED = "throttled", "the GPU's clocks were held down"
    GPU_SHARED = "gpu_shared", "another process used the GPU"
    CPU_SHARED = "cpu_shared", "other processes used the CPU"
    PEAKS_DISTURBED = "peaks_disturbed", "the device's peaks were measured on a busy machine"
    SAMPLES_MISSING = "samples_missing", "some of the monitor's readings are missing"
    TOO_SHORT = "too_short", "too short for utilization, power and energy"
    TRACE_FAILED = "trace_failed", "kernels were not traced"
    UNFUSED = "unfused", "captured without fusing small kernels"


DISTURBED = frozenset({Flag.GPU_SHARED, Flag.CPU_SHARED})


def flag_text(flags: Iterable[str] | None) -> str:
    """Return flags in words, separated by semicolons; unknown ones as they are."""
    known = {flag.value: flag.text for flag in Flag}
    return "; ".join(known.get(flag, flag) for flag in flags or ())


def is_disturbed(flags: Any) -> bool:
    """Return whether a row's flags say that other processes were at work meanwhile."""
    return isinstance(flags, (list, tuple)) and not DISTURBED.isdisjoint(flags)
