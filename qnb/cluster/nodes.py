"""Which machines measure: connect to Ray, ask its nodes what they are, and share them out among workers."""

from __future__ import annotations

import logging
import os
import platform
import re
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from qnb import device
from qnb.device import Device
from qnb.errors import InputError, scrub
from qnb.memory import MIB

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


def describe(node_id: str, gpus: float, cpus: int, choice: str) -> Node:
    """Describe the machine that this runs on, of whose cores the cluster has `cpus`."""
    import psutil

    os.environ.pop(device.CHOICE, None)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    free_bytes = int(psutil.virtual_memory().available)
    cores = cores[: max(1, cpus)]
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
            with _own_signals():
                ray.init("local", num_cpus=cores, object_store_memory=STORE_BYTES, include_dashboard=False, **quiet)
        else:
            _check_address(options.address)
            try:
                with _own_signals():
                    ray.init(address=options.address, **quiet)
            except Exception as error:  # ConnectionError, or RuntimeError for another version
                reason = scrub(" ".join(str(error).split()), 300)
                raise InputError(
                    f"the Ray cluster at {options.address} cannot be joined ({reason}); where it asks for a token, "
                    "set RAY_AUTH_MODE=token here too, and have the same ~/.ray/auth_token"
                ) from error
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handlers of signals, which Ray replaces as it starts: its own abort the process."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield
    if threading.current_thread() is threading.main_thread():
        for each, handler in before.items():
            signal.signal(each, handler)


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
    """Return the cluster's nodes, as they describe themselves.

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
    gpus, cpus = ({node["NodeID"]: node["Resources"].get(kind, 0.0) for node in listed} for kind in ("GPU", "CPU"))
    takes_gpus = wanted == "cuda" or (wanted == "auto" and any(gpus.values()))
    if takes_gpus and not any(gpus.values()):
        raise InputError(f"device is {wanted!r}, and no node of the cluster has a GPU; take 'auto' or 'cpu'")
    choice = "cuda" if takes_gpus else "cpu"
    task = ray.remote(num_cpus=0, num_gpus=int(takes_gpus), max_calls=1)(describe)
    asked = []
    for node in listed:
        if gpus[node["NodeID"]] or not takes_gpus:
            there = task.options(scheduling_strategy=on_node(node["NodeID"]))
            about = (node["NodeID"], gpus[node["NodeID"]], int(cpus[node["NodeID"]]), choice)
            asked.append((node["NodeManagerHostname"], there.remote(*about)))
    nodes = []
    for name, answer in asked:
        try:
            nodes.append(ray.get(answer, timeout=ANSWER_S))
        except ray.exceptions.GetTimeoutError as error:
            raise InputError(f"node {name} does not answer within {ANSWER_S:.0f} s: its GPUs may be in use") from error
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


def on_node(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


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
