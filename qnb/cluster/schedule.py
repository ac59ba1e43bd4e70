"""Which worker measures what next: cells over workers and nodes, without a cluster.

Accuracy runs on every GPU at once. What the host's speed decides is timed alone on its node, before anything else
there. A worker keeps its format for as long as others do not wait for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

TRIES = 3  # workers that one cell may end, before it counts as failed; one that makes something, on each node


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
        Cells that must have ended on its node before, once for all its workers. They are in no plan themselves.
    makes
        What its node has afterwards, where others need it, such as ``"checkpoint nf4"``.
    node
        Where it runs; empty is anywhere.
    after
        The name of a cell that has to end before, wherever it runs.
    is_alone
        Whether nothing else may run on its node meanwhile.
    estimate_s
        How long it takes, as far as is known.
    """

    about: Mapping[str, Any]
    step: Any = None
    needs: tuple[Cell, ...] = ()
    makes: str = ""
    node: str = ""
    after: str = ""
    is_alone: bool = False
    estimate_s: float = 1.0

    @property
    def name(self) -> str:
        """What people see."""
        return self.makes or " ".join(str(part) for part in self.about.values() if part)

    @property
    def precision(self) -> str:
        """The format's name."""
        return str(self.about.get("precision", ""))


@dataclass
class Seat:
    """A worker, as the schedule sees it."""

    node: str
    precision: str = ""  # the format of its last cell
    cell: Cell | None = None  # at work


class Schedule:
    """Hands out cells.

    Parameters
    ----------
    cells
        The plan.
    nodes
        Where workers are, one for each: w0, w1 ...
    """

    def __init__(self, cells: Iterable[Cell], nodes: Iterable[str]) -> None:
        self.seats = {f"w{number}": Seat(node) for number, node in enumerate(nodes)}
        self.pending: dict[str, Cell] = {}  # by name, the longest first
        self._ready = set[tuple[str, str]]()  # what each node has
        self._losses = Counter[tuple[str, str]]()  # workers that a cell ended, by node and name
        self._add(cells)

    def _add(self, cells: Iterable[Cell]) -> None:
        """Let cells be pending, and choose nodes for those that run alone: as few as end them in the least time."""
        both = [*self.pending.values(), *cells]
        self.pending = {cell.name: cell for cell in sorted(both, key=lambda cell: -cell.estimate_s)}
        nodes = list(dict.fromkeys(seat.node for seat in self.seats.values()))
        alone_s = sum(cell.estimate_s for cell in both if cell.is_alone)
        count = math.ceil(alone_s / max(1.0, self.ideal_s()))
        self._for_alone = nodes if TRIES in self._losses.values() else nodes[:count]

    def ideal_s(self) -> float:
        """Return the least time for what is pending: its longest chain, or an even share of all work."""
        nodes, cells = {seat.node for seat in self.seats.values()}, self.pending.values()
        alone_s = sum(cell.estimate_s for cell in cells if cell.is_alone)
        other_s = sum(cell.estimate_s for cell in cells if not cell.is_alone)
        share_s = other_s / max(1, len(self.seats)) + alone_s / max(1, len(nodes))
        chains_s = (cell.estimate_s + sum(need.estimate_s for need in cell.needs) for cell in cells)
        return max(share_s, *chains_s, 0.0)

    @property
    def running(self) -> dict[str, Cell]:
        """The cells at work, by worker."""
        return {name: seat.cell for name, seat in self.seats.items() if seat.cell}

    def begin(self, worker: str) -> Cell | None:
        """Return what a worker does next, which then counts as begun; None if it is busy, has to wait or is done."""
        seat = self.seats[worker]
        beside = [each.cell for each in self.seats.values() if each.node == seat.node and each.cell]
        being_made = {cell.makes for cell in beside}
        fitting = [cell for cell in self.pending.values() if self._can_run(cell, seat.node)]
        alone = [cell for cell in fitting if cell.is_alone and seat.node in self._for_alone]
        if seat.cell or any(cell.is_alone for cell in beside) or (alone and beside):
            return None
        unfinished = {*self.pending, *(cell.name for cell in self.running.values())}
        free = [cell for cell in alone or fitting if bool(alone) == cell.is_alone and cell.after not in unfinished
                and being_made.isdisjoint(need.makes for need in cell.needs)]  # fmt: skip
        if not free:
            return None
        cell = self._choose(free, seat.precision)
        cell = next((need for need in cell.needs if (seat.node, need.makes) not in self._ready), cell)
        self.pending.pop(cell.name, None)
        seat.cell, seat.precision = cell, cell.precision or seat.precision
        return cell

    def _can_run(self, cell: Cell, node: str) -> bool:
        """Return whether a node may run a cell, and can make what it needs."""
        lost = (self._losses["", cell.name], *(self._losses[node, need.name] for need in cell.needs))
        return cell.node in ("", node) and max(lost) < TRIES

    def _choose(self, free: list[Cell], precision: str) -> Cell:
        """Choose a cell for a worker: of its own format, unless another cell would end after everything else."""
        left_s = sum(cell.estimate_s for cell in self.pending.values() if not cell.is_alone)
        if not free[0].is_alone and free[0].estimate_s * len(self.seats) > left_s:
            return free[0]
        return next((cell for cell in free if cell.precision == precision), free[0])

    def end(self, worker: str) -> None:
        """Count a worker's cell as ended, well or not."""
        seat = self.seats[worker]
        if seat.cell and seat.cell.makes:
            self._ready.add((seat.node, seat.cell.makes))
        seat.cell = None

    def lose(self, worker: str, stays: bool) -> list[Cell]:
        """Let the cell of a worker that was lost be pending again; the worker's place stays, if its node does.

        Return what can run nowhere now, and is pending no more, after what should have made it.
        """
        seat, hopeless = self.seats[worker], list[Cell]()
        cell, seat.cell = seat.cell, None
        self._add([cell] if cell and not cell.makes else [])
        if not stays:
            del self.seats[worker]
        elif cell:
            lost = seat.node if cell.makes else "", cell.name
            self._losses[lost] += 1
            nodes = {each.node for each in self.seats.values()}
            hopeless = [each for each in self.pending.values() if self._losses[lost] == TRIES
                        and not any(self._can_run(each, node) for node in nodes)]  # fmt: skip
        for each in hopeless:
            del self.pending[each.name]
        self._add([])
        return [cell, *hopeless] if cell and cell.makes and hopeless else hopeless


class Planned(NamedTuple):
    """A cell in a rehearsal."""

    begin_s: float
    end_s: float
    worker: str
    cell: Cell


def rehearse(schedule: Schedule, load_s: float = 0.0) -> list[Planned]:
    """Return what a schedule would do if every cell took its estimate, in the order of beginning.

    `load_s` is what a worker takes to change its format.
    """
    now_s, planned = 0.0, list[Planned]()
    while True:
        for worker, seat in schedule.seats.items():
            before = seat.precision
            if cell := schedule.begin(worker):
                seconds = cell.estimate_s + (load_s if cell.precision not in ("", before) else 0.0)
                planned.append(Planned(now_s, now_s + seconds, worker, cell))
        at_work = [each for each in planned if schedule.seats[each.worker].cell is each.cell]
        if not at_work:
            return planned
        first = min(at_work, key=lambda each: each.end_s)
        now_s = first.end_s
        schedule.end(first.worker)
