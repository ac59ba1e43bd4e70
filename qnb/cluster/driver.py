"""Measure a study with Ray: find the nodes, hire workers, hand out cells, and write what they return.

The driver alone writes. A worker that is lost is replaced, and its cell is measured again by another.
"""

from __future__ import annotations

import logging
import math
import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from tqdm.auto import tqdm

from qnb import device
from qnb.cluster import cells
from qnb.cluster.schedule import Cell, Need, Schedule, Seat, rehearse
from qnb.cluster.worker import Post, Result, Worker
from qnb.device import Device
from qnb.errors import InputError, scrub
from qnb.ledger import FAILED, Row, holding, write_atomic
from qnb.memory import MIB
from qnb.provenance import command

if TYPE_CHECKING:
    from qnb.session import Session
    from qnb.study import Study

CONNECT_S = 10.0  # until an address counts as silent
ANSWER_S = 120.0  # until a node that was asked what it is counts as missing; it imports torch
# so that no port of a cluster of this machine alone is open to the network, and nothing is told to Ray's makers
LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
STORE_BYTES = 256 * MIB  # shared memory for results, which are small


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

    Raises
    ------
    InputError
        A value is none of these.
    """

    workers: str = "auto"
    address: str = ""
    gpus_per_model: str = "auto"

    def __post_init__(self) -> None:
        if self.workers != "auto" and not re.fullmatch(r"0*[1-9]\d{0,4}", self.workers):
            raise InputError(f"workers is {self.workers!r}; give a whole number of at least 1, or 'auto'")
        if self.gpus_per_model != "auto" and not re.fullmatch(r"0*[1-9]\d{0,2}|0?\.\d{0,3}[1-9]", self.gpus_per_model):
            raise InputError(
                f"gpus_per_model is {self.gpus_per_model!r}; give a number of GPUs, a share such as 0.5, or 'auto'"
            )


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as it describes itself."""

    id: str
    host: str
    gpus: float
    cores: Sequence[int]
    device: Device
    versions: Mapping[str, str]
    free_bytes: int  # of the host


def describe(node_id: str, gpus: float, choice: str) -> Node:
    """Describe the machine that this runs on."""
    import platform

    import psutil

    os.environ.pop(device.CHOICE, None)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    free_bytes = int(psutil.virtual_memory().available)
    return Node(node_id, platform.node(), gpus, cores, device.detect(choice), device.versions(), free_bytes)


# Ray


@contextmanager
def connected(options: ClusterOptions) -> Iterator[Any]:
    """Yield Ray, connected to a running cluster, or to one of this machine that lives as long as the block.

    Raises
    ------
    InputError
        Ray is not installed, nobody answers at the address, or the cluster has another version of Ray or Python.
    """
    with patch.dict(os.environ, LOCAL if not options.address else {}):
        try:
            import ray
        except ModuleNotFoundError as error:
            raise InputError("workers need Ray: pip install 'ray>=2.54', or take --workers 1") from error
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
        if not options.address:
            wanted = 1 if options.workers == "auto" else int(options.workers)
            cores = max(os.cpu_count() or 1, wanted)
            ray.init("local", num_cpus=cores, object_store_memory=STORE_BYTES, include_dashboard=False, **quiet)
        else:
            _check_address(options.address)
            try:
                ray.init(address=options.address, **quiet)
            except Exception as error:  # ConnectionError, or RuntimeError for another version
                reason = scrub(" ".join(str(error).split()), 300)
                raise InputError(f"the Ray cluster at {options.address} cannot be joined: {reason}") from error
        try:
            yield ray
        finally:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse an address at which nobody answers."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        if not (host and port.isdigit()):
            raise ValueError("it is no host and port")
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({error}); start one with ray start --head, and run this on a node "
            "of it"
        ) from error


def find_nodes(ray: Any, wanted: str) -> list[Node]:
    """Return the cluster's nodes, asked one by one.

    Parameters
    ----------
    ray
        Connected.
    wanted
        The device: ``"cpu"``, ``"cuda"`` or ``"auto"``, which is the GPUs where the cluster has any.

    Raises
    ------
    InputError
        There is no GPU, or a node lacks this package or has other versions of its libraries.
    """
    listed = [node for node in ray.nodes() if node["Alive"]]
    gpus = {node["NodeID"]: node["Resources"].get("GPU", 0.0) for node in listed}
    takes_gpus = wanted.startswith("cuda") or (wanted == "auto" and any(gpus.values()))
    if takes_gpus and not any(gpus.values()):
        raise InputError(f"device is {wanted!r}, and no node of the cluster has a GPU; take 'auto' or 'cpu'")
    choice = "cuda" if takes_gpus else "cpu"
    nodes = []
    for node in listed:
        if takes_gpus and not gpus[node["NodeID"]]:
            continue
        task = ray.remote(num_cpus=0, num_gpus=int(takes_gpus), max_calls=1)(describe)
        there = task.options(scheduling_strategy=_on(node["NodeID"]))
        name = node["NodeManagerHostname"]
        try:
            nodes.append(ray.get(there.remote(node["NodeID"], gpus[node["NodeID"]], choice), timeout=ANSWER_S))
        except Exception as error:  # whatever Ray wraps it in
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"node {name} cannot take part: {scrub(lines[-1])}; install qnb there as here") from error
    here = device.versions()
    for each in nodes:
        other = [f"{name} {version}" for name, version in each.versions.items() if here[name] != version]
        if other:
            ours = ", ".join(f"{text.split()[0]} {here[text.split()[0]]}" for text in other)
            raise InputError(f"node {each.host} has {', '.join(other)}, and this one {ours}; install the same on both")
    return nodes


def _on(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


# Workers


@dataclass(frozen=True)
class Place:
    """What one worker has of a node."""

    node: Node
    gpus: float
    cores: Sequence[int]


def share_out(nodes: Sequence[Node], workers: str, gpus: float) -> list[Place]:
    """Return a place for each worker, evenly over the nodes; `gpus` are a worker's, 0 on CPUs.

    Raises
    ------
    InputError
        There are more workers than the cluster has room for.
    """
    room = {node.id: int(node.gpus / gpus + 1e-6) if gpus else len(node.cores) for node in nodes}
    wanted = sum(room.values()) if gpus else len(nodes)
    wanted = wanted if workers == "auto" else int(workers)
    if not 0 < wanted <= sum(room.values()):
        what = f"{gpus:g} GPUs" if gpus else "a core"
        raise InputError(
            f"{wanted} workers with {what} each are wanted, and the cluster has room for {sum(room.values())}; "
            "take --workers auto"
        )
    rounds = [node for turn in range(max(room.values())) for node in nodes if turn < room[node.id]][:wanted]
    of_node, places = Counter(node.id for node in rounds), []
    for number, node in enumerate(rounds):
        turn, all_of_node = rounds[:number].count(node), of_node[node.id]
        first, last = (len(node.cores) * each // all_of_node for each in (turn, turn + 1))
        places.append(Place(node, gpus, node.cores[first:last] or node.cores))
    return places


def gpus_needed(study: Study, nodes: Sequence[Node], wanted: str) -> float:
    """Return the GPUs that one model is spread over: as given, or as many as hold the largest format's weights."""
    if wanted != "auto":
        return float(wanted)
    largest = max(precision.file_bits for precision in study.session.precisions)
    weights_mib = study.session.source.parameters * largest / 8 / MIB
    return math.ceil(weights_mib / (device.WEIGHTS_SHARE * min(node.device.memory_mib for node in nodes)))


class Crew:
    """The workers of a run, and what they are at.

    Parameters
    ----------
    ray
        Connected.
    study
        The study, whose ledger the crew fills.
    places
        One for each worker.
    post
        What is the same for all of them.
    """

    worker: type[Any] = Worker

    def __init__(self, ray: Any, study: Study, places: Sequence[Place], post: Post) -> None:
        self._ray, self._session, self._post = ray, study.session, post
        self._here = ray.get_runtime_context().get_node_id()
        self._places = {f"w{number}": place for number, place in enumerate(places)}
        self._actors = {name: self._hire(name) for name in self._places}
        self._tasks: dict[str, Any] = {}  # references to tasks that were built, by name
        self._at_work: dict[Any, str] = {}  # workers by the reference of their result

    def _hire(self, name: str) -> Any:
        place = self._places[name]
        is_here = place.node.id == self._here
        post = replace(
            self._post,
            place={"node": place.node.host, "worker": name},
            folder=str(self._session.folder) if is_here else "",
            cores=place.cores,
            all_cores=place.node.cores,
        )
        actor = self._ray.remote(num_cpus=0, num_gpus=place.gpus)(self.worker)
        return actor.options(scheduling_strategy=_on(place.node.id)).remote(post)

    def run(self, plan: Sequence[Cell], maker: Callable[[Need], Cell]) -> int:
        """Measure all cells of a plan; return how many cells that took, with those that made what nodes need.

        Raises
        ------
        InputError
            A worker found that input cannot be used.
        RuntimeError
            No worker is left.
        """
        schedule, n_cells = Schedule(plan, seats(self._session, [*self._places.values()]), maker), 0
        with tqdm(total=len(schedule.pending), desc="cells", unit="cell", disable=None) as bar:
            while True:
                for name in [name for name, seat in schedule.seats.items() if not seat.cell]:
                    if cell := schedule.begin(name):
                        self._send(name, cell)
                if not self._at_work:
                    break
                bar.set_postfix_str("; ".join(f"{name} {cell.name}" for name, cell in schedule.running.items()))
                done, _ = self._ray.wait([*self._at_work], timeout=60)
                for reference in done:
                    self._receive(reference, schedule)
                    n_cells += 1
                bar.n = bar.total - len(schedule.pending) - len(schedule.running)
        if schedule.pending:
            raise RuntimeError(f"no worker is left for {', '.join(schedule.pending)}; the same command goes on")
        return n_cells

    def _send(self, name: str, cell: Cell) -> None:
        """Let a worker begin a cell, with what the ledger has of its formats."""
        formats = {cell.precision, "", *(name for kind, name in cell.needs if kind == "checkpoint")}
        rows = [row for row in self._session.ledger.rows() if row["precision"] in formats and self._counts(row)]
        paths = {row[field] for row in rows if row["stage"] == "accuracy" for field in row if field.endswith("_file")}
        files = {path: (self._session.folder / path).read_bytes() for path in paths
                 if (self._session.folder / path).is_file()}  # fmt: skip
        task = next((self._tasks[name] for kind, name in cell.needs if kind == "task" and name in self._tasks), b"")
        work = self._actors[name].measure.remote(cell, rows, files, task, self._session.overflowed)
        self._at_work[work] = name

    def _counts(self, row: Row) -> bool:
        """Return whether a row answers; overwriting, only those of this run do."""
        return self._session.find(row) is not None

    def _receive(self, reference: Any, schedule: Schedule) -> None:
        """Write what a worker returned; replace one that was lost."""
        name = self._at_work.pop(reference)
        cell = schedule.seats[name].cell
        assert cell
        try:
            result: Result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # the worker lives
            result = Result(failure=scrub(str(error).strip().splitlines()[-1]))
        except self._ray.exceptions.RayError as error:
            self._replace(name, schedule, scrub(str(error).strip().splitlines()[0]))
            return
        if result.wrong_input:
            raise InputError(f"{cell.name} on node {self._places[name].node.host}: {result.wrong_input}")
        self._write(result)
        if result.text:
            tqdm.write(result.text.rstrip())
        if result.failure:
            self._record_failure(cell, result.failure)
        if result.task and cell.makes:
            self._tasks[cell.makes[1]] = self._ray.put(result.task)
        schedule.end(name)

    def _write(self, result: Result) -> None:
        """Append a worker's rows to the ledger, after the files that they name."""
        for path, content in result.files.items():
            write_atomic(self._session.folder / path, content)
        for row in result.rows:
            is_known = self._session.ledger.find(row) and row["stage"] in ("quantize", cells.PEAKS)
            if not is_known:  # several nodes make a checkpoint
                self._session.adopt(row)
        if new := {*result.overflowed} - {*self._session.overflowed}:
            self._session.leave_float16(new)

    def _record_failure(self, cell: Cell, reason: str) -> None:
        key = {**cell.about, "stage": cell.about["stage"] + FAILED}
        self._session.append(key, {"error": "RuntimeError", "reason": reason})
        tqdm.write(f"{cell.name} could not be measured ({reason}); it is tried again on the next run")

    def _replace(self, name: str, schedule: Schedule, reason: str) -> None:
        """Hire another worker in the place of one that was lost, if its node is still there."""
        place = self._places.pop(name)
        tqdm.write(f"worker {name} on {place.node.host} was lost ({reason}); its cell is measured again")
        can_time = schedule.seats[name].can_time
        if hopeless := schedule.lose(name):
            self._record_failure(hopeless, "its worker was lost each time; its memory may be too small")
        if any(node["NodeID"] == place.node.id and node["Alive"] for node in self._ray.nodes()):
            again = f"{name}+"
            self._places[again] = place
            self._actors[again] = self._hire(again)
            schedule.seats[again] = Seat(place.node.id, can_time)


def measure(
    study: Study, values: Mapping[str, Any], numbers: set[str], options: ClusterOptions, only_plan: bool = False
) -> Device:
    """Measure what notebooks would, on a cluster, into the study's ledger; return the device that was measured on.

    Parameters
    ----------
    study
        The study.
    values
        Every parameter of the notebooks.
    numbers
        The notebooks' numbers, such as 02.
    options
        Who measures.
    only_plan
        Print what would be measured, by whom, in which order, and measure nothing.

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
        wanted = os.environ.get(device.CHOICE, "auto")
        nodes = find_nodes(ray, wanted.partition(":")[0])
        most = Counter({each.device.name: 0 for each in nodes})
        for each in nodes:
            most[each.device.name] += max(1, int(each.gpus))
        name, _ = most.most_common(1)[0]  # of GPUs of several models, times are taken on that of most
        session.device = next(each.device for each in nodes if each.device.name == name)
        gpus = gpus_needed(study, nodes, options.gpus_per_model)
        if gpus % 1 and numbers & {"03", "04"}:
            raise InputError(f"gpus_per_model is {gpus}: no time can be taken on a shared GPU; add --only 01,02")
        if gpus > 1 and "04" in numbers:
            raise InputError(
                f"one model takes {gpus:g} GPUs, whose largest batch is not searched; add --only 01,02,03"
            )
        places, spread = share_out(nodes, options.workers, gpus * (session.device.kind == "cuda")), max(1, int(gpus))
        plan = cells.plan(session, values, numbers)
        maker = partial(_maker, session, values)
        if only_plan:
            _print_plan(Schedule(plan, seats(session, places), maker))
        else:
            with holding(session.folder / ".lock", lambda: tqdm.write(f"waiting for {session.folder}")):
                Crew(ray, study, places, _post(study, values, places, spread)).run(plan, maker)
    return session.device


def seats(session: Session, places: Sequence[Place]) -> dict[str, Seat]:
    """Return the workers as the schedule sees them: times belong to one GPU model, and need whole GPUs."""
    timed = session.device.name
    return {f"w{number}": Seat(place.node.id, place.node.device.name == timed and (place.gpus == 0 or place.gpus >= 1))
            for number, place in enumerate(places)}  # fmt: skip


def _print_plan(schedule: Schedule) -> None:
    """Print the cells in the order in which they would begin, if each took as long as is known."""
    ideal_s, planned = schedule.ideal_s(), rehearse(schedule)
    for each in planned:
        cell = each.cell
        needs = "needs " * bool(cell.needs) + ", ".join(" ".join(need) for need in sorted(cell.needs))
        about = "; ".join(filter(None, (needs, "alone on its node" * cell.is_alone)))
        tqdm.write(f"{each.begin_s:7.0f} s  {each.worker:4s}{cell.name:40s}{cell.estimate_s:6.0f} s  {about}".rstrip())
    total_min = max((each.end_s for each in planned), default=0.0) / 60
    tqdm.write(f"{len(planned)} cells, about {total_min:.0f} minutes (at best {ideal_s / 60:.0f})")


def _maker(session: Session, values: Mapping[str, Any], need: Need) -> Cell:
    kind, name = need
    return cells.checkpoint_cell(session, name) if kind == "checkpoint" else cells.task_cell(name, values)


def _post(study: Study, values: Mapping[str, Any], places: Sequence[Place], spread: int) -> Post:
    """Return what is the same for all workers."""
    session = study.session
    source = session.source
    return Post(
        study={
            "model": source.name,
            "precisions": values["precisions"],
            "data_dir": str(session.data_dir or ""),
            "seed": values["seed"],
            "device": session.device.kind,
            "half": values["half"],
        },
        record=session.record,
        command=command(),
        place={},
        folder="",
        cores=(),
        all_cores=(),
        threads=int(os.environ.get("OMP_NUM_THREADS") or 0),
        spread=spread,
        planned_bytes=_planned_bytes(study, places),
    )


def _planned_bytes(study: Study, places: Sequence[Place]) -> int:
    """Return the memory that the smallest worker has beside the largest model."""
    beside = Counter(place.node.id for place in places)
    largest = max(precision.file_bits for precision in study.session.precisions)
    weights = study.session.source.parameters * largest // 8

    def free(place: Place) -> float:
        if place.gpus:
            return place.gpus * place.node.device.memory_mib * MIB
        return place.node.free_bytes / beside[place.node.id]

    return int(max(1, min(map(free, places)) - weights))
