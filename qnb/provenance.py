"""Where a number comes from: the command that was given and the commit of the code that measured it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

from qnb.errors import scrub

ROOT = Path(__file__).resolve().parents[1]  # of the checkout the package runs from
LONGEST = 2000  # characters of a command that are kept
COMMAND = "QNB_COMMAND"  # the environment variable by which a run tells its notebooks the command line


def command() -> str:
    """Return the command line that was given, without secrets; empty in an open notebook."""
    if given := os.environ.get(COMMAND):
        return scrub(given, LONGEST)
    program = Path(sys.argv[0]).name
    return "" if program.startswith("ipykernel") else scrub(shlex.join([program, *sys.argv[1:]]), LONGEST)


@cache
def commit() -> str:
    """Return the commit of the package's source, with ``+changes`` where files differ from it; empty if unknown.

    Source: the checkout, else what pip recorded when it installed from a repository (PEP 610).
    """
    if (ROOT / ".git").exists():
        try:
            head = _git("rev-parse", "HEAD")
            return head + "+changes" * bool(_git("status", "--porcelain", "--untracked-files=no"))
        except (OSError, subprocess.SubprocessError):
            return ""
    try:
        origin = json.loads(metadata.distribution("qnb").read_text("direct_url.json") or "{}")
        return str(origin.get("vcs_info", {}).get("commit_id", ""))
    except (metadata.PackageNotFoundError, ValueError):
        return ""


def _git(*words: str) -> str:
    git = ["git", "-C", str(ROOT), *words]
    return subprocess.run(git, capture_output=True, text=True, check=True, timeout=30).stdout.strip()  # noqa: S603
