"""The paper's four tables from the ledger's rows, the published values in columns of their own.

The published values are Llama-3.2-1B's (accuracy on a T1000, performance on a T4). They stand beside whatever model
was measured, under their own name, never in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from typing import Any

import pandas as pd

from qnb import paper
from qnb.precision import BASELINE
from qnb.stats import compare

# the metric a task is known by: accuracy for choices, strict exact match for generated answers
HEADLINE = ("acc", "exact_match")
AGGREGATE = "mean over tasks"


def scores(frame: pd.DataFrame) -> pd.DataFrame:
    """Unfold accuracy rows to a row a task, metric, filter and precision; ``asked`` is the task that was asked for."""
    rows = [
        {"precision": row["precision"], "asked": row["task"], "limit": row["limit"], **score}
        for row in frame.to_dict("records")
        for score in row["scores"]
    ]
    return pd.DataFrame(rows)


def headline(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep one metric a task: accuracy, or exact match as strictly read; then the mean over the tasks asked for.

    The mean weighs every task alike, as the paper's "aggregate accuracy" does; its standard error takes the tasks as
    independent.
    """
    if frame.empty:
        return frame
    strict = (frame.metric != "exact_match") | (frame["filter"] == "strict-match")
    kept = frame[frame.metric.isin(HEADLINE) & strict].copy()
    whole = kept[kept.task == kept.asked]
    means = []
    for precision, group in whole.groupby("precision", sort=False):
        known = group.stderr.notna().all()
        means.append(
            {
                "precision": precision,
                "asked": AGGREGATE,
                "limit": group.limit.iloc[0],
                "task": AGGREGATE,
                "metric": "mean",
                "filter": "none",
                "value": group.value.mean(),
                "stderr": math.sqrt((group.stderr**2).sum()) / len(group) if known else None,
                "items": int(group["items"].sum()),
                "shots": 0,
                "group": True,
            }
        )
    return pd.concat([kept, pd.DataFrame(means)], ignore_index=True)


def accuracy(frame: pd.DataFrame) -> pd.DataFrame:
    """Table 1: a row a task and metric, a column a precision in percent with its standard error in points."""
    if frame.empty:
        return frame
    published = paper.accuracy().set_index(["task", "precision"]).acc
    means = headline(frame)
    frame = pd.concat([frame, means[means.task == AGGREGATE]], ignore_index=True)
    keys = ["task", "metric", "filter", "items"]
    rows = []
    for key, group in frame.groupby(keys, sort=False):
        row = dict(zip(keys, key, strict=True))
        for score in group.itertuples():
            row[f"{score.precision}_pct"] = 100 * score.value
            row[f"{score.precision}_stderr_pp"] = 100 * score.stderr if score.stderr is not None else None
        if row["metric"] == "acc" and row["task"] in published:
            for precision, share in published[row["task"]].items():
                row[f"published_{precision}_pct"] = 100 * share
        rows.append(row)
    return pd.DataFrame(rows).round(4)


def change(frame: pd.DataFrame, items: Callable[[str, str], pd.DataFrame]) -> pd.DataFrame:
    """Table 2: a row a task and precision, change against BF16 in points and relative, and a paired test.

    Parameters
    ----------
    frame
        Accuracy rows.
    items
        Returns the items of (task asked for, precision).
    """
    if frame.empty or BASELINE not in set(frame.precision):
        return pd.DataFrame()
    published = paper.change().set_index(["task", "precision"]).change_pct
    all_scores = scores(frame)
    rows: list[dict[str, Any]] = []
    for asked, group in frame.groupby("task", sort=False):
        if BASELINE not in set(group.precision):
            continue
        base = _correct(items(str(asked), BASELINE))
        for precision in group.precision:
            if precision == BASELINE:
                continue
            other = _correct(items(str(asked), precision))
            pairs = base.join(other, lsuffix="_base", how="inner", validate="one_to_one").reset_index()
            if len(pairs) != len(base):
                continue  # measured on other items: there is nothing to pair
            mine = all_scores[all_scores.asked == asked]
            for task in mine[mine.metric.isin(HEADLINE)].task.unique():
                part = pairs if task == asked else pairs[pairs.task.isin(_members(task, mine, pairs))]
                if part.empty or part[["correct_base", "correct"]].isna().any(axis=None):
                    continue  # right and wrong are what is paired; a task that gives shares has neither
                paired = compare(list(part.correct_base), list(part.correct))
                rows.append(
                    {
                        "task": task,
                        "precision": precision,
                        "items": paired.items,
                        "baseline_pct": 100 * paired.baseline,
                        "accuracy_pct": 100 * paired.accuracy,
                        "change_pp": paired.change_pp,
                        "change_pct": paired.change_pct,
                        "gained": paired.gained,
                        "lost": paired.lost,
                        "mcnemar_p": paired.p_value,
                        "published_change_pct": published.get((task, precision)),
                    }
                )
    return pd.DataFrame(rows).round(6)


def _members(task: str, scores: pd.DataFrame, pairs: pd.DataFrame) -> set[str]:
    """Return the leaf tasks below `task`; lm-eval's rows come in tree order, a group before what is in it."""
    if task in set(pairs.task):
        return {task}
    order = scores.drop_duplicates("task")[["task", "group"]].itertuples(index=False)
    leaves: set[str] = set()
    inside = False
    for name, group in order:
        if name == task:
            inside = True
        elif inside and group:
            break
        elif inside:
            leaves.add(name)
    return leaves


def _correct(items: pd.DataFrame) -> pd.DataFrame:
    """Return right or wrong by (task, doc_id), generated answers as strictly read."""
    kept = items[items["filter"].isin(["none", "strict-match"])]
    return kept.set_index(["task", "doc_id"])[["correct"]]


def performance(frame: pd.DataFrame, number: int) -> pd.DataFrame:
    """Tables 3 and 4: a row a precision, medians over repeats with the spread of throughput, published columns last.

    ``seconds_per_request`` is total time over requests (the paper's "average latency"); ``batch_latency_s`` is what a
    request really waits for. ``speedup`` is throughput over BF16's.
    """
    if frame.empty:
        return frame
    published = paper.performance(number).set_index("precision")
    rows: list[dict[str, Any]] = []
    for (precision, engine), runs in frame.groupby(["precision", "engine"], sort=False):
        first = runs.iloc[-1]
        row = {
            "precision": precision,
            "engine": engine,
            "batch_size": int(first.batch_size),
            "capped": bool(first.get("capped", False)),
            "requests": int(first.requests),
            "prompt_tokens": int(first.prompt_tokens),
            "new_tokens": int(first.new_tokens),
            "repeats": len(runs),
        }
        for name in ("throughput_rps", "throughput_tps", "total_s", "seconds_per_request", "batch_latency_s"):
            row[name] = median(runs[name])
        row["throughput_spread_pct"] = 100 * (runs.throughput_rps.max() / runs.throughput_rps.min() - 1)
        row["monitor"] = first.monitor_source
        row["utilization_pct"] = _median(runs, "monitor_utilization_pct")
        row["memory_mib"] = _median(runs, "memory_mib")
        row["device_memory_mib"] = _median(runs, "monitor_peak_memory_mib")
        row["power_w"] = _median(runs, "monitor_power_w")
        for name in ("throughput_rps", "seconds_per_request", "utilization_pct", "vram_mib", "speedup"):
            row[f"published_{name}"] = published[name].get(precision)
        rows.append(row)
    base = {row["engine"]: row["throughput_rps"] for row in rows if row["precision"] == BASELINE}
    for row in rows:
        row["speedup"] = row["throughput_rps"] / base[row["engine"]] if row["engine"] in base else None
    result = pd.DataFrame(rows)
    order = [name for name in result if not str(name).startswith("published_")]
    return result[order + [name for name in result if name not in order]].round(6)


def _median(runs: pd.DataFrame, name: str) -> float | None:
    values = runs[name].dropna() if name in runs else pd.Series(dtype=float)
    return float(values.median()) if len(values) else None
