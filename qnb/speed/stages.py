"""The stages of notebooks 03 and 04: workload, device peaks, batch size 1, largest batch, sweep, prompt lengths.

Each is a function of a session and of what a user may ask, a class that checks its values.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import cycle, islice, pairwise, product
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from qnb import memory, prompts
from qnb.budget import Clock
from qnb.columns import flag_text
from qnb.errors import InputError
from qnb.ledger import Row
from qnb.options import Count, check_count
from qnb.precision import Precision, parse
from qnb.prompts import Workload
from qnb.speed import batch_search
from qnb.speed.batch_search import LargestBatch
from qnb.speed.passes import Loaded, Series, time_in_turn, with_model

if TYPE_CHECKING:
    from qnb.session import Session
    from qnb.speed.device_peaks import DevicePeaks

Engines = str | Iterable[str]  # names in `qnb.speed.engines.FACTORIES`; "auto" is all that can run on the device

NOTEBOOKS = {"bs1": "03", "maxbatch": "04"}  # by setting
# a budget of minutes: requests of a pass fill so many seconds, if there is no launch to wait for, but are so many
PASS_S, LEAST_REQUESTS = 2.0, 3
# a search and a timing take about so many times the largest batch's time, at such a share of the device's peaks
BATCHES_RUN, REACHED_SHARE, LEAST_NEW_TOKENS = 6, 0.6, 25
BATCHES_SWEPT = 3  # of each size
UNSAFE = "not tried: bitsandbytes counts an INT8 layer's outputs in 32 bits, and ends the process beyond"


@dataclass(frozen=True)
class WorkloadOptions:
    """Which prompts every format gets.

    Parameters
    ----------
    setting
        ``"bs1"`` or ``"maxbatch"``: the default of `requests` depends on it.
    requests
        How many prompts.
    prompt_tokens, new_tokens
        The most tokens of a prompt, and the new tokens of each. In a session with a budget of minutes a large batch
        may get fewer new tokens, the same for every format.
    prompt_source
        ``"wikitext"``, ``"sample"``, or ``"auto"``: WikiText-2 where there is a GPU or a `data_dir`.

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

    def __post_init__(self) -> None:
        if self.setting not in NOTEBOOKS:
            raise InputError(f"setting is {self.setting!r}; give {' or '.join(map(repr, NOTEBOOKS))}")
        check_count(f"{self.setting}_requests", self.requests)
        for name in ("prompt_tokens", "new_tokens"):
            check_count(name, getattr(self, name))
        prompts.check(self.prompt_source)


@dataclass(frozen=True)
class TimingOptions:
    """What is timed: one request at a time, in the largest batch, or in batches of several sizes.

    Parameters
    ----------
    workload
        The requests. The search takes the longest of them with all its new tokens; a sweep repeats them as often as
        its batches need.
    engines
        ``"eager"``, ``"cuda_graph"`` or both; ``"auto"`` is both on a GPU, else eager.
    repeats
        The most passes. After three at the earliest, a format and engine that has settled gets no further one.
    max_batch
        The largest batch worth trying.
    memory_mib
        The memory allowed: of a GPU, where ``"auto"`` is all; on a CPU, how much the process may grow.
    sweep_batch
        The largest batch of a sweep; 0 is no sweep. On a GPU ``"auto"`` is the largest batch found for the format and
        engine, or 256 where none was searched; on a CPU it is 0.

    Raises
    ------
    InputError
        A value is none of these.
    """

    workload: Workload
    engines: Engines = "auto"
    repeats: int = 1
    max_batch: Count = "auto"
    memory_mib: Count = "auto"
    sweep_batch: Count = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.workload, Workload):
            raise InputError(f"workload is {self.workload!r}; give what study.workload('bs1') or ('maxbatch') returns")


def workload(session: Session, options: WorkloadOptions) -> Workload:
    """Return the prompts that every format gets.

    Raises
    ------
    InputError
        The prompts cannot be read, or a request is longer than the context window.
    """
    from qnb.speed.engines import check_context_window

    prompt_tokens = session.count("prompt_tokens", options.prompt_tokens)
    new_tokens = session.count("new_tokens", options.new_tokens)
    requests = session.count(f"{options.setting}_requests", options.requests)
    check_context_window(session.config, prompt_tokens, new_tokens)
    if session.minutes:
        most = Shape(requests, prompt_tokens, new_tokens)
        requests, prompt_tokens, new_tokens = _within_budget(session, options.setting, most)
    source = session.prompt_source(options.prompt_source)
    return prompts.load(session.tokenizer, source, requests, prompt_tokens, new_tokens, session.data_dir, session.seed)


class Shape(NamedTuple):
    """The size of a workload."""

    requests: int
    prompt_tokens: int
    new_tokens: int


def _within_budget(session: Session, setting: str, most: Shape) -> Shape:
    """Return a workload that a budget of minutes allows, at most `most`. Formats that are added later get it too.

    Fewer requests are timed one at a time. Large batches are as large as ever, and get fewer new tokens.
    """
    notebook, asked = NOTEBOOKS[setting], {"minutes": session.minutes, "most": most}
    peaks, key = device_peaks(session, notebook), session.key("pace", None, asked, setting=setting)
    with session.exclusive(notebook) as clock:
        if row := session.decided(key):
            return Shape(row["requests"], row["prompt_tokens"], row["new_tokens"])
        shape = most
        if setting == "bs1" and peaks.copy_bytes_per_s:
            request_s = most.new_tokens * session.source.weights_bytes / peaks.copy_bytes_per_s
            shape = most._replace(requests=min(most.requests, max(LEAST_REQUESTS, math.ceil(PASS_S / request_s))))
        while setting == "maxbatch" and shape.new_tokens // 2 >= LEAST_NEW_TOKENS:
            if sum(_search_s(session, each, peaks, shape) for each in session.precisions) <= clock.left_s:
                break
            shape = shape._replace(new_tokens=shape.new_tokens // 2)
        session.append(key, asked, shape._asdict())
    tqdm.write(f"{session.minutes:g} minutes allow {shape.requests} requests of {shape.new_tokens} new tokens each")
    return shape


def _search_s(session: Session, precision: Precision, peaks: DevicePeaks, shape: Shape, engines: int = 0) -> float:
    """Return about how long a format takes to find its largest batch and to time it, with so many engines.

    Large batches are bound by arithmetic. A token takes about as many operations as 16-bit weights have bytes.
    """
    rate = peaks.matmul_flop_per_s.get(session.pinned(precision).compute_dtype, math.inf)
    flops = session.source.weights_bytes * shape.requests * (shape.prompt_tokens + shape.new_tokens)
    engines = engines or (2 if session.device.kind == "cuda" else 1)
    return engines * BATCHES_RUN * flops / rate / REACHED_SHARE


def device_peaks(session: Session, notebook: str = "03") -> DevicePeaks:
    """Measure the device's peaks, once a device, in a notebook's time, and say so where they failed.

    While other processes disturb them, they are measured up to three times. The last ones are kept, and said to be
    disturbed.
    """
    from qnb.speed.device_peaks import DevicePeaks, measure_peaks

    key = session.key("peaks")
    with session.exclusive(notebook):
        row = session.find(key)
        if not row:
            with session.failing(key, "the device's peaks"):
                for _ in range(3):  # other processes that disturb it may end
                    peaks = measure_peaks(session.device.place)
                    if not peaks.flags:
                        break
                row = session.append(key, asdict(peaks))
                if row["flags"]:
                    reason = flag_text(row["flags"])
                    tqdm.write(f"the device's peaks were disturbed ({reason}); overwrite measures them again")
    return DevicePeaks(**{each.name: row[each.name] for each in fields(DevicePeaks)} if row else {})


def perf_bs1(session: Session, options: TimingOptions) -> None:
    """Time the workload one request at a time, a row a format, engine and pass (Table 3).

    Raises
    ------
    InputError
        An engine is unknown or cannot run here.
    RuntimeError
        Nothing could be measured.
    """
    all_series = _all_series(session, "bs1", options)
    with session.exclusive("03") as clock:
        time_in_turn(session, "bs1", all_series, clock)
    session.require("perf", "bs1")


def perf_maxbatch(session: Session, options: TimingOptions) -> None:
    """Find the largest batch of each format and engine, then time the workload in it (Table 4).

    Raises
    ------
    InputError
        An engine is unknown or cannot run here, or `memory_mib` is too little for one request in every format.
    RuntimeError
        Nothing could be measured.
    """
    allowed_mib = session.count("memory_mib", options.memory_mib)
    cap = min(session.count("max_batch", options.max_batch), len(options.workload.prompts))
    limit_mib = float(allowed_mib or session.device.memory_mib)
    # peaks are measured before anything is loaded, or held to less memory
    all_series = _all_series(session, "maxbatch", options, memory_limit_mib=limit_mib, cap=cap)
    limited = memory.limited(session.device.memory_mib, allowed_mib if session.device.kind == "cuda" else 0)
    with session.exclusive("04") as clock, limited:
        # 1) search
        searched: list[Series] = []
        too_little = []
        with session.progress(len(all_series), "largest batch") as bar:
            for each in _while_time_is_left(all_series, cap, clock):
                name = f"{each.precision.name} with {each.engine}"
                bar.set_postfix_str(name)
                with session.failing(each.batch_key, f"the largest batch of {name}"):
                    try:
                        _search(each)
                        searched.append(each)
                    except batch_search.OneRequestDoesNotFit as error:
                        too_little.append(str(error))
                        raise
                bar.update()
        if options.memory_mib != "auto" and len(too_little) == len(all_series):
            raise InputError(f"memory_mib is {allowed_mib}: out of memory: {too_little[-1]}")
        # 2) time
        if not searched:
            session.require("batch")
        time_in_turn(session, "maxbatch", searched, clock)
    session.require("perf", "maxbatch")


def _while_time_is_left(all_series: Sequence[Series], cap: int, clock: Clock) -> Iterator[Series]:
    """Yield the series whose largest batch there is time to find and to time; name the others.

    Every format comes with one engine, before those that take longest come with another.
    """
    engines = list(dict.fromkeys(each.engine for each in all_series))
    costs_s = {}
    for place, each in enumerate(all_series):
        shape = Shape(cap, len(each.workload.longest), each.workload.new_tokens)
        costs_s[place] = _search_s(each.session, each.precision, each.peaks, shape, engines=1) + 2 * _beside_s(each)
    timing_s, left_out = 0.0, []
    for place in sorted(costs_s, key=lambda place: costs_s[place] * (1 + engines.index(all_series[place].engine))):
        each = all_series[place]
        if timing_s + costs_s[place] <= clock.left_s or each.session.decided(each.batch_key):
            timing_s += costs_s[place] / 2
            yield each
        else:
            left_out.append(f"{each.precision.name} with {each.engine}")
    if left_out:
        minutes = f"the {all_series[0].session.minutes:g} minutes do not suffice for the largest batch of"
        tqdm.write(f"{minutes} {', '.join(left_out)}; give more minutes to add it")


def _all_series(session: Session, setting: str, options: TimingOptions, **asked: Any) -> list[Series]:
    from qnb.speed.engines import parse as parse_engines

    engines, repeats = parse_engines(options.engines, session.device.kind), session.count("repeats", options.repeats)
    asked = {"workload": options.workload.fingerprint, "prompt_source": options.workload.source, **asked}
    series = partial(
        Series, session, setting, options.workload, repeats, device_peaks(session, NOTEBOOKS.get(setting, "04"))
    )
    return [series(precision, engine, asked) for precision, engine in product(session.precisions, engines)]


def _search(series: Series) -> None:
    """Find the largest batch of a series, in the ledger or by trials; an engine that cannot run stays at batch 1."""
    from qnb.speed.batch_trials import Trials, load_trials
    from qnb.speed.engines import EngineUnavailable, why_unavailable

    session, precision, engine, work = series.session, series.precision, series.engine, series.workload
    limit_mib, cap, place = series.asked["memory_limit_mib"], series.asked["cap"], session.device.place
    if why_unavailable(engine, session.device.kind, precision.threshold):
        return
    if row := session.find(series.batch_key):
        series.largest = LargestBatch.from_row(row)
        return

    def search(loaded: Loaded) -> LargestBatch:
        trials = Trials(loaded.model, work, limit_mib, engine, loaded.baseline_mib)
        return batch_search.find_largest_batch(trials, limit_mib, cap)

    last_safe = _last_safe_batch(series)
    with suppress(EngineUnavailable):
        if last_safe is None or cap <= last_safe:
            largest = with_model(session, precision, search)
        else:
            folder, pinned = session.checkpoint(precision), session.pinned(precision)
            memory.release(workspaces=True)
            with batch_search.ChildTrials(load_trials, folder, pinned, place, work, limit_mib, engine) as try_batch:
                largest = batch_search.find_largest_batch(try_batch, limit_mib, cap, last_safe)
        series.record_batch(largest)


def _last_safe_batch(series: Series) -> int | None:
    """Return the largest batch that cannot end its process, 0 where it is not known; None where none can.

    bitsandbytes' INT8 kernels end the process where `eager` reads more prompts at once. `cuda_graph` reads chunks.
    """
    if series.session.device.kind == "cuda" and series.precision.eight_bit and series.engine == "eager":
        return batch_search.int32_rows(series.session.config, len(series.workload.longest))
    return None


def sweep(session: Session, options: TimingOptions) -> None:
    """Time three batches each of 1, 2, 4 ... requests, a row a format, engine and size.

    The first size that does not fit ends the sizes of its format and engine. It is tried again on the next run. Sizes
    that may end the process are left out; a note stands for them.

    Raises
    ------
    InputError
        An engine is unknown or cannot run here.
    """
    largest = session.count("sweep_batch", options.sweep_batch)
    if not largest:
        return
    searches = session.ledger.rows("batch") if options.sweep_batch == "auto" else []
    searched = {(row["precision"], row["engine"]): row["batch_size"] for row in searches}
    all_series, swept = _all_series(session, "", options), []
    with session.exclusive("04") as clock:
        for each in all_series:
            most = searched.get((each.precision.name, each.engine), largest)
            last_safe = _last_safe_batch(each) or most
            for size in batch_search.sweep_sizes(min(most, last_safe)):
                prompt_ids = tuple(islice(cycle(options.workload.prompts), BATCHES_SWEPT * size))
                batches = replace(options.workload, prompts=prompt_ids)
                swept.append(replace(each, stage="sweep", setting=str(size), size=size, workload=batches, repeats=1))
            unsafe = next((size for size in batch_search.sweep_sizes(most) if size > last_safe), 0)
            key = session.key("sweep", each.precision, each.asked, engine=each.engine, setting=str(unsafe))
            if unsafe and not session.find(key):
                session.append(key, each.asked, {"batch_size": unsafe, "note": UNSAFE})
        time_in_turn(session, "batch sizes", _affordable(session, swept, clock.left_s), clock)


def _affordable(session: Session, swept: Sequence[Series], seconds: float) -> list[Series]:
    """Return the sizes of the formats and engines that can be swept in so many seconds, the fastest first."""
    rows = _first_passes(session)
    timed = {name: row for name, row in rows.items() if row.get("total_s")}
    names = list(dict.fromkeys((each.precision.name, each.engine) for each in swept))
    sizes = Counter((each.precision.name, each.engine) for each in swept)
    costs_s = {name: BATCHES_RUN * sizes[name] * row["total_s"] / row["requests"] for name, row in timed.items()}
    left_out = []
    for name in sorted(names, key=lambda name: costs_s.get(name, 0.0)):
        seconds -= costs_s.get(name, 0.0)
        left_out += [name] if seconds < 0 else []
    if left_out:
        tqdm.write(f"no sweep of {', '.join(map(' with '.join, left_out))}: the {session.minutes:g} minutes are spent")
    return [each for each in swept if (each.precision.name, each.engine) not in left_out]


def _beside_s(series: Series) -> float:
    """Return what warming up and compiling took at batch size 1, beside what was timed; 0 where that was not run."""
    row = _first_passes(series.session).get((series.precision.name, series.engine), {})
    return row["pass_s"] - row["total_s"] if row.get("total_s") else 0.0


def _first_passes(session: Session) -> dict[tuple[str, str], Row]:
    """Return the first passes at batch size 1, by format and engine."""
    rows = (row for row in session.ledger.rows("perf") if row["setting"] == "bs1" and row["repeat"] == 0)
    return {(row["precision"], row["engine"]): row for row in rows}


def prompt_lengths(session: Session, prompt_source: str = "auto", counts: Sequence[int] = (20, 2000, 5000)) -> None:
    """Record the lengths of prompts, from which `qnb.report.batch_plans` plans their batches.

    Prompts are whole paragraphs, of every split of WikiText-2: only the context window cuts them.

    Raises
    ------
    InputError
        The prompts cannot be read, or `counts` has no number or one that is not positive.
    """
    from qnb.speed.engines import context_window

    source = session.prompt_source(prompt_source)
    counts = sorted({session.count("counts", each) for each in counts or [0]})
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
    NotFiniteError
        The format overflows in this model.
    """
    from qnb.quantize.checkpoint import quiet
    from qnb.speed.engines import generate_checked

    (named,), tokens = parse(precision), session.count("new_tokens", new_tokens)
    prompt_ids = session.tokenizer(prompt, verbose=False)["input_ids"] if prompt.strip() else []
    if not prompt_ids:
        raise InputError("the prompt is empty; give some words to go on from")

    def generate(loaded: Loaded) -> list[int]:
        return list(generate_checked(loaded.model, [prompt_ids], tokens)[0].tolist())

    with session.exclusive(), quiet():  # a measurement of another process would be disturbed
        new_ids = with_model(session, named, generate)
    # a character may take several tokens: a piece is what its token adds to the text
    texts = [str(session.tokenizer.decode(new_ids[:end])).rstrip("\ufffd") for end in range(len(new_ids) + 1)]
    return [now.removeprefix(before) for before, now in pairwise(texts)]
