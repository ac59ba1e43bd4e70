"""Cells over workers and nodes, by the clock of a simulation."""

import sys
from collections import Counter
from itertools import pairwise

import pytest

from qnb.cluster.plan import TRIES, Cell, Schedule
from qnb.provenance import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import cluster as bench

sys.path.pop(0)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16, 64])
def test_a_study_ends_within_a_quarter_of_the_ideal(gpus):
    planned = bench.rehearse(Schedule(bench.plan(), bench.nodes(gpus)))
    assert max(each.end_s for each in planned) <= 1.25 * bench.ideal_s(gpus)
    measured = Counter(each.cell.name for each in planned if not each.cell.is_making)
    assert measured == Counter(cell.name for cell in bench.plan())


@pytest.mark.parametrize("gpus", [2, 16])
def test_what_runs_alone_has_its_node_and_what_a_cell_needs_has_ended(gpus):
    node = bench.nodes(gpus)
    planned = bench.rehearse(Schedule(bench.plan(), node))
    ended = {each.cell.name: each.end_s for each in planned}
    made = {(node[each.worker], each.cell.precision): each.end_s for each in planned if each.cell.is_making}
    assert len(made) == sum(each.cell.is_making for each in planned)  # once a node
    for each in planned:
        beside = [other for other in planned if other is not each and node[other.worker] == node[each.worker]
                  and other.begin_s < each.end_s and each.begin_s < other.end_s]  # fmt: skip
        assert not (each.cell.is_alone and beside)
        assert all(ended[need] <= each.begin_s for need in each.cell.needs)
        assert all(made[node[each.worker], precision] <= each.begin_s for precision in each.cell.loads)


def test_one_worker_changes_its_format_once_a_format():
    planned = bench.rehearse(Schedule(bench.plan(), bench.nodes(1)))
    formats = [each.cell.precision for each in planned if each.cell.precision and not each.cell.is_making]
    changes = sum(one != other for one, other in pairwise(formats))
    assert changes <= 2 * len(set(formats)) - 1  # timing first, then accuracy


NF4 = Cell({"stage": "perf", "precision": "nf4"}, is_alone=True)


def test_a_cell_that_ends_its_workers_is_given_up_and_what_needs_it_goes_on():
    other = Cell({"stage": "sweep"}, needs=["perf nf4"])
    schedule = Schedule([other, NF4], {"w0": "a"})
    assert [schedule.begin("w0") and schedule.lose("w0") for _ in range(TRIES)] == [True, True, False]
    assert [each.cell for each in bench.rehearse(schedule)] == [other]


def test_what_goes_with_its_node_is_no_cells_fault():
    nodes = {f"w{number}": str(number) for number in range(TRIES + 1)}
    schedule = Schedule([NF4], nodes)
    for worker in [*nodes][:TRIES]:
        assert schedule.begin(worker) is NF4 and schedule.lose(worker)
        schedule.drop(worker)
    assert [each.cell for each in bench.rehearse(schedule)] == [NF4]


def test_a_cell_that_belongs_to_a_node_runs_there_alone():
    schedule = Schedule([Cell({"stage": "quantize"}, node="b")], {"w0": "a", "w1": "b"})
    assert schedule.begin("w0") is None and schedule.begin("w1") and schedule.lose("w1")
    schedule.drop("w1")
    assert schedule.begin("w0") is None and len(schedule.pending) == 1


def test_a_checkpoint_is_made_once_a_node_while_others_there_measure():
    abouts = [{"stage": "accuracy", "precision": "nf4", "task": each} for each in "abc"]
    tasks = [Cell(about, loads=["nf4"], estimate_s=9.0) for about in abouts]
    planned, other = Cell({"stage": "quantize", "precision": "nf4"}, node="a"), Cell({"stage": "lengths"})
    schedule = Schedule([*tasks, planned, other], {"w0": "a", "w1": "a", "w2": "a", "w3": "b"})
    assert schedule.begin("w0") is planned and schedule.begin("w1") is other and schedule.begin("w2") is None
    there = schedule.begin("w3")
    assert there.about == planned.about and there.node == "b"  # one more
    assert schedule.lose("w3") and schedule.begin("w3") == there  # and again, where its worker was lost
    schedule.end("w0")
    assert schedule.begin("w2") in tasks and schedule.begin("w0") in tasks
    schedule.end("w3")
    assert schedule.begin("w3") in tasks and not schedule.pending
