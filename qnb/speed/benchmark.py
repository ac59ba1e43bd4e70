"""Time generation over a workload.

Wall clock is taken between device synchronizations, after a warm-up; kernels are traced in a pass of their own. At
batch size 1 a small model is bound by how fast Python launches kernels, then by reading the weights once a token.
Large batches share that reading and are bound by arithmetic and by the KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedModel

from qnb.flags import Flag
from qnb.memory import MIB, places, release
from qnb.prompts import Workload
from qnb.quantize.checkpoint import quiet
from qnb.speed import engines
from qnb.speed.decode_work import Work, count_work, trace_kernels
from qnb.speed.device_peaks import DevicePeaks
from qnb.speed.engines import Clock, Engine, Prompts
from qnb.speed.monitor import WATCHED_S, Reading, Sensor, Usage, Window, flags_of
from qnb.speed.passes import twice, unless_it_fails

WARM_UP_TOKENS = 4
CHECKED_PROMPTS, CHECKED_TOKENS = 8, 2  # the first so many, and new tokens of each: their logits must be finite
UNKNOWN_PEAKS = DevicePeaks()
_checked: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # the workload by which a model was found finite


@dataclass(frozen=True, kw_only=True)
class Run(Work, Usage):
    """One timed pass over a workload: `asdict` of it is its ledger row. None where something was not measured."""

    batch_size: int
    requests: int  # in full batches, warm-up excluded; on a GPU a short workload is timed more than once
    prompt_tokens: int  # of the longest prompt
    new_tokens: int  # of every request
    total_s: float
    batch_s: tuple[float, ...]  # of each batch, in order
    ttft_s: float  # median time to a batch's first new token
    tpot_s: float | None = None  # median over batches of the mean time of a new token after the first
    itl_p50_s: float | None = None  # percentiles of the time between two tokens
    itl_p95_s: float | None = None
    itl_p99_s: float | None = None
    peak_allocated_mib: float | None = None  # of torch's allocator, weights included; on a GPU only
    peak_reserved_mib: float | None = None
    peak_bytes_per_s: float | None = None  # the device's, see `DevicePeaks`
    peak_flop_per_s: float | None = None  # the device's, for the types that this model multiplies in
    idle_power_w: float | None = None
    flags: tuple[Flag, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Timed:
    """A run, and what it was reduced from."""

    run: Run
    readings: list[Reading]  # of the monitor
    token_times_s: list[list[float]]  # of each batch: seconds from its start to each new token


@quiet()
def run(
    model: PreTrainedModel, workload: Workload, batch_size: int = 1, engine: str = "eager", baseline_mib: float = 0.0,
    peaks: DevicePeaks = UNKNOWN_PEAKS, kernels: str | None = "",
) -> Timed:  # fmt: skip
    """Generate for the workload's prompts in full batches, and time it.

    `baseline_mib` was in use before the model was loaded, NaN where unknown. A GPU's kernels are traced, and held
    against the format's pattern `kernels`, unless that is None.

    Raises
    ------
    InputError
        The engine cannot run this model here, or a request is longer than the context window.
    NotFiniteError
        The model's outputs are not finite.
    torch.cuda.OutOfMemoryError
        The batch does not fit.
    """
    batches, device, new_tokens = full_batches(workload.prompts, batch_size), model.device, workload.new_tokens
    shape = {"batch_size": len(batches[0]), "prompt_tokens": len(workload.longest), "new_tokens": new_tokens}
    # 1) count a decode step's work, check the model's outputs, and warm up
    work = unless_it_fails(partial(count_work, model, **shape), Work())
    _check_outputs(model, workload, batch_size)
    generator, sensor = _warm_engine(model, engine, batches, workload), Sensor(*places(model))
    # 2) time
    with Window(sensor, baseline_mib=baseline_mib) as window:
        token_times_s: list[list[float]] = []
        while not token_times_s or (sensor.monitor == "nvml" and sum(each[-1] for each in token_times_s) < WATCHED_S):
            token_times_s += [_token_times_s(generator, batch, new_tokens, device) for batch in batches]
    values = shape | asdict(window.usage) | latency(token_times_s) | peak_memory(places(model))
    # 3) trace a decode step's kernels, which changes the memory's peaks
    flags = [*generator.flags, *flags_of(window.usage)]
    if kernels is not None and new_tokens > 1 and device.type == "cuda":
        trace = partial(trace_kernels, work, generator, batches[0], new_tokens, device, kernels)
        work = unless_it_fails(partial(twice, trace), work)
        flags += [Flag.TRACE_FAILED] if work.kernels_per_token is None else []
    flags += [Flag.PEAKS_DISTURBED] if peaks.flags else []
    values |= asdict(work) | peaks.columns(work.flops_by_type) | {"requests": len(token_times_s) * len(batches[0])}
    row = Run(**values, flags=tuple(flags), note="; ".join(filter(None, (generator.note, sensor.note))))
    return Timed(row, window.readings, token_times_s)


def full_batches(prompts: Prompts, batch_size: int) -> list[Prompts]:
    """Cut prompts into batches of one size. Where there are fewer, all make one batch.

    Prompts that would make a smaller last batch are left out: it is another batch size.
    """
    batch_size = min(batch_size, len(prompts))
    last = len(prompts) - len(prompts) % batch_size
    return [prompts[start : start + batch_size] for start in range(0, last, batch_size)]


def _check_outputs(model: PreTrainedModel, workload: Workload, batch_size: int) -> None:
    """Refuse a model whose logits are not finite in the first new tokens of the first prompts.

    A loaded model is checked once, not again for each pass and engine.
    """
    if _checked.get(model) == workload.fingerprint:
        return
    for batch in full_batches(workload.prompts[:CHECKED_PROMPTS], batch_size):
        engines.generate_checked(model, batch, min(CHECKED_TOKENS, workload.new_tokens))
    _checked[model] = workload.fingerprint


def _warm_engine(model: PreTrainedModel, engine: str, batches: Sequence[Prompts], workload: Workload) -> Engine:
    """Build an engine and warm it up; on a GPU, first load the kernels and workspaces that stay as long as the model.

    A workspace allocated during a batch would split the free memory for as long as the model lives, and would be
    counted as the batch's memory.
    """
    batch_size, longest, new_tokens = len(batches[0]), workload.longest, workload.new_tokens
    make, warm_up_tokens = engines.FACTORIES[engine], min(WARM_UP_TOKENS, new_tokens)
    if model.device.type == "cuda":
        release(workspaces=True)
        rows = min(batch_size, engines.warm_up_batch_sizes(engine, len(longest))[-1])
        make(model, rows, len(longest), new_tokens).generate([longest] * rows, warm_up_tokens)
        release()
        for device in places(model):
            torch.cuda.reset_peak_memory_stats(device)
    generator = make(model, batch_size, len(longest), new_tokens)
    warm_ups = [min(batches, key=lambda batch: min(map(len, batch))), [longest] * batch_size]  # the first is padded
    if model.device.type == "cuda" and batch_size > 1:  # the allocator then holds what a batch takes
        warm_ups, warm_up_tokens = [[*[longest] * (batch_size - 1), min(warm_ups[0], key=len)]], new_tokens
    for batch in warm_ups:
        _token_times_s(generator, batch, warm_up_tokens, model.device)
    return generator


def _token_times_s(generator: Engine, prompts: Prompts, new_tokens: int, device: torch.device) -> list[float]:
    """Generate for a batch; return the seconds from its start to each new token, once the last one is there."""
    clock = Clock(device)
    generator.generate(prompts, new_tokens, clock)
    return clock.elapsed_s()


def latency(token_times_s: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Reduce the times of each batch's tokens to a row's; what needs two tokens may be missing."""
    times_s = np.array(token_times_s)  # (batches, N)
    gaps_s = np.diff(times_s)  # (batches, N - 1)
    batch_s = times_s[:, -1].tolist()
    values = {"batch_s": tuple(batch_s), "total_s": sum(batch_s), "ttft_s": float(np.median(times_s[:, 0]))}
    if gaps_s.size:
        values["tpot_s"] = float(np.median(gaps_s.mean(axis=1)))
        for share in (50, 95, 99):
            values[f"itl_p{share}_s"] = float(np.percentile(gaps_s, share))
    return values


def peak_memory(devices: Sequence[torch.device]) -> dict[str, float]:
    """Return the peaks of torch's allocator since the engine was built, of all devices; nothing on a CPU."""
    stats = [torch.cuda.memory_stats(device) for device in devices if device.type == "cuda"]
    kinds = ("allocated", "reserved") if stats else ()
    return {f"peak_{kind}_mib": sum(each[f"{kind}_bytes.all.peak"] for each in stats) / MIB for kind in kinds}
