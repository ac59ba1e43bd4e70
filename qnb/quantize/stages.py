"""The stages of notebook 01: make every format's checkpoint, push the checkpoints to the hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnb.errors import InputError
from qnb.ledger import write_atomic
from qnb.precision import Precision
from qnb.quantize import hub

if TYPE_CHECKING:
    from qnb.session import Session


def quantize(session: Session) -> dict[Precision, Path]:
    """Make, save and reload every format's checkpoint; the ledger gets a row each. Return their folders.

    A checkpoint that cannot be made is recorded as a failure and left out.

    Raises
    ------
    InputError
        The model cannot be fetched or loaded.
    RuntimeError
        No checkpoint could be made.
    """
    folders = {}
    with session.exclusive("01"):
        for precision in session.each_format("quantize"):
            with session.failing(session.key("quantize", precision), f"the checkpoint of {precision.name}"):
                folders[precision] = session.checkpoint(precision, is_new=session.overwrite)
    session.require("quantize")
    return folders


@dataclass(frozen=True, slots=True)
class PushOptions:
    """Where checkpoints are pushed to.

    Parameters
    ----------
    push_to
        A hub name such as ``you/llama-3.2-1b``; each checkpoint goes to ``<push_to>-<format>``, named as its
        folder. Empty: nowhere.
    private
        Whether the repositories are private.
    dry_run
        Upload nothing, only list what would be uploaded; needs neither token nor network.

    Raises
    ------
    InputError
        The hub allows no such name, or there is no token for an upload.
    """

    push_to: str
    private: bool = True
    dry_run: bool = True

    def __post_init__(self) -> None:
        from huggingface_hub import get_token

        name = str(self.push_to)
        if self.push_to and not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name, re.ASCII):
            raise InputError(f"push_to {self.push_to!r} is no name on the hub; give one such as you/llama-3.2-1b")
        if self.push_to and not self.dry_run and not get_token():
            raise InputError(f"pushing to {self.push_to!r} needs a hub token with write access; set HF_TOKEN")


def push(session: Session, options: PushOptions, card: Callable[[Precision], str]) -> list[dict[str, Any]]:
    """Push every format's checkpoint with its model card, or list what would be pushed; return a row each.

    push.csv in the study's folder gets each row as soon as it is known. A checkpoint that cannot be made is left out.

    Raises
    ------
    InputError
        The model cannot be fetched, or the hub refuses.
    RuntimeError
        No checkpoint could be made.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for precision, folder in session.measure(quantize).items() if options.push_to else ():
        if precision.origin:
            continue  # it is somebody else's
        repository = f"{options.push_to}-{folder.name}"
        pushed = hub.push(folder, repository, options.private, options.dry_run, card(precision))
        rows.append({"precision": precision.name, **asdict(pushed), "files": " ".join(pushed.files)})
        write_atomic(session.folder / "push.csv", pd.DataFrame(rows).to_csv(index=False))
    return rows
