"""Timed generation over a workload.

At batch size 1 a small model is bound by how fast Python launches kernels, then by reading the weights once a token;
large batches share that reading and are bound by arithmetic and by the cache's memory. Wall clock is taken between
device synchronizations; warm-up is apart. "Seconds per request" is total time over requests, what the paper calls
average latency; a request really waits for its whole batch, so the batch's latency stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from qnb.batch import Largest, is_out_of_memory, largest
from qnb.decode import ENGINES
from qnb.device import MIB
from qnb.model import quiet, release
from qnb.monitor import ProcessSensor, Usage, Window, sensor
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

    On a GPU a batch fits when it runs; the reading is the allocator's peak. On a CPU, where memory does not run out
    but swaps, it fits when the process stays within `limit_mib` above `baseline_mib`.

    Raises
    ------
    InputError
        Not even one request fits.
    """
    generate, device = ENGINES[engine], model.device

    def try_batch(batch_size: int) -> float | None:
        prompts = [workload.longest] * batch_size
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                with quiet():
                    generate(model, prompts, workload.new_tokens)
                return torch.cuda.max_memory_allocated(device) / MIB
            sense = ProcessSensor()
            with quiet(), Window(sense.sample, sense.source, 0.01, baseline_mib) as window:
                generate(model, prompts, workload.new_tokens)
            return window.usage.peak_memory_mib
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            release()

    return largest(try_batch, limit_mib, cap)
