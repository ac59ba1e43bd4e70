"""How a study of nine formats scales over GPUs: the schedule's makespan against the ideal, and Ray's cost a cell.

``python tests/bench/cluster.py``: 1 to 64 GPUs by the clock of a simulation, in a second
``python tests/bench/cluster.py --ray 1,2,4,8,16,64``: on Ray, with workers that sleep 2 ms a second

The ideal is the longest chain of cells, or all accuracy over the GPUs and all timing over the nodes, if that is more.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from time import perf_counter, sleep
from types import SimpleNamespace
from typing import NamedTuple

import pandas as pd

from qnb.cluster.plan import Cell, Schedule
from qnb.cluster.worker import Node, Post, Result

# Seconds on an H200 told to have two cores: of SmolLM2-135M all items (GSM8K: 40 items times 33), times 9 for a model
# of 1.2 billion parameters; of Llama-3.2-1B's shape one pass. fp32, int8-no-outliers, fp4 and nf4-dq as their nearest.
TASKS_S = {
    "bf16": (22, 39, 48, 413, 1732, 1435), "fp16": (8, 12, 14, 92, 1410, 1410), "int8": (23, 19, 31, 184, 5791, 7004),
    "int4": (13, 16, 28, 175, 3044, 3341), "nf4": (11, 13, 16, 103, 3118, 2821),
}  # fmt: skip
TIMED_S = {"bf16": (26, 10), "fp16": (28, 51), "int8": (61, 0), "int4": (33, 20), "nf4": (26, 18)}  # eager, cuda_graph
LIKE = {"fp32": "bf16", "int8-no-outliers": "nf4", "fp4": "nf4", "nf4-dq": "nf4"}
TASKS = ("arc_challenge", "arc_easy", "hellaswag", "mmlu", "gsm8k", "gsm8k_cot")
PASSES = {"bs1": 3, "maxbatch": 5, "sweep": 1}  # a search takes about five
MAKE_S, BUILD_S, MMLU_S, LOAD_S = 6.0, 10.0, 100.0, 5.0  # of a checkpoint, a task, and of loading a model
GPUS_PER_NODE = 8


def plan() -> list[Cell]:
    """Return the cells of nine formats, the paper's tasks and both engines."""
    cells = [Cell({"stage": "peaks"}, is_alone=True, estimate_s=5.0)]
    for task in TASKS:
        cells.append(Cell({"stage": "task", "task": task}, estimate_s=MMLU_S if task == "mmlu" else BUILD_S))
    for name in (*TASKS_S, *LIKE):
        like, about, loads = LIKE.get(name, name), {"precision": name}, [name]
        for task, seconds in zip(TASKS, TASKS_S[like], strict=True):
            cells.append(Cell({**about, "task": task}, None, [f"task {task}"], loads, estimate_s=seconds))
        cells.append(Cell({"stage": "divergence", **about}, loads=[*{name, "bf16"}], estimate_s=30.0))
        for engine, pass_s in zip(("eager", "cuda_graph"), TIMED_S[like], strict=True):
            for setting, passes in PASSES.items():
                needs = [f"{name} {engine} maxbatch"] if setting == "sweep" else ["peaks"]
                timed = {**about, "engine": engine, "setting": setting}
                is_alone, estimate_s = engine == "eager", passes * pass_s
                cells.append(Cell(timed, None, needs, loads, is_alone=is_alone, estimate_s=estimate_s))
    return cells


def nodes(gpus: int) -> dict[str, str]:
    """Return the node of each worker: eight a node."""
    return {f"w{gpu}": str(gpu // GPUS_PER_NODE) for gpu in range(gpus)}


def ideal_s(gpus: int) -> float:
    """Return the longest chain of cells, or all accuracy over the GPUs and all timing over the nodes."""
    cells = plan()
    by_name = {cell.name: cell.estimate_s for cell in cells}
    alone_s = sum(cell.estimate_s for cell in cells if cell.is_alone)
    others_s = sum(cell.estimate_s for cell in cells) - alone_s
    chains_s = (cell.estimate_s + sum(map(by_name.get, cell.needs)) + MAKE_S * len(cell.loads) for cell in cells)
    return max(others_s / gpus + alone_s / len({*nodes(gpus).values()}), *chains_s)


class Planned(NamedTuple):
    """A cell in a rehearsal."""

    begin_s: float
    end_s: float
    worker: str
    cell: Cell


class Clock:
    """What cells take: their work, and loading a model where a worker changes its format."""

    def __init__(self) -> None:
        self._formats = dict[str, str]()

    def end_s(self, worker: str, cell: Cell, now_s: float) -> float:
        """Return when a cell ends that begins now."""
        if cell.is_making:  # another model cannot stand beside
            self._formats[worker] = ""
            return now_s + MAKE_S
        is_changed = cell.precision not in ("", self._formats.get(worker))
        self._formats[worker] = cell.precision or self._formats.get(worker, "")
        return now_s + cell.estimate_s + LOAD_S * is_changed


def rehearse(schedule: Schedule) -> list[Planned]:
    """Return what a schedule would do if every cell took its estimate, in the order of beginning."""
    now_s, planned, clock = 0.0, list[Planned](), Clock()
    while True:
        for worker in schedule.nodes:
            if cell := schedule.begin(worker):
                planned.append(Planned(now_s, clock.end_s(worker, cell, now_s), worker, cell))
        at_work = [each for each in planned if schedule.running.get(each.worker) is each.cell]
        if not at_work:
            return planned
        first = min(at_work, key=lambda each: each.end_s)
        now_s = first.end_s
        schedule.end(first.worker)


class Sleeper:
    """A worker that sleeps in place of measuring."""

    def __init__(self, post: Post) -> None:
        self._post, self._clock = post, Clock()

    def work(self, cell: Cell, *_: object) -> Result:
        """Sleep as long as the cell takes, by the scale in the post."""
        sleep(float(self._post.record["scale"]) * self._clock.end_s("", cell, 0.0))
        return Result()


def on_ray(gpus: int, scale: float) -> float:
    """Run the plan on Ray with sleeping workers; return its seconds, without hiring."""
    import ray
    from ray.cluster_utils import Cluster

    from qnb.cluster.driver import Crew

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = Cluster()
    for _ in range(-(-gpus // GPUS_PER_NODE)):
        cluster.add_node(num_cpus=1, num_gpus=min(gpus, GPUS_PER_NODE), include_dashboard=False)
    ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    device = SimpleNamespace(name="GPU", kind="cuda")
    posts = []
    for node in ray.nodes():
        here = Node(node["NodeID"], node["NodeID"], node["Resources"]["GPU"], [0], device, {})
        posts += [Post(here, [0], 1.0, "", {}, {"scale": scale}, 0, 1)] * int(here.gpus)

    class Sleepers(Crew):
        worker = Sleeper

    with tempfile.TemporaryDirectory() as folder:
        ledger, source = SimpleNamespace(answers=list), SimpleNamespace(reason="")
        session = SimpleNamespace(ledger=ledger, folder=Path(folder), overflowed=[], device=device, source=source)
        crew = Sleepers(ray, session, posts[:gpus], plan())
        started_s = perf_counter()
        crew.run()
        taken_s = perf_counter() - started_s
    ray.shutdown()
    cluster.shutdown()
    return taken_s


def table(counts: list[int], ray_counts: list[int], scale: float) -> pd.DataFrame:
    """Return a row a number of GPUs."""
    rows = []
    for gpus in counts:
        planned = rehearse(Schedule(plan(), nodes(gpus)))
        best_s, makespan_s = ideal_s(gpus), max(each.end_s for each in planned)
        row = {"gpus": gpus, "nodes": -(-gpus // GPUS_PER_NODE), "ideal_min": best_s / 60,
               "makespan_min": makespan_s / 60, "ratio": makespan_s / best_s, "cells": len(planned)}  # fmt: skip
        if gpus in ray_counts:
            taken_s = on_ray(gpus, scale)
            cost_s = taken_s - scale * makespan_s
            row |= {"on_ray_s": taken_s, "ray_cost_ms_per_cell": 1000 * cost_s / len(planned)}
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", default="1,2,4,8,16,64")
    parser.add_argument("--ray", default="", help="numbers of GPUs to run on Ray too")
    parser.add_argument("--scale", type=float, default=0.002, help="seconds slept a second")
    options = parser.parse_args()
    gpus, on = (([int(each) for each in text.split(",") if each]) for text in (options.gpus, options.ray))
    print(table(gpus, on, options.scale).round(3).to_csv(index=False), end="")
