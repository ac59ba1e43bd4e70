"""The append-only record of a study: one JSON object a line, true once it is there.

A row is keyed by what it is about (stage, precision, engine, setting, task, repeat) and carries the fingerprint of
what it was measured with. The newest row of a key is the one shown; a row with the asked fingerprint is never
measured again. Each line ends in a check of its own bytes, so that a changed one is noticed wherever it is read.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from qnb.errors import InputError

KEY = ("stage", "precision", "engine", "setting", "task", "repeat")
FAILED = ".failed"  # ends the stage of a row that says why a measurement could not be made
_CHECK = b', "check": "'
# a line begins with its key and fingerprint, which are compared as they are written: quotes within are escaped
_HEAD = re.compile(b"{" + b", ".join(b'"%b": (.*?)' % name.encode() for name in (*KEY, "fingerprint")) + b"[,}]")


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that change when any of `parts` does."""
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def seal(row: Mapping[str, Any]) -> bytes:
    """Return a row as one line: its key and fingerprint first, a check of all bytes before it last.

    Raises
    ------
    ValueError
        A number is not finite.
    """
    return checked({**dict.fromkeys((*KEY, "fingerprint"), ""), **row})


def checked(fields: Mapping[str, Any]) -> bytes:
    """Return `fields` as one line of JSON whose last field is a check of all bytes before.

    Raises
    ------
    ValueError
        A number is not finite.
    """
    body = json.dumps(fields, allow_nan=False).encode()
    return body[:-1] + _CHECK + sha256(body).hexdigest()[:16].encode() + b'"}\n'


def unchecked(line: bytes) -> bytes:
    """Return the JSON of a line that `checked` wrote, without its check.

    Raises
    ------
    ValueError
        A byte was changed since it was written.
    """
    body, _, check = line.rpartition(_CHECK)
    body += b"}"
    if check != sha256(body).hexdigest()[:16].encode() + b'"}\n':
        raise ValueError("it was changed since it was written")
    return body


class Line:
    """One sealed row, its fields read when they are asked for.

    Raises
    ------
    ValueError
        The line is none that `seal` wrote.
    """

    __slots__ = ("_bytes", "_row", "fingerprint", "key")

    def __init__(self, line: bytes) -> None:
        head = _HEAD.match(line)
        if head is None:
            raise ValueError("its key is missing")
        self._bytes = unchecked(line)
        self.key: tuple[bytes, ...] = head.groups()[:-1]
        self.fingerprint: bytes = head.groups()[-1]
        self._row: dict[str, Any] | None = None

    @property
    def stage(self) -> str:
        """The stage it belongs to."""
        return str(json.loads(self.key[0]))

    @property
    def row(self) -> dict[str, Any]:
        """Its fields."""
        if self._row is None:
            self._row, self._bytes = dict(json.loads(self._bytes)), b""
        return self._row


class Ledger:
    """Rows of one study in `folder`/ledger.jsonl.

    A torn last line, as a killed process leaves it, is passed over and cut off by the next append. A whole line that
    is no row, or was changed since it was written, is passed over and named in `damaged`.

    Parameters
    ----------
    folder
        The study's folder; made on the first append.

    Raises
    ------
    InputError
        `folder` is a file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "ledger.jsonl"
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"output {self.folder} is a file; give a folder, or a name that does not exist yet")
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        self._newest: dict[tuple[bytes, ...], Line] = {}
        self._by_fingerprint: dict[bytes, list[Line]] = {}
        self._frames: dict[str, pd.DataFrame] = {}  # by stage, as long as no row is added
        self._end = self._lines = 0  # bytes and lines read
        self.damaged: list[str] = []  # a text for each line that is no row

    def refresh(self) -> None:
        """Take in the rows that another notebook has appended to the same study since the last look."""
        if not self.path.exists():
            self._forget()
        elif self.path.stat().st_size != self._end:
            with self.path.open("rb") as file:
                self._read(file)

    def _read(self, file: BinaryIO) -> None:
        if file.seek(0, os.SEEK_END) < self._end:  # removed and begun anew
            self._forget()
        file.seek(self._end)
        for line in file:
            if not line.endswith(b"\n"):
                break
            self._end += len(line)
            self._lines += 1
            try:
                self._add(Line(line))
            except ValueError as error:
                self.damaged.append(f"{self.path}, line {self._lines}, is no row of a study: {error}")

    def _add(self, line: Line) -> None:
        self._newest.pop(line.key, None)  # so that keys stand in the order in which they were last asked
        self._newest[line.key] = line
        self._frames.clear()
        self._by_fingerprint.setdefault(line.fingerprint, []).append(line)

    def append(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write one row, whole and flushed to disk, and return it with its time stamp.

        Raises
        ------
        OSError
            It cannot be written; nothing of it stays.
        """
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        line = seal({"measured_at": stamp, **row})
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        with self.path.open("r+b", buffering=0) as file, _alone(file):  # a buffer would be written again when closed
            self.refresh()
            file.truncate(self._end)  # drops the torn line of a killed process
            file.seek(self._end)
            try:
                left = memoryview(line)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(self._end)
                raise
        self._end += len(line)
        self._lines += 1
        self._add(made := Line(line))
        return made.row

    def find(self, fingerprint: str, **wanted: Any) -> dict[str, Any] | None:
        """Return the newest row with this fingerprint whose other fields equal those given; None if there is none.

        A row that answers but is not the newest of its key, or was followed by a failure, is appended again, so that
        what was asked last is what is shown.
        """
        self.refresh()
        for line in reversed(self._by_fingerprint.get(json.dumps(fingerprint).encode(), [])):
            if all(line.row.get(name) == value for name, value in wanted.items()):
                shown = line is self._newest[line.key] and not self._failed_since(line)
                return line.row if shown else self.append(line.row)
        return None

    def _failed_since(self, line: Line) -> bool:
        """Return whether a failure of the same key stands after a row."""
        failed = (json.dumps(line.stage + FAILED).encode(), *line.key[1:])
        return failed in self._newest and next(
            key for key in reversed(self._newest) if key in (failed, line.key)) == failed  # fmt: skip

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the newest row of each key, in the order in which these were appended."""
        self.refresh()
        return (line.row for line in list(self._newest.values()))

    def __len__(self) -> int:
        self.refresh()
        return len(self._newest)

    def stages(self) -> Counter[str]:
        """Return how many keys each stage has."""
        self.refresh()
        counts = Counter(key[0] for key in self._newest)
        return Counter({str(json.loads(stage)): count for stage, count in counts.items()})

    def frame(self, stage: str) -> pd.DataFrame:
        """Return the newest rows of one stage, a column a field; empty if nothing was measured."""
        self.refresh()
        if stage not in self._frames:
            wanted = json.dumps(stage).encode()
            self._frames[stage] = pd.DataFrame([line.row for line in self._newest.values() if line.key[0] == wanted])
        return self._frames[stage].copy(deep=False)

    def failures(self) -> list[dict[str, Any]]:
        """Return the rows that say what could not be measured and was not measured since."""
        self.refresh()
        place = {key: place for place, key in enumerate(self._newest)}
        failed = [line for line in self._newest.values() if line.stage.endswith(FAILED)]
        meant = [(json.dumps(line.stage.removesuffix(FAILED)).encode(), *line.key[1:]) for line in failed]
        return [line.row for line, key in zip(failed, meant, strict=True) if place.get(key, -1) < place[line.key]]


@contextmanager
def _alone(file: BinaryIO) -> Iterator[None]:
    """Keep other processes from appending meanwhile, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
