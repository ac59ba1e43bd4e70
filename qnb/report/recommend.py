"""Which format may be deployed? A decision over measured rows, and what the rows cannot decide.

A format loses at most what is tolerated only if its whole 95 % interval says so. It loses more only if the whole
interval says that. In between the data cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qnb.columns import column, format_value, is_disturbed
from qnb.precision import BASELINE
from qnb.report.results import Results
from qnb.report.tables import MEAN, build, common_tasks, headline

SPEEDS = ("tpot_s", "throughput_rps", "throughput_tps")  # what candidates may be ranked by
CHANGE = ("change_pp", "low_pp", "high_pp")
PRACTICAL = 100  # times the items: nobody evaluates more than that


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to serve the model, as measured; None where it was not."""

    precision: str
    engine: str
    batch_size: int = 1
    peak_memory_mib: float | None = None
    tpot_s: float | None = None
    throughput_rps: float | None = None
    throughput_tps: float | None = None
    throughput_spread_pct: float | None = None  # range over passes
    passes: int = 1
    disturbed: bool = False  # other processes were at work while it was timed
    accuracy_pct: float | None = None
    change_pp: float | None = None  # against BF16, on the same items
    low_pp: float | None = None  # 95 % interval of the change
    high_pp: float | None = None
    n_items: int | None = None

    @property
    def name(self) -> str:
        """Format and engine."""
        return f"{self.precision} ({self.engine})" if self.engine else self.precision


@dataclass(frozen=True, slots=True)
class Demand:
    """What a deployment needs; None sets no limit."""

    rank_by: str  # a name in SPEEDS
    memory_mib: float | None = None  # at most
    speed_limit: float | None = None  # of `rank_by`: at most for a time, at least for a rate
    loss_pp: float | None = None  # tolerated points below BF16


@dataclass(frozen=True, slots=True)
class Judgement:
    """A candidate held against a demand."""

    candidate: Candidate
    against: tuple[str, ...]  # what rules it out
    unknown: tuple[str, ...]  # what the data cannot tell

    @property
    def fits(self) -> bool:
        """Whether the rows show that every limit is met."""
        return not self.against and not self.unknown


@dataclass(frozen=True, slots=True)
class Advice:
    """The recommendation and everything it was weighed against, best first."""

    demand: Demand
    fitting: tuple[Judgement, ...]
    unsure: tuple[Judgement, ...]
    ruled_out: tuple[Judgement, ...]
    notes: tuple[str, ...]

    @property
    def best(self) -> Candidate | None:
        """What to deploy; None where nothing is shown to fit."""
        return self.fitting[0].candidate if self.fitting else None

    @property
    def second(self) -> Candidate | None:
        """What to deploy if the first is not to be had."""
        return self.fitting[1].candidate if len(self.fitting) > 1 else None


def candidates(results: Results, setting: str, task: str = MEAN) -> list[Candidate]:
    """Join speed and accuracy of every format and engine that was timed.

    Parameters
    ----------
    results
        A study's frames.
    setting
        ``"bs1"`` or ``"maxbatch"``.
    task
        The task whose accuracy counts, or `MEAN` for the mean over tasks that all formats answered alike.
    """
    known = accuracies(results, task)
    measured = ("peak_memory_mib", *SPEEDS, "throughput_spread_pct")
    return [
        Candidate(
            row["precision"], row["engine"], row["batch_size"], passes=int(row["passes"]),
            disturbed=is_disturbed(row["flags"]), **_numbers(row, measured),
            **known.get(row["precision"], {}),
        )
        for row in results.timed(setting).to_dict("records")
    ]  # fmt: skip


def tasks(results: Results) -> list[str]:
    """Return the tasks a decision can rest on: the mean over tasks first, none where no accuracy was measured."""
    if results.scores.empty:
        return []
    shown = headline(results.scores)
    return [MEAN, *dict.fromkeys(shown[shown.metric != "mean"].task)]


def accuracies(results: Results, task: str = MEAN) -> dict[str, dict[str, Any]]:
    """Return accuracy, change against BF16, its 95 % interval and items by format; empty where none was measured."""
    if results.scores.empty:
        return {}
    shown, changes = headline(results.scores), build(results, "table2_change")
    values = shown[shown.asked == MEAN] if task == MEAN else shown[shown.task == task]
    only = common_tasks(shown)  # one task is its own mean, and Table 2 has it once
    meant = only[0] if task == MEAN and len(only) == 1 else task
    changes = changes[changes.task.map(lambda name: name.partition(" (")[0]) == meant]  # of an empty column too
    changes = changes.dropna(subset=list(CHANGE)).set_index("precision")
    known = {BASELINE: dict.fromkeys(CHANGE, 0.0), **changes[list(CHANGE)].to_dict("index")}
    return {
        row.precision: {"accuracy_pct": 100 * row.value, "n_items": int(row.n_items), **known.get(row.precision, {})}
        for row in values.drop_duplicates("precision").itertuples()
    }


def _numbers(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: float(row[name]) if pd.notna(row[name]) else None for name in names}


def choose(found: Iterable[Candidate], demand: Demand) -> Advice:
    """Hold every candidate against a demand: what fits, what may, and what does not, each by speed, then by memory.

    Raises
    ------
    ValueError
        `demand.rank_by` is no name in `SPEEDS`.
    """
    if demand.rank_by not in SPEEDS:
        raise ValueError(f"rank_by is {demand.rank_by!r}; choose from {', '.join(SPEEDS)}")
    judged = [_judge(candidate, demand) for candidate in sorted(found, key=lambda each: _rank(each, demand))]
    fitting = tuple(each for each in judged if each.fits)
    unsure = tuple(each for each in judged if each.unknown and not each.against)
    ruled_out = tuple(each for each in judged if each.against)
    return Advice(demand, fitting, unsure, ruled_out, tuple(_notes(judged, fitting, demand)))


def _rank(candidate: Candidate, demand: Demand) -> tuple[float, float]:
    """Return what candidates are sorted by, the best first."""
    speed = getattr(candidate, demand.rank_by)
    memory_mib = candidate.peak_memory_mib
    sign = -1 if column(demand.rank_by).better == "more" else 1
    return math.inf if speed is None else sign * speed, math.inf if memory_mib is None else memory_mib


def _judge(candidate: Candidate, demand: Demand) -> Judgement:
    against, unknown = [], []
    for name, limit in (("peak_memory_mib", demand.memory_mib), (demand.rank_by, demand.speed_limit)):
        value, more = getattr(candidate, name), column(name).better == "more"
        if value is None and (limit is not None or name == demand.rank_by):
            unknown.append(f"its {column(name).label} was not measured")
        elif limit is not None and (value < limit if more else value > limit):
            wanted = f"{_shown(name, limit)} or {'more' if more else 'less'}"
            against.append(f"{column(name).label} is {_shown(name, value)}; you need {wanted}")
    if demand.loss_pp is not None:
        low, high, change = candidate.low_pp, candidate.high_pp, candidate.change_pp
        if low is None or high is None or change is None:
            unknown.append(f"its change in accuracy against {BASELINE} was not measured")
        elif high < -demand.loss_pp:
            loss = f"{-change:.1f} points (95 %: {-high:.1f} to {-low:.1f})"
            against.append(f"it loses {loss}; you allow {demand.loss_pp:g}")
        elif low < -demand.loss_pp:
            unknown.append(
                f"its change is {change:+.1f} points (95 %: {low:+.1f} to {high:+.1f}); {candidate.n_items:,} items "
                f"cannot tell whether it loses over {demand.loss_pp:g}, {_more_items(change, low, demand.loss_pp)}"
            )
    return Judgement(candidate, tuple(against), tuple(unknown))


def _more_items(change: float, low: float, loss_pp: float) -> str:
    """Say how many times the items would clear the tolerated loss, if the change stays what it is."""
    distance = abs(change + loss_pp)
    times = ((change - low) / distance) ** 2 if distance else math.inf
    return f"about {math.ceil(times)} times as many might" if times <= PRACTICAL else "nor could any practical number"


def _shown(name: str, value: float) -> str:
    return f"{format_value(name, float(value))} {column(name).unit}"


def _notes(judged: list[Judgement], fitting: tuple[Judgement, ...], demand: Demand) -> Iterator[str]:
    """Yield what qualifies the recommendation."""
    if disturbed := [each.candidate.name for each in judged if each.candidate.disturbed]:
        yield f"Other processes were at work while these were timed: {', '.join(disturbed)}."
    if not fitting:
        return
    best = fitting[0].candidate
    if best.passes < 2:
        yield "Each speed is one pass: how much it varies was not measured."
    elif len(fitting) > 1:
        second = fitting[1].candidate
        speeds = [getattr(each, demand.rank_by) for each in (best, second)]
        halves = [(each.throughput_spread_pct or 0) / 200 for each in (best, second)]
        if abs(speeds[0] - speeds[1]) < speeds[0] * halves[0] + speeds[1] * halves[1]:
            yield f"{best.name} and {second.name} differ in speed by less than their passes do."
    faster = [each.candidate.name for each in judged[: judged.index(fitting[0])] if not each.against]
    if faster:
        yield f"Faster, but not shown to fit: {', '.join(faster)}."


def explain(advice: Advice) -> dict[str, list[str]]:
    """Return the advice in sentences by heading: what to deploy, what is second, unknown, and ruled out."""
    demand, sections = advice.demand, {}
    if advice.best is None:
        problem = "The data cannot tell whether anything fits." if advice.unsure else "No row meets every limit."
        sections["Recommended: nothing"] = [problem, *advice.notes]
    else:
        better = "highest" if column(demand.rank_by).better == "more" else "shortest"
        among = f"{better} {column(demand.rank_by).label} of {len(advice.fitting)} that fit"
        reason = among if advice.second else "it alone is shown to fit"
        sections[f"Recommended: {advice.best.name}"] = [f"{facts(advice.best, demand)}. Why: {reason}.", *advice.notes]
    if advice.second is not None:
        sections[f"Second: {advice.second.name}"] = [f"{facts(advice.second, demand)}."]
    sections["The data cannot tell"] = [f"{each.candidate.name}: {'; '.join(each.unknown)}." for each in advice.unsure]
    sections["Ruled out"] = [f"{each.candidate.name}: {'; '.join(each.against)}." for each in advice.ruled_out]
    return {heading: sentences for heading, sentences in sections.items() if sentences}


def facts(candidate: Candidate, demand: Demand) -> str:
    """Return a candidate's measured numbers in one line."""
    values = {name: getattr(candidate, name) for name in ("peak_memory_mib", demand.rank_by)}
    parts = [f"{column(name).label} {_shown(name, value)}" for name, value in values.items() if value is not None]
    if candidate.change_pp is not None and candidate.precision != BASELINE:
        interval = f"95 %: {candidate.low_pp:+.1f} to {candidate.high_pp:+.1f}, {candidate.n_items:,} items"
        parts.append(f"{candidate.change_pp:+.1f} points against {BASELINE} ({interval})")
    return ", ".join(parts)
