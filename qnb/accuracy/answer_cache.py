"""A model's answers, kept on disk while they are given, so that an interrupted task goes on where it was.

Answers are written when a while has passed since the last time, not one by one: a GPU would wait for the disk. A kill
loses what was answered in that while, and tears one line at most, which is passed over.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any

from qnb.ledger import checked, unchecked

KEEP_S = 10.0  # what an interrupted run may lose, besides the batch it is at


class Answers:
    """Answers to one list of requests, by a request's place in it.

    Parameters
    ----------
    path
        The file; one for each model and task. Lists of requests may share it. None keeps nothing.
    requests
        What is asked, as lm-eval's arguments: answers to any other list are not these.
    """

    def __init__(self, path: Path | None, requests: Sequence[Any]) -> None:
        self.path = path
        self.known: dict[int, Any] = {}
        self._of = "" if path is None else sha256(repr(requests).encode()).hexdigest()[:16]
        self._last = monotonic()
        if path is not None and path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                with contextlib.suppress(ValueError):  # torn by a kill, or changed since: asked again
                    kept = json.loads(unchecked(line))
                    if kept["of"] == self._of:
                        self.known |= zip(kept["places"], kept["answers"], strict=True)

    @property
    def due(self) -> bool:
        """Whether it is time to keep what was answered since the last time."""
        return self.path is not None and monotonic() - self._last >= KEEP_S

    def keep(self, found: Mapping[int, Any]) -> None:
        """Remember answers by place, and write them: one line that is whole or not read."""
        self.known |= found
        if self.path is None or not found:
            return
        line = checked({"of": self._of, "places": list(found), "answers": list(found.values())})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(b"\n" + line)
        self._last = monotonic()
