"""Time formats and engines in turn, pass by pass, until each has settled.

Each turn begins with another format, so a machine that slows down slows all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from qnb import memory
from qnb.ledger import Row, write_parquet
from qnb.precision import Precision
from qnb.prompts import Workload
from qnb.speed.batch_search import LargestBatch

if TYPE_CHECKING:
    from tqdm.auto import tqdm
    from transformers import PreTrainedModel

    from qnb.session import Session
    from qnb.speed.device_peaks import DevicePeaks

Result = TypeVar("Result")
Passes = Sequence[str]  # see `qnb.speed.benchmark.PASSES`

LEAST_PASSES = 3
SETTLED_WIDTH = 0.05  # of the 95 % interval over passes, relative to their mean
_is_warmed_up = False  # whether this process has run a model


class Loaded(NamedTuple):
    """A model, and the memory in use before it was loaded, None where that is unknown."""

    model: PreTrainedModel
    baseline_mib: float | None


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


@dataclass
class Series:
    """The passes of one format with one engine, all of one batch size.

    `search` is what the batch size comes from: a row of stage "batch", or just a batch size. `asked` is what that
    search depends on, and with its outcome, what the passes depend on.
    """

    precision: Precision
    engine: str
    asked: Mapping[str, Any]
    search: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)
    has_failed: bool = False

    @property
    def pass_asked(self) -> dict[str, Any]:
        """What a pass depends on."""
        return {**self.asked, **{name: self.search[name] for name in ("batch_size", "capped") if name in self.search}}

    def stop_reason(self, repeats: int, *new: Mapping[str, Any]) -> str:
        """Return why no pass follows its rows and `new` ones: "interval", "limit", or "" where one does."""
        rows = (*self.rows, *new)
        if any("batch_s" not in row for row in rows):  # the engine cannot run
            return "limit"
        if is_settled([median(row["batch_s"]) for row in rows]):
            return "interval"
        return "limit" if len(rows) >= repeats else ""


@dataclass(frozen=True)
class Timer:
    """Times series in turn and records each pass. What the ledger has is not measured again."""

    session: Session
    setting: str
    workload: Workload
    repeats: int
    peaks: DevicePeaks

    def time_all(self, all_series: Sequence[Series], bar: tqdm) -> None:
        """Give each series passes until it has settled, has failed, or has had all of them."""
        precisions = self.session.precisions
        for turn in count():
            first, is_over = turn % len(precisions), True
            for precision in (*precisions[first:], *precisions[:first]):
                bar.set_postfix_str(precision.name)
                mine = [each for each in all_series if each.precision == precision and not each.has_failed]
                due = [each for each in mine if not each.stop_reason(self.repeats)]
                if due:
                    is_over = False
                    self._time_turn(due)
                bar.update(turn < self.repeats)
            if is_over:
                return

    def _time_turn(self, due: Sequence[Series]) -> None:
        """Add a pass to each series of one format."""
        missing: list[Series] = []
        for series in due:
            if row := self.session.find(self._key(series)):
                series.rows.append(row)
            else:
                series.has_failed = True  # until its pass is recorded
                missing.append(series)
        if missing:
            precision = missing[0].precision
            with self.session.failing(self._key(missing[0]), precision.name):
                warm_up_libraries(self.session, precision)
                with_model(self.session, precision, partial(self._time_missing, missing))

    def _time_missing(self, missing: Sequence[Series], loaded: Loaded) -> None:
        for series in missing:
            with self.session.failing(self._key(series), f"{series.precision.name} with engine {series.engine}"):
                values = self._time_pass(series, loaded)
                reason = {"stop_reason": series.stop_reason(self.repeats, values)}
                row = self.session.append(self._key(series), series.pass_asked, values, reason)
                series.rows.append(row)
                series.has_failed = False
            memory.release()

    def _time_pass(self, series: Series, loaded: Loaded) -> dict[str, Any]:
        """Time one pass. Where memory runs out, the batch shrinks and the series begins again."""
        from qnb.speed.benchmark import PASSES

        while True:
            key, batch_size, passes = self._key(series), series.search["batch_size"], () if series.rows else PASSES
            try:
                return time_row(self.session, key, loaded, self.workload, batch_size, self.peaks, passes)
            except (RuntimeError, MemoryError) as error:
                if not memory.is_out_of_memory(error) or batch_size == 1 or "probes" not in series.search:
                    raise
            smaller = LargestBatch.from_row(series.search).smaller()
            series.search = record_batch(self.session, series, self.workload, smaller)
            series.rows.clear()
            memory.release()

    def _key(self, series: Series) -> dict[str, Any]:
        fields = {"engine": series.engine, "setting": self.setting, "repeat": len(series.rows)}
        return self.session.key("perf", series.precision, series.pass_asked, **fields)


def record_batch(session: Session, series: Series, workload: Workload, largest: LargestBatch) -> Row:
    """Record the largest batch of a series' format and engine."""
    key = session.key("batch", series.precision, series.asked, engine=series.engine)
    tokens = {"prompt_tokens": len(workload.longest), "new_tokens": workload.new_tokens}
    return session.append(key, series.asked, asdict(largest), tokens)


def time_row(
    session: Session, key: Row, loaded: Loaded, workload: Workload, batch_size: int, peaks: DevicePeaks, passes: Passes
) -> dict[str, Any]:
    """Run the workload with the key's engine; return the row's values, or a note where the engine cannot run.

    What the row was reduced from, the monitor's readings and each token's time, is written to files that it names.
    """
    import pandas as pd

    from qnb.speed.benchmark import run
    from qnb.speed.engines import why_unavailable

    engine, tokens = key["engine"], len(workload.longest) + workload.new_tokens
    if reason := why_unavailable(engine, session.device.kind, model=loaded.model, tokens=tokens):
        return {"batch_size": batch_size, "note": reason}
    timed = run(loaded.model, workload, batch_size, engine, loaded.baseline_mib, peaks, passes)
    values = asdict(timed.run)
    parts = ("stage", "setting", "precision", "engine", "repeat", "fingerprint")
    stem = "samples/" + ".".join(str(key.get(name, 0)) for name in parts)
    for name, rows in (("samples", timed.readings), ("tokens", timed.token_rows())):
        file_and_hash = write_parquet(session.folder, f"{stem}.{name}", pd.DataFrame(rows))
        values[f"{name}_file"], values[f"{name}_sha256"] = file_and_hash
    return values


def with_model(session: Session, precision: Precision, measure: Callable[[Loaded], Result]) -> Result:
    """Load a format's checkpoint, measure it, and give its memory back; `measure` must not keep the model."""
    from qnb.speed.monitor import used_memory_mib

    session.checkpoint(precision)
    memory.release(workspaces=True)
    baseline_mib = used_memory_mib(session.device.place)
    with ExitStack() as stack:  # no variable here may hold the model: a notebook keeps its last traceback
        return measure(Loaded(stack.enter_context(session.loaded(precision)), baseline_mib))


def warm_up_libraries(session: Session, precision: Precision) -> None:
    """Run a model once in this process: on a CPU, what libraries allocate at first use is no format's memory."""
    global _is_warmed_up
    if session.device.kind == "cpu" and not _is_warmed_up:
        from qnb.quantize.checkpoint import quiet
        from qnb.speed.engines import Eager

        with quiet():
            with_model(session, precision, lambda loaded: Eager(loaded.model).generate([[1, 2, 3, 4]], 2))
        _is_warmed_up = True
