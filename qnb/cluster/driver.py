"""Measure a study with Ray: hire workers, hand out cells, and write what they return.

The driver alone writes. A worker that is lost is replaced, and its cell is measured again.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any

from tqdm.auto import tqdm

from qnb import device
from qnb.cluster import cells
from qnb.cluster.nodes import ClusterOptions, Node, connected, find_nodes, on_node, reason, share_out
from qnb.cluster.schedule import Cell, Schedule
from qnb.cluster.worker import Post, Result, Worker
from qnb.errors import InputError
from qnb.ledger import holding, write_atomic
from qnb.memory import MIB
from qnb.precision import BASELINE
from qnb.provenance import command
from qnb.session import Session
from qnb.study import Study

START_S = 120.0  # until workers that have not started are given up
CLOSE_S = 5.0  # until a worker that removes its folder is let alone
CONTEXT_BYTES = 1024 * MIB  # of a process on a GPU, and what its libraries take


class Crew:
    """The workers of a run, and what they are at.

    Parameters
    ----------
    ray
        Connected.
    session
        Of the study, whose ledger the crew fills.
    posts
        One for each worker.
    """

    worker: type[Any] = Worker

    def __init__(self, ray: Any, session: Session, posts: Sequence[Post]) -> None:
        self._ray, self._session = ray, session
        self._posts = {f"w{number}": post for number, post in enumerate(posts)}
        self._actors: dict[str, Any] = {}
        self._tasks: dict[str, Any] = {}  # references to tasks that were built, by name
        self._hire([*self._posts])

    def _hire(self, names: Sequence[str]) -> None:
        """Start workers, or start them again; those that do not come in time are given up."""
        ready = {}
        for name in names:
            post = self._posts[name]
            gpus = post.gpus if post.node.device.kind == "cuda" else 0
            actor = self._ray.remote(num_cpus=0, num_gpus=gpus)(self.worker)
            self._actors[name] = actor.options(scheduling_strategy=on_node(post.node.id)).remote(post)
            ready[name] = self._actors[name].__ray_ready__.remote()
        self._ray.wait([*ready.values()], num_returns=len(ready), timeout=START_S)
        for name, reference in ready.items():
            try:
                self._ray.get(reference, timeout=0)
            except self._ray.exceptions.RayError as error:
                place = f"worker {name} on {self._posts[name].node.host}"
                if InputError.__name__ in str(error):  # of the study's parameters, which are the same everywhere
                    raise InputError(f"{place}: {reason(error).partition(': ')[2]}") from None
                tqdm.write(f"{place} has not started and is given up ({reason(error)})")
                self._ray.kill(self._actors.pop(name))

    def run(self, plan: Sequence[Cell]) -> None:
        """Measure all cells of a plan.

        Raises
        ------
        InputError
            A worker found that input cannot be used.
        RuntimeError
            No worker is left.
        """
        schedule = Schedule(plan, {name: self._posts[name].node.id for name in self._actors})
        awaited: dict[Any, str] = {}  # workers by the reference of their result
        try:
            with tqdm(total=len(plan), desc="cells", unit="cell", disable=None) as bar:
                while True:
                    for name in schedule.nodes:
                        if cell := schedule.begin(name):
                            awaited[self._send(name, cell)] = name
                    if not awaited:
                        break
                    bar.set_postfix_str("; ".join(f"{name} {cell.name}" for name, cell in schedule.running.items()))
                    (reference, *_), _ = self._ray.wait([*awaited])
                    self._receive(awaited.pop(reference), reference, schedule, bar)
        finally:
            ended = [actor.__ray_terminate__.remote() for actor in self._actors.values()]
            self._ray.wait(ended, num_returns=len(ended), timeout=CLOSE_S)
        if schedule.pending:
            raise RuntimeError(f"no worker is left for {len(schedule.pending)} cells; the same command goes on")

    def _send(self, worker: str, cell: Cell) -> Any:
        """Let a worker begin a cell, with what the ledger has of its formats; return the reference of its result."""
        formats = "", cell.precision, BASELINE
        rows = [row for row in self._session.ledger.answers()
                if row["precision"] in formats and self._session.counts(row)]  # fmt: skip
        return self._actors[worker].work.remote(cell, rows, self._tasks)

    def _receive(self, name: str, reference: Any, schedule: Schedule, bar: tqdm) -> None:
        """Write what a worker returned, and say so where no terminal draws progress; replace one that was lost."""
        post, cell = self._posts[name], schedule.running[name]
        try:
            result: Result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # the worker lives
            schedule.end(name)
            self._session.fail(cell.about, cell.name, error.cause)
        except self._ray.exceptions.RayError as error:
            tqdm.write(f"worker {name} on {post.node.host} was lost ({reason(error)})")
            self._ray.kill(self._actors.pop(name))  # it may only be out of reach, and would keep its GPU
            self._hire([name])
            if not schedule.lose(name, is_replaced=name in self._actors):
                return
            error = RuntimeError("a worker was lost each time; its memory may be too small")
            self._session.fail(cell.about, cell.name, error)
        else:
            schedule.end(name)
            self._write(result, name)
            if result.error:
                raise InputError(f"{cell.name} on node {post.node.host}: {result.error}")
            if result.task:
                self._tasks[cell.about["task"]] = result.task
        bar.update()
        if bar.disable:
            tqdm.write(f"{cell.name}: ended on {post.node.host}, {name}", file=sys.stderr)

    def _write(self, result: Result, worker: str) -> None:
        """Append a worker's new rows to the ledger, after the files that they name, and show those that it found."""
        session, post = self._session, self._posts[worker]
        place = {"node": post.node.host, "worker": worker, "gpu": result.gpu, "command": command(),
                 "model_reason": session.source.reason}  # fmt: skip
        if result.text:
            tqdm.write(result.text.rstrip())
        for path, content in result.files.items():
            write_atomic(session.folder / path, content)
        for row in result.rows:
            known = session.ledger.find(row) or {}
            is_known = all(known.get(name) == value for name, value in row.items() if name not in place)
            is_copy = row["stage"] == "quantize" and not post.folder  # of a checkpoint that another node has too
            if is_known or (is_copy and session.counts(row)):
                session.decided(row)
            else:
                session.adopt({**row, **place})
        if new := {*result.overflowed} - {*session.overflowed}:
            session.leave_float16(new)


def measure(study: Study, values: Mapping[str, Any], numbers: set[str], options: ClusterOptions) -> device.Device:
    """Measure what notebooks would, on a cluster, into the study's ledger; return the device that was measured on.

    `values` are all parameters of the notebooks with these `numbers`, such as 02.

    Raises
    ------
    InputError
        The cluster cannot be had, or a worker found that input cannot be used.
    RuntimeError
        No worker is left.
    """
    session = study.session
    if values["minutes"]:
        raise InputError(f"minutes is {values['minutes']}: it plans a sitting on one GPU; give -p minutes 0")
    with connected(options) as ray:
        nodes = find_nodes(ray, os.environ.get(device.CHOICE, "auto"))
        session.device = nodes[0].device
        gpus = gpus_needed(session, nodes, options.gpus_per_model, numbers)
        shares, here = share_out(nodes, options.workers, gpus), ray.get_runtime_context().get_node_id()
        plan = cells.plan(session, values, numbers, here if here in {node.id for node, _ in shares} else "")
        if options.only_plan:
            _print_plan(plan, {f"w{number} on {node.host}": node.id for number, (node, _) in enumerate(shares)})
            return session.device
        with holding(session.folder / ".lock", lambda: tqdm.write(f"waiting for {session.folder}")):
            overflowed = None
            while overflowed != session.overflowed:  # all cells of these formats are measured in bfloat16 then
                overflowed = session.overflowed
                Crew(ray, session, _posts(session, values, shares, gpus, here)).run(plan)
    return session.device


def _print_plan(plan: Sequence[Cell], nodes: Mapping[str, str]) -> None:
    """Print the cells in the order in which workers would begin them, if all took equally long."""
    schedule = Schedule(plan, nodes)
    for worker in cycle(nodes):
        if not schedule.pending:
            break
        if cell := schedule.begin(worker):
            needs = "needs " * bool(cell.needs) + ", ".join(cell.needs)
            about = "; ".join(filter(None, (needs, "alone on its node" * cell.is_alone)))
            tqdm.write(f"{cell.name:40s}{cell.estimate_s:6.0f} s  {about}".rstrip())
            schedule.end(worker)
    work_min = sum(cell.estimate_s for cell in plan) / 60
    tqdm.write(f"{len(plan)} cells, {work_min:.0f} minutes of work, for {', '.join(nodes)}")


def gpus_needed(session: Session, nodes: Sequence[Node], wanted: str, numbers: set[str]) -> float:
    """Return the GPUs that one model is spread over: as given, or as many as hold the largest format's weights.

    Divergence loads BF16 beside every other format.

    Raises
    ------
    InputError
        What is measured needs whole GPUs, or one.
    """
    beside = 16 * ("02" in numbers)
    bits = (each.file_bits + beside * (each.name != BASELINE) for each in session.precisions)
    weights_mib = session.source.parameters * max(bits) / 8 / MIB
    needed = math.ceil(weights_mib / (device.WEIGHTS_SHARE * min(node.device.memory_mib for node in nodes)))
    gpus = needed if wanted == "auto" else float(wanted)
    refused = {name for name, fits in (("03", gpus % 1 == 0), ("04", gpus == 1)) if not fits}
    if refused & numbers:
        others = ",".join(sorted({"01", "02", "03", "05"} - refused))
        raise InputError(f"gpus_per_model is {gpus:g}: 03 takes whole GPUs, and 04 one; give --only {others}")
    return gpus


def _posts(
    session: Session, values: Mapping[str, Any], shares: Sequence[tuple[Node, Sequence[int]]], gpus: float, here: str
) -> list[Post]:
    """Return what each worker is told."""
    study = {"model": session.source.name, "data_dir": str(session.data_dir or ""),
             **{name: values[name] for name in ("precisions", "seed", "half", "overwrite")}}  # fmt: skip
    # batches are planned for what the smallest GPU has beside the largest model; a CPU's are small
    memory_bytes = gpus * MIB * min(node.device.memory_mib for node, _ in shares)
    weights_bytes = session.source.parameters * max(precision.file_bits for precision in session.precisions) / 8
    free_bytes = int(max(1, memory_bytes - weights_bytes - CONTEXT_BYTES)) if session.device.kind == "cuda" else 0
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    post = partial(Post, gpus=gpus, study=study, record=session.record, threads=threads, planned_bytes=free_bytes)
    folder = str(session.folder)
    return [post(node=node, cores=cores, folder=folder if node.id == here else "") for node, cores in shares]
