"""Time generation over a workload.

Wall clock is taken between device synchronizations. Warm-up comes first; memory, kernels and tokens are read in passes
of their own. At batch size 1 a small model is bound by how fast Python launches kernels, then by reading the weights
once a token. Large batches share that reading and are bound by arithmetic and by the KV cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from qnb.columns import Flag
from qnb.memory import MIB, is_out_of_memory, release
from qnb.prompts import Workload
from qnb.quantize.checkpoint import quiet
from qnb.speed import engines
from qnb.speed.decode_work import Work, count_work
from qnb.speed.device_peaks import DevicePeaks
from qnb.speed.engines import Clock, Prompts
from qnb.speed.kernel_trace import Trace, trace_decode
from qnb.speed.monitor import Reading, Usage, Window, flags_of, open_sensor

LOG = logging.getLogger(__name__)
Result = TypeVar("Result")

WARM_UP_TOKENS = 4
# Passes beside the timed one: the allocator's peak over the longest prompts, and kernels, both on a GPU only; tokens
# beside eager's, for other engines
PASSES = ("memory", "trace", "comparison")


@dataclass(frozen=True, kw_only=True)
class Run(Work, Trace, Usage):
    """One timed pass over a workload: `asdict` of it is its ledger row. None where something was not measured."""

    batch_size: int
    requests: int  # in full batches, warm-up excluded
    prompt_tokens: int  # of the longest prompt
    new_tokens: int  # of every request
    total_s: float
    batch_s: tuple[float, ...]  # of each batch, in order
    ttft_s: float  # median time to a batch's first new token
    tpot_s: float | None = None  # median over batches of the mean time of a new token after the first
    itl_p50_s: float | None = None  # percentiles of the time between two tokens
    itl_p95_s: float | None = None
    itl_p99_s: float | None = None
    latency_p50_s: float  # percentiles of the time of a batch
    latency_p95_s: float
    latency_p99_s: float
    peak_allocated_mib: float | None = None  # of torch's allocator, weights included; on a GPU only
    peak_reserved_mib: float | None = None
    peak_bytes_per_s: float | None = None  # the device's, see `DevicePeaks`
    peak_flop_per_s: float | None = None  # the device's, for the types that this model multiplies in
    idle_power_w: float | None = None
    compared_tokens: int | None = None  # with eager's, see `qnb.speed.engines.compare_tokens`
    first_difference: int | None = None
    difference_margin: float | None = None
    flags: tuple[Flag, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Timed:
    """A run, and what it was reduced from."""

    run: Run
    readings: list[Reading]  # of the monitor
    token_times_s: list[list[float]]  # of each batch: seconds from its start to each new token

    def token_rows(self) -> list[dict[str, float]]:
        """Return a row a batch and new token: t_s is when it was there."""
        return [
            {"batch": batch, "token": token, "t_s": seconds}
            for batch, times_s in enumerate(self.token_times_s)
            for token, seconds in enumerate(times_s)
        ]


def run(
    model: PreTrainedModel,
    workload: Workload,
    batch_size: int = 1,
    engine: str = "eager",
    baseline_mib: float | None = 0.0,
    peaks: DevicePeaks | None = None,
    passes: Sequence[str] = PASSES,
) -> Timed:
    """Generate for the workload's prompts in full batches, and time it.

    `engine` is a name in `qnb.speed.engines.FACTORIES`, `baseline_mib` the memory in use before the model was loaded
    (None where unknown), and `peaks` the device's, stored beside what they are compared with. Where a trace or a
    comparison fails, the timing stays and a flag says so.

    Raises
    ------
    InputError
        The engine cannot run this model here, or a request is longer than the context window.
    torch.cuda.OutOfMemoryError
        The batch does not fit.
    """
    engines.check_context_window(model.config, len(workload.longest), workload.new_tokens)
    bench = _Bench(model, workload, batch_size, engine)
    on_gpu = model.device.type == "cuda"
    with quiet():
        # 1) build the engine and warm up
        bench.build()
        # 2) read the allocator's peak
        if on_gpu and "memory" in passes:
            bench.read_peak_memory()
        # 3) time
        bench.time(baseline_mib)
        # 4) trace kernels
        if on_gpu and "trace" in passes and workload.new_tokens > 1:
            bench.attempt(bench.trace, Flag.TRACE_FAILED)
        # 5) compare tokens with eager's
        if engine != "eager" and "comparison" in passes:
            bench.attempt(bench.compare, Flag.COMPARISON_FAILED)
    return bench.result(peaks)


def full_batches(prompts: Prompts, batch_size: int) -> list[Prompts]:
    """Cut prompts into batches of one size. Where there are fewer, all make one batch.

    Prompts that would make a smaller last batch are left out: it is another batch size.
    """
    batch_size = min(batch_size, len(prompts))
    last = len(prompts) - len(prompts) % batch_size
    return [prompts[start : start + batch_size] for start in range(0, last, batch_size)]


class _Bench:
    """The passes over a workload with one engine. `values` are the row's; each pass adds its own."""

    def __init__(self, model: PreTrainedModel, workload: Workload, batch_size: int, engine: str) -> None:
        self.model, self.device, self.engine_name = model, model.device, engine
        self.longest, self.new_tokens = workload.longest, workload.new_tokens
        self.batches = full_batches(workload.prompts, batch_size)
        self.shape = (len(self.batches[0]), len(workload.longest), workload.new_tokens)
        self.flags: list[Flag] = []
        self.values: dict[str, Any] = {}

    def build(self) -> None:
        """Build the engine; on a GPU, first load the kernels and workspaces that stay as long as the model.

        A workspace taken in the midst of a batch would stand between pieces of memory ever after, and be counted as
        the batch's.
        """
        make, (batch_size, prompt_tokens, new_tokens) = engines.FACTORIES[self.engine_name], self.shape
        if self.device.type == "cuda":
            release(workspaces=True)
            rows = min(batch_size, engines.warm_up_batch_sizes(self.engine_name, prompt_tokens)[-1])
            make(self.model, rows, prompt_tokens, new_tokens).generate(
                [self.longest] * rows, min(WARM_UP_TOKENS, new_tokens)
            )
            release()
            torch.cuda.reset_peak_memory_stats(self.device)
        self.engine = make(self.model, *self.shape)

    def read_peak_memory(self) -> None:
        """Generate for a batch of the longest prompts, and read the allocator."""
        self.engine.generate([self.longest] * self.shape[0], self.new_tokens)
        self.synchronize()
        self.values["peak_allocated_mib"] = torch.cuda.max_memory_allocated(self.device) / MIB
        self.values["peak_reserved_mib"] = torch.cuda.max_memory_reserved(self.device) / MIB

    def time(self, baseline_mib: float | None) -> None:
        """Warm up, then time every batch under the monitor."""
        padded = (batch for batch in self.batches if min(map(len, batch)) < len(self.longest))  # read under a mask
        for batch in (next(padded, self.batches[0]), self.batches[0]):
            self.engine.generate(batch, min(WARM_UP_TOKENS, self.new_tokens))
        self.synchronize()
        clocks: list[Clock] = []
        outputs: list[torch.Tensor] = []
        sensor = open_sensor(self.device)
        with Window(sensor, baseline_mib=baseline_mib) as self.window:
            ends_s = [perf_counter()]
            for batch in self.batches:
                clocks.append(Clock(self.device))
                outputs.append(self.engine.generate(batch, self.new_tokens, clocks[-1])[:1])  # (1, N)
                self.synchronize()
                ends_s.append(perf_counter())
        self.first_tokens = outputs[0]
        self.token_times_s = [clock.elapsed_s() for clock in clocks]
        batch_s = np.diff(ends_s).tolist()
        self.values |= asdict(self.window.usage) | latency(batch_s, self.token_times_s)
        self.values |= {"batch_s": tuple(batch_s), "total_s": sum(batch_s)}
        self.values["note"] = "; ".join(filter(None, (self.engine.note, sensor.note)))

    def trace(self) -> Trace:
        """Trace the kernels of a decode step."""
        return trace_decode(self.engine, self.batches[0], self.new_tokens, self.device)

    def compare(self) -> engines.TokenComparison:
        """Compare the first request's tokens with eager's."""
        prompt = self.batches[0][:1]
        eager_tokens = engines.Eager(self.model).generate(prompt, self.new_tokens)
        return engines.compare_tokens(self.model, prompt, eager_tokens, self.first_tokens)

    def attempt(self, measure: Callable[[], Any], flag: Flag | None = None) -> None:
        """Add what `measure` tells beside the timing; where it fails, log why and set `flag`."""
        try:
            self.values |= asdict(twice(measure))
        except Exception as error:  # bookkeeping must not take the measurement with it
            LOG.warning("%s: %s: %s", flag or "work not counted", type(error).__name__, error)
            self.flags += [flag] if flag else []

    def result(self, peaks: DevicePeaks | None) -> Timed:
        """Count a step's work, and reduce all passes to a row."""
        self.attempt(lambda: count_work(self.model, *self.shape))
        if peaks:
            self.values |= peaks.columns(self.values.get("flops_by_type"))
            self.flags += [Flag.PEAKS_DISTURBED] if peaks.flags else []
        shape: dict[str, Any] = dict(zip(("batch_size", "prompt_tokens", "new_tokens"), self.shape, strict=True))
        flags = (*flags_of(self.window.usage), *self.flags)
        result = Run(**self.values, **shape, requests=sum(map(len, self.batches)), flags=flags)
        return Timed(result, self.window.readings, self.token_times_s)

    def synchronize(self) -> None:
        """Wait until a GPU has done what was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def latency(batch_s: Sequence[float], token_times_s: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Reduce the times of batches and tokens to medians and percentiles; what needs two tokens may be missing."""
    gaps_s = [np.diff(times_s) for times_s in token_times_s if len(times_s) > 1]
    latency: dict[str, Any] = {"ttft_s": median(times_s[0] for times_s in token_times_s)}
    if gaps_s:
        latency["tpot_s"] = median(float(gaps.mean()) for gaps in gaps_s)
    for name, values in (("itl", np.concatenate(gaps_s) if gaps_s else ()), ("latency", batch_s)):
        for share in (50, 95, 99) if len(values) else ():
            latency[f"{name}_p{share}_s"] = float(np.percentile(values, share))
    return latency


def twice(work: Callable[[], Result]) -> Result:
    """Return what `work` does. Where memory runs out, give back what is held in pieces and do it once more."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release()
    return work()
