"""Measure a study with Ray: hire workers, hand out cells, and write what they return.

The driver alone writes. A worker that is lost is replaced, and its cell is measured again by another.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from qnb import device
from qnb.cluster import cells
from qnb.cluster.nodes import ClusterOptions, Node, Place, connected, find_nodes, on_node, share_out
from qnb.cluster.schedule import Cell, Need, Schedule, Seat, rehearse
from qnb.cluster.worker import Post, Result, Worker
from qnb.device import Device
from qnb.errors import InputError, scrub
from qnb.ledger import FAILED, holding, row_key, write_atomic
from qnb.memory import MIB
from qnb.precision import BASELINE
from qnb.provenance import command

if TYPE_CHECKING:
    from qnb.session import Session
    from qnb.study import Study

START_S = 120.0  # until a worker that does not start is let alone, where no other is at work
CLOSE_S = 5.0  # until a worker that removes its folder is let alone
CONTEXT_BYTES = 1024 * MIB  # of a process on a GPU, and what its libraries take


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
        self._starting: dict[Any, tuple[str, Seat]] = {}  # those hired later, by that of their first answer

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
        return actor.options(scheduling_strategy=on_node(place.node.id)).remote(post)

    def run(self, plan: Sequence[Cell], maker: Callable[[Need], Cell]) -> int:
        """Measure all cells of a plan; return how many cells that took, with those that made what nodes need.

        Raises
        ------
        InputError
            A worker found that input cannot be used.
        RuntimeError
            No worker is left.
        """
        schedule = Schedule(plan, seats(self._session, [*self._places.values()]), maker, self._here)
        n_cells = 0
        tqdm.write(f"{len(plan)} cells for {len(self._places)} workers", file=sys.stderr)
        with self._closing(), tqdm(total=len(plan), desc="cells", unit="cell", disable=None) as bar:
            while True:
                for name in [name for name, seat in schedule.seats.items() if not seat.cell]:
                    if cell := schedule.begin(name):
                        self._send(name, cell)
                if not self._at_work and not (self._starting and schedule.pending):
                    break
                bar.set_postfix_str("; ".join(f"{name} {cell.name}" for name, cell in schedule.running.items()))
                done, _ = self._ray.wait([*self._at_work, *self._starting], timeout=START_S)
                if not done and not self._at_work:
                    break
                for reference in done:
                    if reference in self._starting:
                        self._seat(reference, schedule)
                        continue
                    name = self._at_work[reference]
                    ended = f"{schedule.running[name].name}: ended on {self._places[name].node.host}, {name}"
                    is_ended = self._receive(reference, schedule)
                    n_cells += is_ended
                    if is_ended and bar.disable:  # no terminal draws it
                        tqdm.write(ended, file=sys.stderr)
                bar.n = len(plan) - schedule.unfinished
        if schedule.pending:
            raise RuntimeError(f"no worker is left for {', '.join(schedule.pending)}; the same command goes on")
        return n_cells

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """Let the workers remove their folders in the end, those that still answer."""
        try:
            yield
        finally:
            closed = [actor.close.remote() for actor in self._actors.values()]
            if closed:
                self._ray.wait(closed, num_returns=len(closed), timeout=CLOSE_S)

    def _send(self, name: str, cell: Cell) -> None:
        """Let a worker begin a cell, with what the ledger has of its formats."""
        formats = {cell.precision, "", *(name for kind, name in cell.needs if kind == "checkpoint")}
        answers = (row for row in self._session.ledger.answers() if not row["stage"].endswith(FAILED))
        rows = [row for row in answers if row["precision"] in formats and self._session.counts(row)]
        own = (row for row in rows if row["stage"] == "accuracy" and row["task"] == cell.about.get("task"))
        paths = {row["items_file"]: self._session.folder / row["items_file"] for row in own}
        files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
        task = next((self._tasks[name] for kind, name in cell.needs if kind == "task" and name in self._tasks), b"")
        work = self._actors[name].measure.remote(cell, rows, files, task, self._session.overflowed)
        self._at_work[work] = name

    def _receive(self, reference: Any, schedule: Schedule) -> bool:
        """Write what a worker returned; replace one that was lost. Return whether its cell has ended."""
        name = self._at_work.pop(reference)
        cell = schedule.seats[name].cell
        assert cell
        try:
            result: Result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # the worker lives
            result = Result(failure=scrub(str(error).strip().splitlines()[-1]))
        except self._ray.exceptions.RayError as error:
            self._replace(name, schedule, scrub(str(error).strip().splitlines()[0]))
            return False
        self._write(result, schedule)
        if result.wrong_input:
            raise InputError(f"{cell.name} on node {self._places[name].node.host}: {result.wrong_input}")
        if result.text:
            tqdm.write(result.text.rstrip())
        if result.failure:
            self._record_failure(cell, result.failure)
        if result.task and cell.makes:
            self._tasks[cell.makes[1]] = self._ray.put(result.task)
        schedule.end(name)
        return True

    def _write(self, result: Result, schedule: Schedule) -> None:
        """Append a worker's rows to the ledger, after the files that they name."""
        for path, content in result.files.items():
            write_atomic(self._session.folder / path, content)
        for row in result.rows:
            is_known = self._session.counts(row) and row["stage"] in ("quantize", cells.PEAKS)
            if not is_known:  # several nodes make a checkpoint
                self._session.adopt(row)
        if new := {*result.overflowed} - {*self._session.overflowed}:
            self._session.leave_float16(new)
            schedule.repeat(new)

    def _record_failure(self, cell: Cell, reason: str) -> None:
        key = {**cell.about, "stage": cell.about["stage"] + FAILED}
        self._session.append(key, {"error": "RuntimeError", "reason": reason})
        tqdm.write(f"{cell.name} could not be measured ({reason}); it is tried again on the next run")

    def _replace(self, name: str, schedule: Schedule, reason: str) -> None:
        """Hire another worker in the place of one that was lost, if its node is still there."""
        place = self._places.pop(name)
        tqdm.write(f"worker {name} on {place.node.host} was lost ({reason}); its cell is measured again")
        can_time = schedule.seats[name].can_time
        self._ray.kill(self._actors.pop(name))
        for hopeless in schedule.lose(name):
            self._record_failure(hopeless, "a worker was lost each time; its memory may be too small")
        if any(node["NodeID"] == place.node.id and node["Alive"] for node in self._ray.nodes()):
            again = f"{name}+"
            self._places[again] = place
            self._actors[again] = self._hire(again)
            self._starting[self._actors[again].ready.remote()] = again, Seat(place.node.id, can_time)

    def _seat(self, reference: Any, schedule: Schedule) -> None:
        """Let a worker that was hired later have cells, if it has started: its node may be gone since."""
        name, seat = self._starting.pop(reference)
        with suppress(self._ray.exceptions.RayError):
            self._ray.get(reference)
            schedule.join(name, seat)


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
        if wanted not in ("auto", "cpu", "cuda"):
            raise InputError(f"device is {wanted!r}; with workers, give cuda, cpu or auto")
        nodes = find_nodes(ray, wanted)
        most = Counter({each.device.name: 0 for each in nodes})
        for each in nodes:
            most[each.device.name] += max(1, int(each.gpus))
        name, _ = most.most_common(1)[0]  # of GPUs of several models, times are taken on that of most
        session.device = next(each.device for each in nodes if each.device.name == name)
        gpus = gpus_needed(study, nodes, options.gpus_per_model, "02" in numbers)
        if gpus % 1 and numbers & {"03", "04"}:
            raise InputError(f"gpus_per_model is {gpus}: no time can be taken on a shared GPU; add --only 01,02,05")
        if gpus > 1 and "04" in numbers:
            raise InputError(
                f"one model takes {gpus:g} GPUs, whose largest batch is not searched; add --only 01,02,03,05"
            )
        places, spread = share_out(nodes, options.workers, gpus * (session.device.kind == "cuda")), max(1, int(gpus))
        plan = cells.plan(session, values, numbers)
        maker = partial(_maker, session, values)
        if only_plan:
            tqdm.write("; ".join(f"w{number} on {place.node.host}" for number, place in enumerate(places)))
            _print_plan(Schedule(plan, seats(session, places), maker), {row_key(row) for row in session.ledger.rows()})
        else:
            with holding(session.folder / ".lock", lambda: tqdm.write(f"waiting for {session.folder}")):
                Crew(ray, study, places, _post(study, values, places, spread)).run(plan, maker)
    return session.device


def seats(session: Session, places: Sequence[Place]) -> dict[str, Seat]:
    """Return the workers as the schedule sees them: times belong to one GPU model, and need whole GPUs."""
    timed = session.device.name
    return {f"w{number}": Seat(place.node.id, place.node.device.name == timed and (place.gpus == 0 or place.gpus >= 1))
            for number, place in enumerate(places)}  # fmt: skip


def _print_plan(schedule: Schedule, measured: Collection[tuple[Any, ...]]) -> None:
    """Print the cells in the order in which they would begin, if each took as long as is known.

    Those with a row may be measured already, and then end at once.
    """
    ideal_s, planned = schedule.ideal_s(), rehearse(schedule)
    for each in planned:
        cell = each.cell
        needs = "needs " * bool(cell.needs) + ", ".join(" ".join(need) for need in sorted(cell.needs))
        has_row = "has a row" * (row_key(cell.about) in measured)
        about = "; ".join(filter(None, (has_row, needs, "alone on its node" * cell.is_alone)))
        tqdm.write(f"{each.begin_s:7.0f} s  {each.worker:4s}{cell.name:40s}{cell.estimate_s:6.0f} s  {about}".rstrip())
    total_min = max((each.end_s for each in planned), default=0.0) / 60
    tqdm.write(f"{len(planned)} cells, about {total_min:.0f} minutes (at best {ideal_s / 60:.0f})")


def _maker(session: Session, values: Mapping[str, Any], need: Need) -> Cell:
    kind, name = need
    return cells.checkpoint_cell(session, name) if kind == "checkpoint" else cells.task_cell(name, values)


def gpus_needed(study: Study, nodes: Sequence[Node], wanted: str, has_divergence: bool) -> float:
    """Return the GPUs that one model is spread over: as given, or as many as hold the largest format's weights.

    Divergence loads BF16 beside every other format.
    """
    if wanted != "auto":
        return float(wanted)
    beside = 16 * has_divergence
    bits = (each.file_bits + beside * (each.name != BASELINE) for each in study.session.precisions)
    weights_mib = study.session.source.parameters * max(bits) / 8 / MIB
    return math.ceil(weights_mib / (device.WEIGHTS_SHARE * min(node.device.memory_mib for node in nodes)))


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

    return int(max(1, min(map(free, places)) - weights - CONTEXT_BYTES))
