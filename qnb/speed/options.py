"""What a user may ask of the speed stages. Each class checks its values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qnb import prompts
from qnb.errors import InputError
from qnb.options import Count, check_count, check_requests
from qnb.prompts import Workload

Engines = str | Iterable[str]  # names in `qnb.speed.engines.FACTORIES`; "auto" is all that can run on the device
SETTINGS = ("bs1", "maxbatch")


class _Checked:
    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "setting" and value not in SETTINGS:
                raise InputError(f"setting is {value!r}; give {' or '.join(map(repr, SETTINGS))}")
            if name == "requests":
                check_requests(f"{vars(self)['setting']}_requests", value)
            if name == "workload" and not isinstance(value, Workload):
                raise InputError(f"workload is {value!r}; give what study.workload('bs1') or ('maxbatch') returns")
            if name == "prompt_source" and value != "auto":
                prompts.check(value)
            if name == "largest":
                check_count("sweep_batch", value)
            if name in ("prompt_tokens", "new_tokens", "max_batch", "memory_mib", "repeats"):
                check_count(name, value)


@dataclass(frozen=True)
class WorkloadOptions(_Checked):
    """Which prompts every format gets.

    Parameters
    ----------
    setting
        ``"bs1"`` or ``"maxbatch"``: the default of `requests` depends on it.
    requests
        How many prompts; or a time such as ``"4 minutes"`` for as many as it allows, all formats, `engines` and
        `repeats` together.
    prompt_tokens, new_tokens
        The most tokens of a prompt, and the new tokens of each.
    prompt_source
        ``"wikitext"``, ``"sample"``, or ``"auto"``: WikiText-2 where there is a GPU or a `data_dir`.
    engines, repeats
        As for `BatchOneOptions`.

    Raises
    ------
    InputError
        A value is none of these.
    """

    setting: str
    requests: Count = "auto"
    prompt_tokens: Count = "auto"
    new_tokens: Count = "auto"
    prompt_source: str = "auto"
    engines: Engines = "auto"
    repeats: int = 1


@dataclass(frozen=True)
class BatchOneOptions(_Checked):
    """What is timed one request at a time.

    Parameters
    ----------
    workload
        The requests.
    repeats
        The most passes. After three at the earliest, a format and engine that has settled gets no further one.
    engines
        ``"eager"``, ``"cuda_graph"`` or both; ``"auto"`` is both on a GPU, else eager.

    Raises
    ------
    InputError
        A value is none of these.
    """

    workload: Workload
    repeats: int = 1
    engines: Engines = "auto"


@dataclass(frozen=True)
class LargestBatchOptions(_Checked):
    """What is timed in the largest batch.

    Parameters
    ----------
    workload
        The requests. The search takes the longest of them with all its new tokens.
    max_batch
        The largest batch worth trying.
    memory_mib
        The memory allowed: of a GPU, where ``"auto"`` is all; on a CPU, how much the process may grow.
    repeats, engines
        As for `BatchOneOptions`.

    Raises
    ------
    InputError
        A value is none of these.
    """

    workload: Workload
    max_batch: Count = "auto"
    memory_mib: Count = "auto"
    repeats: int = 1
    engines: Engines = "auto"


@dataclass(frozen=True)
class SweepOptions(_Checked):
    """Which batch sizes are swept.

    Parameters
    ----------
    workload
        Its prompts are repeated as often as the batches need.
    largest
        The largest batch; 0 is no sweep. On a GPU ``"auto"`` is the largest batch found for the format and engine, or
        256 where none was searched; on a CPU it is 0.
    engines
        As for `BatchOneOptions`.

    Raises
    ------
    InputError
        A value is none of these.
    """

    workload: Workload
    largest: Count = "auto"
    engines: Engines = "auto"


@dataclass(frozen=True)
class PlanOptions(_Checked):
    """Which prompts are planned in batches: their source as for `WorkloadOptions`, and several numbers of them.

    Raises
    ------
    InputError
        The source is unknown, or there is no number or one that is not positive.
    """

    prompt_source: str = "auto"
    counts: Sequence[int] = (20, 2000, 5000)

    def __post_init__(self) -> None:
        if not isinstance(self.counts, list | tuple) or not self.counts:
            raise InputError(f"counts is {self.counts!r}; give numbers of prompts, such as (2000, 5000)")
        for each in self.counts:
            check_count("counts", each)
        super().__post_init__()
