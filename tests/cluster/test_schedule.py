"""Cells over workers and nodes, by the clock of a simulation."""

import sys
from collections import Counter
from itertools import pairwise

import pytest

from qnb.cluster.schedule import TRIES, Cell, Schedule, Seat, rehearse
from qnb.provenance import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import cluster as bench

sys.path.pop(0)


def ideal_s(gpus):
    """Return the longest chain of cells, or all accuracy over the GPUs and all timing over the nodes."""
    cells, nodes = bench.plan(), -(-gpus // bench.GPUS_PER_NODE)
    alone_s = sum(cell.estimate_s for cell in cells if cell.is_alone)
    others_s = sum(cell.estimate_s for cell in cells) - alone_s
    made_s = {cell.name: sum(bench.maker(need).estimate_s for need in cell.needs) for cell in cells}
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
        assert all(made[need] <= each.begin_s for need in each.cell.needs)
        peaks = next(other for other in planned if other.cell.name == each.cell.after or other is each)
        assert not each.cell.after or peaks.end_s <= each.begin_s
    made = Counter((node[each.worker], each.cell.makes) for each in planned if each.cell.makes)
    assert set(made.values()) == {1}
    assert set(Counter(each.cell.name for each in planned if not each.cell.makes).values()) == {1}


def test_one_worker_changes_its_format_once_a_format():
    planned = rehearse(bench.schedule(1))
    formats = [each.cell.precision for each in planned if each.cell.precision and not each.cell.makes]
    changes = sum(one != other for one, other in pairwise(formats))
    assert changes <= 2 * len(set(formats)) - 1  # timing first, then accuracy


def test_times_are_taken_on_one_gpu_model_alone():
    cells = [Cell("timed", {"precision": "bf16"}, is_timed=True), Cell("scored", {"precision": "bf16"})]
    seats = {"w0": Seat("a", can_time=False), "w1": Seat("b")}
    planned = {each.cell.name: each.worker for each in rehearse(Schedule(cells, seats, bench.maker))}
    assert planned == {"timed": "w1", "scored": "w0"}


def test_a_lost_workers_cell_goes_to_another_and_counts_as_failed_in_the_end():
    schedule = Schedule([Cell("long", {"precision": "bf16"})], {"w0": Seat("a")}, bench.maker)
    for number in range(TRIES):
        assert schedule.begin(f"w{number}").name == "long"
        lost = schedule.lose(f"w{number}")
        assert [cell.name for cell in lost] == ["long"] * (number == TRIES - 1)
        schedule.seats[f"w{number + 1}"] = Seat("b")
    assert schedule.begin(f"w{TRIES}") is None


def test_what_needs_a_thing_that_cannot_be_made_counts_as_failed_too():
    need = ("checkpoint", "nf4")
    cells = [Cell(name, {"precision": "nf4"}, needs=frozenset({need})) for name in ("one", "other")]
    schedule = Schedule(cells, {"w0": Seat("a")}, bench.maker)
    for number in range(TRIES):
        assert schedule.begin(f"w{number}").makes == need
        lost = schedule.lose(f"w{number}")
        schedule.seats[f"w{number + 1}"] = Seat("a")
    assert [cell.name for cell in lost] == [bench.maker(need).name, "one", "other"] and not schedule.pending


def test_the_drivers_node_makes_planned_checkpoints_and_overflow_repeats_a_format():
    plan = [bench.maker(("checkpoint", name)) for name in ("bf16", "nf4")]
    schedule = Schedule(plan, {"w0": Seat("a"), "w1": Seat("b")}, bench.maker, here="b")
    assert {each.worker for each in rehearse(schedule)} == {"w1"}
    schedule.repeat({"nf4"})
    assert [each.cell.name for each in rehearse(schedule)] == [plan[1].name]


def test_a_lost_nodes_timing_moves_to_another_node():
    cells = [Cell(f"{name} eager", {"precision": name}, is_timed=True, is_alone=True) for name in ("bf16", "nf4")]
    schedule = Schedule(cells, {"w0": Seat("a"), "w1": Seat("b")}, bench.maker)
    home = next(worker for worker in ("w0", "w1") if schedule.begin(worker))
    schedule.lose(home)
    planned = rehearse(schedule)
    assert {each.cell.name for each in planned} == {cell.name for cell in cells}
    assert {each.worker for each in planned} == {"w0", "w1"} - {home}
