"""The stages of notebooks 03 and 04: workload, device peaks, batch size 1, largest batch, sweep, prompt lengths.

Each is a function of a session and of what a user may ask, a class that checks its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import cycle, islice, pairwise
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from qnb import memory, prompts
from qnb.errors import InputError, check_choice
from qnb.flags import flag_text
from qnb.options import Count, Names, check_count
from qnb.precision import parse
from qnb.prompts import Workload
from qnb.quantize import existing
from qnb.speed import batch_search, plan
from qnb.speed.passes import UNSAFE, Loaded, Series, time_in_turn, with_model
from qnb.speed.plan import Shape

if TYPE_CHECKING:
    from qnb.session import Session
    from qnb.speed.device_peaks import DevicePeaks

NOTEBOOKS = {"bs1": "03", "maxbatch": "04"}  # by setting
BATCHES_SWEPT = 3  # of each size


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
        The most tokens of a prompt, and the new tokens of each. In a session with a budget of minutes there may
        be fewer new tokens, the same for every format.
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
        check_choice("prompt_source", self.prompt_source, prompts.SOURCES)


@dataclass(frozen=True)
class TimingOptions:
    """What is timed: one request at a time, in the largest batch, or in batches of several sizes.

    Parameters
    ----------
    workload
        The requests, which the largest batch has at most. The search takes the longest of them with all its new
        tokens; a sweep repeats them as often as its batches need.
    engines
        ``"eager"``, ``"cuda_graph"`` or both; ``"auto"`` is both on a GPU, else eager.
    repeats
        The most passes. After three at the earliest, a format and engine that has settled gets no further one.
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
    engines: Names = "auto"
    repeats: int = 1
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
        requests, prompt_tokens, new_tokens = _within_budget(session, options, most)
    source = session.prompt_source(options.prompt_source)
    return prompts.load(session.tokenizer, source, requests, prompt_tokens, new_tokens, session.data_dir, session.seed)


def _within_budget(session: Session, options: WorkloadOptions, most: Shape) -> Shape:
    """Return a workload that the session's minutes allow, at most `most`; it stays, whatever is added later."""
    setting, asked = options.setting, {"most": most}
    notebook, key = NOTEBOOKS[setting], session.key("pace", None, asked, setting=setting)
    peaks = device_peaks(session, notebook)
    with session.exclusive(notebook) as clock:
        row = session.decided(key)
        if not row:
            allowed = most
            if setting == "maxbatch":
                allowed = plan.fewer_new_tokens(session, peaks, most, clock.left_s)
            elif options.requests == "auto":
                allowed = plan.fewer_requests(session, peaks, most, clock.left_s)
            row = session.append(key, asked, allowed._asdict())
            tqdm.write(f"timed are {allowed.requests} requests of {allowed.new_tokens} new tokens each")
    return Shape(**{name: row[name] for name in Shape._fields})


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
        time_in_turn(session, "batch size 1", all_series, clock)
    session.require("perf", "bs1")


def perf_maxbatch(session: Session, options: TimingOptions) -> None:
    """Find the largest batch of each format and engine within the memory allowed, then time the workload in it.

    Raises
    ------
    InputError
        An engine is unknown or cannot run here, or `memory_mib` is too little for one request.
    RuntimeError
        Nothing could be measured.
    """
    allowed_mib = session.count("memory_mib", options.memory_mib)
    asked = {"memory_limit_mib": float(allowed_mib or session.device.memory_mib), "cap": len(options.workload.prompts)}
    # peaks are measured before anything is loaded, or held to less memory
    all_series = _all_series(session, "maxbatch", options, **asked)
    limited = memory.limited(session.device.memory_mib, allowed_mib if session.device.kind == "cuda" else 0)
    with session.exclusive("04") as clock, limited:
        quick_first = sorted(all_series, key=lambda each: plan.batches_s(each, each.asked["cap"]))
        time_in_turn(session, "largest batches", quick_first, clock)
    if not any(each.passes for each in all_series):
        keys = [each.batch_key["fingerprint"] for each in all_series]
        failed = [row for row in session.ledger.failures() if row["fingerprint"] in keys]
        if options.memory_mib != "auto" and {row["error"] for row in failed} == {MemoryError.__name__}:
            raise InputError(f"memory_mib is {options.memory_mib}: {failed[-1]['reason']}")
        session.require("batch")
    session.require("perf", "maxbatch")


def _all_series(session: Session, setting: str, options: TimingOptions, **asked: Any) -> list[Series]:
    from qnb.speed.engines import parse as parse_engines

    engines, repeats = parse_engines(options.engines, session.device.kind), session.count("repeats", options.repeats)
    asked = {"workload": options.workload.fingerprint, "prompt_source": options.workload.source, **asked}
    notebook = NOTEBOOKS.get(setting, "04")
    series = partial(Series, session, setting, options.workload, repeats, device_peaks(session, notebook))
    all_series: list[Series] = []
    with session.exclusive(notebook):
        for precision in session.precisions:
            # a checkpoint made elsewhere that cannot be loaded is recorded as a failure
            with session.failing(session.key("quantize", precision), precision.name):
                if precision.origin:
                    existing.row(session, precision)
                all_series += [series(precision, engine, asked) for engine in engines]
    return all_series


def sweep(session: Session, options: TimingOptions) -> None:
    """Time three batches or more of 1, 2, 4 ... requests each, a row a format, engine and size.

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
            most = searched.get(each.name, largest)
            last_safe = each.last_safe_batch
            for size in batch_search.sweep_sizes(min(most, last_safe)):
                prompt_ids = tuple(islice(cycle(options.workload.prompts), BATCHES_SWEPT * size))
                batches = replace(options.workload, prompts=prompt_ids)
                swept.append(replace(each, stage="sweep", setting=str(size), size=size, workload=batches, repeats=1))
            unsafe = next((size for size in batch_search.sweep_sizes(most) if size > last_safe), 0)
            key = session.key("sweep", each.precision, each.asked, engine=each.engine, setting=str(unsafe))
            if unsafe and not session.find(key):
                session.append(key, each.asked, {"batch_size": unsafe, "note": UNSAFE})
        plan.leave_out_late(swept, clock.left_s)
        time_in_turn(session, "larger batches of the sweep", swept, clock)


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
