"""Keep a model's answers on disk, so that a killed task goes on where it was, and a round where the last one ended."""

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
            row = json.loads(line)
            if "requests" in row:  # not of an earlier version
                yield row


def kept_s(path: Path | None) -> float:
    """Return how long the answers in a file took."""
    return float(sum(row["seconds"] for row in _rows(path)))


class AnswerCache:
    """Answers to one list of requests, by a request's position in it.

    Parameters
    ----------
    path
        The file, one for each model and task. Answers in it to the same requests are read. None writes nothing.
    requests
        The arguments of lm-eval's requests.
    in_rounds
        Whether batches hold only what the file does not answer. Else they are those of all requests, so that a killed
        task ends with the same numbers as one that ran through.
    """

    def __init__(self, path: Path | None, requests: Sequence[Any], in_rounds: bool = False) -> None:
        self.path = path
        self._requests = [sha256(repr(request).encode()).hexdigest()[:16] for request in requests]
        earlier: dict[str, Any] = {}
        for row in _rows(path):
            earlier |= zip(row["requests"], row["answers"], strict=True)
        self.answers = {place: earlier[name] for place, name in enumerate(self._requests) if name in earlier}
        self.asked = [place for place in range(len(requests)) if not (in_rounds and place in self.answers)]
        self._unwritten: dict[int, Any] = {}
        self._written_at = monotonic()

    def has(self, positions: Iterable[int]) -> bool:
        """Return whether all these requests are answered."""
        return all(position in self.answers for position in positions)

    def keep(self, answers: Mapping[int, Any]) -> None:
        """Remember answers by position, and write them now and then."""
        self.answers |= answers
        self._unwritten |= answers
        if monotonic() - self._written_at >= WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Append what is new to the file, as one line."""
        if self.path is None or not self._unwritten:
            return
        row = {
            "requests": [self._requests[place] for place in self._unwritten],
            "answers": [*self._unwritten.values()],
            "seconds": monotonic() - self._written_at,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(row)}")  # the line before may be torn, so a line begins with its line feed
        self._unwritten, self._written_at = {}, monotonic()
