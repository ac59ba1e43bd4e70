"""Where a number comes from: the command that was given, the commit of the code, the state of the files it read."""

import json
import os
import shlex
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from qnb.errors import scrub

ROOT = Path(__file__).resolve().parents[1]  # of the checkout the package runs from
_FOLDERS = (ROOT / "notebooks", ROOT / "qnb" / "notebooks")  # those of a clone, or as the package brings them
NOTEBOOKS = next((folder for folder in _FOLDERS if (folder / "profiles").is_dir()), _FOLDERS[0])
LONGEST = 2000  # characters of a command that are kept
COMMAND = "QNB_COMMAND"  # the environment variable by which a run tells its notebooks the command line
REPLAY = "QNB_REPLAY"  # the one that tells them to show what was measured elsewhere, and on which device
WAITING = "QNB_WAITING"  # the one that tells them how many processes hold a GPU context and wait for them


def command() -> str:
    """Return the command line that was given, without secrets; empty in an open notebook."""
    if given := os.environ.get(COMMAND):
        return scrub(given, LONGEST)
    program = Path(sys.argv[0]).name
    return "" if program.startswith("ipykernel") else scrub(shlex.join([program, *sys.argv[1:]]), LONGEST)


@cache
def commit() -> str:
    """Return the commit of the package's source, with ``+changes`` where files differ from it; empty if unknown.

    Source: the variable QNB_COMMIT, else the checkout, else what pip recorded when it installed from a repository
    (PEP 610).
    """
    if given := os.environ.get("QNB_COMMIT"):
        return given
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    with suppress(OSError, subprocess.SubprocessError, metadata.PackageNotFoundError, ValueError):
        if (ROOT / ".git").exists():
            done = subprocess.run(describe, capture_output=True, check=True, timeout=30)  # noqa: S603
            return done.stdout.decode(errors="replace").strip()
        origin = json.loads(metadata.distribution("qnb").read_text("direct_url.json") or "{}")
        return str(origin.get("vcs_info", {}).get("commit_id", ""))
    return ""


def file_state(folder: Path) -> str:
    """Return 16 hexadecimal digits that change when a file below `folder` is written again; contents are not read."""
    from qnb.ledger import fingerprint

    stats = {str(path): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return fingerprint({name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()})


def cache_folder() -> Path:
    """Return the folder for what is fetched once: $QNB_CACHE, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("QNB_CACHE") or Path(home) / "qnb")
