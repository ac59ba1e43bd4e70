"""Which worker measures what next: cells over workers and nodes, without a cluster.

Accuracy runs on every GPU at once. What the host's speed decides is timed alone on its node, before anything else
there. A worker keeps its format for as long as others do not wait for it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TRIES = 3  # workers that one cell may end, before it counts as failed


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
        Names of cells that have to end before, and of checkpoints, which a node makes when the first cell loads them.
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


class Schedule:
    """What is left to do, and who is at what.

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
        self._formats = dict.fromkeys(nodes, "")  # of each worker's last cell
        self._lost = defaultdict[str, list[str]](list)  # nodes on which a cell ended a worker, by its name
        # as few nodes as end what runs alone before the longest of the others can end
        alone_s = sum(cell.estimate_s for cell in cells if cell.is_alone)
        longest_s = max((cell.estimate_s for cell in cells if not cell.is_alone), default=0.0)
        self._alone_nodes = math.ceil(alone_s / max(1.0, longest_s))

    def begin(self, worker: str) -> Cell | None:
        """Return what a worker does next, which then counts as begun; None if it is busy, has to wait or is done."""
        node = self.nodes[worker]
        beside = [cell for other, cell in self.running.items() if self.nodes[other] == node]
        unfinished = {cell.name for cell in (*self.pending, *self.running.values())}
        free = [cell for cell in self.pending if unfinished.isdisjoint(cell.needs) and self._fits(cell, node)]
        alone = [cell for cell in free if cell.is_alone]
        if worker in self.running or not free or any(cell.is_alone for cell in beside) or (alone and beside):
            return None
        cell = self._choose(alone or free, self._formats[worker])
        self.pending.remove(cell)
        self.running[worker] = cell
        self._formats[worker] = cell.precision or self._formats[worker]
        return cell

    def _fits(self, cell: Cell, node: str) -> bool:
        """Return whether a cell may run on a node: not where it ended a worker, if there is another."""
        nodes = [each for each in dict.fromkeys(self.nodes.values()) if cell.node in ("", each)]
        nodes = [each for each in nodes if each not in self._lost[cell.name]] or nodes
        return node in (nodes[: self._alone_nodes] if cell.is_alone else nodes)

    def _choose(self, free: Sequence[Cell], precision: str) -> Cell:
        """Choose a cell for a worker: of its own format, unless another cell would end after everything else."""
        longest = max(free, key=lambda cell: cell.estimate_s)
        left_s = sum(cell.estimate_s for cell in self.pending if not cell.is_alone)
        if not longest.is_alone and longest.estimate_s * len(self.nodes) > left_s:
            return longest
        return next((cell for cell in free if cell.precision in ("", precision)), free[0])

    def end(self, worker: str) -> None:
        """Count a worker's cell as ended, well or not."""
        del self.running[worker]

    def lose(self, worker: str, is_replaced: bool) -> Cell | None:
        """Let the cell of a worker that was lost begin again; return it if that was its last try.

        A worker without another in its place is gone, most likely with its node: that is nothing the cell did.
        """
        cell = self.running.pop(worker)
        if is_replaced:
            self._lost[cell.name].append(self.nodes[worker])
        else:
            del self.nodes[worker]
        if len(self._lost[cell.name]) == TRIES:
            return cell
        self.pending.insert(0, cell)
        return None
