"""The append-only record of a study: one JSON object a line, true once it is there.

A row is keyed by what it is about (stage, precision, engine, setting, task, repeat) and carries the fingerprint of
what it was measured with. The newest row of a key is the one shown; a row with the asked fingerprint is never
measured again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from qnb.error import InputError

KEY = ("stage", "precision", "engine", "setting", "task", "repeat")


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that change when any of `parts` does."""
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Ledger:
    """Rows of one study in `folder`/ledger.jsonl.

    Parameters
    ----------
    folder
        The study's folder; made on the first append.

    Raises
    ------
    InputError
        `folder` is a file, or a complete line of the ledger is not a row. A torn last line, as a killed process
        leaves it, is passed over and cut off by the next append.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "ledger.jsonl"
        self._rows: list[dict[str, Any]] = []
        self._newest: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._end = 0  # bytes read
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"output {self.folder} is a file; give a folder, or a name that does not exist yet")
        self.refresh()

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
            try:
                self._add({**dict.fromkeys(KEY, ""), **json.loads(line)})
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"{self.path}, line {len(self._rows) + 1}, is not a row of a study ({error}); "
                    "remove that line, or give another output folder"
                ) from error
            self._end += len(line)

    def _forget(self) -> None:
        self._rows, self._newest, self._end = [], {}, 0

    def _add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        key = tuple(row[name] for name in KEY)
        self._newest.pop(key, None)  # so that keys stand in the order in which they were last asked
        self._newest[key] = row

    def append(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write one row, whole and flushed to disk, and return it with its time stamp."""
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        row = {**dict.fromkeys(KEY, ""), "measured_at": stamp, **row}
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        with self.path.open("r+b") as file, _alone(file):
            self._read(file)
            file.truncate(self._end)  # drops the torn line of a killed process
            file.seek(self._end)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._end += len(line)
        self._add(row)
        return row

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """Return the newest row whose fields equal those given; None if there is none.

        A row that answers but is not the newest of its key is appended again, so that what was asked last is what
        is shown.
        """
        self.refresh()
        for row in reversed(self._rows):
            if all(row.get(name) == value for name, value in wanted.items()):
                newest = self._newest[tuple(row[name] for name in KEY)]
                return row if row is newest else self.append(row)
        return None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the newest row of each key, in the order in which these were appended."""
        self.refresh()
        return iter(self._newest.values())

    def __len__(self) -> int:
        self.refresh()
        return len(self._newest)

    def frame(self, stage: str) -> pd.DataFrame:
        """Return the newest rows of one stage, a column a field; empty if nothing was measured."""
        return pd.DataFrame([row for row in self if row["stage"] == stage])


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
