"""Which machines measure: connect to Ray, ask its nodes what they are, and share them out among workers."""

from __future__ import annotations

import logging
import os
import platform
import re
import signal
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from typing import Any
from unittest.mock import patch

from tqdm.auto import tqdm

from qnb import device
from qnb.device import Device
from qnb.errors import InputError, refusing, scrub
from qnb.memory import MIB
from qnb.options import check_count

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


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as it describes itself."""

    id: str
    host: str
    gpus: float
    cores: Sequence[int]  # as many as the cluster has of it
    device: Device
    versions: Mapping[str, str]
    asked_at: str = ""  # its clock's time then; what a run overwrites is older


def describe(node_id: str, resources: Mapping[str, float], kind: str) -> Node:
    """Describe the machine that this runs on, whose resources are those that Ray knows."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = cores[: max(1, int(resources.get("CPU", 0)))]
    gpus, asked_at = resources.get("GPU", 0.0), datetime.now(UTC).isoformat(timespec="seconds")
    return Node(node_id, platform.node(), gpus, cores, device.detect(kind), device.versions(), asked_at)


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
        with refusing("workers and --dry-run need Ray: pip install 'ray>=2.54', or give neither", ModuleNotFoundError):
            import ray
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
        if not options.address:
            quiet |= {"object_store_memory": STORE_BYTES, "include_dashboard": False}
        advice = "give HOST:PORT of one, and where it asks for a token, RAY_AUTH_MODE=token and its auth_token"
        with refusing(f"no Ray cluster can be joined at {options.address or 'this machine'}; {advice}"):
            if options.address not in ("", "auto"):  # where nobody answers, Ray tries for minutes
                host, _, port = options.address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
            handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
            ray.init(options.address or "local", **quiet)
            for each, handler in handlers.items():  # Ray's own abort the process
                signal.signal(each, handler)
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
            nodes.append(ray.get(answer, timeout=ANSWER_S))
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
