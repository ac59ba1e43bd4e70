"""Timed generation over a workload.

At batch size 1 a small model is bound by how fast Python launches kernels, then by reading the weights once a token;
large batches share that reading and are bound by arithmetic and by the cache's memory. Wall clock is taken between
device synchronizations; warm-up is apart, and so are the passes that read memory, trace kernels and compare tokens.
"Seconds per request" is total time over requests, what the paper calls average latency; a request really waits for
its whole batch, so the batch's latency stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from qnb.device import MIB, detect
from qnb.precision import Precision
from qnb.prompts import Workload
from qnb.quantize.checkpoint import load, quiet, release, weigh
from qnb.speed.batch_search import OUT_OF_MEMORY, Apart, Largest, Probe, is_out_of_memory, largest
from qnb.speed.decode_step import FEW_ROWS
from qnb.speed.engines import (
    FACTORIES,
    RECORDED_TOKENS,
    Agreement,
    Clock,
    Eager,
    Engine,
    Prompts,
    agreement,
    check_window,
    give_back,
)
from qnb.speed.monitor import BUSY_LIMITS, SETTLED_S, ProcessSensor, Sample, Usage, Window, disturbed, sensor
from qnb.speed.roofline import bound

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Result = TypeVar("Result")

WARM_UP_TOKENS = 4
TRACED_STEPS = 8  # decode steps in the profiled pass
TIGHT = 0.95  # of the memory allowed: a batch that takes more has to fit twice
PROBES = {"eager": 6, "cuda_graph": 8}  # of a search for the largest batch; recorded, one takes a fraction of the time
WIDTH = 0.05  # of the 95 % interval over passes, relative to their mean, at which repeating may end
LEAST_PASSES = 3
PASSES = ("memory", "trace", "agreement")  # beside the timed one


@dataclass(frozen=True, slots=True)
class Limits:
    """What a device reaches on the simplest work there is: the roofs that a decode step is held against."""

    copy_bytes_per_s: float  # read and written, by a copy larger than any cache
    matmul_flop_per_s: dict[str, float]  # a square product by type; int8 counts operations
    idle_power_w: float | None  # of a GPU that waits with a context on it
    flags: Sequence[str] = ()  # what else was at work, even the last time they were measured

    def flop_per_s(self, flops: Mapping[str, float]) -> float | None:
        """Return the rate at which operations, given by type, can be done at most, one type after the other."""
        if not all(self.matmul_flop_per_s.get(name) for name in flops):
            return None
        return sum(flops.values()) / sum(count / self.matmul_flop_per_s[name] for name, count in flops.items())


@dataclass(frozen=True, slots=True)
class Work:
    """What one decode step has to do at least, counted from shapes, and the memory that takes."""

    weights_mib: float
    cache_mib: float  # keys and values of the whole batch at its end
    bytes_per_step: float  # every weight once, keys and values of half the new tokens
    flops: dict[str, float]  # by the type that multiplies, which decides the roof

    @property
    def flops_per_step(self) -> float:
        """Operations of all types."""
        return sum(self.flops.values())


@dataclass(frozen=True, slots=True)
class Trace:
    """Kernels of one decode step, from a profiled pass, whose wall clock would carry the profiler's own cost."""

    kernel_s: float
    kernels: float


@dataclass(frozen=True, slots=True)
class Run:
    """One timed pass over a workload."""

    engine: str
    batch_size: int
    requests: int  # completed in full batches, warm-up excluded
    prompt_tokens: int  # of the longest prompt
    new_tokens: int  # of every request
    total_s: float  # wall clock between device synchronizations
    batch_s: tuple[float, ...]  # each batch's wall clock, in order
    peak_allocated_mib: float | None  # torch allocator's peak, weights included; None on a CPU
    peak_reserved_mib: float | None
    usage: Usage  # of the device or of the process
    token_s: tuple[tuple[float, ...], ...] = ()  # a batch's new tokens, seconds since it was given
    readings: tuple[Sample, ...] = ()  # the monitor's
    work: Work | None = None
    trace: Trace | None = None  # None where it was not taken, or kernels cannot be seen
    limits: Limits | None = None
    agreement: Agreement | None = None  # with eager
    note: str = ""
    on_gpu: bool = False
    lost: tuple[str, ...] = ()  # passes beside the timed one that failed, and why

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
        """Peak memory: the torch allocator's on a GPU, where it was read; on a CPU the process's growth."""
        return self.peak_allocated_mib if self.on_gpu else self.usage.peak_memory_mib

    @property
    def ttft_s(self) -> float | None:
        """Median seconds to a batch's first new token."""
        return median(times[0] for times in self.token_s) if self.token_s else None

    @property
    def tpot_s(self) -> float | None:
        """Median seconds a new token after the first; None where there is only one."""
        means = [(times[-1] - times[0]) / (len(times) - 1) for times in self.token_s if len(times) > 1]
        return median(means) if means else None

    def percentiles(self) -> dict[str, float]:
        """Return percentiles of the time between tokens and of a request's latency, in seconds."""
        import numpy as np

        gaps = [after - before for times in self.token_s for before, after in pairwise(times)]
        found: dict[str, float] = {}
        for name, values in (("itl", gaps), ("latency", self.batch_s)):
            if values:
                found |= {f"{name}_p{share}_s": float(np.percentile(values, share)) for share in (50, 95, 99)}
        return found

    @property
    def bound(self) -> str | None:
        """What a decode step waits for, see `roof.bound`; None where that cannot be told."""
        if self.tpot_s is None or self.work is None or self.limits is None:
            return None
        roof = self.limits.flop_per_s(self.work.flops)
        return bound(
            self.trace.kernel_s / self.tpot_s if self.trace else None,
            self.work.bytes_per_step / self.tpot_s / self.limits.copy_bytes_per_s,
            self.work.flops_per_step / self.tpot_s / roof if roof else None,
        )

    @property
    def flags(self) -> list[str]:
        """What makes this run unlike an undisturbed one."""
        busy = [BUSY_LIMITS] if self.limits and self.limits.flags else []
        return [*self.usage.flags, *busy, *self.lost]

    def energy(self) -> dict[str, float]:
        """Return joules a request and a token, whole and above what the device takes idle; empty where unknown."""
        joules, seconds = self.usage.energy_j, self.usage.energy_s
        if joules is None or seconds is None:
            return {}
        tokens = self.requests * self.new_tokens
        found = {"energy_j_per_request": joules / self.requests, "energy_j_per_token": joules / tokens}
        if self.limits is not None and self.limits.idle_power_w is not None:
            above = joules - self.limits.idle_power_w * seconds
            found |= {
                "energy_above_idle_j_per_request": above / self.requests,
                "energy_above_idle_j_per_token": above / tokens,
            }
        return found

    def row(self) -> dict[str, Any]:
        """Return everything measured, flat, as the ledger keeps it: what was not measured is None."""
        usage, work, trace, limits = self.usage, self.work, self.trace, self.limits
        step_s, parted = self.tpot_s, self.agreement
        return {
            "batch_size": self.batch_size,
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "total_s": self.total_s,
            "batch_s": list(self.batch_s),
            "throughput_rps": self.throughput_rps,
            "throughput_tps": self.throughput_tps,
            "seconds_per_request": self.seconds_per_request,
            "batch_latency_s": self.batch_latency_s,
            "ttft_s": self.ttft_s,
            "tpot_s": step_s,
            **self.percentiles(),
            "kernel_s_per_token": trace and trace.kernel_s,
            "kernels_per_token": trace and trace.kernels,
            "bytes_per_step": work and work.bytes_per_step,
            "flops_per_step": work and work.flops_per_step,
            "flops_by_type": work and work.flops,
            "achieved_bytes_per_s": work.bytes_per_step / step_s if work and step_s else None,
            "achieved_flop_per_s": work.flops_per_step / step_s if work and step_s else None,
            "limit_bytes_per_s": limits and limits.copy_bytes_per_s,
            "limit_flop_per_s": limits.flop_per_s(work.flops) if limits and work else None,
            "bound": self.bound,
            "weights_mib": work and work.weights_mib,
            "cache_mib": work and work.cache_mib,
            "peak_allocated_mib": self.peak_allocated_mib,
            "peak_reserved_mib": self.peak_reserved_mib,
            "memory_mib": self.memory_mib,
            **{
                f"monitor_{name}": getattr(usage, name)
                for name in ("source", "samples", "duration_s", "utilization_pct", "memory_mib", "peak_memory_mib",
                             "baseline_mib", "power_w", "clock_mhz", "energy_j", "others_pct", "failures", "missing")
            },
            "monitor_idle_power_w": limits and limits.idle_power_w,
            "monitor_throttle": list(usage.throttle),
            **self.energy(),
            "compared_tokens": parted and parted.tokens,
            "first_difference": parted and parted.first_difference,
            "difference_margin": parted and parted.margin,
            "flags": self.flags,
            "note": self.note,
        }  # fmt: skip

    def tokens(self) -> list[dict[str, float]]:
        """Return a row a batch and new token: when it was there, in seconds since the batch was given."""
        return [
            {"batch": batch, "requests": self.requests // len(self.batch_s), "token": token, "t_s": seconds}
            for batch, times in enumerate(self.token_s)
            for token, seconds in enumerate(times)
        ]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(
    model: PreTrainedModel,
    workload: Workload,
    batch_size: int = 1,
    engine: str = "eager",
    baseline_mib: float | None = 0.0,
    period_s: float = 0.1,
    limits: Limits | None = None,
    passes: Sequence[str] = PASSES,
) -> Run:
    """Generate for the prompts of `workload`, `batch_size` at a time, and time it.

    Prompts that would make a smaller last batch are left out: it is another batch size, and near the limit of memory
    it takes longer than a full one, as nothing cached serves it.

    Parameters
    ----------
    model
        A loaded model; its device is the one watched.
    workload
        Prompts and the number of new tokens.
    batch_size
        Rows a batch; where there are fewer prompts, one batch of all.
    engine
        A name in `decode.FACTORIES`.
    baseline_mib
        What the sensor read before the model was loaded.
    period_s
        Seconds between two samples of the monitor.
    limits
        The device's, for what bounds the run and for energy above idle.
    passes
        Passes beside the timed one: ``"memory"`` (the allocator's peak over the longest prompts) and ``"trace"``
        (kernels), both on a GPU only; ``"agreement"`` with eager, for other engines. What fails in the last two
        costs what they would have told; the timing stays.

    Raises
    ------
    InputError
        The engine cannot run this model here, or a request is longer than the context window.
    torch.cuda.OutOfMemoryError
        The batch does not fit.
    """
    device, prompts, new_tokens = model.device, workload.prompts, workload.new_tokens
    longest, on_gpu = workload.longest, device.type == "cuda"
    check_window(model.config, len(longest), new_tokens)
    batch_size = min(batch_size, len(prompts))
    full = len(prompts) // batch_size
    batches = [prompts[place * batch_size : (place + 1) * batch_size] for place in range(full)]
    make, measures = FACTORIES[engine], on_gpu and "memory" in passes
    few, peaks = min(WARM_UP_TOKENS, new_tokens), None
    lost: list[str] = []
    with quiet():
        if on_gpu:
            # What is made once, for as long as the model is loaded, is no batch's. It is made while there is little
            # else: a workspace taken in the midst of a batch would stand between pieces of memory ever after.
            give_back()
            rows = min(batch_size, warm_up_rows(engine, len(longest))[-1])
            make(model, rows, len(longest), new_tokens).generate([longest] * rows, few)
            release()
            torch.cuda.reset_peak_memory_stats(device)
        made = make(model, batch_size, len(longest), new_tokens)
        if measures:
            made.generate([longest] * batch_size, new_tokens)
            _synchronize(device)
            peaks = torch.cuda.max_memory_allocated(device) / MIB, torch.cuda.max_memory_reserved(device) / MIB
        ragged = next((batch for batch in batches if min(map(len, batch)) < len(longest)), None)  # read under a mask
        for batch in filter(None, (ragged, None if peaks else batches[0])):
            made.generate(batch, few)
            _synchronize(device)
        sense, batch_s, clocks = sensor(device), [], []
        first = torch.empty(0)
        with Window(sense.sample, sense.source, period_s, baseline_mib) as window:
            started = before = perf_counter()
            for batch in batches:
                clocks.append(Clock(device))
                new = made.generate(batch, new_tokens, clocks[-1])
                _synchronize(device)
                now = perf_counter()
                batch_s.append(now - before)
                first = first if len(first) else new[:1]
                before = now
            total_s = before - started
        timed = Run(
            engine=engine,
            batch_size=batch_size,
            requests=sum(map(len, batches)),
            prompt_tokens=len(longest),
            new_tokens=new_tokens,
            total_s=total_s,
            batch_s=tuple(batch_s),
            peak_allocated_mib=peaks and peaks[0],
            peak_reserved_mib=peaks and peaks[1],
            usage=window.usage,
            token_s=tuple(tuple(clock.seconds()) for clock in clocks),
            readings=tuple(window.readings),
            work=count_work(model, len(longest), new_tokens, batch_size),
            limits=limits,
            note=made.note,
            on_gpu=on_gpu,
        )
        trace = parted = None
        if on_gpu and "trace" in passes and new_tokens > 1:
            traced = partial(_trace, made, batches[0], new_tokens, device)
            trace = noting(lost, "kernels not traced", lambda: twice(traced))
        if engine != "eager" and "agreement" in passes:
            parted = noting(
                lost,
                "tokens not compared with eager's",
                lambda: agreement(model, prompts[:1], Eager(model).generate(prompts[:1], new_tokens), first),
            )
    return replace(timed, trace=trace, agreement=parted, lost=tuple(lost))


def twice(work: Callable[[], Result]) -> Result:
    """Return what `work` does; where memory runs out, give back what was kept in pieces and do it once more."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release()
    return work()


def noting(lost: list[str], what: str, work: Callable[[], Result | None]) -> Result | None:
    """Return what a further pass tells; note in `lost` if it fails or tells nothing: what was timed before stays."""
    try:
        told = work()
    except (RuntimeError, MemoryError) as error:
        lost.append(f"{what}: {OUT_OF_MEMORY if is_out_of_memory(error) else type(error).__name__}")
        return None
    if told is None:
        lost.append(f"{what}: nothing was seen")
    return told


def _trace(engine: Engine, prompts: Prompts, new_tokens: int, device: torch.device) -> Trace | None:
    """Trace a generation to a little beyond the middle of the new tokens; None where no kernel is seen.

    A second generation, some steps shorter, tells how many of the first one's kernels are its last steps'; their times
    are then summed. Subtracting the two generations' times would also subtract the clocks, which power changes.
    """
    steps = min(TRACED_STEPS, new_tokens - 1)
    before = 1 + (new_tokens - 1 - steps) // 2
    _kernels(engine, prompts, 1, device)  # a profiler's first trace misses kernels
    short, long = (_kernels(engine, prompts, count, device) for count in (before, before + steps))
    return last_steps(long, len(long) - len(short), steps)


def last_steps(kernels: Sequence[tuple[float, float]], count: int, steps: int) -> Trace | None:
    """Return what a step takes of the last `count` kernels, given as start and end in seconds, in that order."""
    if count <= 0:
        return None
    last = kernels[-count:]
    return Trace(sum(end - start for start, end in last) / steps, count / steps)


def _kernels(engine: Engine, prompts: Prompts, new_tokens: int, device: torch.device) -> list[tuple[float, float]]:
    """Return when each of one generation's kernels began and ended, in seconds, by their beginning."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        engine.generate(prompts, new_tokens)
        _synchronize(device)
    return sorted(
        (event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in trace.events() or ()
        if event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset"))
    )


def count_work(model: PreTrainedModel, prompt_tokens: int, new_tokens: int, batch_size: int) -> Work:
    """Count a decode step's bytes and operations from the model's tensors and shapes.

    Weights are read once whatever the batch, but for the embedding, of which a row a request is read, unless it is
    the output head too. Keys and values are those of half the new tokens. A product of (B, K) and (K, N) counts 2BNK,
    and is of the type its layer multiplies in; attention is of the model's.
    """
    config, weights = model.config.get_text_config(), weigh(model)
    embedding, head = (part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    assert isinstance(embedding, torch.Tensor) and isinstance(head, torch.Tensor)
    tied = embedding.data_ptr() == head.data_ptr()
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    cache_bytes = 2 * layers * kv_heads * size * embedding.element_size()  # of one token
    seen = prompt_tokens + new_tokens / 2
    rows = 0 if tied else batch_size * embedding.shape[1] * embedding.element_size()
    flops: dict[str, float] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            name = _multiplies_in(module, model.dtype)
            flops[name] = flops.get(name, 0.0) + 2.0 * batch_size * module.in_features * module.out_features
    name = str(model.dtype).removeprefix("torch.")
    flops[name] = flops.get(name, 0.0) + 4.0 * batch_size * layers * heads * size * seen
    read = weights.linear_bytes + weights.other_bytes + (weights.embedding_bytes if tied else rows)
    return Work(
        weights_mib=weights.total_mib,
        cache_mib=batch_size * (prompt_tokens + new_tokens) * cache_bytes / MIB,
        bytes_per_step=read + batch_size * seen * cache_bytes,
        flops=flops,
    )


def _multiplies_in(layer: torch.nn.Linear, otherwise: torch.dtype) -> str:
    """Return the type in which a linear layer multiplies."""
    if getattr(layer, "state", None) is not None and layer.weight.dtype == torch.int8:
        return "int8"
    packed = getattr(layer.weight, "quant_state", None) is not None
    compute: torch.dtype | None = getattr(layer, "compute_dtype", None) if packed else None
    return str(compute or otherwise).removeprefix("torch.")


# sizes that fill a device without taking long: MiB copied, rows of a square product
SIZES = {"cuda": (1024, 8192), "cpu": (64, 512)}
TYPES = ("float32", "float16", "bfloat16", "int8")
IDLE_S = 1.0


def measure_limits(device: torch.device | str) -> Limits:
    """Measure a device's memory bandwidth, the rate of its products by type, and a GPU's power when idle.

    The copy counts bytes read and bytes written. Products are square; float32 is what PyTorch does by default.
    """
    device = torch.device(device)
    copied_mib, side = SIZES[device.type]
    idle_power_w = None
    if device.type == "cuda":
        torch.zeros(1, device=device)  # a context keeps the clocks of a GPU that nobody uses from falling
        _synchronize(device)
        sense, read = sensor(device), []
        sleep(SETTLED_S)  # power is a mean over that time before
        for _ in range(10):
            sleep(IDLE_S / 10)
            with suppress(OSError):  # a sensor that answers no more costs its own number alone
                read.append(sense.sample().get("power_w"))
        idle_power_w = median(power for power in read if power is not None) if any(read) else None
    source = torch.ones(copied_mib * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _fastest_s(partial(target.copy_, source), device)
    rates = {}
    for name in TYPES:
        matrix = torch.ones(side, side, device=device, dtype=getattr(torch, name))
        multiply = torch._int_mm if name == "int8" else torch.mm
        with suppress(RuntimeError, NotImplementedError):  # the device has no such product
            # transposed, as layers have it: the int8 units take the right matrix by columns, or crawl
            rates[name] = 2 * side**3 / _fastest_s(partial(multiply, matrix, matrix.t()), device)
    return Limits(2 * copied_mib * MIB / copy_s, rates, idle_power_w)


def undisturbed_limits(device: torch.device | str, tries: int = 3) -> Limits:
    """Measure the limits, again while other processes are at work, and take the best of each: work is only slowed."""
    sense, found = sensor(device), []
    for _ in range(tries):
        with Window(sense.sample, sense.source) as window:
            found.append(measure_limits(device))
        flags = [flag for flag in window.usage.flags if disturbed([flag])]
        if not flags:
            break
    rates = {name: max(one.matmul_flop_per_s.get(name, 0.0) for one in found) for name in found[0].matmul_flop_per_s}
    idle_w = min((one.idle_power_w for one in found if one.idle_power_w is not None), default=None)
    return Limits(max(one.copy_bytes_per_s for one in found), rates, idle_w, flags)


def _fastest_s(work: Callable[[], Any], device: torch.device, least: int = 3, most_s: float = 0.2) -> float:
    """Return the fastest of several runs, in seconds."""
    work()
    seconds: list[float] = []
    while len(seconds) < least or sum(seconds) < most_s:
        _synchronize(device)
        clock = Clock(device)
        work()
        clock.tick()
        seconds += clock.seconds()
    return min(seconds)


def settled(passes: Sequence[float]) -> bool:
    """Return whether the mean of `passes` is known to `WIDTH`: more of them would not change what is reported.

    A value is a pass's: its requests share the mood that the machine was in, so they are no draws of their own. The
    interval is Student's, of 95 %, from three passes on; a median has one of its own from six on.
    """
    from scipy.special import stdtrit

    if len(passes) < LEAST_PASSES:
        return False
    half = float(stdtrit(len(passes) - 1, 0.975)) * stdev(passes) / math.sqrt(len(passes))
    return 2 * half <= WIDTH * fmean(passes)


def largest_batch(
    model: PreTrainedModel,
    workload: Workload,
    limit_mib: float,
    cap: int,
    engine: str = "eager",
    baseline_mib: float | None = 0.0,
) -> Largest:
    """Find the largest batch of the workload's longest prompt, with all its new tokens, that fits.

    On a GPU a batch fits when it runs and the allocator reserves no more than `limit_mib`, to which the caller holds
    it. On a CPU, where memory does not run out but swaps, it fits when the process stays within `limit_mib` above
    `baseline_mib`.

    Raises
    ------
    MemoryError
        Not even one request fits.
    decode.Absent
        The engine cannot run this model here.
    """
    try_batch = trial(model, workload, limit_mib, engine, baseline_mib)
    return largest(try_batch, limit_mib, cap, most_probes=PROBES[engine])


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
    MemoryError
        Not even one request fits.
    RuntimeError
        The model cannot be loaded, or not even one request runs.
    decode.Absent
        The engine cannot run this model here.
    """
    from transformers import AutoConfig

    longest = Workload((workload.longest,), workload.new_tokens, workload.source)
    cliff = counted(AutoConfig.from_pretrained(folder), len(workload.longest))
    with Apart(trial_of, folder, precision, device, longest, limit_mib, engine) as try_batch:
        return largest(try_batch, limit_mib, cap, cliff, most_probes=PROBES[engine])


def counted(config: PretrainedConfig, prompt_tokens: int) -> int:
    """Return how many prompts a model's widest layer turns into outputs that 32 bits count; 0 where it is not known.

    INT8 is expected to end its process beyond (`batch.Apart`).
    """
    width = getattr(config.get_text_config(), "intermediate_size", None)
    return (2**31 - 1) // (prompt_tokens * width) if width else 0


def warm_up_rows(engine: str, prompt_tokens: int) -> tuple[int, ...]:
    """Return the batch sizes that have an engine build all that it builds once.

    Kernels of a recorded step are built for one row and for any number above a few; prompts are read by kernels of
    their own once they are too many to be read by a recording.
    """
    return (1,) if engine == "eager" else (1, max(FEW_ROWS, RECORDED_TOKENS // prompt_tokens) + 1)


def trial_of(
    folder: str | Path, precision: Precision, device: str, workload: Workload, limit_mib: float, engine: str = "eager"
) -> Callable[[int], Probe]:
    """Load the model from `folder`, hold a GPU's allocator to `limit_mib`, and return the model's `trial`."""
    found, baseline_mib = detect(device), 0.0
    found.use()
    if found.kind == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_mib / found.memory_mib))
    else:
        release()
        baseline_mib = ProcessSensor().sample()["memory_mib"]
    return trial(load(folder, precision, found.place), workload, limit_mib, engine, baseline_mib)


def trial(
    model: PreTrainedModel,
    workload: Workload,
    limit_mib: float,
    engine: str = "eager",
    baseline_mib: float | None = 0.0,
) -> Callable[[int], Probe]:
    """Return what tries a batch of the workload's longest prompt, and leaves memory as it found it.

    On a GPU a batch that comes near the limit has to fit twice: to the first all memory is free, the second finds it
    in the pieces that the first one left, and so does every batch of a workload after it.

    Something is generated first, so that kernels and workspaces loaded once are no batch's.
    """
    device, longest = model.device, workload.longest
    on_gpu = device.type == "cuda"

    def run_out(batch_size: int, tokens: int, again: Callable[[], bool] = lambda: False) -> bool:
        try:
            with quiet():
                made = FACTORIES[engine](model, batch_size, len(longest), workload.new_tokens)
                made.generate([longest] * batch_size, tokens)
                _synchronize(device)
                if again():
                    made.generate([longest] * batch_size, tokens)
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

        def squeezed() -> bool:
            return torch.cuda.memory_stats(device)["num_alloc_retries"] > retries

        def tight() -> bool:
            return squeezed() or torch.cuda.max_memory_reserved(device) / MIB > TIGHT * min(limit_mib, room_mib)

        torch.cuda.reset_peak_memory_stats(device)
        started = perf_counter()
        out = run_out(batch_size, workload.new_tokens, tight)
        read: dict[str, Any] = {"idle_mib": idle_mib, "room_mib": room_mib, "took_s": perf_counter() - started}
        memory_mib = torch.cuda.max_memory_reserved(device) / MIB
        live_mib = torch.cuda.max_memory_allocated(device) / MIB
        release()
        if out:
            return Probe(batch_size, False, **read, ended=OUT_OF_MEMORY)
        return Probe(batch_size, memory_mib <= limit_mib, memory_mib, live_mib, squeezed(), **read)

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

    for rows in warm_up_rows(engine, len(longest)):
        run_out(rows, min(WARM_UP_TOKENS, workload.new_tokens))
    return on_device if on_gpu else on_cpu
