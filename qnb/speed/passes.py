"""Time formats and engines in turn, pass by pass, until each has settled.

Each turn begins with another format, so a machine that slows down slows all of them.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from qnb import memory
from qnb.budget import Clock, name_left_out, now_s
from qnb.ledger import write_parquet
from qnb.precision import Precision
from qnb.prompts import Workload
from qnb.quantize import existing
from qnb.speed import batch_search, plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qnb.session import Session
    from qnb.speed.device_peaks import DevicePeaks

LOG = logging.getLogger(__name__)

Result = TypeVar("Result")

LEAST_PASSES = 3
UNSAFE = "not tried: bitsandbytes counts an INT8 layer's outputs in 32 bits, and ends the process beyond"
STAND_IN = "no speed: in batches of {} its library multiplies by {}, which is no kernel of the format"
SETTLED_WIDTH = 0.05  # of the 95 % interval over passes, relative to their mean
_is_warmed_up = False  # whether this process has run a model


@dataclass
class Series:
    """The passes of one format with one engine, all of one batch size: the largest where that was searched, or `size`.

    `asked` holds everything that the search depends on. The passes of a largest batch depend on that batch too.
    """

    session: Session
    setting: str
    workload: Workload
    repeats: int  # the most passes
    peaks: DevicePeaks
    precision: Precision
    engine: str
    asked: Mapping[str, Any]
    stage: str = "perf"  # or "sweep", in which a size that does not fit is a result
    size: int = 1
    largest: batch_search.LargestBatch | None = None
    passes: list[Mapping[str, Any]] = field(default_factory=list, init=False)
    has_failed: bool = False
    is_late: bool = False  # left out of a sweep or a search for which there is no time

    @property
    def name(self) -> tuple[str, str]:
        """The names of the format and the engine."""
        return self.precision.name, self.engine

    def why_unavailable(self, model: PreTrainedModel | None = None) -> str:
        """Return why the engine cannot run with the format; "" where it can, as far as is known without the model."""
        from qnb.speed.engines import why_unavailable

        tokens = len(self.workload.longest) + self.workload.new_tokens
        if self.precision.origin and (row := existing.row(self.session, self.precision))["is_unpacked"]:
            return f"{row['ran_as']}: its speed and memory would be those of the unpacked weights"
        pinned, place = self.session.pinned(self.precision), self.session.device
        is_emulated = place.bf16 == "emulated" and pinned.dtype == "bfloat16"
        is_unfused_int8 = is_emulated and pinned.compute_dtype == "int8"
        return why_unavailable(self.engine, place.kind, pinned.threshold, model, tokens, is_unfused_int8)

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return self.largest.batch_size if self.largest else self.size

    @property
    def pass_asked(self) -> dict[str, Any]:
        """What a pass depends on; the sizes of a sweep belong together."""
        if self.stage == "sweep":
            return {**self.asked}
        capped = {"capped": self.largest.capped} if self.largest else {}
        return {**self.asked, "batch_size": self.batch_size, **capped}

    @property
    def key(self) -> dict[str, Any]:
        """The key of the next pass."""
        fields = {"engine": self.engine, "setting": self.setting, "repeat": len(self.passes)}
        return self.session.key(self.stage, self.precision, self.pass_asked, **fields)

    @property
    def batch_key(self) -> dict[str, Any]:
        """The key of the search."""
        return self.session.key("batch", self.precision, self.asked, engine=self.engine)

    @property
    def is_unsearched(self) -> bool:
        """Whether its largest batch has to be found before it can be timed."""
        return self.setting == "maxbatch" and self.largest is None

    @property
    def last_safe_batch(self) -> int:
        """The largest batch that cannot end the process.

        bitsandbytes' INT8 kernels end it where `eager` reads more prompts at once. `cuda_graph` reads chunks.
        """
        if self.session.device.kind == "cuda" and self.precision.eight_bit and self.engine == "eager":
            return max(1, batch_search.int32_rows(self.session.config, len(self.workload.longest)))
        return sys.maxsize

    @property
    def stop_reason(self) -> str:
        """Why no further pass follows: "interval", "limit", or "" where one does."""
        if any("batch_s" not in each for each in self.passes):  # the engine cannot run
            return "limit"
        if is_settled([median(each["batch_s"]) for each in self.passes]):
            return "interval"
        return "limit" if len(self.passes) >= self.repeats else ""

    def record_batch(self, largest: batch_search.LargestBatch, note: str = "") -> None:
        """Record the largest batch; its passes begin anew. A note says what, other than memory, ended the search."""
        tokens = {"prompt_tokens": len(self.workload.longest), "new_tokens": self.workload.new_tokens}
        self.session.append(self.batch_key, self.asked, asdict(largest), tokens, {"note": note})
        self.largest = largest
        self.passes.clear()

    def search(self, loaded: Loaded) -> None:
        """Find the largest batch by trials, and record it."""
        from qnb.speed.batch_trials import Trials

        limit_mib, cap, last_safe = self.asked["memory_limit_mib"], self.asked["cap"], self.last_safe_batch
        trials = Trials(loaded.model, self.workload, limit_mib, self.engine, loaded.baseline_mib)
        largest = batch_search.find_largest_batch(trials, limit_mib, min(cap, last_safe))
        note = f"larger batches were {UNSAFE}" if largest.batch_size == last_safe < cap else ""
        self.record_batch(replace(largest, capped=largest.batch_size == cap), note)

    def comes_late(self, clock: Clock, missing: Sequence[Series]) -> bool:
        """Return whether there is no time for a search or a size of a sweep; any other series gets its first pass."""
        if self.is_unsearched:
            self.is_late = not plan.is_affordable(self, missing, clock.left_s)
        elif self.stage == "sweep":
            self.is_late = clock.left_s < 0
        return self.is_late

    def find_pass(self) -> bool:
        """Take the next pass from the ledger; return whether it was there. What did not fit is tried again."""
        if self.is_unsearched and (row := self.session.find(self.batch_key)):
            self.largest = batch_search.LargestBatch.from_row(row)
        row = self.session.find(self.key)
        self.has_failed = row is None or row.get("fits") is False  # until it is recorded
        self.passes += [row] if row and not self.has_failed else []
        return not self.has_failed

    def time_pass(self, loaded: Loaded | None) -> None:
        """Time the next pass and record it. Where memory runs out, the batch shrinks; in a sweep that ends it.

        Nothing has to be loaded where the engine cannot run.
        """
        started_s = now_s()
        while True:
            try:
                values = twice(partial(self._time, loaded)) if self.stage == "sweep" else self._time(loaded)
                break
            except (RuntimeError, MemoryError) as error:
                if not memory.is_out_of_memory(error) or (self.batch_size == 1 and self.stage != "sweep"):
                    raise
            if self.largest is None:
                values = {"batch_size": self.batch_size, "fits": False, "note": "out of memory"}
                break
            self.record_batch(self.largest.smaller())
            memory.release()
        key, asked = self.key, self.pass_asked
        values["pass_s"] = now_s() - started_s  # with warming up and compiling
        self.passes.append(values)
        self.session.append(key, asked, values, {"stop_reason": self.stop_reason})
        self.has_failed = False

    def _time(self, loaded: Loaded | None) -> dict[str, Any]:
        """Run the workload; return the row's values, or a note where the engine cannot run.

        What the row was reduced from, the monitor's readings and each token's time, is written to files that it names.
        """
        import pandas as pd

        from qnb.speed.benchmark import run

        workload, folder = self.workload, self.session.folder
        reason = self.why_unavailable(loaded.model if loaded else None)
        if reason or loaded is None:
            return {"batch_size": self.batch_size, "note": reason}
        is_traced = self.precision.kernels or (not self.passes and self.stage != "sweep")
        kernels = self.precision.kernels if is_traced else None
        if kernels and self.batch_size > 1:
            kernels = kernels.removesuffix("|triton_")  # of one row's product, a reduction; else of elementwise work
        timed = run(loaded.model, workload, self.batch_size, self.engine, loaded.baseline_mib, self.peaks, kernels)
        values = asdict(timed.run)
        if name := timed.run.stand_in:
            return {"batch_size": self.batch_size, "stand_in": name, "note": STAND_IN.format(self.batch_size, name)}
        token_times_s = pd.DataFrame({"token_times_s": timed.token_times_s})  # a row a batch
        stem = "samples/" + ".".join(map(str, self.key.values()))

        def write() -> None:
            for name, frame in {"samples": pd.DataFrame(timed.readings), "tokens": token_times_s}.items():
                values[f"{name}_file"], values[f"{name}_sha256"] = write_parquet(folder, f"{stem}.{name}", frame)

        unless_it_fails(write, None)
        return values


def is_settled(pass_medians_s: Sequence[float]) -> bool:
    """Return whether the mean over passes is known to 5 %: more of them would not change what is reported.

    The interval is Student's, of 95 %. A value is a whole pass's: its requests share the state that the machine was
    in.
    """
    from scipy.special import stdtrit

    passes = len(pass_medians_s)
    if passes < LEAST_PASSES:
        return False
    half_width = float(stdtrit(passes - 1, 0.975)) * stdev(pass_medians_s) / math.sqrt(passes)
    return 2 * half_width <= SETTLED_WIDTH * fmean(pass_medians_s)


def time_in_turn(session: Session, what: str, all_series: Sequence[Series], clock: Clock) -> None:
    """Give each series passes until it has settled, has failed, has had all of them, or time is short for another.

    A series without its largest batch is searched before its first pass, on the same loaded model, if there is time
    for both; every other one gets a first pass, unless it is late already. A format is loaded once for all its passes
    of a turn. What the ledger has is not measured again. What there was no time for is named.
    """
    formats = list(dict.fromkeys(series.precision for series in all_series))
    for turn in count():
        due = [each for each in all_series if not (each.is_late or each.has_failed or each.stop_reason)]
        turn_s = sum(series.passes[-1].get("pass_s", 0.0) for series in due if series.passes)
        if not due or (turn and turn_s > clock.left_s):
            # a size of a sweep is late with all that are larger
            return name_left_out(session, what, {" with ".join(each.name): each.is_late for each in all_series})
        first, missing = turn % len(formats), [series for series in due if not series.find_pass()]
        for precision in session.each_format(f"{what}, pass {turn + 1}", formats[first:] + formats[:first]):
            own = [series for series in missing if series.precision == precision]
            for series in filter(Series.why_unavailable, own):
                series.time_pass(None)  # it is recorded, and no longer a failure
            own = [series for series in own if series.has_failed and not series.comes_late(clock, missing)]
            if own:
                key = own[0].batch_key if own[0].is_unsearched else own[0].key
                with session.failing(key, precision.name):
                    with_model(session, precision, partial(_time_passes, own, missing, clock))
            missing = [series for series in missing if series.precision != precision]


def _time_passes(own: Sequence[Series], missing: Sequence[Series], clock: Clock, loaded: Loaded) -> None:
    """Time a pass of each series with their format loaded; one that fails costs no other its pass.

    After a size that does not fit, no larger one of its engine is tried; of a sweep, none once the time is spent.
    """
    full_engines: set[str] = set()
    for series in own:
        memory.release()
        # for the first one the model was loaded
        if series.engine in full_engines or (series is not own[0] and series.comes_late(clock, missing)):
            continue
        name = f"{series.precision.name} with engine {series.engine}"
        if series.is_unsearched and not series.why_unavailable(loaded.model):
            with series.session.failing(series.batch_key, f"the largest batch of {name}"):
                series.search(loaded)
            if series.is_unsearched:
                continue
        with series.session.failing(series.key, name):
            series.time_pass(loaded)
            full_engines |= {series.engine} if series.passes[-1].get("fits") is False else set()


def twice(measure: Callable[[], Result]) -> Result:
    """Return what `measure` returns; where memory runs out, give back what is cached and measure once more."""
    try:
        return measure()
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
    memory.release()  # out of `except`, whose error holds the frames of the failure
    return measure()


def unless_it_fails(measure: Callable[[], Result], otherwise: Result) -> Result:
    """Return what `measure` returns. Where it fails, that is missing, and the timing beside it stays."""
    try:
        return measure()
    except Exception as error:
        LOG.warning("something beside a timing failed: %s: %s", type(error).__name__, error)
        return otherwise


class Loaded(NamedTuple):
    """A model, and the memory in use before it was loaded, NaN where that is unknown."""

    model: PreTrainedModel
    baseline_mib: float


def with_model(session: Session, precision: Precision, measure: Callable[[Loaded], Result]) -> Result:
    """Load a format's checkpoint, measure it, and give its memory back; `measure` must not keep the model.

    On a CPU the first model of a process runs once before: what libraries allocate at first use is no format's memory.
    """
    global _is_warmed_up
    from qnb.speed.engines import Eager
    from qnb.speed.monitor import used_memory_mib

    if session.device.kind == "cpu" and not _is_warmed_up:
        _is_warmed_up = True
        with_model(session, precision, lambda loaded: Eager(loaded.model).generate([[1, 2, 3, 4]], 2))
    session.checkpoint(precision)
    memory.release(workspaces=True)
    baseline_mib = used_memory_mib(*session.device.places)
    with ExitStack() as stack:  # no variable here may hold the model: a notebook keeps its last traceback
        return measure(Loaded(stack.enter_context(session.loaded(precision)), baseline_mib))
