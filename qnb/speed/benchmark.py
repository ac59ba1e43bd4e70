"""Time generation over a workload.

Wall clock is taken between device synchronizations. Warm-up comes first; memory, kernels and tokens are read in passes
of their own. At batch size 1 a small model is bound by how fast Python launches kernels, then by reading the weights
once a token. Large batches share that reading and are bound by arithmetic and by the KV cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

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
from qnb.speed.engines import Clock, Engine, Prompts
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
        requests = self.run.batch_size
        rows = [
            (batch, token, t_s) for batch, times in enumerate(self.token_times_s) for token, t_s in enumerate(times)
        ]
        return [{"batch": batch, "requests": requests, "token": token, "t_s": t_s} for batch, token, t_s in rows]


class Shape(NamedTuple):
    """What an engine is built for."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int


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
    batches, on_gpu = full_batches(workload.prompts, batch_size), model.device.type == "cuda"
    shape = Shape(len(batches[0]), len(workload.longest), workload.new_tokens)
    engines.check_context_window(model.config, shape.prompt_tokens, shape.new_tokens)
    flags = [Flag.PEAKS_DISTURBED] if peaks and peaks.flags else []
    values: dict[str, Any] = {}
    with quiet():
        # 1) build the engine
        generator = _build(model, engine, workload.longest, shape)
        # 2) read the allocator's peak
        if on_gpu and "memory" in passes:
            values |= _peak_memory(generator, workload.longest, shape, model.device)
        # 3) warm up and time
        _warm_up(generator, batches, shape.new_tokens)
        sensor = open_sensor(model.device)
        with Window(sensor, baseline_mib=baseline_mib) as window:
            batch_s, token_times_s, tokens = _time(generator, batches, shape.new_tokens, model.device)
        # 4) trace kernels
        if on_gpu and "trace" in passes and shape.new_tokens > 1:
            trace = partial(trace_decode, generator, batches[0], shape.new_tokens, model.device)
            values |= _attempt(trace, flags, Flag.TRACE_FAILED)
        # 5) compare tokens with eager's
        if engine != "eager" and "comparison" in passes:
            prompt, eager = batches[0][:1], engines.Eager(model)
            values |= _attempt(
                lambda: engines.compare_tokens(model, prompt, eager.generate(prompt, shape.new_tokens), tokens),
                flags,
                Flag.COMPARISON_FAILED,
            )
    # 6) count a step's work
    values |= _attempt(partial(count_work, model, *shape), flags)
    values |= shape._asdict() | _latency(batch_s, token_times_s)
    if peaks:
        values |= peaks.columns(values.get("flops_by_type"))
    values["flags"] = (*flags_of(window.usage), *flags)
    values["note"] = "; ".join(filter(None, (generator.note, sensor.note)))
    requests = shape.batch_size * len(batches)
    result = Run(**asdict(window.usage), **values, requests=requests, total_s=sum(batch_s), batch_s=tuple(batch_s))
    return Timed(result, window.readings, token_times_s)


def full_batches(prompts: Prompts, batch_size: int) -> list[Prompts]:
    """Cut prompts into batches of one size. Where there are fewer, all make one batch.

    Prompts that would make a smaller last batch are left out: it is another batch size.
    """
    batch_size = min(batch_size, len(prompts))
    last = len(prompts) - len(prompts) % batch_size
    return [prompts[start : start + batch_size] for start in range(0, last, batch_size)]


def _build(model: PreTrainedModel, engine: str, longest: Sequence[int], shape: Shape) -> Engine:
    """Build the engine; on a GPU, first load the kernels and workspaces that stay as long as the model.

    A workspace taken in the midst of a batch would stand between pieces of memory ever after, and be counted as the
    batch's.
    """
    make = engines.FACTORIES[engine]
    if model.device.type == "cuda":
        release(workspaces=True)
        rows = min(shape.batch_size, engines.warm_up_batch_sizes(engine, shape.prompt_tokens)[-1])
        warm_up = make(model, *shape._replace(batch_size=rows))
        warm_up.generate([longest] * rows, min(WARM_UP_TOKENS, shape.new_tokens))
        del warm_up
        release()
        torch.cuda.reset_peak_memory_stats(model.device)
    return make(model, *shape)


def _peak_memory(generator: Engine, longest: Sequence[int], shape: Shape, device: torch.device) -> dict[str, float]:
    generator.generate([longest] * shape.batch_size, shape.new_tokens)
    torch.cuda.synchronize(device)
    return {
        "peak_allocated_mib": torch.cuda.max_memory_allocated(device) / MIB,
        "peak_reserved_mib": torch.cuda.max_memory_reserved(device) / MIB,
    }


def _warm_up(generator: Engine, batches: Sequence[Prompts], new_tokens: int) -> None:
    """Generate a few tokens for the first batch, and for one of uneven prompts, which is read under a mask."""
    uneven = next((batch for batch in batches if len(set(map(len, batch))) > 1), batches[0])
    for batch in (uneven, batches[0]):
        generator.generate(batch, min(WARM_UP_TOKENS, new_tokens))


def _time(
    generator: Engine, batches: Sequence[Prompts], new_tokens: int, device: torch.device
) -> tuple[list[float], list[list[float]], torch.Tensor]:
    """Return each batch's seconds, the times of its tokens, and the first request's new ids, (1, N)."""
    clocks, ends_s, first_tokens = [], [], torch.empty(0)
    for batch in (None, *batches):
        if batch is not None:
            clocks.append(Clock(device))
            tokens = generator.generate(batch, new_tokens, clocks[-1])  # (B, N)
            first_tokens = first_tokens if len(first_tokens) else tokens[:1]  # (1, N)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends_s.append(perf_counter())
    return np.diff(ends_s).tolist(), [clock.elapsed_s() for clock in clocks], first_tokens


def _latency(batch_s: Sequence[float], token_times_s: Sequence[Sequence[float]]) -> dict[str, Any]:
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


def _attempt(work: Callable[[], Any], flags: list[Flag], flag: Flag | None = None) -> dict[str, Any]:
    """Return the fields of what `work` measures beside the timing; where it fails, log why and set `flag`."""
    try:
        return asdict(twice(work))
    except Exception as error:  # bookkeeping must not take the measurement with it
        LOG.warning("%s: %s: %s", flag or "a decode step's work was not counted", type(error).__name__, error)
        flags += [flag] if flag else []
        return {}
