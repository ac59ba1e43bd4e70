"""What a worker does: it measures cells with a session of its own, and returns rows and files instead of writing them.

It keeps its model while the format stays the same, and its tasks as long as it lives.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qnb import memory
from qnb.cluster.nodes import Node
from qnb.cluster.schedule import Cell
from qnb.errors import InputError, scrub
from qnb.ledger import FAILED, Row, write_atomic
from qnb.precision import parse
from qnb.provenance import cache_folder
from qnb.session import Session


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

    rows: list[Row]
    files: dict[str, bytes]  # that rows name, by their path in the study's folder
    overflowed: list[str]  # formats measured in bfloat16 from now on
    task: Any  # a reference to the one that was built, or None


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
            Input cannot be used, for which the whole run ends.
        """
        session = self._session
        self._prepare(cell, tasks)
        for name, content in files.items():
            write_atomic(session.folder / name, content)
        session.ledger.add_missing(rows)
        before = session.ledger.answers()
        for step in cell.steps:
            try:
                session.measure(step)
            except Exception as error:  # that one format cannot be measured ends nothing else
                if any(row not in before for row in session.ledger.failures()):
                    continue
                if isinstance(error, InputError):
                    raise
                key = {**cell.about, "stage": cell.about["stage"] + FAILED}
                session.append(key, {"error": type(error).__name__, "reason": scrub(str(error))})
        return self._result(cell, [row for row in session.ledger.answers() if row not in before])

    def _result(self, cell: Cell, rows: Sequence[Row]) -> Result:
        import ray

        session = self._session
        names = [row[column] for row in rows for column in row if column.endswith("_file") and row[column]]
        files = {name: (session.folder / name).read_bytes() for name in names}
        task = session.tasks.get(cell.makes[1]) if cell.makes else None
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "") if session.device.kind == "cuda" else ""
        rows = [{**row, "gpu": gpu} for row in rows]
        return Result(rows, files, session.overflowed, ray.put(task) if task else None)

    @cached_property
    def _session(self) -> Session:
        post, folder = self._post, Path(self._scratch.name)
        memory.planned_bytes = post.planned_bytes
        write_atomic(folder / "study.json", json.dumps(post.record))
        session = Session(**post.study, output=folder)
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
        session.precisions = tuple(
            each for each in parse(self._post.study["precisions"]) if each.name == cell.precision
        )
        for kind, name in cell.needs:
            if kind == "task" and name in tasks and name not in session.tasks:
                with suppress(Exception):  # where its builder is gone, this worker builds it too
                    session.tasks[name] = ray.get(tasks[name])
        keeps_model = cell.about["stage"] != "perf" and not cell.makes  # which read memory before they load
        if keeps_model and not self._keeps_model:
            self._models.enter_context(memory.models_kept())
        elif not keeps_model:
            self._models.close()
        self._keeps_model = keeps_model

    def _use_cores(self, cores: Sequence[int]) -> None:
        """Keep to some cores of the CPU; on a CPU, multiply on as many as the user allows."""
        import torch

        if self._post.study["device"] == "cpu":
            torch.set_num_threads(self._post.threads or len(cores))
        elif hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
