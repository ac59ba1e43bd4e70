"""Timed generation over a workload.

At batch size 1 a small model is bound by how fast Python launches kernels, then by reading the weights once a token;
large batches share that reading and are bound by arithmetic and by the cache's memory. Wall clock is taken between
device synchronizations; warm-up is apart. "Seconds per request" is total time over requests, what the paper calls
average latency; a request really waits for its whole batch, so the batch's latency stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from qnb.batch import OUT_OF_MEMORY, Apart, Largest, Probe, is_out_of_memory, largest
from qnb.decode import ENGINES
from qnb.device import MIB
from qnb.model import load, quiet, release
from qnb.monitor import ProcessSensor, Usage, Window, sensor
from qnb.precision import Precision
from qnb.workload import Workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Run:
    """One timed pass over a workload."""

    engine: str
    batch_size: int
    requests: int  # completed, warm-up excluded
    prompt_tokens: int  # of the longest prompt
    new_tokens: int  # of every request
    total_s: float  # wall clock between device synchronizations
    batch_s: tuple[float, ...]  # each batch's wall clock, in order
    peak_allocated_mib: float | None  # torch allocator's peak, weights included; None on a CPU
    peak_reserved_mib: float | None
    usage: Usage  # of the device or of the process

    @property
    def throughput_rps(self) -> float:
        """Requests per second, as in Tables 3 and 4 of the paper."""
        return self.requests / self.total_s

    @property
    def seconds_per_request(self) -> float:
        """Total time over requests: the paper's "average latency"."""
        return self.total_s / self.requests

    @property
    def throughput_tps(self) -> float:
        """New tokens per second, all rows together."""
        return self.requests * self.new_tokens / self.total_s

    @property
    def batch_latency_s(self) -> float:
        """Median seconds from a batch's start to its last token: what one request waits for."""
        return median(self.batch_s)

    @property
    def memory_mib(self) -> float | None:
        """Peak memory: the torch allocator's on a GPU, the process's growth since before loading on a CPU."""
        return self.peak_allocated_mib if self.peak_allocated_mib is not None else self.usage.peak_memory_mib


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(
    model: PreTrainedModel,
    workload: Workload,
    batch_size: int = 1,
    engine: str = "eager",
    baseline_mib: float = 0.0,
    period_s: float = 0.1,
) -> Run:
    """Generate for every prompt of `workload`, `batch_size` at a time, and time it.

    Parameters
    ----------
    model
        A loaded model; its device is the one watched.
    workload
        Prompts and the number of new tokens.
    batch_size
        Rows a batch; the last batch may be smaller.
    engine
        A name in `decode.ENGINES`.
    baseline_mib
        What the sensor read before the model was loaded.
    period_s
        Seconds between two samples of the monitor.

    Raises
    ------
    torch.cuda.OutOfMemoryError
        The batch does not fit.
    """
    generate, device = ENGINES[engine], model.device
    prompts = workload.prompts
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    with quiet():
        generate(model, batches[0], min(WARM_UP_TOKENS, workload.new_tokens))
        _synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        sense, batch_s = sensor(device), []
        with Window(sense.sample, sense.source, period_s, baseline_mib) as window:
            started = before = perf_counter()
            for batch in batches:
                generate(model, batch, workload.new_tokens)
                _synchronize(device)
                now = perf_counter()
                batch_s.append(now - before)
                before = now
            total_s = before - started
    on_gpu = device.type == "cuda"
    return Run(
        engine=engine,
        batch_size=batch_size,
        requests=len(prompts),
        prompt_tokens=len(workload.longest),
        new_tokens=workload.new_tokens,
        total_s=total_s,
        batch_s=tuple(batch_s),
        peak_allocated_mib=torch.cuda.max_memory_allocated(device) / MIB if on_gpu else None,
        peak_reserved_mib=torch.cuda.max_memory_reserved(device) / MIB if on_gpu else None,
        usage=window.usage,
    )


def largest_batch(
    model: PreTrainedModel,
    workload: Workload,
    limit_mib: float,
    cap: int,
    engine: str = "eager",
    baseline_mib: float = 0.0,
) -> Largest:
    """Find the largest batch of the workload's longest prompt, with all its new tokens, that fits.

    On a GPU a batch fits when it runs and the allocator reserves no more than `limit_mib`, to which the caller holds
    it. On a CPU, where memory does not run out but swaps, it fits when the process stays within `limit_mib` above
    `baseline_mib`.

    Raises
    ------
    InputError
        Not even one request fits.
    """
    return largest(trial(model, workload, limit_mib, engine, baseline_mib), limit_mib, cap)


def largest_batch_apart(
    folder: str | Path,
    precision: Precision,
    device: str,
    workload: Workload,
    limit_mib: float,
    cap: int,
    engine: str = "eager",
) -> Largest:
    """Find the largest batch as `largest_batch` does, in a process of its own that loads the model from `folder`.

    A batch that ends that process counts as one that does not fit. The caller should hold no model on the device.

    Raises
    ------
    InputError
        Not even one request fits, or the model cannot be loaded.
    """
    longest = Workload((workload.longest,), workload.new_tokens, workload.source)
    with Apart(trial_of, folder, precision, device, longest, limit_mib, engine) as try_batch:
        return largest(try_batch, limit_mib, cap, counted(folder, len(workload.longest)))


def counted(folder: str | Path, prompt_tokens: int) -> int:
    """Return how many prompts a model's widest layer turns into outputs that 32 bits count; 0 where it is not known.

    INT8 is expected to end its process beyond (`batch.Apart`).
    """
    from transformers import AutoConfig

    width = getattr(AutoConfig.from_pretrained(folder), "intermediate_size", None)
    return (2**31 - 1) // (prompt_tokens * width) if width else 0


def trial_of(
    folder: str | Path, precision: Precision, device: str, workload: Workload, limit_mib: float, engine: str = "eager"
) -> Callable[[int], Probe]:
    """Load the model from `folder`, hold a GPU's allocator to `limit_mib`, and return the model's `trial`."""
    baseline_mib = 0.0
    if device == "cuda":
        total_mib = torch.cuda.get_device_properties(device).total_memory / MIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_mib / total_mib))
    else:
        release()
        baseline_mib = ProcessSensor().sample()["memory_mib"]
    return trial(load(folder, precision, device), workload, limit_mib, engine, baseline_mib)


def trial(
    model: PreTrainedModel, workload: Workload, limit_mib: float, engine: str = "eager", baseline_mib: float = 0.0
) -> Callable[[int], Probe]:
    """Return what tries a batch of the workload's longest prompt, and leaves memory as it found it.

    A few tokens are generated first, so that kernels and workspaces loaded once are no batch's.
    """
    generate, device = ENGINES[engine], model.device
    on_gpu = device.type == "cuda"

    def run_out(batch_size: int, new_tokens: int) -> bool:
        try:
            with quiet():
                generate(model, [workload.longest] * batch_size, new_tokens)
            _synchronize(device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return True
        return False

    def on_device(batch_size: int) -> Probe:
        release()
        idle_mib = torch.cuda.memory_allocated(device) / MIB
        room_mib = (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / MIB
        retries = torch.cuda.memory_stats(device)["num_alloc_retries"]
        torch.cuda.reset_peak_memory_stats(device)
        started = perf_counter()
        out = run_out(batch_size, workload.new_tokens)
        read: dict[str, Any] = {"idle_mib": idle_mib, "room_mib": room_mib, "took_s": perf_counter() - started}
        memory_mib = torch.cuda.max_memory_reserved(device) / MIB
        live_mib = torch.cuda.max_memory_allocated(device) / MIB
        squeezed = torch.cuda.memory_stats(device)["num_alloc_retries"] > retries
        release()
        if out:
            return Probe(batch_size, False, **read, ended=OUT_OF_MEMORY)
        return Probe(batch_size, memory_mib <= limit_mib, memory_mib, live_mib, squeezed, **read)

    def on_cpu(batch_size: int) -> Probe:
        release()
        sense, started = ProcessSensor(), perf_counter()
        with Window(sense.sample, sense.source, 0.01, baseline_mib) as window:
            out = run_out(batch_size, workload.new_tokens)
        took_s, memory_mib = perf_counter() - started, window.usage.peak_memory_mib
        release()
        if out:
            return Probe(batch_size, False, took_s=took_s, ended=OUT_OF_MEMORY)
        return Probe(batch_size, memory_mib is None or memory_mib <= limit_mib, memory_mib, took_s=took_s)

    run_out(1, min(WARM_UP_TOKENS, workload.new_tokens))
    return on_device if on_gpu else on_cpu
