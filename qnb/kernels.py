"""Kernels that torch.compile built, kept on the user's Drive, so that a new Colab VM does not build them again.

A file of them is code: it is read from the user's own Drive alone, never from a folder that may be someone else's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from qnb.ledger import write_atomic

LOG = logging.getLogger(__name__)
_loaded: set[Path] = set()  # files that this process has read or written


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Load the kernels in `folder` once a process, and add a file of those that the block builds."""
    import torch
    from torch._dynamo.utils import counters

    for path in sorted({*folder.glob("*.bin")} - _loaded):
        _loaded.add(path)
        try:
            torch.compiler.load_cache_artifacts(path.read_bytes())
        except Exception as error:  # of another version of PyTorch, or damaged: they are built anew
            LOG.warning("compiled kernels in %s could not be loaded: %s", path, error)
    built = counters["inductor"]["fxgraph_cache_miss"]
    try:
        yield
    finally:
        if counters["inductor"]["fxgraph_cache_miss"] > built and (saved := torch.compiler.save_cache_artifacts()):
            path = folder / f"{sha256(saved[0]).hexdigest()[:16]}.bin"
            _loaded.add(path)
            write_atomic(path, saved[0])
