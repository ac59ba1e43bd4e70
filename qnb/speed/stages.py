"""The stages of notebooks 03 and 04: workload, device peaks, batch size 1, largest batch, sweep, prompt lengths."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import cycle, islice, pairwise
from typing import TYPE_CHECKING, Any

from qnb import memory, prompts
from qnb.errors import InputError
from qnb.ledger import Row
from qnb.options import AUTO, minutes_of
from qnb.precision import PRECISIONS, Precision, parse
from qnb.prompts import Workload
from qnb.speed.batch_search import (
    ChildTrials,
    LargestBatch,
    OneRequestDoesNotFit,
    find_largest_batch,
    int32_rows,
    sweep_sizes,
)
from qnb.speed.options import BatchOneOptions, Engines, LargestBatchOptions, PlanOptions, SweepOptions, WorkloadOptions
from qnb.speed.passes import Loaded, Series, Timer, record_batch, time_row, warm_up_libraries, with_model

if TYPE_CHECKING:
    from qnb.session import Session
    from qnb.speed.device_peaks import DevicePeaks

PACE_BATCH = {"bs1": {"cuda": 1, "cpu": 1}, "maxbatch": {"cuda": 32, "cpu": 4}}  # timed once to learn the pace
# What a setting runs beside its timed passes: so many times its requests, and so many more. One by one: kernels
# traced, memory read, tokens compared. In the largest batch: three probes of its size, memory read, kernels traced.
EXTRA_COST = {"bs1": (0, 3), "maxbatch": (5, 0)}
BATCHES_SWEPT = 3  # of each size


def workload(session: Session, options: WorkloadOptions) -> Workload:
    """Return the prompts that every format gets.

    Raises
    ------
    InputError
        The prompts cannot be read, an engine cannot run here, or a request is longer than the context window.
    """
    from qnb.speed.engines import check_context_window

    prompt_tokens = session.count("prompt_tokens", options.prompt_tokens)
    new_tokens = session.count("new_tokens", options.new_tokens)
    check_context_window(session.config, prompt_tokens, new_tokens)
    source, engines = _prompt_source(session, options.prompt_source), sorted(_engines(session, options.engines))
    options = replace(
        options, prompt_tokens=prompt_tokens, new_tokens=new_tokens, prompt_source=source, engines=engines
    )
    if minutes := minutes_of(options.requests):
        requests = _affordable_requests(session, options, minutes)
    else:
        requests = session.count(f"{options.setting}_requests", options.requests)
    return prompts.load(session.tokenizer, source, requests, prompt_tokens, new_tokens, session.data_dir, session.seed)


def _affordable_requests(session: Session, options: WorkloadOptions, minutes: float) -> int:
    """Return how many requests a time allows, for all formats, engines and repeats together.

    A batch of each format is timed with `eager`, and every engine is taken to be as slow. Loading and compiling come
    on top. The number stands for formats that are added later: all get the same prompts.
    """
    from qnb.speed.benchmark import run

    asked = {**asdict(options), "minutes": minutes, "repeats": int(options.repeats)}
    del asked["requests"]
    key = session.key("pace", None, asked, setting=options.setting)
    with session.exclusive():
        if row := session.decided(key):
            return int(row["requests"])
        device_peaks(session)  # before anything is loaded
        batch_size = PACE_BATCH[options.setting][session.device.kind]
        batch, seconds = workload(session, replace(options, requests=batch_size)), {}
        for precision in session.precisions:
            with suppress(RuntimeError, MemoryError):  # it is recorded where it is measured
                timed = with_model(session, precision, lambda loaded: run(loaded.model, batch, batch_size, passes=()))
                seconds[precision.name] = timed.run.total_s
        requests = AUTO["cpu"][f"{options.setting}_requests"]
        if seconds:
            spent_s, (times, more) = sum(seconds.values()), EXTRA_COST[options.setting]
            request_s = len(asked["engines"]) * spent_s / batch_size
            requests = max(1, int(((60 * minutes - spent_s) / request_s - more) / (times + asked["repeats"])))
        return int(session.append(key, {"requests": requests, "seconds": seconds}, asked)["requests"])


def device_peaks(session: Session) -> DevicePeaks:
    """Measure the device's peaks, once a device."""
    from qnb.speed.device_peaks import DevicePeaks, measure_peaks

    key = session.key("peaks")
    with session.exclusive():
        row = session.find(key) or session.append(key, asdict(measure_peaks(session.device.place)))
    return DevicePeaks(**{each.name: row[each.name] for each in fields(DevicePeaks)})


def perf_bs1(session: Session, options: BatchOneOptions) -> None:
    """Time the workload one request at a time, a row a format, engine and pass (Table 3).

    Raises
    ------
    InputError
        An engine is unknown or cannot run here.
    RuntimeError
        Nothing could be measured.
    """
    asked, engines, repeats = _asked(options.workload), _engines(session, options.engines), int(options.repeats)
    all_series = [
        Series(precision, engine, asked, {"batch_size": 1}) for precision in session.precisions for engine in engines
    ]
    with session.exclusive(), session.progress(repeats * len(session.precisions), "batch size 1") as bar:
        Timer(session, "bs1", options.workload, repeats, device_peaks(session)).time_all(all_series, bar)
    session.require("perf")


def perf_maxbatch(session: Session, options: LargestBatchOptions) -> None:
    """Find the largest batch of each format and engine, then time the workload in it (Table 4).

    Raises
    ------
    InputError
        An engine is unknown or cannot run here, or `memory_mib` is too little for one request in every format.
    RuntimeError
        Nothing could be measured.
    """
    engines, repeats = _engines(session, options.engines), int(options.repeats)
    allowed_mib = session.count("memory_mib", options.memory_mib)
    limit_mib = float(allowed_mib or session.device.memory_mib)
    cap = min(session.count("max_batch", options.max_batch), len(options.workload.prompts))
    asked = {**_asked(options.workload), "memory_limit_mib": limit_mib, "cap": cap}
    peaks = device_peaks(session)  # before anything is loaded, or held to less memory
    limited = memory.limited(session.device.memory_mib, allowed_mib if session.device.kind == "cuda" else 0)
    progress = session.progress((1 + repeats) * len(session.precisions), "largest batch")
    with session.exclusive(), progress as bar, limited:
        # 1) search
        all_series: list[Series] = []
        too_small: list[MemoryError] = []
        for precision in session.precisions:
            bar.set_postfix_str(f"search {precision.name}")
            for engine in engines:
                series = Series(precision, engine, asked, {})
                key = session.key("batch", precision, asked, engine=engine)
                with session.failing(key, f"the largest batch of {precision.name} with engine {engine}"):
                    try:
                        series.search = session.find(key) or _search(session, series, options.workload)
                        all_series.append(series)
                    except OneRequestDoesNotFit as error:
                        too_small.append(error)
                        raise
            bar.update()
        if options.memory_mib != "auto" and len(too_small) == len(session.precisions) * len(engines):
            raise InputError(f"memory_mib is {allowed_mib}: {too_small[-1]}")
        # 2) time
        Timer(session, "maxbatch", options.workload, repeats, peaks).time_all(all_series, bar)
    session.require("perf" if all_series else "batch")


def _search(session: Session, series: Series, workload: Workload) -> Row:
    """Search the largest batch and record it. Where the engine cannot run there is no row, and the batch is 1."""
    from qnb.speed.batch_trials import Trials, load_trials
    from qnb.speed.engines import EngineUnavailable, why_unavailable

    precision, engine = series.precision, series.engine
    limit_mib, cap, place = series.asked["memory_limit_mib"], series.asked["cap"], session.device.place
    not_searched = {"batch_size": 1, "capped": False}
    if why_unavailable(engine, session.device.kind, precision.threshold):
        return not_searched

    def search(loaded: Loaded) -> LargestBatch:
        trials = Trials(loaded.model, workload, limit_mib, engine, loaded.baseline_mib)
        return find_largest_batch(trials, limit_mib, cap)

    warm_up_libraries(session, precision)
    last_safe = _last_safe_batch(session, precision, engine, workload)
    try:
        if last_safe is None or cap <= last_safe:
            largest = with_model(session, precision, search)
        else:
            folder = session.checkpoint(precision)
            memory.release(workspaces=True)
            with ChildTrials(load_trials, folder, precision, place, workload, limit_mib, engine) as try_batch:
                largest = find_largest_batch(try_batch, limit_mib, cap, last_safe)
    except EngineUnavailable:
        return not_searched
    return record_batch(session, series, workload, largest)


def _last_safe_batch(session: Session, precision: Precision, engine: str, workload: Workload) -> int | None:
    """Return the largest batch that cannot end its process, 0 where it is not known; None where none can.

    bitsandbytes' INT8 kernels end the process where `eager` reads more prompts at once. `cuda_graph` reads chunks.
    """
    if session.device.kind == "cuda" and precision.eight_bit and engine == "eager":
        return int32_rows(session.config, len(workload.longest))
    return None


def sweep(session: Session, options: SweepOptions) -> None:
    """Time three batches each of 1, 2, 4 ... requests, a row a format, engine and size.

    The first size that does not fit ends the sizes of its format and engine. It is tried again on the next run.

    Raises
    ------
    InputError
        An engine is unknown or cannot run here.
    """
    engines, largest = _engines(session, options.engines), session.count("sweep_batch", options.largest)
    if not largest:
        return
    searches = session.ledger.rows("batch") if options.largest == "auto" else []
    searched = {(row["precision"], row["engine"]): row["batch_size"] for row in searches}
    asked = _asked(options.workload)
    with session.exclusive(), session.progress(len(session.precisions), "batch sizes") as bar:
        peaks = device_peaks(session)
        for precision in session.precisions:
            bar.set_postfix_str(precision.name)
            keys = [
                session.key("sweep", precision, asked, engine=engine, setting=str(size))
                for engine in engines
                for size in sweep_sizes(searched.get((precision.name, engine), largest))
            ]
            missing = [key for key in keys if not (session.find(key) or {"fits": False}).get("fits", True)]
            if missing:
                with session.failing(missing[0], f"the batch sizes of {precision.name}"):
                    time = partial(_sweep_format, session, missing, options.workload, peaks)
                    with_model(session, precision, time)
            bar.update()


def _sweep_format(
    session: Session, keys: Sequence[Row], workload: Workload, peaks: DevicePeaks, loaded: Loaded
) -> None:
    """Time a batch size a key with a loaded format, and record the rows."""
    from qnb.speed.benchmark import twice

    full_engines: set[str] = set()
    for key in keys:
        size, engine, precision = int(key["setting"]), key["engine"], PRECISIONS[key["precision"]]
        batches = replace(workload, prompts=tuple(islice(cycle(workload.prompts), BATCHES_SWEPT * size)))
        values: dict[str, Any] = {"fits": False, "note": "a smaller batch did not fit"}
        with session.failing(key, f"{precision.name}'s batch of {size} with engine {engine}"):
            if 0 < (_last_safe_batch(session, precision, engine, workload) or 0) < size:
                values = {"note": "not tried: bitsandbytes counts an INT8 layer's outputs in 32 bits"}
            elif engine not in full_engines:
                try:
                    time = partial(time_row, session, key, loaded, batches, size, peaks, ("memory",))
                    values = twice(time)
                except (RuntimeError, MemoryError) as error:
                    if not memory.is_out_of_memory(error):
                        raise
                    full_engines.add(engine)
                    values["note"] = "out of memory"
            session.append(key, _asked(workload), {"batch_size": size, **values})
        memory.release()


def prompt_lengths(session: Session, options: PlanOptions) -> None:
    """Record the lengths of prompts, from which `qnb.report.batch_plans` plans their batches.

    Prompts are whole paragraphs, of every split of WikiText-2: only the context window cuts them.

    Raises
    ------
    InputError
        The prompts cannot be read.
    """
    from qnb.speed.engines import context_window

    source, counts = _prompt_source(session, options.prompt_source), sorted({int(each) for each in options.counts})
    lengths = prompts.lengths(session.tokenizer, source, counts[-1], session.data_dir, session.seed)
    asked = {"prompt_source": source, "counts": counts, "lengths": lengths, "window": context_window(session.config)}
    key = session.key("lengths", None, asked)
    with session.exclusive():
        if not session.find(key):
            session.append(key, asked)


def continuation(session: Session, prompt: str, precision: str, new_tokens: int = 24) -> list[str]:
    """Return what a format writes after a prompt, greedily, token by token as text.

    Raises
    ------
    InputError
        The prompt is empty, the format unknown, or `new_tokens` below 1.
    """
    from qnb.quantize.checkpoint import quiet
    from qnb.speed.engines import Eager

    (named,), tokens = parse(precision), session.count("new_tokens", new_tokens)
    prompt_ids = session.tokenizer(prompt, verbose=False)["input_ids"] if prompt.strip() else []
    if not prompt_ids:
        raise InputError("the prompt is empty; give some words to go on from")
    with session.exclusive(), quiet():  # a measurement of another process would be disturbed
        new_ids = with_model(
            session, named, lambda loaded: Eager(loaded.model).generate([prompt_ids], tokens)[0].tolist()
        )  # (N,)
    # a character may take several tokens: a piece is what its token adds to the text
    texts = [str(session.tokenizer.decode(new_ids[:end])).rstrip("\ufffd") for end in range(len(new_ids) + 1)]
    return [now.removeprefix(before) for before, now in pairwise(texts)]


def _asked(workload: Workload) -> dict[str, Any]:
    return {"workload": workload.fingerprint, "prompt_source": workload.source}


def _engines(session: Session, engines: Engines) -> tuple[str, ...]:
    from qnb.speed.engines import parse as parse_engines

    return parse_engines(engines, session.device.kind)


def _prompt_source(session: Session, source: str) -> str:
    if source == "auto":
        return "wikitext" if session.device.kind == "cuda" or session.data_dir else "sample"
    return source
