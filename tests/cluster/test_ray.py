"""A real Ray on two cores: a study by two workers is the study of one, whatever dies meanwhile."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import SECRET, command

from qnb import Study
from qnb import precision as precisions
from qnb.__main__ import main
from qnb.cluster import driver
from qnb.cluster.driver import ClusterOptions
from qnb.cluster.plan import Cell
from qnb.cluster.worker import Node
from qnb.device import Device
from qnb.errors import InputError
from qnb.ledger import Ledger, row_key
from qnb.run import NAMES, NOTEBOOKS, notebook_parameters

ray = pytest.importorskip("ray")
# of a row: when, where, in what order and by which command it was measured, and what takes another time each time
OF_ONE_RUN = {"measured_at", "command", "commit", "node", "gpu", "worker", "host_peak_mib", "flags", "note",
              "device_memory_mib"}  # fmt: skip
TIMED = ("perf", "batch", "peaks", "sweep")


def same(row):
    """Return what a row of one run shares with that of another: of timings, what was asked and counted."""
    asked = {"fingerprint", "batch_size", "requests", "new_tokens", "prompt_tokens", "bytes_per_step", "fits"}
    shared = {name: value for name, value in row.items() if name not in OF_ONE_RUN and not name.endswith("_s")}
    return {name: value for name, value in shared.items() if name in asked or row["stage"] not in TIMED}


def parameters(**given):
    defaults = [notebook_parameters(NOTEBOOKS / f"{name}.ipynb") for name in NAMES]
    return {key: value for each in defaults for key, value in each.items()} | {"minutes": 0} | given


def lines(folder):
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)  # with the smoke study, if this is the first test that needs it
def test_two_workers_told_to_end_and_killed_make_the_ledger_of_one(smoke, tmp_path):
    folder, temporary = tmp_path / "study", Path(tempfile.mkdtemp(prefix="ray"))  # a socket's path is short
    arguments = ["run", "--profile", "smoke", "--output", str(folder), "--workers", "2", "--only", "01,02,03,04"]
    environment = {"HF_TOKEN": SECRET, "RAY_TMPDIR": str(temporary)}

    def begin(until):
        process = subprocess.Popen([sys.executable, "-m", "qnb", *arguments], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})  # fmt: skip
        while not until():
            assert process.poll() is None
            time.sleep(0.1)
        return process

    # 1) told to end
    process = begin((folder / "ledger.jsonl").exists)
    process.terminate()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and error.splitlines()[-1].startswith("qnb: interrupted")
    # 2) killed: no port was open to the network, and its workers end with it
    process = begin(lambda: Ledger(folder).rows("perf"))
    parts = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    ports = [port for each in parts for port in each.net_connections("inet") if port.status == psutil.CONN_LISTEN]
    assert {port.laddr.ip.removeprefix("::ffff:") for port in ports} == {"127.0.0.1"}
    workers = [each for each in parts if each.name().startswith("ray::Worker")]
    process.kill()
    before = lines(folder)
    assert workers and not psutil.wait_procs(workers, timeout=60)[1]
    # 3) left alone: every cell was measured once, and the notebooks measured nothing
    done = command(*arguments, **environment)
    assert done.returncode == 0, done.stderr
    after = lines(folder)
    alone, both = ({row_key(row): same(row) for row in Ledger(each).rows()} for each in (smoke[0], folder))
    assert after[: len(before)] == before and len(after) == len(both) and both == alone
    measured = [row for row in after if row["stage"] != "lengths"]
    assert {row["worker"] for row in measured} == {"w0", "w1"} and all(row["node"] for row in measured)
    # the token is in no log of Ray's
    logs = [path.read_text(errors="replace") for path in temporary.rglob("*.log")]
    shutil.rmtree(temporary)
    assert logs and SECRET not in "".join(logs)


def wait_for(flag, then):
    """Do something with the process and the node of a cell, once it is at work."""

    def wait():
        while not (flag.exists() and flag.read_text()):
            time.sleep(0.1)
        then(*flag.read_text().split())

    threading.Thread(target=wait, daemon=True).start()


def slow(session, flag):
    """Hang the first time, and measure the next."""
    if not flag.exists():
        flag.write_text(f"{os.getpid()} {ray.get_runtime_context().get_node_id()}")
        time.sleep(300)
    session.append(session.key("lengths", None, {"cell": flag.name}, task=flag.name))


def test_a_killed_worker_and_a_lost_node_cost_no_row(tmp_path, source, monkeypatch):
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    settings = {"health_check_period_ms": 500}  # a lost node is missed in seconds
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": settings}
    ring = Cluster(initialize_head=True, head_node_args=head)
    second = ring.add_node(num_cpus=1)
    flags = [tmp_path / name for name in ("first", "second")]
    there = [tmp_path / name for name in ("third", "fourth")]
    for each in there:
        each.touch()
    plan = [Cell({"stage": "lengths", "task": each.name}, partial(slow, flag=each)) for each in (*flags, *there)]
    monkeypatch.setattr(driver, "plan", lambda *_: plan)

    def end(pid, node_id):
        """Take the second node away, and on the first the worker: each has one of the two cells that hang."""
        if node_id == second.node_id:
            ring.remove_node(second, allow_graceful=False)
        else:
            os.kill(int(pid), signal.SIGKILL)

    for flag in flags:
        wait_for(flag, end)
    study = Study("smollm2-135m", "bf16", tmp_path / "study", device="cpu")
    try:
        driver.measure(study, parameters(precisions="bf16"), {"02"}, ClusterOptions("2", ring.address))
    finally:
        ring.shutdown()
    rows = lines(study.folder)
    assert sorted(row["task"] for row in rows) == ["first", "fourth", "second", "third"]
    assert not study.session.ledger.failures()


def test_a_format_that_overflows_is_measured_again_in_all_cells(tmp_path, monkeypatch):
    crews = []

    class Overflowing:
        def __init__(self, ray, session, posts, cells):
            crews.append(posts[0].record.get("overflowed"))
            self.run = lambda *_: session.leave_float16(["nf4"])

    here = SimpleNamespace(get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "a"))
    monkeypatch.setattr(driver, "connected", lambda _: nullcontext(here))
    monkeypatch.setattr(driver, "find_nodes", lambda *_: [node("a", 0, CPU)])
    monkeypatch.setattr(driver, "Crew", Overflowing)
    study = Study("smollm2-135m", "nf4", tmp_path / "study", device="cpu")
    driver.measure(study, parameters(precisions="nf4"), {"01"}, ClusterOptions("1"))
    assert crews == [None, ["nf4"]]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--workers", "0"], "workers is '0'"),
        (["--gpus-per-model", "-1"], "gpus_per_model is '-1'"),
        (["--workers", "2", "-p", "minutes", "5"], "minutes is 5"),
        (["--ray-address", "127.0.0.1:1"], "no Ray cluster can be joined at 127.0.0.1:1"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, part, tmp_path, capsys):
    assert main(["run", "--profile", "smoke", "--output", str(tmp_path / "study"), *arguments]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1
    assert not (tmp_path / "study" / "ledger.jsonl").exists()


def test_without_ray_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="pip install"), driver.connected(ClusterOptions("2")):
        pass


CPU = Device("cpu", "a CPU", 1000.0, "native", "")
GPU = Device("cuda", "a GPU", 1000.0, "native", "")


def node(name, gpus=2.0, device=GPU):
    return Node(name, name, gpus, (0, 1, 2, 3), device, {})


def test_workers_are_spread_evenly_with_cores_of_their_own():
    shares = driver.share_out([node("a"), node("b")], "auto", 1.0)
    assert [(node.id, cores) for node, cores in shares] == [
        ("a", (0, 2)), ("a", (1, 3)), ("b", (0, 2)), ("b", (1, 3))
    ]  # fmt: skip
    assert [node.id for node, _ in driver.share_out([node("a"), node("b")], "3", 1.0)] == ["a", "a", "b"]
    assert len(driver.share_out([node("a")], "auto", 0.5)) == 4
    assert len(driver.share_out([node("a", 0, CPU), node("b", 0, CPU)], "auto", 1.0)) == 2
    with pytest.raises(InputError, match="room for 2"):
        driver.share_out([node("a")], "3", 1.0)


@pytest.mark.parametrize(("gpus", "only"), [("2", "01,02,03,05"), ("0.5", "01,02,05")])
def test_what_a_spread_or_shared_model_allows_is_named(gpus, only):
    session = SimpleNamespace(precisions=precisions.parse("bf16"), source=SimpleNamespace(parameters=10**6))
    assert driver.gpus_needed(session, [node("a")], gpus, {name for name in only.split(",")}) == float(gpus)
    with pytest.raises(InputError, match=f"--only {only}$"):
        driver.gpus_needed(session, [node("a")], gpus, {"03", "04"})


def test_only_nodes_with_the_gpu_model_of_most_gpus_measure():
    other = node("c", 3.0, Device("cuda", "another GPU", 1000.0, "native", ""))
    assert [each.id for each in driver._alike([node("a"), other, node("b")])] == ["a", "b"]


class OneNode:
    """Ray with one node, which describes itself as it is told."""

    def __init__(self, gpus, described):
        self._gpus, self._described = gpus, described

    def nodes(self):
        return [{"NodeID": "a" * 56, "Alive": True, "Resources": {"GPU": self._gpus}, "NodeManagerHostname": "box"}]

    def remote(self, **_):
        return lambda _: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: None))

    def get(self, *_, **__):
        if isinstance(self._described, Exception):
            raise self._described
        return self._described


@pytest.mark.parametrize(
    ("gpus", "described", "wanted", "part"),
    [
        (0.0, None, "cuda", "0 nodes have GPUs"),
        (1.0, TimeoutError(), "auto", "node box cannot take part: TimeoutError"),
        (0.0, ModuleNotFoundError("No module named 'qnb'"), "auto", "node box cannot take part: No module named"),
        (1.0, Node("a", "box", 1.0, (0,), GPU, {"torch": "1.0"}), "auto", "node box has torch 1.0"),
    ],
)
def test_a_node_that_cannot_take_part_is_named(gpus, described, wanted, part):
    with pytest.raises(InputError, match=part):
        driver.find_nodes(OneNode(gpus, described), wanted)


def test_an_address_where_no_ray_answers_is_given_up_in_one_line(tmp_path):
    with socket.socket() as silent:  # takes connections, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        done = command("run", "--profile", "smoke", "--output", str(tmp_path / "study"), "--ray-address", address)
    assert done.returncode == 2 and f"no Ray cluster can be joined at {address}" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_beyond_its_memory_is_spread_and_scores_alike(smoke, tmp_path):
    folder = tmp_path / "study"
    options = ["--output", str(folder), "--workers", "1", "--gpus-per-model", "2", "-p", "precisions", "bf16"]
    done = command("run", "--profile", "smoke", "--only", "02", *options, QNB_MEMORY_MIB="200")
    assert done.returncode == 0, done.stderr
    assert all(row["worker"] == "w0" for row in lines(folder))
    alone, spread = ({row_key(row): same(row) for row in Ledger(each).rows()} for each in (smoke[0], folder))
    assert len(spread) == 5 and spread.items() <= alone.items()
