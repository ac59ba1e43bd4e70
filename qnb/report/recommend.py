"""Which format may be deployed? Verdicts on accuracy beside measured speed and memory, and what they cannot decide."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qnb.columns import column, format_value
from qnb.errors import InputError
from qnb.flags import Flag, is_disturbed
from qnb.options import is_number
from qnb.precision import BASELINE, title
from qnb.report.results import EMULATED, Results, is_unfused, unfused
from qnb.report.verdicts import MOST_ITEMS, Verdict, check_margin, decide, in_points, items_needed, judge

SPEEDS = ("tpot_s", "throughput_rps", "throughput_tps")  # what candidates may be ranked by
FITS, UNSURE, RULED_OUT = "fits", "may fit", "ruled out"
RANKED = ("precision", "engine", "fit", "peak_memory_mib", "weights_mib", "tpot_s", "change_pp", "low_pp", "high_pp",
          "kl_mean_nats", "words", "reasons", "model")  # fmt: skip
TIE = 1e-3  # values that differ by less, relative to the smaller, are equal
SUMMARY = ("precision", "weights_mib", "peak_memory_mib", "tpot_eager_s", "tpot_captured_s", "energy_j_per_token",
           "throughput_rps", "change_pp", "low_pp", "high_pp", "perplexity_change_pct", "kl_mean_nats", "verdict",
           "words")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Demand:
    """What a deployment needs; None sets no limit."""

    rank_by: str  # a name in SPEEDS
    memory_mib: float | None = None  # at most
    speed_limit: float | None = None  # of `rank_by`: at most for a time, at least for a rate
    loss_pp: float | None = None  # tolerated points below BF16


def candidates(results: Results, setting: str) -> pd.DataFrame:
    """Join the speed, accuracy and divergence of every format and engine, under a name made of the two.

    Formats that were not timed stand there too.

    Parameters
    ----------
    results
        A study's frames.
    setting
        ``"bs1"`` or ``"maxbatch"``.
    """
    judged, timed = judge(results).drop(columns=["verdict", "words"]), results.timed(setting).set_index("precision")
    frame = judged.join(timed, rsuffix="_timed").rename_axis("precision").reset_index()
    frame = frame.assign(
        engine=frame.engine.where(frame.engine.notna(), "not timed"),
        weights_mib=frame.weights_mib.combine_first(frame.weights_mib_timed),
        peak_memory_mib=frame.peak_memory_mib.where(frame.peak_reserved_mib.notna()),  # a process is no measure
    )
    return frame.set_index(pd.Index([f"{row.precision} ({row.engine})" for row in frame.itertuples()], dtype=object))


def choose(candidates: pd.DataFrame, demand: Demand) -> pd.DataFrame:
    """Hold every candidate against a demand: what fits, what may, and what does not.

    What fits is ranked by speed, then by memory. What may fit is ranked by KL divergence where that was measured: it
    sees what too few items hide.

    Returns
    -------
    pandas.DataFrame
        The candidates, best first, with ``fit``, a verdict's ``words``, and ``reasons``: what rules each out.
        ``attrs["notes"]`` says which is recommended, and what qualifies that.
    """
    is_time = column(demand.rank_by).better == "less"
    table = candidates.sort_values([demand.rank_by, "peak_memory_mib"], ascending=[is_time, True])
    held = [_hold(row, demand) for row in table.to_dict("records")]
    table = table.join(pd.DataFrame(held, table.index, ["words", "fit", "reasons"]))
    fits, unsure, ruled_out = (table[table.fit == fit] for fit in (FITS, UNSURE, RULED_OUT))
    table = pd.concat([fits, unsure.sort_values("kl_mean_nats", kind="stable"), ruled_out])
    table.attrs["notes"] = [*_notes(table, demand)]
    return table


def _hold(row: Mapping[str, Any], demand: Demand) -> tuple[str, str, str]:
    """Return a candidate's verdict in words, whether it fits, and what rules it out or cannot be told.

    Where no allocator was read, the weights are held against the memory that is allowed.
    """
    against, unknown = [], []
    verdict, words = decide(row["precision"], row, demand.loss_pp or 0)
    is_known = pd.notna(row["peak_memory_mib"]) or pd.isna(row.get("weights_mib"))
    size = "peak_memory_mib" if is_known else "weights_mib"
    for name, limit in ((size, demand.memory_mib), (demand.rank_by, demand.speed_limit)):
        value, more = row[name], column(name).better == "more"
        if pd.isna(value) and (limit is not None or name == demand.rank_by):
            unknown.append(f"its {column(name).label} was not measured")
        elif limit is not None and (value < limit if more else value > limit):
            bound = "more" if more else "less"
            against.append(f"{column(name).label}: {_shown(name, value)}; you need {_shown(name, limit)} or {bound}")
    if verdict is Verdict.BARELY_QUANTIZED:
        against.append(words)
    elif demand.loss_pp is not None:
        interval = "" if pd.isna(row["low_pp"]) else f": {interval_text(row)}"
        if verdict is Verdict.LOSES:
            against.append(words + interval)
        elif verdict in (Verdict.UNCLEAR, Verdict.UNMEASURED):
            unknown.append(words + interval)
    fit = RULED_OUT if against else UNSURE if unknown else FITS
    return words, fit, "; ".join([*against, *unknown])


def interval_text(row: Mapping[str, Any]) -> str:
    """Return a change in accuracy with its 95 % interval and its number of items."""
    interval = f"95 %: {row['low_pp']:+.1f} to {row['high_pp']:+.1f}, {row['n_items']:,.0f} items"
    return f"{row['change_pp']:+.1f} points ({interval})"


def _shown(name: str, value: float) -> str:
    return f"{format_value(name, float(value))} {column(name).unit}"


def _recommended(table: pd.DataFrame, rank_by: str) -> Iterator[str]:
    """Yield what is recommended, the first of what fits, and what may fit and is faster."""
    first, unsure = table[table.fit == FITS], table[table.fit == UNSURE]
    if first.empty:
        why = "no row meets every limit" if unsure.empty else "the data cannot tell what fits"
        why = "nothing was timed" if table[rank_by].isna().all() else why
        yield f"Recommended: nothing, since {why}."
        return
    yield f"Recommended: {first.index[0]}."
    behind = unsure[rank_by] - first[rank_by].iloc[0]
    is_faster = (behind < 0) if column(rank_by).better == "less" else (behind > 0)
    if faster := [name for name in unsure.index[is_faster] if not is_disturbed(unsure["flags"][name])]:
        yield f"Faster, but not shown to fit: {', '.join(faster)}."


def _notes(table: pd.DataFrame, demand: Demand) -> Iterator[str]:
    """Yield what is recommended, and what qualifies it."""
    first, unsure = table[table.fit == FITS].head(2), table[table.fit == UNSURE]
    yield from _recommended(table, demand.rank_by)
    if demand.memory_mib is not None and table.peak_memory_mib.isna().any() and "weights_mib" in table:
        yield "Where no GPU's allocator was read, the weights alone are held against the memory."
    if disturbed := [name for name, flags in table["flags"].items() if is_disturbed(flags)]:
        yield f"Other processes were at work while these were timed: {', '.join(disturbed)}."
    if names := unfused(table):
        yield f"{Flag.UNFUSED.text.capitalize()}: {names}."
    if unsure.kl_mean_nats.notna().any():
        yield "What may fit is ranked by KL divergence, since accuracy cannot tell."
    if first.empty:
        return
    speeds = first[demand.rank_by]
    half_ranges = speeds * first.throughput_spread_pct.fillna(0) / 200
    if first.passes.iloc[0] < 2:
        yield "Each speed is one pass: how much it varies was not measured."
    elif len(first) > 1 and speeds.max() - speeds.min() < half_ranges.sum():
        yield f"{' and '.join(first.index)} differ in speed by less than their passes do."


def ranked(
    results: Results,
    peak_memory_mib: float | None = None,
    tpot_ms: float | None = None,
    margin_pp: float | None = None,
) -> pd.DataFrame:
    """Return every format and engine, what fits best first, each with its verdict and reasons.

    Parameters
    ----------
    results
        A study's frames.
    peak_memory_mib
        At most so much memory at batch size 1, in MiB; None sets no limit.
    tpot_ms
        At most so many milliseconds per output token; None sets no limit.
    margin_pp
        The loss of accuracy against the baseline, in points, that is accepted; None takes the study's.

    Returns
    -------
    pandas.DataFrame
        A row a format and engine; ``attrs["notes"]`` says which is recommended, and what qualifies that.

    Raises
    ------
    InputError
        `margin_pp` is no number of points above 0, or a limit no number above 0.
    """
    margin_pp = results.margin_pp if margin_pp is None else margin_pp
    check_margin(margin_pp)
    for name, limit in (("peak_memory_mib", peak_memory_mib), ("tpot_ms", tpot_ms)):
        if limit is not None and not (is_number(limit) and limit > 0):
            raise InputError(f"{name} is {limit!r}; give a number above 0, or None for no limit")
    demand = Demand("tpot_s", peak_memory_mib, None if tpot_ms is None else tpot_ms / 1000, margin_pp)
    table = choose(candidates(results, "bs1"), demand).assign(model=results.model)[list(RANKED)]
    table.attrs["notes"].insert(0, f"Measured on {results.model}, {results.device}.")
    return table.reset_index(drop=True)


def advice(results: Results) -> str:
    """Return what is recommended without limits; "" unless accuracy and speed at batch size 1 were measured."""
    if results.scores.empty or results.bs1.empty:
        return ""
    demand = Demand("tpot_s", loss_pp=results.margin_pp)
    recommended = _recommended(choose(candidates(results, "bs1"), demand), demand.rank_by)
    return " ".join([*recommended, "No limit on memory or speed was set: notebook 05 takes limits."])


def summary(results: Results) -> pd.DataFrame:
    """Return the answer in one table: a row a format with its memory, speeds, loss and verdict.

    Speeds at batch size 1 are given for both engines; throughput is the best engine's at the largest batch, energy the
    best engine's at batch size 1. ``peak_memory_mib`` is a GPU's, captured where that was timed: a process on
    a CPU grows by what ran before. ``note`` says which formats were captured without fusing kernels as others were,
    which other processes disturbed, and which have the throughput of ``generate`` where others have that of a captured
    step.
    """
    timed, is_eager = (rows := candidates(results, "bs1")).groupby("precision", sort=False), rows.engine == "eager"
    timed_full = results.maxbatch.dropna(subset=["throughput_rps"])
    fastest = timed_full.sort_values("throughput_rps", ascending=False).drop_duplicates("precision")
    is_captured = fastest.precision.isin(timed_full.precision[timed_full.engine != "eager"])
    is_eager_alone = ~is_captured & is_captured.any()
    shown = results.speed[results.speed.setting != "sweep"]
    disturbed = shown["flags"].map(is_disturbed).astype(bool)
    notes = [pd.Series(Flag.UNFUSED.text, results.speed.precision[is_unfused(results.speed)].unique()),
             pd.Series(EMULATED, shown.precision[shown.note.str.contains(EMULATED, na=False)].unique()),
             pd.Series("disturbed by other processes", shown.precision[disturbed].unique()),
             pd.Series("largest batch with eager alone", fastest.precision[is_eager_alone])]  # fmt: skip
    note = pd.concat(notes).groupby(level=0, sort=False).agg("; ".join)
    frame = judge(results).assign(
        weights_mib=timed.weights_mib.min(), energy_j_per_token=timed.energy_j_per_token.min(),
        peak_memory_mib=timed.peak_memory_mib.last(), tpot_eager_s=rows[is_eager].set_index("precision").tpot_s,
        tpot_captured_s=rows[~is_eager].groupby("precision").tpot_s.min(),
        throughput_rps=fastest.set_index("precision").throughput_rps, note=note,
    )  # fmt: skip
    return frame.rename_axis("precision").reset_index()[[*SUMMARY, "ran_as", "note"]]


def sentence(results: Results) -> str:
    """Return the study's answer in a few sentences: what is lost, which format is fastest, and which smallest."""
    table = summary(results)
    if table.empty:
        return "Nothing was measured yet."
    points = in_points(results.margin_pp)
    phrases = {
        Verdict.WITHIN: f"within {points} for",
        Verdict.LOSES: f"more than {points} lost by",
        Verdict.UNCLEAR: "cannot tell for",
        Verdict.UNMEASURED: "not measured for",
        Verdict.BARELY_QUANTIZED: "most weights not quantized in",
    }
    lists = [f"{phrase} {', '.join(map(title, names))}" for each, phrase in phrases.items()
             if len(names := table.precision[table.verdict == each])]  # fmt: skip
    opening = [f"On {results.model}, accuracy against {BASELINE.upper()}: {'; '.join(lists)}."] if lists else []
    if results.scores.empty and results.divergence.empty:
        opening = [f"On {results.model}, accuracy was not measured."]
    is_allowed = ~table.verdict.isin([Verdict.LOSES, Verdict.BARELY_QUANTIZED])
    disturbed = results.bs1.precision[results.bs1["flags"].map(is_disturbed).astype(bool)].unique()
    speeds = table[["tpot_captured_s", "tpot_eager_s"]].mask(table.precision.isin(disturbed))
    allowed = table.assign(**speeds)[is_allowed]
    alone = unfused(results.speed[results.speed.precision.isin(allowed.precision)])
    closing = [f"{Flag.UNFUSED.text.capitalize()}: {alone}."] if alone else []
    if results.speed["flags"].map(is_disturbed).any():
        names = _joined(map(title, disturbed))
        left_out = f"; left out of the fastest at batch size 1: {names}" if names else ""
        closing.append(f"Other processes disturbed the timing{left_out}.")
    judged = judge(results)
    needed = items_needed(judged[judged.verdict == Verdict.UNCLEAR], results.margin_pp).dropna()
    if len(needed) > 1 and needed.min() <= MOST_ITEMS:
        words = judged.words[needed.idxmin()].partition("; ")[2]
        opening.append(f"{title(needed.idxmin())} is the closest to a decision: {words}.")
    is_single = bool((results.timed("bs1").passes < 2).any())
    extremes = _extremes(allowed, "" if is_allowed.all() else ", of those not ruled out", is_single)
    return " ".join([*opening, *extremes, *closing])


def _extremes(allowed: pd.DataFrame, among: str, is_single: bool) -> Iterator[str]:
    """Yield which format is closest, fastest and smallest, of those not ruled out; where `is_single`, in one pass."""
    size = "peak_memory_mib" if allowed.peak_memory_mib.notna().any() else "weights_mib"
    tpot_s = allowed[["tpot_captured_s", "tpot_eager_s"]].min(axis=1)
    once = " in one pass" * is_single
    unclear = allowed.kl_mean_nats.where(allowed.verdict.isin([Verdict.UNCLEAR, Verdict.UNMEASURED]))
    for what, name, values in (
        (f"the closest to {BASELINE.upper()} among undecided formats", "kl_mean_nats", unclear),
        (f"fastest at batch size 1{once}{among}", "tpot_s", tpot_s),
        (f"smallest{among}", size, allowed[size]),
    ):
        if values.notna().sum() > 1:
            label, best = column(name).label.partition(" (")[0], values.min()
            names = [title(each) for each in allowed.precision[values <= best * (1 + TIE)]]
            be = "is" if len(names) == 1 else "are"
            yield f"{_joined(names)} {be} {what} ({label} {_shown(name, best)})."


def _joined(names: Iterable[str]) -> str:
    """Return names as a sentence lists them; "" for none."""
    return " and ".join(", ".join(names).rsplit(", ", 1))
