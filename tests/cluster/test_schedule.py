"""Cells over workers and nodes, by the clock of a simulation."""

import sys
from collections import Counter
from itertools import pairwise

import pytest

from qnb.cluster.schedule import Cell, Schedule, rehearse
from qnb.provenance import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import cluster as bench

sys.path.pop(0)


def ideal_s(gpus):
    """Return the longest chain of cells, or all accuracy over the GPUs and all timing over the nodes."""
    cells, nodes = bench.plan(), -(-gpus // bench.GPUS_PER_NODE)
    alone_s = sum(cell.estimate_s for cell in cells if cell.is_alone)
    others_s = sum(cell.estimate_s for cell in cells) - alone_s
    made_s = {cell.name: sum(need.estimate_s for need in cell.needs) for cell in cells}
    return max(others_s / gpus + alone_s / nodes, *(cell.estimate_s + made_s[cell.name] for cell in cells))


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16, 64])
def test_a_study_ends_within_a_quarter_of_the_ideal(gpus):
    planned = rehearse(bench.schedule(gpus), bench.LOAD_S)
    assert max(each.end_s for each in planned) <= 1.25 * ideal_s(gpus)
    assert {cell.name for cell in bench.plan()} <= {each.cell.name for each in planned}


@pytest.mark.parametrize("gpus", [2, 16])
def test_what_runs_alone_has_its_node_and_each_node_makes_a_thing_once(gpus):
    schedule = bench.schedule(gpus)
    planned = rehearse(schedule, bench.LOAD_S)
    node = {worker: seat.node for worker, seat in schedule.seats.items()}
    for each in planned:
        beside = [other for other in planned if other is not each and node[other.worker] == node[each.worker]
                  and other.begin_s < each.end_s and each.begin_s < other.end_s]  # fmt: skip
        assert not (each.cell.is_alone and beside)
        made = {other.cell.makes: other.end_s for other in planned if node[other.worker] == node[each.worker]}
        assert all(made[need.makes] <= each.begin_s for need in each.cell.needs)
    made = Counter((node[each.worker], each.cell.makes) for each in planned if each.cell.makes)
    assert set(made.values()) == {1}
    assert set(Counter(each.cell.name for each in planned if not each.cell.makes).values()) == {1}


def test_one_worker_changes_its_format_once_a_format():
    planned = rehearse(bench.schedule(1))
    formats = [each.cell.precision for each in planned if each.cell.precision and not each.cell.makes]
    changes = sum(one != other for one, other in pairwise(formats))
    assert changes <= 2 * len(set(formats)) - 1  # timing first, then accuracy


NF4 = {"stage": "perf", "precision": "nf4"}
MADE = bench.maker("checkpoint", "nf4")


@pytest.mark.parametrize("stays", [True, False])
def test_a_lost_workers_cell_begins_again_there_or_elsewhere(stays):
    schedule = Schedule([Cell(NF4, is_alone=True)], ["a", "b"])
    home = next(worker for worker in ("w0", "w1") if schedule.begin(worker))
    assert not schedule.lose(home, stays)
    (planned,) = rehearse(schedule)
    assert planned.cell.about == NF4 and (planned.worker == home) == stays


def test_a_maker_that_was_lost_is_asked_for_again():
    schedule = Schedule([Cell(NF4, needs=(MADE,))], ["a"])
    for _ in range(2):
        assert schedule.begin("w0") is MADE
        schedule.lose("w0", stays=True)
    assert [bool(each.cell.makes) for each in rehearse(schedule)] == [True, False]


def test_a_cell_of_a_node_that_is_gone_stays_pending():
    """What the other node loses once is no reason to give it up."""
    schedule = Schedule([Cell(NF4, needs=(MADE,), node="a"), Cell({"stage": "lengths"}, needs=(MADE,))], ["a", "b"])
    assert schedule.lose("w0", stays=False) == []
    assert schedule.begin("w1") is MADE
    assert schedule.lose("w1", stays=True) == [] and len(schedule.pending) == 2


def test_a_cell_that_belongs_to_a_node_runs_there():
    schedule = Schedule([Cell(NF4, needs=(MADE,), node="b")], ["a", "b"])
    assert {each.worker for each in rehearse(schedule)} == {"w1"}


def test_what_others_come_after_runs_once_before_them():
    after = [Cell(NF4 | {"engine": name}, after="peaks", is_alone=name == "eager") for name in ("eager", "cuda_graph")]
    cells = [Cell({"stage": "peaks"}, is_alone=True), Cell({"stage": "accuracy"}), *after]
    peaks, *others = sorted(rehearse(Schedule(cells, ["a", "a", "b"])), key=lambda each: each.cell.name != "peaks")
    assert len(others) == 3
    assert all(peaks.end_s <= each.begin_s for each in others if each.cell.after)
