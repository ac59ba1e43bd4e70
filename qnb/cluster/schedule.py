"""Which worker measures what next: cells over workers and nodes, without a cluster.

Accuracy runs on every GPU at once. What the host's speed decides is timed alone on its node, before anything else
there. A worker keeps its format for as long as others do not wait for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Need = tuple[str, str]  # ("checkpoint", a format) or ("task", a task): made once on each node, for all its workers
TRIES = 3  # workers that one cell may end, before it counts as failed


@dataclass(frozen=True)
class Cell:
    """One format and stage, of accuracy one task: what a worker measures in one go.

    Parameters
    ----------
    name
        What people see; no other cell has it.
    about
        What its rows are about, as their keys have it; without a precision what is measured once for all formats.
    steps
        Importable functions of a session, each with its further arguments.
    needs
        What its node must have before.
    makes
        What its node has afterwards.
    after
        The name of a cell that must end before.
    is_timed
        Whether times are taken: on the GPU model that is timed, with no model kept from the cell before.
    is_alone
        Whether nothing else may run on its node meanwhile.
    estimate_s
        How long it takes, as far as is known.
    """

    name: str
    about: Mapping[str, Any]
    steps: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...] = ()
    needs: frozenset[Need] = frozenset()
    makes: Need | None = None
    after: str = ""
    is_timed: bool = False
    is_alone: bool = False
    estimate_s: float = 1.0

    @property
    def precision(self) -> str:
        """The format's name."""
        return str(self.about.get("precision", ""))


@dataclass
class Seat:
    """A worker, as the schedule sees it."""

    node: str
    can_time: bool = True  # it is on the GPU model that is timed
    precision: str = ""  # the format of its last cell
    cell: Cell | None = None  # at work


@dataclass
class Schedule:
    """Hands out cells.

    Parameters
    ----------
    cells
        The plan.
    seats
        Workers by name.
    maker
        Returns the cell that makes what a node needs.
    here
        The node on which planned checkpoints are made, if it has a worker: the driver's, which keeps them.
    """

    cells: Iterable[Cell]
    seats: dict[str, Seat]
    maker: Callable[[Need], Cell]
    here: str = ""
    pending: dict[str, Cell] = field(init=False)  # by name, the longest first
    ready: set[tuple[str, Need]] = field(default_factory=set)  # what each node has
    tries: Counter[str] = field(default_factory=Counter)  # of cells whose workers ended

    def __post_init__(self) -> None:
        self._planned = {cell.name: cell for cell in self.cells}
        self.pending = {}
        self._add(self._planned.values())

    def _add(self, cells: Iterable[Cell]) -> None:
        """Let cells be pending."""
        both = [*self.pending.values(), *cells]
        self.pending = {cell.name: cell for cell in sorted(both, key=lambda cell: -cell.estimate_s)}
        self._settle()

    def _settle(self) -> None:
        """Give each cell that runs alone a node: as few nodes as can end by the time all work ends at best."""
        nodes = dict.fromkeys((seat.node for seat in self.seats.values() if seat.can_time), 0.0)
        self.home: dict[str, str] = {}  # of a cell that runs alone
        alone = [cell for cell in self.pending.values() if cell.is_alone]
        end_s = self.ideal_s()
        for cell in sorted(alone, key=lambda cell: cell.precision) if nodes else ():
            fitting = [node for node, busy_s in nodes.items() if busy_s + cell.estimate_s <= end_s]
            node = max(fitting, key=nodes.__getitem__) if fitting else min(nodes, key=nodes.__getitem__)
            self.home[cell.name] = node
            nodes[node] += cell.estimate_s

    def ideal_s(self) -> float:
        """Return the least time for what is pending: its longest chain, or an even share of all work."""
        nodes = {seat.node for seat in self.seats.values() if seat.can_time}
        alone_s = sum(cell.estimate_s for cell in self.pending.values() if cell.is_alone)
        other_s = sum(cell.estimate_s for cell in self.pending.values() if not cell.is_alone)
        share_s = other_s / max(1, len(self.seats)) + alone_s / max(1, len(nodes))
        return max([share_s, *map(self._chain_s, self.pending.values())])

    def _chain_s(self, cell: Cell) -> float:
        before = self.pending.get(cell.after)
        makers_s = sum(self.maker(need).estimate_s for need in cell.needs)
        return cell.estimate_s + makers_s + (self._chain_s(before) if before else 0.0)

    @property
    def running(self) -> dict[str, Cell]:
        """The cells at work, by worker."""
        return {name: seat.cell for name, seat in self.seats.items() if seat.cell}

    def begin(self, worker: str) -> Cell | None:
        """Return what an idle worker does next, which then counts as begun; None where it has to wait, or is done."""
        seat = self.seats[worker]
        beside = [each.cell for each in self.seats.values() if each.node == seat.node and each.cell]
        if any(cell.is_alone for cell in beside):
            return None
        alone = [cell for name, cell in self.pending.items() if self.home.get(name) == seat.node]
        if alone and beside:
            return None
        cell = self._next(seat, alone or [cell for cell in self.pending.values() if not cell.is_alone])
        if cell is None:
            return None
        missing = sorted(need for need in cell.needs if (seat.node, need) not in self.ready)
        cell = self.maker(missing[0]) if missing else cell
        if not cell.makes or self._is_made_on(seat.node):
            self.pending.pop(cell.name, None)
        seat.cell, seat.precision = cell, cell.precision or seat.precision
        return cell

    def _is_made_on(self, node: str) -> bool:
        """Return whether planned checkpoints are made on a node."""
        return node == self.here or all(seat.node != self.here for seat in self.seats.values())

    @property
    def unfinished(self) -> int:
        """How many planned cells have not ended."""
        return len(self._planned.keys() & {*self.pending, *(cell.name for cell in self.running.values())})

    def _next(self, seat: Seat, cells: Iterable[Cell]) -> Cell | None:
        """Choose a cell for a worker: of its own format, unless another cell would end after everything else."""
        begun = {cell.name for cell in self.running.values()}
        beside = (each.cell for each in self.seats.values() if each.node == seat.node and each.cell)
        being_made = {cell.makes for cell in beside if cell.makes}
        free = [cell for cell in cells if being_made.isdisjoint({*cell.needs, cell.makes})
                and cell.after not in self.pending and cell.after not in begun
                and (seat.can_time or not cell.is_timed)
                and (not cell.makes or self._is_made_on(seat.node))]  # fmt: skip
        if not free:
            return None
        left_s = sum(cell.estimate_s for cell in self.pending.values() if not cell.is_alone)
        is_critical = free[0].estimate_s * len(self.seats) > left_s  # the longest one would end last
        own = (cell for cell in free if cell.precision == seat.precision and (cell.is_alone or not is_critical))
        return next(own, free[0])

    def end(self, worker: str) -> None:
        """Count a worker's cell as ended, well or not."""
        seat = self.seats[worker]
        if seat.cell and seat.cell.makes:
            self.ready.add((seat.node, seat.cell.makes))
        seat.cell = None

    def join(self, worker: str, seat: Seat) -> None:
        """Take another worker in."""
        self.seats[worker] = seat
        self._settle()

    def repeat(self, precisions: Collection[str]) -> None:
        """Let all planned cells of formats be pending again: their checkpoints are others from now on."""
        checkpoints = {("checkpoint", name) for name in precisions}
        self.ready = {(node, need) for node, need in self.ready if need not in checkpoints}
        self._add(cell for cell in self._planned.values() if cell.precision in precisions)

    def lose(self, worker: str) -> list[Cell]:
        """Take a worker away; its cell is pending again. Return what can't be measured after too many losses."""
        cell = self.seats.pop(worker).cell
        failed: list[Cell] = []
        if cell:
            self.tries[cell.name] += 1
            if self.tries[cell.name] >= TRIES:  # and what needs the thing that it makes
                failed = [cell, *(each for each in self.pending.values() if cell.makes in each.needs)]
        for each in failed:
            self.pending.pop(each.name, None)
        self._add([cell] if cell and cell.name in self._planned and not failed else [])
        return failed


@dataclass(frozen=True)
class Planned:
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
    at_work: dict[str, Planned] = {}
    while True:
        for worker, seat in schedule.seats.items():
            before = seat.precision
            if not seat.cell and (cell := schedule.begin(worker)):
                seconds = cell.estimate_s + (load_s if cell.precision not in ("", before) else 0.0)
                at_work[worker] = Planned(now_s, now_s + seconds, worker, cell)
                planned.append(at_work[worker])
        if not at_work:
            return planned
        worker = min(at_work, key=lambda name: at_work[name].end_s)
        now_s = at_work.pop(worker).end_s
        schedule.end(worker)
