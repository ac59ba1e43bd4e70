"""A crew whose workers work in this process: what they measure, find or fail at is in the study's ledger."""

import os
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from qnb import Study
from qnb.cluster import driver
from qnb.cluster.plan import TRIES, Cell
from qnb.cluster.worker import Node, Post, Worker
from qnb.device import Device
from qnb.errors import InputError
from qnb.ledger import file_sha256
from qnb.quantize import checkpoint, stages
from qnb.quantize.files import MANIFEST

ray = pytest.importorskip("ray")
CPU = Device("cpu", "a CPU", 1000.0, "native", "")
LENGTHS = {"stage": "lengths", "task": "a"}


class Killed(BaseException):
    """Ends a worker."""


@dataclass(frozen=True, eq=False)
class Reference:
    is_there: bool
    value: Any


class InProcess:
    """Ray, as far as a crew uses it: a call is made at once. Workers with these numbers, as hired, never start."""

    exceptions = ray.exceptions

    def __init__(self, held=()):
        self.held, self.n_hired, self.n_lost = held, 0, 0

    def remote(self, **_):
        return lambda worker: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=partial(self._hire, worker)))

    def _hire(self, worker, post):
        starts, hired = None if self.n_hired in self.held else bool, worker(post)
        self.n_hired += 1
        methods = {"__ray_ready__": starts, "work": hired.work, "__ray_terminate__": hired._scratch.cleanup}
        return SimpleNamespace(
            **{name: SimpleNamespace(remote=partial(self._call, each)) for name, each in methods.items()}
        )

    def _call(self, method, *arguments):
        try:
            return Reference(bool(method), method and method(*arguments))
        except Killed:
            self.n_lost += 1
            return Reference(True, ray.exceptions.RayActorError())
        except OSError as error:
            return Reference(True, ray.exceptions.RayTaskError("work", "", error))

    def wait(self, references, **_):
        return [each for each in references if each.is_there][:1], []

    def get(self, reference, timeout=None):
        if not reference.is_there:
            raise ray.exceptions.GetTimeoutError
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def kill(self, actor):
        pass


class Crew(driver.Crew):
    """Measures no format on node b: who tries is killed."""

    class worker(Worker):
        def work(self, cell, *arguments):
            if cell.precision and self._post.node.host == "b":
                raise Killed
            return super().work(cell, *arguments)


def measure(study, plan, hosts="a", held=(), folder=""):
    """Let a worker on each of these hosts measure a plan; return Ray."""
    session, here = study.session, InProcess(held)
    options = {"model": session.source.name, "precisions": "bf16", "overwrite": session.overwrite}
    cores = sorted(os.sched_getaffinity(0))
    nodes = [Node(host * 56, host, 0, cores, CPU, {}) for host in hosts]
    posts = [Post(node, cores, 1, folder, options, session.record, 1, 0) for node in nodes]
    Crew(here, session, posts, plan).run()
    return here


@pytest.fixture
def study(tmp_path, source):
    return Study("smollm2-135m", "bf16", tmp_path / "study", device="cpu")


def ask(session, task="a", limit=0):
    """Measure what has no row."""
    key = session.key("lengths", None, {"limit": limit}, task=task)
    session.find(key) or session.append(key, {"limit": limit})


def load(session):
    """Find the checkpoint."""
    session.checkpoint(session.precisions[0])


def fail(session):
    """Record a failure, and raise."""
    with session.failing(session.key("lengths", session.precisions[0]), "lengths"):
        raise ValueError
    session.require("lengths")


def fail_and_refuse(session):
    """Record a failure, and refuse something, as a format that is too large for `memory_mib`."""
    with session.failing(session.key("batch", session.precisions[0]), "the largest batch"):
        raise MemoryError
    raise InputError("memory_mib is 1")


def refuse(session):
    """Measure something, and refuse something."""
    ask(session)
    raise InputError("a value cannot be used")


@pytest.mark.parametrize("limits", [(2, 3, 2), (2, 3, 2, 3)])
def test_what_was_asked_last_is_shown(study, limits):
    for limit in limits:
        measure(study, [Cell(LENGTHS, partial(ask, limit=limit))])
        (row,) = study.session.ledger.rows("lengths")
        assert row["limit"] == limit
    assert len(study.session.ledger.answers()) == 2


@pytest.mark.parametrize(
    ("hosts", "n_lost", "n_failed", "n_rows"), [("b", 3 * TRIES, 3, 0), ("bbba", 3, 0, 3), ("bb", 3 * TRIES, 3, 0)]
)
def test_what_ends_workers_on_a_node_goes_elsewhere_or_fails(study, hosts, n_lost, n_failed, n_rows):
    abouts = [LENGTHS | {"task": each, "precision": "bf16"} for each in "abc"]
    plan = [Cell(each, partial(ask, task=each["task"])) for each in abouts]
    assert measure(study, plan, hosts).n_lost == n_lost
    ledger = study.session.ledger
    assert (len(ledger.failures()), len(ledger.rows("lengths"))) == (n_failed, n_rows)


def test_the_others_go_on_while_a_lost_worker_is_replaced(study):
    plan = [Cell(LENGTHS | {"task": each, "precision": "bf16"}, partial(ask, task=each)) for each in "abcd"]
    assert measure(study, plan, "ab", held=[2]).n_lost == 1
    assert {row["worker"] for row in study.session.ledger.rows("lengths")} == {"w0"}


def test_a_worker_that_never_starts_is_given_up(study, monkeypatch):
    monkeypatch.setattr(driver, "START_S", 0.0)
    measure(study, [Cell(LENGTHS, ask, is_alone=True)], "ab", held=[0])
    assert [row["worker"] for row in study.session.ledger.rows("lengths")] == ["w1"]
    with pytest.raises(RuntimeError, match="no worker is left"):
        measure(study, [Cell(LENGTHS, ask)], "a", held=[0])


def test_what_cannot_be_run_takes_no_row_away(study):
    with pytest.raises(InputError, match="lengths a on node a: a value"):
        measure(study, [Cell(LENGTHS, refuse)])
    assert len(study.session.ledger.rows("lengths")) == 1


def test_what_fails_is_told_once_and_the_others_go_on(study, capsys):
    abouts = [{"stage": stage, "precision": "bf16"} for stage in ("lengths", "sweep", "batch")]
    steps = (fail, lambda _: [][0], fail_and_refuse)
    measure(study, [*map(Cell, abouts, steps), Cell(LENGTHS, ask)])
    assert {row["stage"] for row in study.session.ledger.failures()} == {f"{each['stage']}.failed" for each in abouts}
    assert capsys.readouterr().out.count("could not be measured") == 3
    assert len(study.session.ledger.rows("lengths")) == 1


def test_what_is_measured_already_needs_no_model(study, monkeypatch):
    values = {"tasks": "sample_easy", "limit": 2, "batch_size": 1, "scorer": "qnb", "sensitivity_limit": 1,
              "prompt_source": "sample", "ppl_tokens": 64, "ppl_context": 32}  # fmt: skip

    def cells():
        return [cell for cell in driver.plan(study.session, values, {"02"}, "") if cell.about["stage"] == "divergence"]

    measure(study, cells())
    monkeypatch.setattr(Worker, "checkpoint", None)
    measure(study, cells())
    assert len(study.session.ledger.rows("divergence")) == 1 and not study.session.ledger.failures()


def test_a_checkpoint_that_is_made_again_in_the_studys_folder_has_a_new_row(study):
    session, cell = study.session, Cell({"stage": "quantize", "precision": "bf16"}, stages.quantize)
    session.append(session.key("quantize", session.precisions[0]), {"manifest_sha256": "of one that was removed"})
    measure(study, [cell], folder=str(session.folder))
    (row,) = session.ledger.rows("quantize")
    assert row["manifest_sha256"] == file_sha256(session.folder / "checkpoints" / "bf16" / MANIFEST)


def test_what_fails_in_a_worker_that_lives_fails_once(study, monkeypatch):
    monkeypatch.setattr(Worker, "_prepare", Mock(side_effect=OSError(28, "No space left on device")))
    assert measure(study, [Cell(LENGTHS, ask)]).n_lost == 0 and Worker._prepare.call_count == 1
    assert "No space left" in study.session.ledger.failures()[0]["reason"]


def test_a_worker_whose_parameters_are_refused_ends_the_run_with_its_line(study, monkeypatch):
    died = ray.exceptions.RayActorError(error_msg="qnb.errors.InputError: data_dir /data is not a folder")
    monkeypatch.setattr(InProcess, "_call", lambda *_: Reference(True, died))
    with pytest.raises(InputError, match="worker w0 on a: data_dir /data is not a folder"):
        measure(study, [Cell(LENGTHS, ask)])


def test_a_node_keeps_a_checkpoint_for_all_studies_but_one_that_overwrites(study, tmp_path, monkeypatch):
    made, convert = [], checkpoint.convert
    monkeypatch.setattr(checkpoint, "convert", lambda *arguments: made.append(arguments) or convert(*arguments))
    other = Study("smollm2-135m", "bf16", tmp_path / "other", device="cpu")
    session = other.session
    session.append(session.key("quantize", session.precisions[0]), {"manifest_sha256": "another node's"})
    study.session.source  # noqa: B018  # from the common cache
    monkeypatch.setenv("QNB_CACHE", str(tmp_path / "cache"))
    again = Study("smollm2-135m", "bf16", other.folder, overwrite=True)
    abouts = [{"stage": "divergence", "precision": "bf16", "repeat": each} for each in (1, 2)]
    plan = [Cell(about, load, loads=["bf16"]) for about in abouts]
    for each, count in ((study, 1), (other, 1), (again, 2)):
        measure(each, plan, "aa")
        assert (len(each.session.ledger.rows("quantize")), len(made)) == (1, count)


def test_what_loads_a_checkpoint_that_cannot_be_made_fails_too(study, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "convert", Mock(side_effect=MemoryError))
    cell = Cell({"stage": "lengths", "precision": "bf16"}, load, loads=["bf16"])
    measure(study, [cell], folder=str(tmp_path / "own"))
    stages = [row["stage"] for row in study.session.ledger.failures()]
    assert stages == ["quantize.failed", "lengths.failed"] and not study.session.ledger.rows()
