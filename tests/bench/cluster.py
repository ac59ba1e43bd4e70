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

import pandas as pd

from qnb.cluster.schedule import Cell, Schedule, rehearse
from qnb.cluster.worker import Post, Result

# Seconds on an H200 told to have two cores: of SmolLM2-135M all items (GSM8K: 40 items times 33), times 9 for a model
# of 1.2 billion parameters; of Llama-3.2-1B's shape one pass. fp32, int8-no-outliers, fp4 and nf4-dq as their nearest.
TASKS_S = {
    "bf16": (22, 39, 48, 413, 1732, 1435), "fp16": (8, 12, 14, 92, 1410, 1410), "int8": (23, 19, 31, 184, 5791, 7004),
    "int4": (13, 16, 28, 175, 3044, 3341), "nf4": (11, 13, 16, 103, 3118, 2821),
}  # fmt: skip
TIMED_S = {"bf16": (26, 10), "fp16": (28, 51), "int8": (61, 0), "int4": (33, 20), "nf4": (26, 18)}  # eager, cuda_graph
LIKE = {"fp32": "bf16", "int8-no-outliers": "nf4", "fp4": "nf4", "nf4-dq": "nf4"}
TASKS = ("arc_challenge", "arc_easy", "hellaswag", "mmlu", "gsm8k", "gsm8k_cot")
PASSES = {"bs1": 3, "maxbatch": 6}  # a search takes about five
MAKE_S = {"checkpoint": 6.0, "task": 10.0}
LOAD_S = 5.0
GPUS_PER_NODE = 8


def maker(kind: str, name: str) -> Cell:
    """Return the cell that makes a checkpoint or builds a task."""
    about = {"precision": name} if kind == "checkpoint" else {}
    return Cell(about, makes=f"{kind} {name}", estimate_s=100.0 if name == "mmlu" else MAKE_S[kind])


def plan() -> list[Cell]:
    """Return the cells of nine formats, the paper's tasks and both engines."""
    cells = [Cell({"stage": "peaks"}, is_alone=True, estimate_s=5.0)]
    for name in (*TASKS_S, *LIKE):
        like, about, checkpoint = LIKE.get(name, name), {"precision": name}, maker("checkpoint", name)
        for task, seconds in zip(TASKS, TASKS_S[like], strict=True):
            cells.append(Cell(about | {"task": task}, needs=(checkpoint, maker("task", task)), estimate_s=seconds))
        divergence = about | {"stage": "divergence"}
        cells.append(Cell(divergence, needs=(checkpoint, maker("checkpoint", "bf16")), estimate_s=30.0))
        for setting, passes in PASSES.items():
            for engine, pass_s in zip(("eager", "cuda_graph"), TIMED_S[like], strict=True):
                timed, is_alone = about | {"setting": setting, "engine": engine}, engine == "eager"
                seconds = passes * pass_s
                cells.append(Cell(timed, needs=(checkpoint,), after="peaks", is_alone=is_alone, estimate_s=seconds))
    return cells


def schedule(gpus: int) -> Schedule:
    """Return the plan on so many GPUs, eight a node."""
    return Schedule(plan(), [str(gpu // GPUS_PER_NODE) for gpu in range(gpus)])


class Sleeper:
    """A worker that sleeps in place of measuring."""

    def __init__(self, post: Post) -> None:
        self._post, self._precision = post, ""

    def measure(self, cell: Cell, *_: object) -> Result:
        """Sleep as long as the cell takes, and a load where the format changes, by the scale in the post."""
        load_s = LOAD_S if cell.precision not in ("", self._precision) else 0.0
        self._precision = cell.precision or self._precision
        sleep(float(self._post.record["scale"]) * (cell.estimate_s + load_s))
        return Result()

    def close(self) -> None:
        """Remove nothing."""


def on_ray(gpus: int, scale: float) -> float:
    """Run the plan on Ray with sleeping workers; return its seconds, without hiring."""
    import ray
    from ray.cluster_utils import Cluster

    from qnb.cluster.driver import Crew
    from qnb.cluster.nodes import Node

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
        ledger = SimpleNamespace(answers=list)
        session = SimpleNamespace(ledger=ledger, folder=Path(folder), overflowed=[], device=device)
        crew = Sleepers(ray, session, posts[:gpus])
        empty = Cell({"stage": "hired"})
        ray.get([actor.measure.remote(empty) for actor in crew._actors.values()])
        started_s = perf_counter()
        crew.run(plan())
        taken_s = perf_counter() - started_s
    ray.shutdown()
    cluster.shutdown()
    return taken_s


def table(counts: list[int], ray_counts: list[int], scale: float) -> pd.DataFrame:
    """Return a row a number of GPUs."""
    rows = []
    for gpus in counts:
        ideal_s = schedule(gpus).ideal_s()
        planned = rehearse(schedule(gpus), LOAD_S)
        makespan_s = max(each.end_s for each in planned)
        row = {"gpus": gpus, "nodes": -(-gpus // GPUS_PER_NODE), "ideal_min": ideal_s / 60,
               "makespan_min": makespan_s / 60, "ratio": makespan_s / ideal_s, "cells": len(planned)}  # fmt: skip
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
