"""Scores of tasks: the metric that a task is known by, means over tasks, and Table 1."""

import math

import pandas as pd

from qnb.accuracy.statistics import Z95
from qnb.report import paper
from qnb.report.results import Results, stack

# the metric a task is known by: accuracy for choices, strict exact match for generated answers
HEADLINE = ("acc", "exact_match")
MEAN = "mean over tasks"
# The paper's "GSM8K (average of strict and CoT)" is the mean of two strict readings: the 5-shot task's, and the 8-shot
# chain-of-thought one's
AVERAGED = {"gsm8k_average": ("gsm8k", "gsm8k_cot")}


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


def table(results: Results) -> pd.DataFrame:
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
