"""Cells over workers and nodes, by the clock of a simulation."""

import sys
from collections import Counter
from itertools import pairwise

import pytest

from qnb.cluster.schedule import TRIES, Cell, Schedule
from qnb.provenance import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import cluster as bench

sys.path.pop(0)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16, 64])
def test_a_study_ends_within_a_quarter_of_the_ideal(gpus):
    planned = bench.rehearse(Schedule(bench.plan(), bench.nodes(gpus)))
    assert max(each.end_s for each in planned) <= 1.25 * bench.ideal_s(gpus)
    assert Counter(each.cell.name for each in planned) == Counter(cell.name for cell in bench.plan())


@pytest.mark.parametrize("gpus", [2, 16])
def test_what_runs_alone_has_its_node_and_what_a_cell_needs_has_ended(gpus):
    node = bench.nodes(gpus)
    planned = bench.rehearse(Schedule(bench.plan(), node))
    ended = {each.cell.name: each.end_s for each in planned}
    for each in planned:
        beside = [other for other in planned if other is not each and node[other.worker] == node[each.worker]
                  and other.begin_s < each.end_s and each.begin_s < other.end_s]  # fmt: skip
        assert not (each.cell.is_alone and beside)
        assert all(ended.get(need, 0.0) <= each.begin_s for need in each.cell.needs)


def test_one_worker_changes_its_format_once_a_format():
    planned = bench.rehearse(Schedule(bench.plan(), bench.nodes(1)))
    formats = [each.cell.precision for each in planned if each.cell.precision]
    changes = sum(one != other for one, other in pairwise(formats))
    assert changes <= 2 * len(set(formats)) - 1  # timing first, then accuracy


NF4 = Cell({"stage": "perf", "precision": "nf4"}, is_alone=True)


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_lost_workers_cell_begins_again_elsewhere(is_replaced):
    schedule = Schedule([NF4], {"w0": "a", "w1": "b"})
    assert schedule.begin("w0") is NF4
    assert schedule.lose("w0", is_replaced) is None
    (planned,) = bench.rehearse(schedule)
    assert planned.cell is NF4 and planned.worker == "w1"


def test_a_cell_that_ends_its_workers_is_given_up_and_what_needs_it_goes_on():
    other = Cell({"stage": "sweep"}, needs=("perf nf4",))
    schedule = Schedule([other, NF4], {"w0": "a"})
    assert [schedule.begin("w0") and schedule.lose("w0", True) for _ in range(TRIES)] == [None, None, NF4]
    assert [each.cell for each in bench.rehearse(schedule)] == [other]


def test_a_cell_that_belongs_to_a_node_runs_there_alone():
    schedule = Schedule([Cell({"stage": "quantize"}, node="b")], {"w0": "a", "w1": "b"})
    assert schedule.begin("w0") is None and schedule.begin("w1")
    schedule.lose("w1", is_replaced=False)
    assert schedule.begin("w0") is None and len(schedule.pending) == 1
