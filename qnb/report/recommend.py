"""Which precision may be deployed? A decision over measured rows, and what the rows cannot decide.

A precision loses at most what is tolerated only if its whole 95 % interval says so; it loses more only if the whole
interval says that. In between the data cannot tell, and no rule of thumb is put in their place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qnb.accuracy.statistics import mean_of_independent
from qnb.precision import BASELINE
from qnb.report import tables as table
from qnb.report.results import Results
from qnb.speed.monitor import disturbed

OVERALL = "mean over tasks"
PRACTICAL = 100  # times the items: more than that nobody asks
# name of a speed: its words, unit, factor to that unit, whether more is better
SPEEDS = {
    "tpot_s": ("time per output token (TPOT)", "ms", 1000.0, False),
    "throughput_rps": ("throughput", "requests/s", 1.0, True),
    "throughput_tps": ("throughput", "tokens/s", 1.0, True),
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to serve the model, as measured; None where it was not."""

    precision: str
    engine: str
    batch_size: int = 1
    memory_mib: float | None = None
    tpot_s: float | None = None
    throughput_rps: float | None = None
    throughput_tps: float | None = None
    spread: float = 0.0  # range of the throughput over its median, over repeats
    repeats: int = 1
    disturbed: bool = False  # whether other processes were at work while it was timed
    accuracy_pct: float | None = None
    change_pp: float | None = None  # against BF16, on the same items
    low_pp: float | None = None  # 95 % interval of the change
    high_pp: float | None = None
    items: int | None = None

    @property
    def name(self) -> str:
        """Precision and engine."""
        return f"{self.precision} ({self.engine})" if self.engine else self.precision


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of a deployment; None does not ask."""

    speed: str  # a name in SPEEDS: what the rest is ranked by
    memory_mib: float | None = None  # at most
    speed_limit: float | None = None  # at most for a time, at least for a rate
    loss_pp: float | None = None  # tolerated points below BF16


@dataclass(frozen=True, slots=True)
class Judgement:
    """A candidate against a demand."""

    candidate: Candidate
    against: tuple[str, ...]  # what rules it out
    unknown: tuple[str, ...]  # what the data cannot tell

    @property
    def fits(self) -> bool:
        """Whether the rows show that everything asked is met."""
        return not self.against and not self.unknown


@dataclass(frozen=True, slots=True)
class Advice:
    """The recommendation and everything it was weighed against, best first."""

    demand: Demand
    fitting: tuple[Judgement, ...]
    unsure: tuple[Judgement, ...]
    out: tuple[Judgement, ...]
    notes: tuple[str, ...]

    @property
    def best(self) -> Candidate | None:
        """What to deploy; None where nothing is shown to fit."""
        return self.fitting[0].candidate if self.fitting else None

    @property
    def second(self) -> Candidate | None:
        """What to deploy if the first is not to be had."""
        return self.fitting[1].candidate if len(self.fitting) > 1 else None


def candidates(results: Results, setting: str, task: str = OVERALL) -> list[Candidate]:
    """Join speed and accuracy of every precision and engine that was measured.

    Parameters
    ----------
    results
        A study's frames.
    setting
        ``"bs1"`` or ``"maxbatch"``.
    task
        The task whose accuracy counts, or `OVERALL` for the mean over tasks that all precisions answered alike.
    """
    known = accuracies(results, task)
    speed = results.bs1 if setting == "bs1" else results.maxbatch
    found = []
    for row in speed.to_dict("records"):
        values: dict[str, Any] = {name: _number(row.get(name)) for name in ("memory_mib", *SPEEDS)}
        low, high, rate = (_number(row.get(name)) for name in ("low_rps", "high_rps", "throughput_rps"))
        found.append(
            Candidate(
                precision=row["precision"],
                engine=str(row.get("engine") or ""),
                batch_size=int(row["batch_size"]),
                repeats=int(row.get("repeats") or 1),
                spread=(high - low) / rate if low and high and rate else 0.0,
                disturbed=disturbed(row.get("flags")),
                **values,
                **known.get(row["precision"], {}),
            )
        )
    return found


def tasks(results: Results) -> list[str]:
    """Return the tasks a decision can rest on: the mean over tasks first, none where no accuracy was measured."""
    if results.scores.empty:
        return []
    frame = table.headline(results.scores)
    return [OVERALL, *dict.fromkeys(frame[frame.metric != "mean"].task)]


def _number(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def accuracies(results: Results, task: str) -> dict[str, dict[str, Any]]:
    """Return accuracy, change, its 95 % interval and items by precision; empty where none was measured."""
    if results.scores.empty:
        return {}
    frame = table.headline(results.scores)
    asked = frame.task.str.startswith(table.AGGREGATE) if task == OVERALL else frame.task == task
    values = frame[asked].drop_duplicates("precision").set_index("precision")
    whole = [task]
    if task == OVERALL:
        whole = [name for name, rows in frame[frame.task == frame.asked].groupby("task") if table.alike(rows, frame)]
    found = {}
    for precision, row in values.iterrows():
        about: dict[str, Any] = {"accuracy_pct": 100 * row.value, "items": int(row["items"])}
        if precision == BASELINE:
            about |= dict.fromkeys(("change_pp", "low_pp", "high_pp"), 0.0)
        else:
            about |= _change(results.tables[2], str(precision), whole)
        found[str(precision)] = about
    return found


def _change(changes: pd.DataFrame, precision: str, wanted: list[str]) -> dict[str, float]:
    """Return the mean change over tasks with its interval; nothing if none is known.

    Table 2's own interval is taken where it has one. Tables kept before it had get one from each task's own, the
    tasks taken as independent.
    """
    if changes.empty or "change_pp" not in changes:
        return {}
    mine = changes[changes.precision == precision].dropna(subset=["change_pp"])
    means = mine[mine.task.str.startswith(table.AGGREGATE)].dropna(subset=["low_pp"])
    if len(wanted) > 1 and len(means):
        return {name: float(means[name].iloc[0]) for name in ("change_pp", "low_pp", "high_pp")}
    rows = mine[mine.task.isin(wanted)].dropna(subset=["gained"])
    if rows.empty:
        return {}
    names = ["change_pp", "low_pp", "high_pp"]
    return dict(zip(names, mean_of_independent(rows[names].itertuples(index=False, name=None)), strict=True))


def choose(found: Iterable[Candidate], demand: Demand) -> Advice:
    """Weigh every candidate against a demand: what fits, by speed and then by memory; what may; what does not.

    Raises
    ------
    ValueError
        `demand.speed` is no name in `SPEEDS`.
    """
    if demand.speed not in SPEEDS:
        raise ValueError(f"speed {demand.speed!r} is unknown; choose from {', '.join(SPEEDS)}")
    judged = sorted((_judge(candidate, demand) for candidate in found), key=lambda one: _rank(one.candidate, demand))
    fitting = tuple(one for one in judged if one.fits)
    unsure = tuple(one for one in judged if one.unknown and not one.against)
    out = tuple(one for one in judged if one.against)
    return Advice(demand, fitting, unsure, out, tuple(_notes(fitting, unsure, out, demand)))


def _rank(candidate: Candidate, demand: Demand) -> tuple[float, float]:
    speed, more = getattr(candidate, demand.speed), SPEEDS[demand.speed][3]
    memory = candidate.memory_mib
    return (math.inf if speed is None else -speed if more else speed), math.inf if memory is None else memory


def _judge(candidate: Candidate, demand: Demand) -> Judgement:
    against, unknown = [], []
    words, unit, factor, more = SPEEDS[demand.speed]
    speed = getattr(candidate, demand.speed)
    if demand.memory_mib is not None:
        if candidate.memory_mib is None:
            unknown.append("its memory was not measured")
        elif candidate.memory_mib > demand.memory_mib:
            against.append(f"takes {candidate.memory_mib:,.0f} MiB, {demand.memory_mib:,.0f} are allowed")
    if speed is None:
        unknown.append(f"its {words} was not measured")
    elif demand.speed_limit is not None and (speed < demand.speed_limit if more else speed > demand.speed_limit):
        have, want = (f"{value * factor:,.4g}" for value in (speed, demand.speed_limit))
        against.append(f"{words} is {have} {unit}, {want} {'are asked' if more else 'are allowed'}")
    if demand.loss_pp is not None:
        low, high, change = candidate.low_pp, candidate.high_pp, candidate.change_pp
        if low is None or high is None or change is None:
            unknown.append(f"its change in accuracy against {BASELINE} was not measured")
        elif high < -demand.loss_pp:
            against.append(f"loses {-change:.1f} points (95 %: {-high:.1f} to {-low:.1f}), {demand.loss_pp:g} allowed")
        elif low < -demand.loss_pp:
            unknown.append(
                f"its change is {change:+.1f} points (95 % {low:+.1f} to {high:+.1f}): {candidate.items:,} items "
                f"cannot tell whether it loses over {demand.loss_pp:g}, {_more_items(change, low, demand.loss_pp)}"
            )
    return Judgement(candidate, tuple(against), tuple(unknown))


def _more_items(change: float, low: float, loss_pp: float) -> str:
    """Say how many times the items would clear the tolerated loss, if the change stays what it is."""
    distance = abs(change + loss_pp)
    times = ((change - low) / distance) ** 2 if distance else math.inf
    return f"about {math.ceil(times)} times as many might" if times <= PRACTICAL else "nor would any practical number"


def _notes(
    fitting: tuple[Judgement, ...], unsure: tuple[Judgement, ...], out: tuple[Judgement, ...], demand: Demand
) -> Iterable[str]:
    """Yield what qualifies the recommendation."""
    if slowed := [one.candidate.name for one in (*fitting, *unsure, *out) if one.candidate.disturbed]:
        yield f"Other processes were at work while {', '.join(slowed)} {'was' if len(slowed) == 1 else 'were'} timed."
    if not fitting:
        return
    best = fitting[0].candidate
    speed = getattr(best, demand.speed)
    if best.repeats < 2:
        yield "Each speed is one pass: how much it varies was not measured."
    elif len(fitting) > 1:
        second = fitting[1].candidate
        other = getattr(second, demand.speed)
        if abs(speed - other) < speed * best.spread / 2 + other * second.spread / 2:
            yield f"{best.name} and {second.name} differ in speed by less than their repeats do."
    faster = [one.candidate.name for one in unsure if _rank(one.candidate, demand) < _rank(best, demand)]
    if faster:
        yield f"Faster, if it were known to fit: {', '.join(faster)}."


def explain(advice: Advice) -> dict[str, list[str]]:
    """Return the advice in words, by heading: what is recommended and why, what is second, what rules others out."""
    demand = advice.demand
    said: dict[str, list[str]] = {}
    if advice.best is None:
        what = "no row meets everything asked" if not advice.unsure else "the data cannot tell whether anything fits"
        said["Recommended: nothing"] = [f"{what[0].upper()}{what[1:]}.", *advice.notes]
    else:
        words, _, _, more = SPEEDS[demand.speed]
        count = len(advice.fitting)
        among = (
            "it alone is shown to fit"
            if count == 1
            else f"{'highest' if more else 'shortest'} {words} of {count} that fit"
        )
        said[f"Recommended: {advice.best.name}"] = [f"{facts(advice.best, demand)}. Why: {among}.", *advice.notes]
    if advice.second is not None:
        said[f"Second: {advice.second.name}"] = [f"{facts(advice.second, demand)}."]
    if advice.unsure:
        said["The data cannot tell"] = _grouped([(one.candidate, one.unknown) for one in advice.unsure])
    if advice.out:
        said["Ruled out"] = _grouped([(one.candidate, one.against) for one in advice.out])
    return said


def _grouped(reasons: list[tuple[Candidate, tuple[str, ...]]]) -> list[str]:
    """Say each reason once for all engines of a precision that it holds for."""
    engines: dict[tuple[str, str], list[str]] = {}
    for candidate, why in reasons:
        engines.setdefault((candidate.precision, "; ".join(why)), []).append(candidate.engine)
    named = {key: f"{key[0]} ({', '.join(found)})" if any(found) else key[0] for key, found in engines.items()}
    return [f"{name}: {why}." for (_, why), name in named.items()]


def facts(candidate: Candidate, demand: Demand) -> str:
    """Return a candidate's measured numbers in one line."""
    words, unit, factor, _ = SPEEDS[demand.speed]
    speed = getattr(candidate, demand.speed)
    parts = [] if candidate.memory_mib is None else [f"{candidate.memory_mib:,.0f} MiB"]
    parts += [] if speed is None else [f"{words} {speed * factor:,.4g} {unit}"]
    if candidate.change_pp is not None and candidate.precision != BASELINE:
        interval = f"95 % {candidate.low_pp:+.1f} to {candidate.high_pp:+.1f}, {candidate.items:,} items"
        parts.append(f"{candidate.change_pp:+.1f} points against {BASELINE} ({interval})")
    return ", ".join(parts)
