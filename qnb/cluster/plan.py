"""What notebooks measure, cut into cells of one format and stage each, and which worker measures which cell next.

A cell's step is a stage that a notebook calls, with the notebook's own parameters. Accuracy runs on every GPU at once.
What the host's speed decides is timed alone on its node, before anything else there. A checkpoint is made on each node
that needs it, by a cell of its own. A worker keeps its format for as long as others do not wait for it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qnb.accuracy import evaluate, perplexity, tasks
from qnb.precision import BASELINE
from qnb.quantize import stages as checkpoints
from qnb.session import Session
from qnb.speed import stages as speed

TRIES = 3  # workers that one cell may end, before it counts as failed
# seconds that a cell of a stage or setting takes where no row tells, and an item of a task: of choices, or generated
GUESSED_S = {"peaks": 5.0, "task": 10.0, "divergence": 30.0, "bs1": 60.0, "maxbatch": 120.0, "1": 60.0}
GUESSED_ITEM_S = {False: 0.01, True: 0.3}
COLUMNS = {"quantize": "quantize_s", "accuracy": "evaluate_s", "perf": "pass_s"}  # of rows, that tell


@dataclass(frozen=True)
class Cell:
    """One format and stage, of accuracy one task: what a worker measures in one go.

    Parameters
    ----------
    about
        What its rows are about, as their keys have it; no other cell has the same.
    step
        An importable function of a session, with its further arguments.
    needs
        Names of cells that have to end before.
    loads
        Formats whose checkpoints have to be on its node before.
    node
        Where it runs; empty is anywhere.
    is_alone
        Whether nothing else may run on its node meanwhile.
    estimate_s
        How long it takes, as far as is known.
    """

    about: Mapping[str, Any]
    step: Any = None
    needs: Sequence[str] = ()
    loads: Sequence[str] = ()
    node: str = ""
    is_alone: bool = False
    estimate_s: float = 1.0

    @property
    def name(self) -> str:
        """What people see."""
        return " ".join(str(part) for part in self.about.values() if part)

    @property
    def precision(self) -> str:
        """The format's name."""
        return str(self.about.get("precision", ""))

    @property
    def is_making(self) -> bool:
        """Whether it makes a checkpoint."""
        return self.about.get("stage") == "quantize"


START = Cell({"stage": "start"})  # what a worker is at until it has started


class Schedule:
    """What is left to do, who is at what, and which checkpoints each node has.

    Parameters
    ----------
    cells
        What to measure.
    nodes
        Each worker's node.
    """

    def __init__(self, cells: Sequence[Cell], nodes: Mapping[str, str]) -> None:
        self.nodes, self.running = {**nodes}, dict[str, Cell]()  # the cells at work, by worker
        needed = {name for cell in cells for name in cell.needs}
        self.pending = sorted(cells, key=lambda cell: (cell.name not in needed, -cell.estimate_s))
        self._plan = [*cells]
        self._made = set[tuple[str, str]]()  # nodes, and formats whose checkpoint was made there, or failed
        self._formats = dict.fromkeys(nodes, "")  # of each worker's last cell
        self._lost = defaultdict[str, list[str]](list)  # nodes on which a cell ended a worker, by its name
        # as few nodes as end what runs alone before the longest of the others can end
        alone_s = sum(cell.estimate_s for cell in cells if cell.is_alone)
        longest_s = max((cell.estimate_s for cell in cells if not cell.is_alone), default=0.0)
        self._alone_nodes = math.ceil(alone_s / max(1.0, longest_s))

    def begin(self, worker: str) -> Cell | None:
        """Return what a worker does next, which then counts as begun; None if it is busy, has to wait or is done.

        That is a cell of the plan, or the making of a checkpoint that this cell loads.
        """
        node = self.nodes[worker]
        beside = [cell for other, cell in self.running.items() if self.nodes[other] == node]
        if worker in self.running or any(cell.is_alone for cell in beside):
            return None
        unfinished = {cell.name for cell in (*self.pending, *self.running.values())}
        free = [cell for cell in self.pending if unfinished.isdisjoint(cell.needs) and self._fits(cell, node)]
        alone = [cell for cell in free if cell.is_alone]
        in_making = {cell.precision for cell in beside if cell.is_making}
        free = [cell for cell in alone or free if in_making.isdisjoint(cell.loads)]
        if alone:  # all checkpoints of what runs alone are made side by side, before any of it begins
            free = [cell for cell in free if self._lacks(cell, node)] or ([] if beside else free)
        if not free:
            return None
        cell = self._choose(free, self._formats[worker])
        if lacking := self._lacks(cell, node):
            cell = self._making(lacking[0], node)
        self.pending = [each for each in self.pending if each is not cell]
        self.running[worker] = cell
        self._formats[worker] = cell.precision or self._formats[worker]
        return cell

    def _fits(self, cell: Cell, node: str) -> bool:
        """Return whether a cell may run on a node: not where it ended a worker, if there is another."""
        nodes = [each for each in dict.fromkeys(self.nodes.values()) if cell.node in ("", each)]
        nodes = [each for each in nodes if each not in self._lost[cell.name]] or nodes
        return node in (nodes[: self._alone_nodes] if cell.is_alone else nodes)

    def _lacks(self, cell: Cell, node: str) -> list[str]:
        """Return the formats that a cell loads, and whose checkpoint its node has not made."""
        return [precision for precision in cell.loads if (node, precision) not in self._made]

    def _making(self, precision: str, node: str) -> Cell:
        """Return the cell that makes a checkpoint on a node: that of the plan, or one more."""
        making = Cell({"stage": "quantize", "precision": precision}, checkpoints.quantize, node=node)
        planned = (cell for cell in self.pending if cell.about == making.about and self._fits(cell, node))
        return next(planned, making)

    def _choose(self, free: Sequence[Cell], precision: str) -> Cell:
        """Choose a cell for a worker: of its own format, unless another cell would end after everything else."""
        longest = max(free, key=lambda cell: cell.estimate_s)
        left_s = sum(cell.estimate_s for cell in self.pending if not cell.is_alone)
        if not longest.is_alone and longest.estimate_s * len(self.nodes) > left_s:
            return longest
        return next((cell for cell in free if cell.precision in ("", precision)), free[0])

    def end(self, worker: str) -> None:
        """Count a worker's cell as ended, well or not."""
        cell = self.running.pop(worker)
        if cell.is_making:
            self._made.add((self.nodes[worker], cell.precision))

    def lose(self, worker: str) -> bool:
        """Let the cell of a worker that was lost begin again; return whether it may, or has ended for good."""
        cell = self.running[worker]
        self._lost[cell.name].append(self.nodes[worker])
        if len(self._lost[cell.name]) >= TRIES:
            self.end(worker)
            return False
        del self.running[worker]
        if cell in self._plan:  # any other is made anew where it is needed
            self.pending.insert(0, cell)
        return True

    def drop(self, worker: str) -> None:
        """Forget a worker that does not start: it went with its node, most likely, which is nothing a cell did."""
        self.running.pop(worker, None)
        node = self.nodes.pop(worker)
        self._lost.update({name: [each for each in nodes if each != node] for name, nodes in self._lost.items()})


# Cells


def plan(session: Session, values: Mapping[str, Any], numbers: set[str], here: str) -> list[Cell]:
    """Return what notebooks measure.

    Parameters
    ----------
    session
        Of the study, with the device that everything is measured on.
    values
        Every parameter of these notebooks.
    numbers
        The notebooks' numbers, such as 02.
    here
        The node whose checkpoints notebook 01 shows: the driver's, if it has workers.
    """
    cells = []
    for name in (each.name for each in session.precisions):
        if "01" in numbers:
            cells.append(_cell(session, "quantize", checkpoints.quantize, node=here, precision=name))
        if "02" in numbers:
            cells += _accuracy_cells(session, name, values)
        if numbers & {*speed.NOTEBOOKS.values()}:
            cells += _timed_cells(session, name, values, numbers)
    return [*{cell.name: cell for cell in cells}.values()]  # what several formats need is in it once


def _accuracy_cells(session: Session, precision: str, values: Mapping[str, Any]) -> Iterator[Cell]:
    cell = partial(_cell, session, precision=precision, loads=[precision])
    names = tasks.check(evaluate.wanted(session, values["tasks"]))
    for name in names:
        options = evaluate.AccuracyOptions(name, values["limit"], values["batch_size"], values["scorer"])
        guess_s = (sum(evaluate.planned_items(session, options)) or 1000) * GUESSED_ITEM_S[name.startswith("gsm8k")]
        yield _cell(session, "task", partial(evaluate.prepare, name=name, options=options), task=name)
        yield cell("accuracy", partial(evaluate.accuracy, options=options), [f"task {name}"], guess_s, task=name)
    text = perplexity.DivergenceOptions(values["prompt_source"], values["ppl_tokens"], values["ppl_context"])
    loads = [*dict.fromkeys((precision, BASELINE))]
    yield cell("divergence", partial(perplexity.divergence, options=text), loads=loads)
    options = evaluate.AccuracyOptions(values["tasks"], values["sensitivity_limit"])
    yield cell("batch_sensitivity", partial(evaluate.batch_sensitivity, options=options), [f"task {names[0]}"])


def _timed_cells(session: Session, precision: str, values: Mapping[str, Any], numbers: set[str]) -> Iterator[Cell]:
    from qnb.speed import engines

    yield _cell(session, "peaks", speed.device_peaks, is_alone=True)
    for engine in engines.parse(values["engines"], session.device.kind):
        # what the host's speed decides runs alone; what fails is a first pass, which a pass that is measured answers
        cell: Callable[..., Cell] = partial(
            _cell, session, precision=precision, engine=engine, repeat=0, loads=[precision], is_alone=engine == "eager"
        )
        step = partial(time_engine, values, engine)
        if "03" in numbers:
            yield cell("perf", partial(step, speed.perf_bs1, "bs1"), ["peaks"], setting="bs1")
        if "04" in numbers:
            search = partial(step, speed.perf_maxbatch, "maxbatch")
            yield (searched := cell("perf", search, ["peaks"], setting="maxbatch"))
            if session.count("sweep_batch", values["sweep_batch"]):
                yield cell("sweep", partial(step, speed.sweep, "maxbatch"), [searched.name], setting="1")


def time_engine(
    values: Mapping[str, Any], engine: str, stage: Callable[..., None], setting: str, session: Session
) -> None:
    """Run a stage of notebook 03 or 04 for one engine; each worker reads the prompts itself."""
    lengths = (values[name] for name in ("prompt_tokens", "new_tokens", "prompt_source"))
    workload = speed.workload(session, speed.WorkloadOptions(setting, values[f"{setting}_requests"], *lengths))
    repeats, memory_mib, sweep_batch = values[f"{setting}_repeats"], values["memory_mib"], values["sweep_batch"]
    stage(session, speed.TimingOptions(workload, engine, repeats, memory_mib, sweep_batch))


def _cell(
    session: Session, stage: str, step: Callable[..., Any], needs: Sequence[str] = (), guess_s: float = 20.0, *,
    loads: Sequence[str] = (), node: str = "", is_alone: bool = False, **about: Any,
) -> Cell:  # fmt: skip
    """Return a cell that takes what its format's earlier rows say, or those of other formats; else a guess."""
    fields, column = ("engine", "setting", "task"), COLUMNS.get(stage, "")
    rows = [row for row in session.ledger.rows(stage) if all(row[name] == about.get(name, "") for name in fields)]
    if not session.overwrite and any(row["precision"] == about.get("precision") for row in rows):
        loads = ()  # it is measured already, most likely, and its checkpoint needed by nobody
    rows = [row for row in rows if row.get(column)]
    rows = [row for row in rows if row["precision"] == about.get("precision")] or rows
    estimate_s = GUESSED_S.get(about.get("setting", stage), guess_s)
    if rows:
        estimate_s = sum(row[column] for row in rows) / len({row["precision"] for row in rows})
    return Cell({"stage": stage, **about}, step, needs, loads, node, is_alone, estimate_s)
