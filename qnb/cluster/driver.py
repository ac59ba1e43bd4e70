"""Measure a study with Ray: hire workers, hand out cells, and write what they return.

The driver alone writes. A worker that is lost is replaced, and its cell is measured again.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from qnb import device
from qnb.cluster import cells
from qnb.cluster.nodes import ClusterOptions, Node, connected, find_nodes, on_node, share_out
from qnb.cluster.schedule import Cell, Schedule, rehearse
from qnb.cluster.worker import Post, Result, Worker
from qnb.errors import InputError, scrub
from qnb.ledger import FAILED, holding, row_key, write_atomic
from qnb.memory import MIB
from qnb.precision import BASELINE
from qnb.provenance import command
from qnb.session import Session
from qnb.study import Study

START_S = 120.0  # in which nothing ends, until workers that have not started are given up
CLOSE_S = 5.0  # until a worker that removes its folder is let alone
OF_PLACE = ("node", "worker", "gpu", "command", "model_reason")  # columns that the driver writes
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
        self._awaited: dict[Any, str] = {}  # workers by the reference of their result, or of their first answer
        self._actors = {name: self._hire(name) for name in self._posts}
        self._tasks: dict[str, Any] = {}  # references to tasks that were built, by name

    def _hire(self, name: str) -> Any:
        post = self._posts[name]
        gpus = post.gpus if post.node.device.kind == "cuda" else 0
        actor = self._ray.remote(num_cpus=0, num_gpus=gpus)(self.worker)
        actor = actor.options(scheduling_strategy=on_node(post.node.id)).remote(post)
        self._awaited[actor.__ray_ready__.remote()] = name
        return actor

    def run(self, plan: Sequence[Cell]) -> None:
        """Measure all cells of a plan.

        Raises
        ------
        InputError
            A worker found that input cannot be used.
        RuntimeError
            No worker is left.
        """
        schedule = Schedule(plan, [post.node.id for post in self._posts.values()])
        try:
            with tqdm(total=len(plan), desc="cells", unit="cell", disable=None) as bar:
                while True:
                    for name in [name for name in schedule.seats if name not in self._awaited.values()]:
                        if cell := schedule.begin(name):
                            self._awaited[self._send(name, cell)] = name
                    running = schedule.running
                    starts = len(self._awaited) > len(running)
                    bar.n = len(plan) - len(schedule.pending) - sum(not cell.makes for cell in running.values())
                    if not running and not (starts and schedule.pending):
                        break
                    bar.set_postfix_str("; ".join(f"{name} {cell.name}" for name, cell in running.items()))
                    ended, _ = self._ray.wait([*self._awaited], timeout=START_S if starts else None)
                    if not ended:
                        self._give_up(schedule)
                    for reference in ended:
                        if (name := self._awaited.pop(reference)) in running:
                            self._receive(name, reference, schedule)
        finally:
            ended = [actor.close.remote() for actor in self._actors.values()]
            self._ray.wait(ended, num_returns=len(ended), timeout=CLOSE_S)
        if schedule.pending:
            raise RuntimeError(f"no worker is left for {', '.join(schedule.pending)}; the same command goes on")

    def _give_up(self, schedule: Schedule) -> None:
        """Let others do the work of those that have not started."""
        starting = {reference: name for reference, name in self._awaited.items() if name not in schedule.running}
        for reference, name in starting.items():
            place = f"worker {name} on {self._posts[name].node.host}"
            tqdm.write(f"{place} has not started in {START_S:.0f} s and is given up; is its GPU in use?")
            self._ray.kill(self._actors.pop(name))
            schedule.lose(name, stays=False)
            del self._awaited[reference]

    def _send(self, worker: str, cell: Cell) -> Any:
        """Let a worker begin a cell, with what the ledger has of its formats; return the reference of its result."""
        formats = {"", *(each.precision for each in (cell, *cell.needs))}
        rows = [row for row in self._session.ledger.answers() if row["precision"] in formats
                and not row["stage"].endswith(FAILED) and self._session.counts(row)]  # fmt: skip
        own = [row["items_file"] for row in rows if "items_file" in row and row_key(row) == row_key(cell.about)]
        files = {name: path.read_bytes() for name in own if (path := self._session.folder / name).is_file()}
        return self._actors[worker].measure.remote(cell, rows, files, self._tasks)

    def _receive(self, name: str, reference: Any, schedule: Schedule) -> None:
        """Write what a worker returned, and say so where no terminal draws progress; replace one that was lost."""
        post, cell = self._posts[name], schedule.running[name]
        try:
            result: Result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # the worker lives
            result = Result(error=error.cause)
        except self._ray.exceptions.RayError as error:
            self._lose(name, schedule, scrub(str(error)))
            return
        self._write(result, name)
        if isinstance(result.error, InputError):
            raise InputError(f"{cell.name} on node {post.node.host}: {result.error}")
        if result.error:
            self._session.fail(cell.about, cell.name, result.error)
        if result.task:
            self._tasks[cell.about["task"]] = result.task
        schedule.end(name)
        if not sys.stderr.isatty():
            tqdm.write(f"{cell.name}: ended on {post.node.host}, {name}", file=sys.stderr)

    def _lose(self, name: str, schedule: Schedule, reason: str) -> None:
        """Replace a worker that was lost, if its node is there; let its cell begin again, a few times."""
        post = self._posts[name]
        tqdm.write(f"worker {name} on {post.node.host} was lost ({reason})")
        is_node_there = any(node["NodeID"] == post.node.id and node["Alive"] for node in self._ray.nodes())
        if is_node_there:
            self._ray.kill(self._actors[name])  # it may only be out of reach, and would keep its GPU
            self._actors[name] = self._hire(name)
        for cell in schedule.lose(name, is_node_there):
            error = RuntimeError("a worker was lost each time; its memory may be too small")
            self._session.fail(cell.about, cell.name, error)

    def _write(self, result: Result, worker: str) -> None:
        """Append a worker's new rows to the ledger, after the files that they name, and show those that it found."""
        session, post = self._session, self._posts[worker]
        place = {"node": post.node.host, "worker": worker, "gpu": result.gpu, "command": command()}
        if result.text:
            tqdm.write(result.text.rstrip())
        for path, content in result.files.items():
            write_atomic(session.folder / path, content)
        for row in result.rows:
            known = session.ledger.find(row) or {}
            is_known = all(known.get(name) == value for name, value in row.items() if name not in OF_PLACE)
            is_copy = row["stage"] == "quantize" and not post.folder  # of a checkpoint that another node has too
            if is_known or (is_copy and session.counts(row)):
                session.decided(row)
            else:
                session.adopt({**row, **place, "model_reason": session.source.reason})
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
            tqdm.write("; ".join(f"w{number} on {node.host}" for number, (node, _) in enumerate(shares)))
            _print_plan(Schedule(plan, [node.id for node, _ in shares]))
            return session.device
        with holding(session.folder / ".lock", lambda: tqdm.write(f"waiting for {session.folder}")):
            overflowed = None
            while overflowed != session.overflowed:  # all cells of these formats are measured in bfloat16 then
                overflowed = session.overflowed
                Crew(ray, session, _posts(session, values, shares, gpus, here)).run(plan)
    return session.device


def _print_plan(schedule: Schedule) -> None:
    """Print the cells in the order in which they would begin, if each took as long as is known."""
    ideal_s, planned = schedule.ideal_s(), rehearse(schedule)
    for begin_s, _, worker, cell in planned:
        needs = "needs " * bool(cell.needs) + ", ".join(dict.fromkeys(need.name for need in cell.needs))
        about = "; ".join(filter(None, (needs, "alone on its node" * cell.is_alone)))
        tqdm.write(f"{begin_s:7.0f} s  {worker:4s}{cell.name:40s}{cell.estimate_s:6.0f} s  {about}".rstrip())
    total_min = max((each.end_s for each in planned), default=0.0) / 60
    tqdm.write(f"{len(planned)} cells, about {total_min:.0f} minutes (at best {ideal_s / 60:.0f})")


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
    study = {"model": session.source.name, "data_dir": str(session.data_dir or ""), "device": session.device.kind,
             **{name: values[name] for name in ("precisions", "seed", "half", "overwrite")}}  # fmt: skip
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    # batches are planned for what the smallest GPU has beside the largest model; a CPU's are small
    memory_bytes = gpus * MIB * min(node.device.memory_mib for node, _ in shares)
    weights_bytes = session.source.parameters * max(precision.file_bits for precision in session.precisions) / 8
    free_bytes = int(max(1, memory_bytes - weights_bytes - CONTEXT_BYTES)) if session.device.kind == "cuda" else 0
    post = partial(Post, gpus=gpus, study=study, record=session.record, threads=threads, planned_bytes=free_bytes)
    folder = str(session.folder)
    return [post(node=node, cores=cores, folder=folder if node.id == here else "") for node, cores in shares]
