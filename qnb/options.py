"""What a user may pass: counts, "auto", and budgets of minutes."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qnb.errors import InputError

Count = int | str  # a number, or "auto": what the device allows in minutes
Names = str | Iterable[str]  # one text with commas between names, or a list
AUTO: dict[str, dict[str, int]] = {
    "cuda": {"bs1_requests": 20, "maxbatch_requests": 512, "prompt_tokens": 128, "new_tokens": 100, "limit": 200,
             "batch_size": 32, "memory_mib": 0, "ppl_tokens": 16384, "ppl_context": 512,
             "sweep_batch": 256, "sensitivity_limit": 10, "minutes": 25},
    "cpu": {"bs1_requests": 4, "maxbatch_requests": 16, "prompt_tokens": 32, "new_tokens": 8, "limit": 12,
            "batch_size": 8, "memory_mib": 400, "ppl_tokens": 1024, "ppl_context": 128,
            "sweep_batch": 0, "sensitivity_limit": 4, "minutes": 0},
}  # fmt: skip
TYPES: tuple[tuple[str, Any, str], ...] = (
    ("model", str, "a name or a folder"),
    ("precisions", str | list | tuple, "names of formats"),
    ("output", str | Path, "a folder"),
    ("data_dir", str | Path, "a folder, or leave it empty"),
    ("seed", int, "a whole number"),
    ("overwrite", bool, "true or false"),
)
# a word that may stand in place of a number
WORDS = {"limit": "all", "ppl_tokens": "all", "sweep_batch": "0", "workers": "auto"}


def check_types(*given: object) -> None:
    """Refuse values of other types than `TYPES` says, in its order.

    Raises
    ------
    InputError
        A value has another type, or is empty.
    """
    for value, (name, kind, words) in zip(given, TYPES, strict=True):
        is_other = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if is_other or (value == "" and name != "data_dir") or "\0" in str(value):
            raise InputError(f"{name} is {value!r}; give {words}")


def check_count(name: str, value: Count) -> None:
    """Refuse what is neither a whole number of at least 1, nor another value that `name` allows.

    That is ``"auto"``, or a word of its own.

    Raises
    ------
    InputError
        `value` is none of these.
    """
    word = WORDS.get(name)
    has_auto = name in AUTO["cpu"]
    if has_auto and value == "auto":
        return
    if not isinstance(value, bool) and (str(value) == word or re.fullmatch(r"0*[1-9]\d{0,17}", str(value), re.ASCII)):
        return
    words = [repr(each) for each in (word, "auto" if has_auto else None) if each]
    choices = ["a whole number of at least 1", *words]
    raise InputError(f"{name} is {str(value)[:40]!r}; give {', or '.join(choices)}")


def resolve_count(name: str, value: Count, device_kind: str) -> int:
    """Return a checked count as a number: what was given, or for ``"auto"`` what suits the device."""
    check_count(name, value)
    return AUTO[device_kind][name] if value == "auto" else int(value)


def is_number(value: object) -> bool:
    """Return whether a value is a number, which a truth value is not here."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_minutes(minutes: float | str) -> None:
    """Refuse a time budget that is neither ``"auto"`` nor a number, or is below 0.

    Raises
    ------
    InputError
        `minutes` is no such number.
    """
    if minutes != "auto" and not (is_number(minutes) and 0 <= float(minutes) < math.inf):
        raise InputError(f"minutes is {minutes!r}; give a number, 'auto', or 0 for no budget")
