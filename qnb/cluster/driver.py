"""Measure a study with Ray: find nodes, hire workers, hand out cells, and write what they return.

The driver alone writes. A worker that is lost is replaced, and its cell is measured again.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from pathlib import Path
from time import monotonic
from typing import Any
from unittest.mock import patch

from tqdm.auto import tqdm

from qnb import device
from qnb.cluster.plan import START, Cell, Schedule, plan
from qnb.cluster.worker import Node, Post, Result, Worker, describe
from qnb.errors import InputError, refusing, scrub
from qnb.ledger import holding, write_atomic
from qnb.memory import MIB
from qnb.options import check_count
from qnb.precision import BASELINE
from qnb.provenance import command
from qnb.session import Session
from qnb.study import Study

CONNECT_S = 10.0  # until an address counts as silent
START_S = 120.0  # until a node that was asked what it is, or a worker that has not started, is given up
CLOSE_S = 5.0  # until a worker that removes its folder is let alone
# so that no port of a cluster of this machine alone is open to the network, and nothing is told to Ray's makers
LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
# so that Ray tries to join a cluster once, for 10 s in all, instead of 20 times; it reads them as it is imported
JOINED = {"RAY_gcs_server_port_wait_time_s": "1", "RAY_py_gcs_connect_timeout_s": "4",
          "RAY_gcs_rpc_server_connect_timeout_s": "3"}  # fmt: skip
STORE_BYTES = 256 * MIB  # shared memory for results, which are small
CONTEXT_BYTES = 1024 * MIB  # of a process on a GPU, and what its libraries take


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Who measures.

    Parameters
    ----------
    workers
        A number, or ``"auto"``: one for each GPU, and without GPUs one for each node.
    address
        Of a running Ray cluster, such as ``10.0.0.1:6379``, or ``"auto"`` for this machine's. Empty starts one here,
        for this run alone.
    gpus_per_model
        GPUs that one model is spread over; ``"auto"`` takes as many as its weights need. A share such as 0.5 puts two
        workers on a GPU, for accuracy alone.
    only_plan
        Print what would be measured and in which order, and measure nothing.

    Raises
    ------
    InputError
        A value is none of these.
    """

    workers: str = "auto"
    address: str = ""
    gpus_per_model: str = "auto"
    only_plan: bool = False

    def __post_init__(self) -> None:
        check_count("workers", self.workers)
        if self.gpus_per_model != "auto" and not re.fullmatch(r"0*[1-9]\d{0,2}|0?\.\d{0,3}[1-9]", self.gpus_per_model):
            raise InputError(f"gpus_per_model is {self.gpus_per_model!r}; give a number such as 2 or 0.5, or 'auto'")


# The run


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
        cells = plan(session, values, numbers, here if here in {node.id for node, _ in shares} else "")
        if options.only_plan:
            _print_plan(cells, {f"w{number} on {node.host}": node.id for number, (node, _) in enumerate(shares)})
            return session.device
        with holding(session.folder / ".lock", lambda: tqdm.write(f"waiting for {session.folder}")):
            overflowed = None
            while overflowed != session.overflowed:  # all cells of these formats are measured in bfloat16 then
                asked = {**values, "overwrite": values["overwrite"] and overflowed is None}
                overflowed = session.overflowed
                Crew(ray, session, _posts(session, asked, shares, gpus, here), cells).run()
    return session.device


def _print_plan(cells: Sequence[Cell], nodes: Mapping[str, str]) -> None:
    """Print the cells in the order in which workers would begin them, if all took equally long."""
    schedule = Schedule(cells, nodes)
    for worker in cycle(nodes):
        if not schedule.pending:
            break
        if cell := schedule.begin(worker):
            schedule.end(worker)
            needs = ", ".join([*cell.needs, *(f"checkpoint {name}" for name in cell.loads)])
            about = "; ".join(filter(None, (needs and f"needs {needs}", "alone on its node" * cell.is_alone)))
            if cell in cells:  # not a checkpoint that one more node makes
                tqdm.write(f"{cell.name:40s}{cell.estimate_s:6.0f} s  {about}".rstrip())
    work_min = sum(cell.estimate_s for cell in cells) / 60
    tqdm.write(f"{len(cells)} cells, {work_min:.0f} minutes of work, for {', '.join(nodes)}")


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


# Its workers


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
    cells
        What to measure.
    """

    worker: type[Any] = Worker

    def __init__(self, ray: Any, session: Session, posts: Sequence[Post], cells: Sequence[Cell]) -> None:
        self._ray, self._session, self._cells = ray, session, cells
        self._posts = {f"w{number}": post for number, post in enumerate(posts)}
        self._schedule = Schedule(cells, {name: post.node.id for name, post in self._posts.items()})
        self._actors: dict[str, Any] = {}
        self._tasks: dict[str, Any] = {}  # references to tasks that were built, by name
        self._awaited: dict[Any, tuple[str, float]] = {}  # workers, and since when, by what they start or measure

    def run(self) -> None:
        """Measure all cells.

        Raises
        ------
        InputError
            A worker found that input cannot be used.
        RuntimeError
            No worker is left.
        """
        try:
            for name in self._posts:
                self._hire(name)
            with tqdm(total=len(self._cells), desc="cells", unit="cell", disable=None) as bar:
                while self._hand_out(bar):
                    running, awaited = self._schedule.running, self._awaited
                    starting = {each: since_s for each, (name, since_s) in awaited.items() if running[name] is START}
                    ready, _ = self._ray.wait([*awaited], timeout=START_S if starting else None)
                    late = [each for each, since_s in starting.items() if monotonic() - since_s >= START_S]
                    for reference in dict.fromkeys((*ready, *late)):
                        self._receive(awaited.pop(reference)[0], reference, bar)
        finally:
            ended = [actor.__ray_terminate__.remote() for actor in self._actors.values()]
            self._ray.wait(ended, num_returns=len(ended), timeout=CLOSE_S)
        if left := self._schedule.pending:
            raise RuntimeError(f"no worker is left for {len(left)} cells; the same command goes on")

    def _hire(self, name: str) -> None:
        """Start a worker, or start it again; the others go on meanwhile."""
        post = self._posts[name]
        gpus = post.gpus if post.node.device.kind == "cuda" else 0
        actor = self._ray.remote(num_cpus=0, num_gpus=gpus)(self.worker)
        self._actors[name] = actor.options(scheduling_strategy=on_node(post.node.id)).remote(post)
        self._awaited[self._actors[name].__ray_ready__.remote()] = name, monotonic()
        self._schedule.running[name] = START

    def _hand_out(self, bar: tqdm) -> bool:
        """Let workers begin cells, with what the ledger has of their formats; return whether any cell is awaited."""
        running = self._schedule.running
        for name in self._schedule.nodes:
            if cell := self._schedule.begin(name):
                formats = "", cell.precision, BASELINE
                rows = [row for row in self._session.ledger.answers()
                        if row["precision"] in formats and self._session.counts(row)]  # fmt: skip
                self._awaited[self._actors[name].work.remote(cell, rows, self._tasks)] = name, monotonic()
        bar.set_postfix_str("; ".join(f"{name} {cell.name}" for name, cell in running.items()))
        is_open = self._schedule.pending or any(cell is not START for cell in running.values())
        return bool(self._awaited and is_open)

    def _receive(self, name: str, reference: Any, bar: tqdm) -> None:
        """Write what a worker returned, and say so where no terminal draws progress; replace one that was lost."""
        cell = self._schedule.running[name]
        try:
            result = self._ray.get(reference, timeout=0)
        except self._ray.exceptions.RayTaskError as error:  # the worker lives
            self._schedule.end(name)
            self._session.fail(cell.about, cell.name, error.cause)
        except self._ray.exceptions.RayError as error:
            self._replace(name, cell, error)
        else:
            self._schedule.end(name)
            if cell is not START:
                self._write(result, name, cell)
        if cell in self._cells and cell not in self._schedule.pending:
            bar.update()
            if bar.disable:
                tqdm.write(f"{cell.name}: ended on {self._posts[name].node.host}, {name}", file=sys.stderr)

    def _replace(self, name: str, cell: Cell, error: Exception) -> None:
        """Hire a worker in place of one that was lost, or give one up that has not started."""
        self._ray.kill(self._actors.pop(name))  # it may only be out of reach, and would keep its GPU
        place = f"worker {name} on {self._posts[name].node.host}"
        if cell is not START:
            tqdm.write(f"{place} was lost ({reason(error)})")
            if not self._schedule.lose(name):
                too_often = RuntimeError("a worker was lost each time; its memory may be too small")
                self._session.fail(cell.about, cell.name, too_often)
            self._hire(name)
        elif InputError.__name__ in str(error):  # of the study's parameters, which are the same everywhere
            raise InputError(f"{place}: {reason(error).partition(': ')[2]}")
        else:
            tqdm.write(f"{place} has not started and is given up ({reason(error)})")
            self._schedule.drop(name)

    def _write(self, result: Result, worker: str, cell: Cell) -> None:
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
            is_copy = row["stage"] == "quantize" and not post.folder  # of a checkpoint that another node has too
            if known.get("measured_at") == row["measured_at"] or (is_copy and session.counts(row)):
                session.decided(row)
            else:
                session.adopt({**row, **place})
        if new := {*result.overflowed} - {*session.overflowed}:
            session.leave_float16(new)
        if result.error:
            raise InputError(f"{cell.name} on node {post.node.host}: {result.error}")
        if result.task:
            self._tasks[cell.about["task"]] = result.task


# Their nodes


@contextmanager
def connected(options: ClusterOptions) -> Iterator[Any]:
    """Yield Ray, connected to a running cluster, or to one of this machine that lives as long as the block.

    Raises
    ------
    InputError
        Ray is not installed, nobody answers at the address, or the cluster has another version of Ray or Python.
    """
    with patch.dict(os.environ, JOINED if options.address else LOCAL):
        with refusing("workers and --dry-run need Ray: pip install 'ray>=2.54', or give neither", ModuleNotFoundError):
            import ray
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
        if not options.address:
            quiet |= {"object_store_memory": STORE_BYTES, "include_dashboard": False}
        advice = "give HOST:PORT of one, and where it asks for a token, RAY_AUTH_MODE=token and its auth_token"
        with refusing(f"no Ray cluster can be joined at {options.address or 'this machine'}; {advice}"):
            if options.address not in ("", "auto"):  # which is quicker than Ray where nobody answers
                host, _, port = options.address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
            with ExitStack() as restored, Path(os.devnull).open("wb") as nowhere:
                for each in (signal.SIGINT, signal.SIGTERM):  # Ray's own handlers abort the process
                    restored.callback(signal.signal, each, signal.getsignal(each))
                console = os.dup(2)
                restored.callback(os.close, console)
                restored.callback(os.dup2, console, 2)
                os.dup2(nowhere.fileno(), 2)  # where Ray says many times that nobody answers
                ray.init(options.address or "local", **quiet)
        try:
            yield ray
        finally:
            ray.shutdown()


def find_nodes(ray: Any, wanted: str) -> list[Node]:
    """Return the cluster's nodes, as they describe themselves: those with the GPU model that most GPUs are of.

    So all rows of a table are measured on one.

    Parameters
    ----------
    ray
        Connected.
    wanted
        The device: ``"cpu"``, ``"cuda"`` or ``"auto"``, which is the GPUs where the cluster has any.

    Raises
    ------
    InputError
        There is no such device, or a node lacks this package or has other versions of its libraries.
    """
    listed = [node for node in ray.nodes() if node["Alive"]]
    with_gpu = [node for node in listed if node["Resources"].get("GPU")]
    if wanted not in ("auto", "cpu", "cuda") or (wanted == "cuda" and not with_gpu):
        raise InputError(f"device is {wanted!r}, and {len(with_gpu)} nodes have GPUs here; give 'auto' or 'cpu'")
    kind = "cuda" if with_gpu and wanted != "cpu" else "cpu"
    task = ray.remote(num_cpus=0, num_gpus=int(kind == "cuda"), max_calls=1)(describe)
    answers = {}
    for node in with_gpu if kind == "cuda" else listed:
        there = task.options(scheduling_strategy=on_node(node["NodeID"]))
        answers[there.remote(node["NodeID"], node["Resources"], kind)] = node["NodeManagerHostname"]
    nodes: list[Node] = []
    for answer, name in answers.items():
        try:
            nodes.append(ray.get(answer, timeout=START_S))
        except Exception as error:  # whatever Ray wraps it in; no answer where GPUs are in use
            advice = "qnb has to be installed there as here, and its GPUs free"
            raise InputError(f"node {name} cannot take part: {reason(error)}; {advice}") from error
    return _alike(nodes)


def _alike(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes with the GPU model that most GPUs are of; refuse other versions of libraries than here."""
    for node, (name, ours) in product(nodes, device.versions().items()):
        if (theirs := node.versions.get(name, ours)) != ours:
            raise InputError(f"node {node.host} has {name} {theirs}, and this one {ours}; install the same on both")
    models = Counter(node.device.name for node in nodes for _ in range(int(node.gpus) or 1))
    model, _ = models.most_common(1)[0]
    for node in nodes:
        if node.device.name != model:
            tqdm.write(f"node {node.host} is left out: its {node.device.name} is no {model}, as most are")
    return [node for node in nodes if node.device.name == model]


def reason(error: Exception) -> str:
    """Return the last line of an error, which says what was wrong where Ray carried it from."""
    return scrub(str(error).strip().splitlines()[-1]) if str(error) else type(error).__name__


def on_node(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def share_out(nodes: Sequence[Node], workers: str, gpus: float) -> list[tuple[Node, Sequence[int]]]:
    """Return each worker's node and cores, evenly over the nodes; one takes `gpus`, on a CPU none.

    Raises
    ------
    InputError
        There are more workers than the cluster has room for.
    """
    has_gpus = nodes[0].device.kind == "cuda"
    room = {node.id: int(node.gpus / gpus + 1e-6) if has_gpus else len(node.cores) for node in nodes}
    seats = [node for turn in range(max(room.values())) for node in nodes if turn < room[node.id]]
    wanted = (len(seats) if has_gpus else len(nodes)) if workers == "auto" else int(workers)
    if not 0 < wanted <= len(seats):
        what = f"{gpus:g} GPUs" if has_gpus else "a core"
        raise InputError(f"workers is {workers}, of {what} each; the cluster has room for {len(seats)}: give 'auto'")
    counts = Counter(node.id for node in seats[:wanted])
    return [(node, node.cores[turn :: counts[node.id]] or node.cores)
            for node in nodes for turn in range(counts[node.id])]  # fmt: skip
