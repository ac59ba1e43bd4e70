"""What a worker does: it measures cells with a session of its own, and returns rows and files instead of writing them.

It keeps its model while the format stays the same, and its tasks as long as it lives.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnb import device, memory
from qnb.cluster.schedule import Cell
from qnb.errors import InputError, scrub
from qnb.ledger import FAILED, Ledger, Row, holding, write_atomic
from qnb.precision import Precision
from qnb.provenance import COMMAND, cache_folder
from qnb.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Post:
    """Where a worker works, and on what.

    Parameters
    ----------
    study
        Parameters of its session.
    record
        What the study's study.json says.
    command
        The command line that is written into rows.
    place
        What rows say of where they were measured: node, GPUs and worker.
    folder
        The study's folder, on the driver's machine; its checkpoints are then the study's. Elsewhere empty: checkpoints
        are kept in the user's cache folder.
    cores
        Of the CPU: its own, which no other worker of its node has.
    all_cores
        Of its node, for what runs alone there.
    threads
        Of a CPU that multiplies; 0 takes all those cores.
    spread
        GPUs that its model is spread over.
    planned_bytes
        Free memory that batches of scoring are planned for: the same on every worker, so that rows are too.
    """

    study: Mapping[str, Any]
    record: Mapping[str, Any]
    command: str
    place: Mapping[str, Any]
    folder: str
    cores: Sequence[int]
    all_cores: Sequence[int]
    threads: int
    spread: int
    planned_bytes: int


@dataclass
class Result:
    """What came of a cell."""

    rows: list[Row] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)  # that rows name, by their path in the study's folder
    text: str = ""  # what a notebook would have printed
    overflowed: list[str] = field(default_factory=list)  # formats measured in bfloat16 from now on
    task: bytes = b""  # a task that was built
    wrong_input: str = ""  # for which the whole run ends
    failure: str = ""  # that no row tells of


class WorkerSession(Session):
    """A session in a folder of its own, which remembers its new rows and keeps a model for the next cell."""

    place: Mapping[str, Any]
    new_rows: list[Row]
    keeps_model = False
    _kept: tuple[Precision, PreTrainedModel] | None = None
    _stack = ExitStack()

    def append(self, key: Mapping[str, Any], *values: Mapping[str, Any]) -> Row:
        """Record a measurement, and where it was made."""
        row = super().append(key, *values, self.place)
        self.new_rows.append(row)
        return row

    @contextmanager
    def loaded(self, precision: Precision) -> Iterator[PreTrainedModel]:
        """Load a format's checkpoint for the block, or take the model that was kept."""
        pinned = self.pinned(precision)
        if not self._kept or self._kept[0] != pinned:
            self.drop_model()
            self._kept = pinned, self._stack.enter_context(super().loaded(precision))
        try:
            yield self._kept[1]
        except BaseException:
            self.keeps_model = False
            raise
        finally:
            if not self.keeps_model:
                self.drop_model()

    def drop_model(self) -> None:
        """Give the kept model's memory back."""
        self._kept = None
        self._stack.close()


class Worker:
    """Measures cells; Ray makes an actor of it."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._scratch = tempfile.TemporaryDirectory(prefix="qnb-worker-")
        self._session: WorkerSession | None = None

    def ready(self) -> None:
        """Answer."""

    def close(self) -> None:
        """Remove what it wrote; checkpoints stay."""
        self._scratch.cleanup()

    def measure(
        self, cell: Cell, rows: Sequence[Row], files: Mapping[str, bytes], task: bytes, overflowed: list[str]
    ) -> Result:
        """Measure a cell.

        Parameters
        ----------
        cell
            What to measure.
        rows
            What the driver's ledger has of its format: that is not measured again.
        files
            What those rows name, by path.
        task
            The cell's task, if another worker has built it.
        overflowed
            Formats that are measured in bfloat16.
        """
        result = Result()
        try:
            session = self._ready_session(cell, rows, files, task)
            session.overflowed = overflowed
            self._run(session, cell, result)
        except InputError as error:
            result.wrong_input = str(error)
        return result

    def _run(self, session: WorkerSession, cell: Cell, result: Result) -> None:
        has_checkpoint = cell.makes is not None and cell.makes[0] == "checkpoint"
        text = io.StringIO()
        with self._node_checkpoints(session) if has_checkpoint else nullcontext(), redirect_stdout(text):
            for step, arguments in cell.steps:
                before = len(session.new_rows)
                try:
                    session.measure(step, *arguments)
                except Exception as error:  # that one format cannot be measured ends nothing else
                    has_row = any(row["stage"].endswith(FAILED) for row in session.new_rows[before:])
                    if isinstance(error, InputError) and not has_row:
                        result.wrong_input = str(error)
                        break
                    if not has_row:
                        result.failure = f"{type(error).__name__}: {scrub(str(error))}"
        result.text, result.rows, result.overflowed = text.getvalue(), session.new_rows, session.overflowed
        for row in result.rows:
            for name in (value for column, value in row.items() if column.endswith("_file") and value):
                result.files[name] = (session.folder / name).read_bytes()
        if cell.makes and cell.makes[0] == "task" and cell.makes[1] in session.tasks:
            from ray import cloudpickle  # tasks hold functions without names

            result.task = cloudpickle.dumps(session.tasks[cell.makes[1]])

    def _ready_session(
        self, cell: Cell, rows: Sequence[Row], files: Mapping[str, bytes], task: bytes
    ) -> WorkerSession:
        """Return the session, set to a cell's format, with all that the driver knows of it."""
        session = self._session or self._new_session()
        self._use_cores(self._post.all_cores if cell.is_alone else self._post.cores)
        for name, content in files.items():
            if not (session.folder / name).exists():
                write_atomic(session.folder / name, content)
        session.ledger.add_missing(rows)
        if task:
            name = next(name for kind, name in cell.needs if kind == "task")
            session.tasks[name] = session.tasks.get(name) or pickle.loads(task)  # noqa: S301  # another worker's
        session.precisions = tuple(each for each in self._precisions if each.name == cell.precision)
        session.new_rows = []
        session.keeps_model = not (cell.is_timed or cell.makes)
        if not session.keeps_model:  # memory is read before a model is loaded
            session.drop_model()
        return session

    def _new_session(self) -> WorkerSession:
        os.environ[COMMAND] = self._post.command
        os.environ.pop(device.CHOICE, None)  # Ray shows a worker its own GPUs alone
        memory.planned_bytes = self._post.planned_bytes
        folder = Path(self._scratch.name)
        write_atomic(folder / "study.json", json.dumps(self._post.record))
        session = WorkerSession(**self._post.study, output=folder)
        if (most_mib := session.device.memory_mib) and session.device.kind == "cuda" and os.environ.get(device.LIMIT):
            import torch

            for index in range(self._post.spread):
                total_bytes = torch.cuda.get_device_properties(index).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, most_mib * memory.MIB / total_bytes), index)
        session.device = replace(session.device, spread=self._post.spread)
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "") if session.device.kind == "cuda" else ""
        session.place, session.new_rows = {**self._post.place, "gpu": gpu}, []
        session.source = replace(session.source, reason=self._post.record["reason"])
        self._root = Path(self._post.folder or cache_folder() / "cluster" / session.source.fingerprint)
        (self._root / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").symlink_to(self._root / "checkpoints")
        self._session, self._precisions = session, session.precisions
        return session

    @contextmanager
    def _node_checkpoints(self, session: WorkerSession) -> Iterator[None]:
        """Let the block know the checkpoints that this node has already, and remember those that it makes."""
        if self._post.folder:  # the driver remembers those of the study
            yield
            return
        with holding(self._root / ".lock", lambda: None):
            ledger = Ledger(self._root)
            session.new_rows += session.ledger.add_missing(ledger.rows("quantize"))
            yield
            ledger.add_missing(session.ledger.rows("quantize"))

    def _use_cores(self, cores: Sequence[int]) -> None:
        """Keep to some cores of the CPU; on a CPU, multiply on as many as the user allows."""
        import torch

        if self._post.study["device"] == "cpu":
            torch.set_num_threads(self._post.threads or len(cores))
        elif hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
