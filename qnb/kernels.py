"""Kernels that torch.compile built, kept on the user's Drive, so that a new Colab VM does not build them again.

A file of them is code, as a notebook is: only what lies in the user's own Drive is loaded.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from qnb import colab
from qnb.ledger import write_atomic

LOG = logging.getLogger(__name__)
OWN = f"{uuid4().hex}.bin"  # this process's file: all that it has built so far
_loaded: set[Path] = set()


@contextmanager
def kept(study: Path) -> Iterator[None]:
    """Load the kernels beside a study on the user's own Drive, once a process, and keep those that the block builds.

    Elsewhere nothing happens: torch.compile's own cache outlives a process. Where a file cannot be read or written,
    kernels are built again.
    """
    if not study.resolve().is_relative_to(colab.MOUNT / "MyDrive"):
        yield
        return
    import torch

    folder = study / "kernels"
    try:
        for path in {*folder.glob("*.bin")} - _loaded - {folder / OWN}:
            _loaded.add(path)
            torch.compiler.load_cache_artifacts(path.read_bytes())
    except Exception as error:  # of another version of PyTorch, damaged, or not to be read
        LOG.warning("compiled kernels in %s could not be loaded: %s", folder, error)
    before = _built()
    try:
        yield
    finally:
        try:
            if _built() > before and (saved := torch.compiler.save_cache_artifacts()):
                write_atomic(folder / OWN, saved[0])
        except Exception as error:
            LOG.warning("compiled kernels could not be kept in %s: %s", folder, error)


def _built() -> int:
    """Return how many graphs this process has compiled, or found compiled on this machine by another one."""
    from torch._dynamo.utils import counters

    counts = counters["inductor"]
    return int(counts["fxgraph_cache_miss"] + (0 if _loaded else counts["fxgraph_cache_hit"]))
