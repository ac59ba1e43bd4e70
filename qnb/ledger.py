"""The append-only record of a study: one JSON object a line.

A row is keyed by what it is about (stage, format, engine, setting, task, repeat) and carries the fingerprint of what
it was measured with. The newest row of a key is the one shown. A row with the wanted fingerprint is never measured
again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from hashlib import file_digest, sha256
from io import BytesIO
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from qnb.errors import InputError, refusing

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Row = dict[str, Any]
KEY = ("stage", "precision", "engine", "setting", "task", "repeat")
PLANS = ("sitting", "pace", "budget", "left_out")  # stages whose rows plan, and measure nothing
LOCKS = {".lock", ".run.lock"}  # of a process that measures, and of one that executes notebooks
FAILED = ".failed"  # ends the stage of a row that says why a measurement failed
# how network mounts and drives say that they cannot do what was asked, such as lock a file or flush it
UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that change when any of `parts` does."""
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all, flushed to the disk; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    with draft.open("wb") as file:  # a path whose bytes are no text of this locale is written as an escape
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        file.flush()
        with _where_supported():
            os.fsync(file.fileno())
    draft.replace(path)


@contextmanager
def _where_supported() -> Iterator[None]:
    """Go on where the file system cannot do what the block asks of it, such as flush a file or cut it."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


@contextmanager
def holding(path: Path, when_busy: Callable[[], None]) -> Iterator[None]:
    """Hold a file's lock for the block, or go on without where the file system has none.

    Parameters
    ----------
    path
        The file; held by this thread already, it is held once more.
    when_busy
        Is called when another process holds the lock, which is then waited for.
    """
    # filelock's way out of a file system without locks is a marker, which a machine that vanishes leaves for ever
    lock = FileLock(path, is_singleton=True, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        when_busy()
        while not lock.is_locked:
            path.parent.mkdir(parents=True, exist_ok=True)  # who held it may have been refused, and removed the folder
            with suppress(Timeout, FileNotFoundError):
                lock.acquire(timeout=0.5)
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in UNSUPPORTED:
            raise
        log.warning("%s has no file locks (%s); make sure that one run at a time writes to it", path.parent, error)
    try:
        yield
    finally:
        lock.release()


def write_parquet(folder: Path, stem: str, frame: pd.DataFrame) -> tuple[str, str]:
    """Write a frame below `folder`; return the file's name there and its sha256.

    The name carries the hash, so a new measurement leaves an earlier row's file alone.
    """
    from pyarrow import Table, parquet, types

    table, content_file = Table.from_pandas(frame), BytesIO()
    lists = {each.name: f"{each.name}.list.element" for each in table.schema if types.is_list(each.type)}
    floats = [lists.get(each.name, each.name) for each in table.schema
              if types.is_floating(each.type.value_type if each.name in lists else each.type)]  # fmt: skip
    others = [each.name for each in table.schema if lists.get(each.name, each.name) not in floats]
    # numbers byte by byte: what alike ones share is packed away; no statistics, which would outweigh so few rows
    packing = {"compression": "zstd", "compression_level": 15, "use_byte_stream_split": floats,
               "use_dictionary": others, "write_statistics": False, "store_schema": False}  # fmt: skip
    parquet.write_table(table, content_file, **packing)
    content = content_file.getvalue()
    digest = sha256(content).hexdigest()
    name = f"{stem}.{digest[:8]}.parquet"
    write_atomic(folder / name, content)
    return name, digest


def row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a row is about; fields that it lacks are empty."""
    return tuple(row.get(name, "") for name in KEY)


def is_outdated(row: Mapping[str, Any]) -> bool:
    """Return whether a version before 1.0, whose fields have other names, wrote this row."""
    return str(dict(row.get("versions") or {}).get("qnb", "")).startswith("0.")


class Ledger:
    """Rows of one study in ``folder/ledger.jsonl``.

    A torn last line, as a killed process leaves it, is passed over and cut off by the next append. Any other line that
    is not a row is passed over and named in `damaged`; rows of versions before 1.0 are passed over. One process at
    a time may append: see `Session.exclusive`.

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
        self._clear()
        self.refresh()
        if self.outdated:
            log.warning("%s: %d rows of versions before 1.0 are passed over", self.path, self.outdated)

    @contextmanager
    def locked(self, name: str, when_busy: Callable[[], None]) -> Iterator[None]:
        """Make the folder, and hold a lock in it for the block.

        Input that is refused before there is a row leaves no folder where there was none, unless somebody else has
        begun something there.

        Raises
        ------
        InputError
            The folder cannot be made.
        """
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        with refusing(f"output {self.folder} cannot be written; give another", OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        with holding(self.folder / name, when_busy):
            try:
                yield
            except InputError:
                with suppress(OSError, Timeout):
                    self._remove(missing, *LOCKS - {name})
                raise

    def _remove(self, missing: Sequence[Path], other_lock: str) -> None:
        """Remove folders that were missing, if they hold what a refused run leaves and nobody else works there."""
        with FileLock(self.folder / other_lock, timeout=0, fallback_to_soft=False):
            if missing and {path.name for path in self.folder.iterdir()} <= {*LOCKS, "study.json", "notebooks"}:
                rmtree(self.folder, ignore_errors=True)
        for folder in missing[1:]:
            folder.rmdir()

    def _clear(self) -> None:
        self._newest: dict[tuple[Any, ...], Row] = {}  # by key, in the order of appending; failures too
        self._answers: dict[tuple[Any, ...], Row] = {}  # by key and fingerprint
        self._end = self._lines = 0  # bytes and lines read
        self.outdated = 0  # rows passed over
        self.damaged: list[str] = []

    def refresh(self) -> None:
        """Read the rows that another process has appended since the last look."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._end:  # the file was removed, and may be begun anew
            self._clear()
        if size == self._end:
            return
        with self.path.open("rb") as file:
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._end += len(line)
                self._lines += 1
                try:
                    self._add(json.loads(line))
                except (ValueError, TypeError, AttributeError, RecursionError):
                    self.damaged.append(f"{self.path}, line {self._lines}, is not a row of a study")

    def _add(self, row: Row) -> None:
        key, digits = row_key(row), row.get("fingerprint", "")
        if not (key[0] and isinstance(key[0], str) and all(isinstance(part, str | int) for part in (*key, digits))):
            raise TypeError("a row's key is made of texts and numbers")
        if is_outdated(row):
            self.outdated += 1
            return
        self._newest.pop((key[0] + FAILED, *key[1:]), None)  # it failed before, and is measured now
        self._newest.pop(key, None)  # so that keys stand in the order in which they were last appended
        self._newest[key] = row
        self._answers.pop((key, digits), None)
        self._answers[key, digits] = row

    def append(self, row: Mapping[str, Any]) -> Row:
        """Write one row, whole and flushed to the disk, and return it with its time stamp.

        Raises
        ------
        OSError
            It cannot be written; nothing of it stays.
        ValueError
            A number is not finite.
        """
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        whole = {**dict.fromkeys(KEY, ""), "measured_at": stamp, **row}
        line = json.dumps(whole, allow_nan=False).encode() + b"\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:  # a buffer would be written again at closing
            self.refresh()
            if file.tell() > self._end:  # a killed process left a torn line
                with _where_supported():
                    file.truncate(self._end)
                if file.seek(0, os.SEEK_END) > self._end:  # it stays, and is no row
                    file.write(b"\n")
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[file.write(rest) :]
                with _where_supported():
                    os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(self._end)
                raise
        self.refresh()
        return self._answers[row_key(whole), whole.get("fingerprint", "")]

    def find(self, key: Mapping[str, Any]) -> Row | None:
        """Return the newest row of a key and its fingerprint; None if there is none."""
        self.refresh()
        return self._answers.get((row_key(key), key.get("fingerprint", "")))

    def is_newest(self, row: Row) -> bool:
        """Return whether no other row, measured or failed, of what `row` is about came later."""
        key = row_key(row)
        return self._newest.get(key) is row and (key[0] + FAILED, *key[1:]) not in self._newest

    def rows(self, stage: str = "") -> list[Row]:
        """Return the newest measured row of each key, oldest first; of one stage, or of all."""
        self.refresh()
        rows = self._newest.values()
        return [row for row in rows if (row["stage"] == stage if stage else not row["stage"].endswith(FAILED))]

    def answers(self) -> list[Row]:
        """Return the newest row of each key and fingerprint, oldest first: all that need not be measured again."""
        self.refresh()
        return [*self._answers.values()]

    def failures(self) -> list[Row]:
        """Return the rows that say what failed and was not measured since."""
        self.refresh()
        return [row for row in self._newest.values() if row["stage"].endswith(FAILED)]

    @property
    def revision(self) -> tuple[int, int]:
        """A value that changes whenever the ledger's content does."""
        self.refresh()
        return self._end, self._lines

    def __len__(self) -> int:
        return len(self.rows())
