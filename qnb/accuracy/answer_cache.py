"""Keep a model's answers on disk while a long task runs, so that a killed task goes on where it was."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any

WRITE_EVERY_S = 10.0  # what a killed run may lose; a GPU would wait for a disk that is written to more often


def _rows(path: Path | None) -> Iterator[dict[str, Any]]:
    """Yield what earlier processes wrote, a line at a time."""
    for line in path.read_bytes().splitlines() if path is not None and path.exists() else ():
        with suppress(ValueError):  # a kill tore the line
            yield json.loads(line)


def kept_s(path: Path | None) -> float:
    """Return how long the answers took that earlier processes wrote."""
    return float(sum(row["seconds"] for row in _rows(path)))


class AnswerCache:
    """Answers to one list of requests, by a request's position in it.

    Parameters
    ----------
    path
        The file, one for each model and task. Several lists of requests may share it. None writes nothing.
    requests
        The arguments of lm-eval's requests. Answers to any other list are not read.
    """

    def __init__(self, path: Path | None, requests: Sequence[Any]) -> None:
        self.path = path
        self.answers: dict[int, Any] = {}
        self._unwritten: dict[int, Any] = {}
        self._written_at = monotonic()
        self._requests_sha256 = sha256(repr(requests).encode()).hexdigest()
        for row in _rows(path):
            if row["requests_sha256"] == self._requests_sha256:
                self.answers |= zip(row["positions"], row["answers"], strict=True)

    def has(self, positions: Iterable[int]) -> bool:
        """Return whether all these requests are answered."""
        return all(position in self.answers for position in positions)

    def keep(self, answers: Mapping[int, Any]) -> None:
        """Remember answers by position, and append what is new to the file as one line, now and then."""
        self.answers |= answers
        self._unwritten |= answers
        if self.path is None or monotonic() - self._written_at < WRITE_EVERY_S:
            return
        positions, values = zip(*self._unwritten.items(), strict=True)
        row = {"requests_sha256": self._requests_sha256, "positions": positions, "answers": values,
               "seconds": monotonic() - self._written_at}  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(row)}")  # the line before may be torn, so a line begins with its line feed
        self._unwritten, self._written_at = {}, monotonic()
