"""What a worker does: it measures cells with a session of its own, and returns rows and files instead of writing them.

It keeps its model while the format stays the same, and its tasks as long as it lives.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qnb import memory
from qnb.cluster.nodes import Node
from qnb.cluster.schedule import Cell
from qnb.errors import InputError
from qnb.ledger import FAILED, Row, holding, write_atomic
from qnb.precision import Precision, parse
from qnb.provenance import cache_folder
from qnb.session import NothingMeasuredError, Session


@dataclass(frozen=True)
class Post:
    """Where a worker works, and on what.

    Parameters
    ----------
    node
        Its machine.
    cores
        Of the CPU: its own, which no other worker of its node has.
    gpus
        That its model is spread over.
    folder
        The study's folder, on the driver's node; its checkpoints are then the study's. Elsewhere empty: checkpoints
        are kept in the user's cache folder.
    study
        Parameters of its session.
    record
        What the study's study.json says.
    threads
        Of a CPU that multiplies; 0 takes all its cores.
    planned_bytes
        Free memory that batches of scoring are planned for: the same on every worker, so that rows are too. 0 plans
        for what is free.
    """

    node: Node
    cores: Sequence[int]
    gpus: float
    folder: str
    study: Mapping[str, Any]
    record: Mapping[str, Any]
    threads: int
    planned_bytes: int


@dataclass(frozen=True)
class Result:
    """What came of a cell."""

    rows: list[Row] = field(default_factory=list)  # that are new, or answered: they are shown from now on
    files: dict[str, bytes] = field(default_factory=dict)  # that rows name, by their path in the study's folder
    gpu: str = ""
    overflowed: list[str] = field(default_factory=list)  # formats measured in bfloat16 from now on
    task: Any = None  # a reference to the one that was built
    text: str = ""  # what a notebook would have printed
    error: Exception | None = None  # of a cell that tells nothing itself; input that cannot be used ends the run


class WorkerSession(Session):
    """A session in a folder of its own, whose ledger tells what a cell decided; its node shares its checkpoints."""

    def decided(self, key: Mapping[str, Any]) -> Row | None:
        """Return the row that answers `key`, which is appended again."""
        row = self.ledger.find(key)
        return self.ledger.append(row) if row else None

    def checkpoint(self, precision: Precision) -> Path:
        """Return the folder of the node's own checkpoint; one worker makes it, of all studies that share it."""
        folder = self.folder / "checkpoints" / self.pinned(precision).checkpoint
        if precision.origin or folder in self._verified:
            return super().checkpoint(precision)
        key, record = self.key("quantize", precision), folder.with_name(f".{folder.name}.row.json")
        with holding(record.with_suffix(".lock"), lambda: None):
            row = json.loads(record.read_text()) if record.exists() else {}
            is_same = row.get("fingerprint") == key["fingerprint"] and not self.overwrite
            if is_same and (self.ledger.find(key) or {}).get("manifest_sha256") != row["manifest_sha256"]:
                self.adopt(row)  # the row that came first may be of another node's
            super().checkpoint(precision)
            write_atomic(record, json.dumps(self.ledger.find(key)))
        return folder


class Worker:
    """Measures cells; Ray makes an actor of it."""

    def __init__(self, post: Post) -> None:
        self._post, self._models, self._keeps_model = post, ExitStack(), False
        self._scratch = tempfile.TemporaryDirectory(prefix="qnb-worker-")

    def close(self) -> None:
        """Remove what it wrote; checkpoints stay."""
        self._scratch.cleanup()

    def measure(self, cell: Cell, rows: Sequence[Row], files: Mapping[str, bytes], tasks: Mapping[str, Any]) -> Result:
        """Measure a cell.

        Parameters
        ----------
        cell
            What to measure.
        rows
            What the driver's ledger has: that is not measured again.
        files
            What those of the cell's rows name, by path.
        tasks
            References to those that other workers have built, by name.

        Raises
        ------
        InputError
            The session cannot begin.
        """
        session = self._session
        self._prepare(cell, tasks)
        for name, content in files.items():
            write_atomic(session.folder / name, content)
        for row in rows:
            session.ledger.find(row) or session.ledger.append(row)
        before, text, error = session.ledger.path.stat().st_size, io.StringIO(), None
        with redirect_stdout(text):
            try:
                session.measure(cell.step)
            except InputError as wrong_input:
                error = InputError(str(wrong_input))
            except NothingMeasuredError:
                pass  # and each failure has its row
            except Exception as failure:  # of this cell alone
                session.fail(cell.about, cell.name, failure)
        decided = [json.loads(line) for line in session.ledger.path.read_bytes()[before:].splitlines()]
        if any(row["stage"].endswith(FAILED) for row in decided):
            error = None  # what one format cannot do ends no other's cells
        return self._result(cell, decided, text.getvalue(), error)

    def _result(self, cell: Cell, rows: list[Row], text: str, error: InputError | None) -> Result:
        import ray

        session = self._session
        paths = {row[column]: session.folder / row[column] for row in rows for column in row
                 if column.endswith("_file") and row[column]}  # fmt: skip
        files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
        task = session.tasks.get(cell.about.get("task", "")) if cell.makes else None
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "") if session.device.kind == "cuda" else ""
        return Result(rows, files, gpu, session.overflowed, ray.put(task) if task else None, text, error)

    @cached_property
    def _session(self) -> WorkerSession:
        post, folder = self._post, Path(self._scratch.name)
        memory.planned_bytes = post.planned_bytes
        write_atomic(folder / "study.json", json.dumps(post.record))
        session = WorkerSession(**post.study, output=folder)
        session.ledger.path.touch()
        session.device = replace(session.device, spread=max(1, int(post.gpus)))
        cache = cache_folder() / "cluster" / post.node.host / session.source.fingerprint
        checkpoints = Path(post.folder or cache) / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").symlink_to(checkpoints)
        return session

    def _prepare(self, cell: Cell, tasks: Mapping[str, Any]) -> None:
        """Set the session to a cell's format, with its task, the cores it may use, and models kept or given back."""
        import ray

        session = self._session
        self._use_cores(self._post.node.cores if cell.is_alone else self._post.cores)
        session.precisions = parse([cell.precision]) if cell.precision else ()
        session.overwrite = self._post.study["overwrite"] and bool(cell.makes)  # else the driver says what counts
        for name in {need.about.get("task", "") for need in cell.needs} & tasks.keys() - session.tasks.keys():
            with suppress(Exception):  # where its builder is gone, this worker builds it too
                session.tasks[name] = ray.get(tasks[name])
        keeps_model = cell.about["stage"] not in ("perf", "peaks", "quantize")  # which read memory before they load
        if not keeps_model:
            self._models.close()
        elif not self._keeps_model:
            self._models.enter_context(memory.models_kept())
        self._keeps_model = keeps_model

    def _use_cores(self, cores: Sequence[int]) -> None:
        """Keep to some cores of the CPU; on a CPU, multiply on as many as the user allows."""
        import torch

        if self._post.study["device"] == "cpu":
            torch.set_num_threads(self._post.threads or len(cores))
        elif hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
