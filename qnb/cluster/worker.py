"""What a node is, and what a worker does there: it measures cells in a session of its own.

It returns rows and files instead of writing them. It keeps its model while the format stays the same, and its tasks as
long as it lives.
"""

from __future__ import annotations

import io
import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qnb import device, memory
from qnb.cluster.plan import Cell
from qnb.errors import InputError
from qnb.ledger import FAILED, Ledger, Row, holding, write_atomic
from qnb.precision import Precision, parse
from qnb.provenance import cache_folder
from qnb.session import NothingMeasuredError, Session


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as it describes itself."""

    id: str
    host: str
    gpus: float
    cores: Sequence[int]  # as many as the cluster has of it
    device: device.Device
    versions: Mapping[str, str]


def describe(node_id: str, resources: Mapping[str, float], kind: str) -> Node:
    """Describe the machine that this runs on, whose resources are those that Ray knows."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = cores[: max(1, int(resources.get("CPU", 0)))]
    return Node(node_id, platform.node(), resources.get("GPU", 0.0), cores, device.detect(kind), device.versions())


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

    rows: list[Row] = field(default_factory=list)  # that are new, or shown from now on
    files: dict[str, bytes] = field(default_factory=dict)  # that rows name, by their path in the study's folder
    gpu: str = ""
    overflowed: list[str] = field(default_factory=list)  # formats measured in bfloat16 from now on
    task: Any = None  # a reference to the one that was built
    text: str = ""  # what a notebook would have printed
    error: InputError | None = None  # which ends the run


class Worker(Session):
    """A session in a folder of its own, whose node shares its checkpoints; Ray makes an actor of it."""

    def __init__(self, post: Post) -> None:
        self._post, self._scratch = post, tempfile.TemporaryDirectory(prefix="qnb-worker-")
        folder = Path(self._scratch.name)
        write_atomic(folder / "study.json", json.dumps(post.record))
        super().__init__(**post.study, output=folder)
        self.device = replace(post.node.device, spread=max(1, int(post.gpus)))
        memory.planned_bytes = post.planned_bytes
        cache = cache_folder() / "cluster" / post.node.host / post.record["fingerprint"]
        checkpoints = Path(post.folder or cache) / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").symlink_to(checkpoints)

    def has_items(self, row: Mapping[str, Any]) -> bool:
        """Leave files to the driver."""
        return True

    def checkpoint(self, precision: Precision, is_new: bool = False) -> Path:
        """Return the folder of the node's checkpoint, beside which its row is kept for every study of the model.

        The cell that makes it, or finds it, reads every byte; the cells after it need not. Another run on the node
        waits meanwhile.
        """
        folder = self.folder / "checkpoints" / self.pinned(precision).checkpoint
        if precision.origin or folder in self._verified:
            return super().checkpoint(precision)
        key, record = self.key("quantize", precision), folder.with_name(f".{folder.name}.row.json")
        with holding(record.with_suffix(".lock"), lambda: None):
            row = json.loads(record.read_text()) if record.exists() else {}
            if row.get("fingerprint") == key["fingerprint"] and not is_new:
                self.adopt(row)  # that of the driver may be of another node's
                if not self._is_making:
                    self._verified.add(folder)
            record.unlink(missing_ok=True)  # it is of no use where what follows fails
            super().checkpoint(precision, is_new)
            write_atomic(record, json.dumps(self.ledger.find(key)))
        return folder

    def work(self, cell: Cell, rows: Sequence[Row], tasks: Mapping[str, Any]) -> Result:
        """Measure a cell.

        Parameters
        ----------
        cell
            What to measure.
        rows
            What the driver's ledger has of the cell's formats, oldest first: that is not measured again.
        tasks
            References to those that other workers have built, by name.
        """
        import ray

        self._prepare(cell, tasks)
        self.ledger.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.ledger, text, error = Ledger(self.folder), io.StringIO(), None
        with redirect_stdout(text):
            try:
                self.measure(cell.step)
            except InputError as wrong_input:
                error = InputError(str(wrong_input))
            except NothingMeasuredError:
                pass  # and each failure has its row
            except Exception as failure:  # of this cell alone
                self.fail(cell.about, cell.name, failure)
        added = [json.loads(line) for line in self.ledger.path.read_text().splitlines()[len(rows) :]]
        if any(row["stage"].endswith(FAILED) for row in added):
            error = None  # what one format cannot do ends no other's cells
        named = {row[column] for row in added for column in row if column.endswith("_file") and row[column]}
        files = {name: path.read_bytes() for name in named if (path := self.folder / name).is_file()}
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "") if self.device.kind == "cuda" else ""
        task = self.tasks.get(cell.about["task"]) if cell.about["stage"] == "task" else None
        return Result(added, files, gpu, self.overflowed, ray.put(task) if task else None, text.getvalue(), error)

    def _prepare(self, cell: Cell, tasks: Mapping[str, Any]) -> None:
        """Get ready for a cell: its format and tasks, the cores it may use, and models kept or given back."""
        import ray
        import torch

        cores = self._post.node.cores if cell.is_alone else self._post.cores
        self._is_making = cell.is_making
        self.overwrite = cell.is_making and self._post.study["overwrite"]  # of all else, the driver says what counts
        torch.set_num_threads(self._post.threads or len(cores))
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        self.precisions = parse([cell.precision]) if cell.precision else ()
        for name in {name for name in tasks if f"task {name}" in cell.needs} - self.tasks.keys():
            with suppress(Exception):  # where its builder is gone, this worker builds it too
                self.tasks[name] = ray.get(tasks[name])
        reads_memory = cell.about["stage"] in ("perf", "sweep", "peaks", "quantize")  # before it loads a model
        memory.keep_models(not reads_memory)
