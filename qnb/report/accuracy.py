"""Accuracy: the metric that a task is known by (Table 1), each format's answers beside the baseline's (Table 2)."""

import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import asdict
from statistics import fmean
from typing import Any

import pandas as pd

from qnb.accuracy import statistics
from qnb.accuracy.statistics import Z95, Change, mean_interval, mean_of_independent
from qnb.precision import BASELINE
from qnb.report import paper
from qnb.report.results import Results, stack

# the metric a task is known by: accuracy for choices, strict exact match for generated answers
HEADLINE = ("acc", "exact_match")
MEAN = "mean over tasks"
# The paper's "GSM8K (average of strict and CoT)" is the mean of two strict readings: the 5-shot task's, and the 8-shot
# chain-of-thought one's
AVERAGED = {"gsm8k_average": ("gsm8k", "gsm8k_cot")}
SIGNIFICANT = 0.05
ANSWER = ("correct", "p_correct", "picked", "loglikelihoods")
COLUMNS = ("task", "precision", "n_items", "chance_pct", "baseline_pct", "accuracy_pct", "change_pp", "low_pp",
           "high_pp", "change_pct", "gained", "lost", "answers_changed", "recovery_pct", "recovery_low_pct",
           "recovery_high_pct", "p_mcnemar", "p_correct_change_pp", "p_correct_low_pp", "p_correct_high_pp", "note",
           "p_holm", "significant")  # fmt: skip


def headline(scores: pd.DataFrame) -> pd.DataFrame:
    """Keep one metric a task: accuracy, or exact match, read strictly where there are several ways; then the means.

    `MEAN` weighs every task that all formats answered alike, as the paper's "aggregate accuracy" does. Its standard
    error takes the tasks as independent.
    """
    if scores.empty:
        return scores
    shown = one_filter(scores[scores.metric.isin(HEADLINE) & (scores.get("unit", "%") == "%")])
    whole = shown[shown.task == shown.asked]
    averages = [_means(whole[whole.task.isin(tasks)], name, len(tasks)) for name, tasks in AVERAGED.items()]
    common = whole.groupby("task").filter(
        lambda rows: rows.precision.nunique() == whole.precision.nunique() and rows.n_items.nunique() == 1
    )
    return stack([shown, *averages, _means(common, f"{MEAN} ({common.task.nunique()})")])


def one_filter(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep one filter a task, by which its answers are read: the strict one, or none, or its first."""
    order = {"strict-match": 0, "none": 1}
    best = {task: min(names, key=lambda name: order.get(name, 2)) for task, names in frame.groupby("task")["filter"]}
    return frame[frame["filter"] == frame.task.map(best)]


def _means(whole: pd.DataFrame, name: str, least: int = 1) -> pd.DataFrame:
    """Return a row a format: the mean over its tasks, where there are at least so many."""
    means = whole.astype({"stderr": float}).groupby("precision", sort=False).agg(
        value=("value", "mean"), stderr=("stderr", lambda errors: math.hypot(*errors) / len(errors)),
        n_items=("n_items", "sum"), n_total=("n_total", "sum"), tasks=("task", "size"),
    )  # fmt: skip
    about = {"asked": name.partition(" (")[0], "task": name, "metric": "mean", "filter": "none", "group": True}
    return means[means.tasks >= least].drop(columns="tasks").reset_index().assign(**about, unit="%")


def table1(results: Results) -> pd.DataFrame:
    """Table 1: a row a task, metric and number of items; a column a format in percent and its error in points.

    Metrics that are no shares have a ``unit``, and columns of their own, which are named after the formats alone.

    ``p_correct`` is the mean probability of the right choice, ``mean`` an average of other rows, followed by the ends
    of its 95 % interval. Rows of a sample never share a cell with rows of a whole task: ``n_items`` and ``n_total``
    are part of the key.
    """
    if results.scores.empty:
        return pd.DataFrame()
    published = paper.accuracy().set_index(["task", "precision"]).accuracy_pct
    means = headline(results.scores).query("metric == 'mean'")
    ends = [
        means.assign(metric=f"mean, 95 % {end}", value=(means.value + z * means.stderr).clip(0, 1), stderr=None)
        for end, z in (("low", -Z95), ("high", Z95))
    ]
    keys, rows = ["task", "metric", "filter", "n_items", "n_total", "unit"], []
    for key, group in stack([results.scores, means, *ends]).groupby(keys, sort=False, dropna=False):
        row = dict(zip(keys, key, strict=True))
        for score in group.itertuples():
            scale, value, error = (100, "_pct", "_stderr_pp") if score.unit == "%" else (1, "", "_stderr")
            row[f"{score.precision}{value}"] = scale * score.value
            row[f"{score.precision}{error}"] = scale * score.stderr if pd.notna(score.stderr) else None
        if row["metric"] in ("acc", "mean") and row["task"] in published:
            row |= {f"published_{name}_pct": value for name, value in published[row["task"]].items()}
        rows.append(row)
    frame = pd.DataFrame(rows).round(4)
    return frame.drop(columns="unit") if (frame.unit == "%").all() else frame


def _pair(results: Results, base: Mapping[str, Any], row: Mapping[str, Any]) -> pd.DataFrame | str:
    """Return a row an item that both a format and the baseline answered, or why they are not compared.

    The baseline's columns end in ``_base``. ``chance`` is the probability of guessing an item right.
    """
    frames = [results.items(each) for each in (base, row)]
    if any(frame is None for frame in frames):
        return "the items' file is gone or was changed"
    # right or wrong by item, generated answers as `headline` reads them
    indexed = [one_filter(frame).set_index(["task", "doc_id"]).reindex(columns=list(ANSWER)) for frame in frames]
    both = indexed[0].join(indexed[1], lsuffix="_base", how="inner", validate="one_to_one").reset_index()
    bad = sum(each.get("bad_items", 0) for each in (base, row))  # an item that is bad in one is missing in both
    if row["data_sha256"] != base["data_sha256"] or any(len(frame) - len(both) > bad for frame in indexed):
        return f"the items are others than {BASELINE}'s"
    if not _shares(row) or both[["correct_base", "correct"]].isna().any(axis=None):
        return "its score is not a share of right answers"
    now, before = both.correct.astype(bool), both.correct_base.astype(bool)
    chance = [1 / len(shares) if isinstance(shares, Sized) else 0.0 for shares in both.loglikelihoods]
    return both.assign(gained=now & ~before, lost=before & ~now, chance=chance)


def _shares(row: Mapping[str, Any]) -> dict[str, None]:
    """Return the tasks and groups of a row that have a share of right answers."""
    scores = [score for score in row["scores"] if score["metric"] in HEADLINE and score.get("unit", "%") == "%"]
    return dict.fromkeys(score["task"] for score in scores)


def changes(results: Results) -> pd.DataFrame:
    """Return Table 2, made once a study. Do not write into it."""
    return results.once("changes", lambda: table2(results))


def table2(results: Results) -> pd.DataFrame:
    """Table 2: a row a task and format, the change against BF16 with its interval and paired test.

    Only answers to the same items are compared; where there are none, ``note`` says why. ``p_holm`` is McNemar's p
    corrected for all cells of the table, and ``significant`` whether it is below 0.05. ``p_correct`` columns are the
    change of the mean probability of the right choice. ``answers_changed`` counts other picks, right or wrong.
    ``recovery_pct`` is the share of the baseline's accuracy above chance that is kept; empty near chance. Means over
    tasks have an interval, for which each task's items are resampled by themselves; their parts are tested, they are
    not.
    """
    rows, both = list[dict[str, Any]](), dict[tuple[str, str], pd.DataFrame]()
    answered = results.accuracy_rows.to_dict("records")
    for base in (row for row in answered if row["precision"] == BASELINE):
        for row in (row for row in answered if row["task"] == base["task"] and row is not base):
            pair = _pair(results, base, row)
            rows += _compare(row, pair)
            both |= {} if isinstance(pair, str) else {(row["task"], row["precision"]): pair}
    frame = pd.DataFrame([*rows, *_averaged(both)]).reindex(columns=list(COLUMNS))
    tested = frame.p_mcnemar.notna()
    frame.loc[tested, "p_holm"] = statistics.holm(list(frame.p_mcnemar[tested]))
    frame["significant"] = (frame.p_holm < SIGNIFICANT).astype(object).where(tested, None)
    published = paper.accuracy().rename(columns={"change_pct": "published_change_pct"}).drop(columns="accuracy_pct")
    return frame.fillna({"note": ""}).merge(published, how="left").round(6)


def _compare(row: Mapping[str, Any], pair: pd.DataFrame | str) -> Iterator[dict[str, Any]]:
    """Compare a task's items, and those of each group in it, which lm-eval weighs by their items."""
    if isinstance(pair, str):
        yield {"task": row["task"], "precision": row["precision"], "note": f"not compared: {pair}"}
        return
    for task in _shares(row):
        part = pair if task == row["task"] else pair[pair.task.isin(row["groups"].get(task, ()))]
        if len(part):
            change = statistics.compare(list(part.correct_base), list(part.correct))
            changed = int((part.picked.map(str) != part.picked_base.map(str)).sum())
            chance = part.chance.mean()
            more = {**_p_correct(part), **_recovery(change, chance), "answers_changed": changed}
            yield _row(task, row["precision"], change, **more, chance_pct=100 * chance)


def _row(task: str, precision: str, change: Change, **more: Any) -> dict[str, Any]:
    points = {"baseline_pct": 100 * change.baseline, "accuracy_pct": 100 * change.accuracy}
    relative = {"change_pp": change.change_pp, "change_pct": change.change_pct}
    return {"task": task, "precision": precision, **asdict(change), **points, **relative, **more}


def _p_correct(pair: pd.DataFrame) -> dict[str, float | None]:
    """Return how the mean probability of the right choice changed, where all items are choices."""
    change_pp = 100 * (pair.p_correct - pair.p_correct_base).astype(float)
    if change_pp.isna().any():
        return {}
    low, high = mean_interval(change_pp.to_numpy()) or (None, None)
    return {"p_correct_change_pp": change_pp.mean(), "p_correct_low_pp": low, "p_correct_high_pp": high}


def _recovery(change: Change, chance: float) -> dict[str, Any]:
    """Return the accuracy above chance that is kept, or a note where the baseline is near chance."""
    if not statistics.is_above_chance(change.baseline, change.n_items, chance):
        return {"note": f"{BASELINE.upper()} cannot be told from guessing"}
    share, low, high = statistics.recovery(change, chance)
    return {"recovery_pct": share, "recovery_low_pct": low, "recovery_high_pct": high}


def _averaged(both: Mapping[tuple[str, str], pd.DataFrame]) -> Iterator[dict[str, Any]]:
    """Yield the means' changes: of GSM8K's strict readings, and over the tasks compared for every format."""
    tasks, precisions = (list(dict.fromkeys(names)) for names in zip(*both, strict=True)) if both else ([], [])
    common = tuple(task for task in tasks if all((task, precision) in both for precision in precisions))
    for name, parts in {**AVERAGED, f"{MEAN} ({len(common)})": common}.items():
        for precision in precisions:
            answers = [both[task, precision] for task in parts if (task, precision) in both]
            if len(answers) == len(parts) > 0:
                note = f"mean of {', '.join(parts)}, which are tested each"
                yield _row(name, precision, _mean_change(answers), gained=None, lost=None, note=note)


def _mean_change(parts: Sequence[pd.DataFrame]) -> Change:
    """Return the mean change over tasks, each weighing the same, with its interval."""
    before, now = (fmean(part[name].mean() for part in parts) for name in ("correct_base", "correct"))
    interval = mean_interval(*(100 * (part.correct.astype(float) - part.correct_base) for part in parts))
    if interval is None:  # nothing flipped: each task has an interval of its own
        changes = [statistics.compare(list(part.correct_base), list(part.correct)) for part in parts]
        interval = mean_of_independent((change.change_pp, change.low_pp, change.high_pp) for change in changes)[1:]
    return Change(sum(map(len, parts)), before, now, 0, 0, math.nan, *interval)
