"""Which format may be deployed? A decision over measured rows, and what the rows cannot decide.

A format loses at most what is tolerated only if its whole 95 % interval says so. It loses more only if the whole
interval says that. In between the data cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qnb.columns import column, format_value, is_disturbed
from qnb.precision import BASELINE
from qnb.report.results import Results
from qnb.report.tables import MEAN, build, headline

SPEEDS = ("tpot_s", "throughput_rps", "throughput_tps")  # what candidates may be ranked by
CHANGE = ["change_pp", "low_pp", "high_pp"]
FITS, UNSURE, RULED_OUT = "fits", "may fit", "ruled out"


@dataclass(frozen=True, slots=True)
class Demand:
    """What a deployment needs; None sets no limit."""

    rank_by: str  # a name in SPEEDS
    memory_mib: float | None = None  # at most
    speed_limit: float | None = None  # of `rank_by`: at most for a time, at least for a rate
    loss_pp: float | None = None  # tolerated points below BF16


@dataclass(frozen=True, slots=True)
class Advice:
    """The recommendation and everything it was weighed against."""

    demand: Demand
    candidates: pd.DataFrame  # best first, with `verdict` and `reasons`, what rules each out or cannot be told
    notes: tuple[str, ...]

    def of(self, verdict: str) -> pd.DataFrame:
        """Return the candidates with a verdict: `FITS`, `UNSURE` or `RULED_OUT`."""
        return self.candidates[self.candidates.verdict == verdict]

    @property
    def best(self) -> pd.Series | None:
        """What to deploy; None where nothing is shown to fit."""
        return next((row for _, row in self.of(FITS).iterrows()), None)


def candidates(results: Results, setting: str, task: str = MEAN) -> pd.DataFrame:
    """Join speed and accuracy of every format and engine that was timed, under a name made of the two.

    Parameters
    ----------
    results
        A study's frames.
    setting
        ``"bs1"`` or ``"maxbatch"``.
    task
        The task whose accuracy counts, or `MEAN` for the mean over tasks that all formats answered alike.
    """
    frame = results.timed(setting).join(accuracies(results, task), on="precision")
    return frame.set_index(pd.Index([f"{row.precision} ({row.engine})" for row in frame.itertuples()], dtype=object))


def tasks(results: Results) -> list[str]:
    """Return the tasks a decision can rest on: the mean over tasks first, none where no accuracy was measured."""
    if results.scores.empty:
        return []
    shown = headline(results.scores)
    return [MEAN, *shown[shown.metric != "mean"].task.unique()]


def accuracies(results: Results, task: str = MEAN) -> pd.DataFrame:
    """Return accuracy, items, and the change against BF16 with its 95 % interval; a row a format."""
    columns = ["accuracy_pct", "n_items", *CHANGE]
    if results.scores.empty:
        return pd.DataFrame(columns=columns, dtype=float)
    shown, changes = headline(results.scores), build(results, "table2_change")
    shown = shown[(shown.asked if task == MEAN else shown.task) == task].drop_duplicates("precision")
    changes = changes[changes.task.map(lambda name: name.partition(" (")[0]) == task].dropna(subset=CHANGE)
    frame = shown.set_index("precision").join(changes.set_index("precision")[CHANGE].astype(float))
    frame.loc[frame.index == BASELINE, CHANGE] = 0.0
    return frame.assign(accuracy_pct=100 * frame.value)[columns]


def choose(candidates: pd.DataFrame, demand: Demand) -> Advice:
    """Hold every candidate against a demand: what fits, what may, and what does not, by speed, then by memory."""
    is_time = column(demand.rank_by).better == "less"
    table = candidates.sort_values([demand.rank_by, "peak_memory_mib"], ascending=[is_time, True])
    judged = [_judge(row, demand) for row in table.to_dict("records")]
    table["verdict"] = [RULED_OUT if against else UNSURE if unknown else FITS for against, unknown in judged]
    table["reasons"] = ["; ".join([*against, *unknown]) for against, unknown in judged]
    return Advice(demand, table, tuple(_notes(table, demand)))


def _judge(row: Mapping[str, Any], demand: Demand) -> tuple[list[str], list[str]]:
    """Return what rules a candidate out, and what the data cannot tell of it."""
    against, unknown = [], []
    for name, limit in (("peak_memory_mib", demand.memory_mib), (demand.rank_by, demand.speed_limit)):
        value, more = row[name], column(name).better == "more"
        if pd.isna(value) and (limit is not None or name == demand.rank_by):
            unknown.append(f"its {column(name).label} was not measured")
        elif limit is not None and (value < limit if more else value > limit):
            bound = "more" if more else "less"
            against.append(f"{column(name).label} is {_shown(name, value)}; you need {_shown(name, limit)} or {bound}")
    if demand.loss_pp is not None:
        if pd.isna(row["low_pp"]):
            unknown.append(f"its change in accuracy against {BASELINE} was not measured")
        elif row["high_pp"] < -demand.loss_pp:
            against.append(f"it changes by {interval_text(row)}; you allow a loss of {demand.loss_pp:g}")
        elif row["low_pp"] < -demand.loss_pp:
            distance_pp = max(abs(row["change_pp"] + demand.loss_pp), 0.01)  # an interval shrinks as 1 / sqrt(n)
            times = math.ceil(((row["change_pp"] - row["low_pp"]) / distance_pp) ** 2)
            question = f"whether it loses over {demand.loss_pp:g}, about {times:,} times the items might tell"
            unknown.append(f"it changes by {interval_text(row)}; {question}")
    return against, unknown


def interval_text(row: Mapping[str, Any]) -> str:
    """Return a change in accuracy with its 95 % interval and its number of items."""
    interval = f"95 %: {row['low_pp']:+.1f} to {row['high_pp']:+.1f}, {row['n_items']:,.0f} items"
    return f"{row['change_pp']:+.1f} points ({interval})"


def _shown(name: str, value: float) -> str:
    return f"{format_value(name, float(value))} {column(name).unit}"


def _notes(table: pd.DataFrame, demand: Demand) -> Iterator[str]:
    """Yield what qualifies the recommendation."""
    if disturbed := [name for name, flags in table["flags"].items() if is_disturbed(flags)]:
        yield f"Other processes were at work while these were timed: {', '.join(disturbed)}."
    first = table[table.verdict == FITS].head(2)
    if first.empty:
        return
    speeds = first[demand.rank_by]
    half_ranges = speeds * first.throughput_spread_pct.fillna(0) / 200
    if first.passes.iloc[0] < 2:
        yield "Each speed is one pass: how much it varies was not measured."
    elif len(first) > 1 and speeds.max() - speeds.min() < half_ranges.sum():
        yield f"{' and '.join(first.index)} differ in speed by less than their passes do."
    before = table[: table.index.get_loc(first.index[0])]
    if faster := list(before.index[before.verdict == UNSURE]):
        yield f"Faster, but not shown to fit: {', '.join(faster)}."


def explain(advice: Advice) -> dict[str, list[str]]:
    """Return the advice in sentences by heading: what to deploy, what is second, unknown, and ruled out."""
    fitting, sections = advice.of(FITS), {}
    for heading, (name, row) in zip(("Recommended", "Second"), fitting.iterrows(), strict=False):
        sections[f"{heading}: {name}"] = [f"{facts(row, advice.demand)}."]
    if fitting.empty:
        undecided = len(advice.of(UNSURE)) > 0
        problem = "The data cannot tell whether anything fits." if undecided else "No row meets every limit."
        sections["Recommended: nothing"] = [problem]
    next(iter(sections.values())).extend(advice.notes)
    for heading, verdict in (("The data cannot tell", UNSURE), ("Ruled out", RULED_OUT)):
        sections[heading] = [f"{name}: {reasons}." for name, reasons in advice.of(verdict).reasons.items()]
    return {heading: sentences for heading, sentences in sections.items() if sentences}


def facts(row: Mapping[str, Any], demand: Demand) -> str:
    """Return a candidate's measured numbers in one line."""
    names = [name for name in ("peak_memory_mib", demand.rank_by) if pd.notna(row[name])]
    parts = [f"{column(name).label} {_shown(name, row[name])}" for name in names]
    if pd.notna(row["change_pp"]) and row["precision"] != BASELINE:
        parts.append(f"{interval_text(row)} against {BASELINE}")
    return ", ".join(parts)
