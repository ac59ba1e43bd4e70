"""What a notebook needs before it begins, mostly on Colab.

The hub token needs nothing here: `huggingface_hub.get_token` asks Colab's secrets for ``HF_TOKEN`` itself.
"""

import sys
from pathlib import Path

import pandas as pd

from qnb.errors import InputError, expand_path, refusing
from qnb.provenance import ROOT

DRIVE = "drive:"
MOUNT = Path("/content/drive")


def hosted() -> bool:
    """Return whether this is a Colab runtime: its kernel has imported ``google.colab`` before any cell runs."""
    return "google.colab" in sys.modules


def prepare() -> None:
    """Show long texts in tables whole, and enable widgets that Colab does not bring itself."""
    pd.set_option("display.max_colwidth", None)
    if hosted():
        from google.colab import output

        output.enable_custom_widget_manager()


def locate(output: str | Path) -> Path:
    """Return the study's folder: a relative path is taken from the checkout, or from the working directory.

    So the five notebooks share one folder, whichever folder each is opened from. ``drive:name`` is a folder of the
    user's Google Drive, which is mounted if it is not yet.

    Raises
    ------
    InputError
        This is no Colab runtime, the name is empty or leaves the drive, or the drive cannot be mounted.
    """
    if not str(output).startswith(DRIVE):
        base = ROOT if (ROOT / "notebooks").is_dir() else Path.cwd()
        return base / expand_path(output)  # where that is absolute, it alone
    name = Path(str(output).removeprefix(DRIVE).strip("/"))
    if not name.parts or ".." in name.parts:
        raise InputError(f"output {output!r} names no folder on the drive; give one such as {DRIVE}qnb/study")
    if not hosted():
        raise InputError(f"output {output!r} is on Google Drive, which only Colab has; give a folder of this machine")
    from google.colab import drive

    if not (MOUNT / "MyDrive").is_dir():
        with refusing("Google Drive was not mounted; allow it, or give a folder of the VM"):
            drive.mount(str(MOUNT))
    return MOUNT / "MyDrive" / name
