"""The paper's four tables from the ledger's rows, the published values in columns of their own.

The published values are Llama-3.2-1B's (accuracy on a T1000, performance on a T4). They stand beside whatever model
was measured, under their own name, never in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import pandas as pd

from qnb import paper
from qnb.precision import BASELINE
from qnb.stats import compare, holm

# the metric a task is known by: accuracy for choices, strict exact match for generated answers
HEADLINE = ("acc", "exact_match")
AGGREGATE = "mean over tasks"
# what the paper calls "GSM8K (average of strict and CoT)": the mean of the two strict readings, 5-shot and
# chain-of-thought; the flexible readings stand beside it
AVERAGED = {"gsm8k_average": ("gsm8k", "gsm8k_cot")}
SIGNIFICANT = 0.05


def scores(frame: pd.DataFrame) -> pd.DataFrame:
    """Unfold accuracy rows to a row a task, metric, filter and precision; ``asked`` is the task that was asked for."""
    rows = [
        {"precision": row["precision"], "asked": row["task"], "limit": row["limit"], **score}
        for row in frame.to_dict("records")
        for score in row["scores"]
    ]
    return pd.DataFrame(rows)


def headline(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep one metric a task: accuracy, or exact match as strictly read; then the means over tasks.

    The aggregate weighs every task that all precisions answered alike, as the paper's "aggregate accuracy" does; its
    standard error takes the tasks as independent.
    """
    if frame.empty:
        return frame
    strict = (frame.metric != "exact_match") | (frame["filter"] == "strict-match")
    kept = frame[frame.metric.isin(HEADLINE) & strict]
    whole = kept[kept.task == kept.asked]
    parts = [kept]
    for name, tasks in AVERAGED.items():
        parts.append(_means(whole[whole.task.isin(tasks)], name, len(tasks)))
    # alike are tasks that every precision answered, on as many items
    common = whole.groupby("task").filter(
        lambda rows: set(rows.precision) == set(whole.precision) and rows["items"].nunique() == 1
    )
    parts.append(_means(common, AGGREGATE, 1))
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def _means(whole: pd.DataFrame, name: str, least: int) -> pd.DataFrame:
    """Return a row a precision: the mean over its tasks, where there are at least so many."""
    rows = []
    for precision, group in whole.groupby("precision", sort=False):
        if len(group) < least:
            continue
        known = group.stderr.notna().all()
        rows.append(
            {
                "precision": precision,
                "asked": name,
                "limit": group.limit.iloc[0],
                "task": f"{name} ({len(group)})" if name == AGGREGATE else name,
                "metric": "mean",
                "filter": "none",
                "value": group.value.mean(),
                "stderr": math.sqrt((group.stderr**2).sum()) / len(group) if known else None,
                "items": int(group["items"].sum()),
                "shots": 0,
                "group": True,
            }
        )
    return pd.DataFrame(rows)


def accuracy(frame: pd.DataFrame) -> pd.DataFrame:
    """Table 1: a row a task, metric and number of items; a column a precision in percent and its error in points.

    Metrics are lm-eval's, with the mean probability of the right choice (``p_right``) beside them; ``mean`` rows are
    averages of others. Rows of a sample never share a cell with rows of a whole task: ``items`` is part of the key.
    """
    if frame.empty:
        return frame
    published = paper.accuracy().set_index(["task", "precision"]).acc
    every = headline(frame)
    frame = pd.concat([frame, every[every.metric == "mean"]], ignore_index=True)
    keys = ["task", "metric", "filter", "items"]
    rows = []
    for key, group in frame.groupby(keys, sort=False):
        row = dict(zip(keys, key, strict=True))
        for score in group.itertuples():
            row[f"{score.precision}_pct"] = 100 * score.value
            row[f"{score.precision}_stderr_pp"] = 100 * score.stderr if score.stderr is not None else None
        if row["metric"] in ("acc", "mean") and row["task"] in published:
            for precision, share in published[row["task"]].items():
                row[f"published_{precision}_pct"] = 100 * share
        rows.append(row)
    return pd.DataFrame(rows).round(4)


def change(frame: pd.DataFrame, items: Callable[[dict[str, Any]], pd.DataFrame | None]) -> pd.DataFrame:
    """Table 2: a row a task and precision, the change against BF16 with its interval and paired test.

    Only answers to the same items are compared; where there are none, ``note`` says why. ``holm_p`` is McNemar's p
    corrected for all cells of the table, and ``significant`` whether it is below 0.05.

    Parameters
    ----------
    frame
        Accuracy rows.
    items
        Returns the items an accuracy row was counted from, or None where they are gone.
    """
    if frame.empty or BASELINE not in set(frame.precision):
        return pd.DataFrame()
    published = paper.change().set_index(["task", "precision"]).change_pct
    all_scores = scores(frame)
    rows: list[dict[str, Any]] = []
    for asked, group in frame.groupby("task", sort=False):
        measured = {row["precision"]: row for row in group.to_dict("records")}
        base = measured.pop(BASELINE, None)
        if base is None:
            continue
        before = items(base)
        mine = all_scores[all_scores.asked == asked]
        for precision, row in measured.items():
            if row["limit"] != base["limit"]:
                note = f"not compared: limit {row['limit']}, {BASELINE} has {base['limit']}"
            elif before is None or (now := items(row)) is None:
                note = "not compared: the items' file is gone or was changed"
            else:
                rows += _paired(str(asked), precision, mine, _correct(before), _correct(now))
                continue
            rows.append({"task": asked, "precision": precision, "note": note})
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame([*rows, *_averaged(rows)])
    if "mcnemar_p" in table:
        tested = table.mcnemar_p.notna()
        table.loc[tested, "holm_p"] = holm(list(table.mcnemar_p[tested]))
        table["significant"] = table.holm_p < SIGNIFICANT
    keys = zip(table.task, table.precision, strict=True)
    table["published_change_pct"] = [published.get(key) for key in keys]
    table["note"] = table.note.fillna("") if "note" in table else ""
    return table.round(6)


def _paired(
    asked: str, precision: str, mine: pd.DataFrame, before: pd.DataFrame, now: pd.DataFrame
) -> list[dict[str, Any]]:
    """Compare one task's items, and those of each group in it."""
    pairs = before.join(now, lsuffix="_base", how="inner", validate="one_to_one").reset_index()
    groups = mine[mine.metric.isin(HEADLINE) & ((mine.task == asked) | mine.group.astype(bool))].task.unique()
    rows = []
    for task in groups:
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
                "low_pp": paired.low_pp,
                "high_pp": paired.high_pp,
                "change_pct": paired.change_pct,
                "gained": paired.gained,
                "lost": paired.lost,
                "mcnemar_p": paired.p_value,
            }
        )
    return rows


def _averaged(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the averages' changes; their parts are tested, they are not."""
    for name, tasks in AVERAGED.items():
        for precision in dict.fromkeys(row["precision"] for row in rows):
            parts = [row for row in rows if row["task"] in tasks and row["precision"] == precision and "items" in row]
            if len(parts) == len(tasks):
                before, now = (
                    sum(row[f"{kind}_pct"] for row in parts) / len(parts) for kind in ("baseline", "accuracy")
                )
                yield {
                    "task": name,
                    "precision": precision,
                    "items": sum(row["items"] for row in parts),
                    "baseline_pct": before,
                    "accuracy_pct": now,
                    "change_pp": now - before,
                    "change_pct": 100 * (now / before - 1) if before else None,
                    "note": f"mean of {' and '.join(tasks)}, which are tested each",
                }


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


def divergence(frame: pd.DataFrame) -> pd.DataFrame:
    """Perplexity and divergence from BF16, a row a precision, each with its 95 % interval."""
    rows = []
    for row in frame.to_dict("records"):
        found: dict[str, Any] = {name: row[name] for name in ("precision", "text", "tokens", "context")}
        for name in ("perplexity", "perplexity_change_pct", "kl_mean_nats", "kl_p99_nats", "same_top1_pct"):
            estimate = row.get(name)
            estimate = estimate if isinstance(estimate, dict) else {}
            found |= {name: estimate.get("value"), f"{name}_low": estimate.get("low"),
                      f"{name}_high": estimate.get("high")}  # fmt: skip
        rows.append(found)
    return pd.DataFrame(rows)


def performance(frame: pd.DataFrame, number: int) -> pd.DataFrame:
    """Tables 3 and 4: a row a precision and engine, medians over passes, published columns last.

    ``seconds_per_request`` is total time over requests (the paper's "average latency"); ``batch_latency_s`` is what a
    request really waits for. ``speedup`` is throughput over BF16's with the same engine on the same workload, device
    and memory, ``engine_speedup`` over eager's of the same precision; empty where that was not measured so. Where an
    engine could not run, ``note`` says why. Published values stand beside eager alone, the engine they are of.
    """
    if frame.empty:
        return frame
    published = paper.performance(number).set_index("precision")
    alike = [name for name in ("workload", "device", "memory_limit_mib", "cap") if name in frame]
    rows: list[dict[str, Any]] = []
    rates: dict[tuple[Any, ...], float] = {}
    for (precision, engine), runs in frame.groupby(["precision", "engine"], sort=False):
        first = runs.iloc[-1]
        like = tuple(first[alike])
        row: dict[str, Any] = {"precision": precision, "engine": engine, "batch_size": int(first.batch_size)}
        if pd.notna(first.get("throughput_rps")):
            rates[precision, engine, like] = median(runs.throughput_rps)
            row |= _performance(runs)
        row["note"] = first.get("note") or ""
        if engine == "eager":
            for name in ("throughput_rps", "seconds_per_request", "utilization_pct", "vram_mib", "speedup"):
                row[f"published_{name}"] = published[name].get(precision)
        rows.append({**row, "like": like})
    for row in rows:
        precision, engine, like = row["precision"], row["engine"], row.pop("like")
        mine = rates.get((precision, engine, like))
        for name, other in (("speedup", (BASELINE, engine, like)), ("engine_speedup", (precision, "eager", like))):
            row[name] = mine / rates[other] if mine and other in rates else None
    result = pd.DataFrame(rows)
    order = [name for name in result if not str(name).startswith("published_")]
    return result[order + [name for name in result if name not in order]].round(6)


# what a notebook shows of Tables 3 and 4; their files have all columns
MAIN = (
    "precision", "engine", "batch_size", "throughput_rps", "seconds_per_request", "batch_latency_s", "utilization_pct",
    "weights_mib", "memory_mib", "energy_j_per_request", "energy_above_idle_j_per_request", "speedup",
    "engine_speedup", "note", "published_throughput_rps", "published_seconds_per_request",
    "published_utilization_pct", "published_vram_mib", "published_speedup",
)  # fmt: skip
MEDIANS = (
    "throughput_rps", "throughput_tps", "total_s", "seconds_per_request", "batch_latency_s", "ttft_s", "tpot_s",
    "itl_p50_s", "itl_p95_s", "itl_p99_s", "latency_p50_s", "latency_p95_s", "latency_p99_s", "kernel_s_per_token",
    "kernels_per_token", "weights_mib", "cache_mib", "peak_reserved_mib", "energy_j_per_request",
    "energy_above_idle_j_per_request", "energy_j_per_token", "energy_above_idle_j_per_token",
)  # fmt: skip


def _performance(runs: pd.DataFrame) -> dict[str, Any]:
    """Return what the passes of one precision and engine come to."""
    first = runs.iloc[-1]
    row: dict[str, Any] = {
        "capped": first.get("capped") is True or first.get("capped") == 1,
        "requests": int(first.requests),
        "prompt_tokens": int(first.prompt_tokens),
        "new_tokens": int(first.new_tokens),
        "repeats": len(runs),
        "stopped": first.get("stopped") or "",
    }
    row |= {name: _median(runs, name) for name in MEDIANS}
    row["throughput_spread_pct"] = 100 * (runs.throughput_rps.max() / runs.throughput_rps.min() - 1)
    step_s = row["tpot_s"]
    for name, done, limit in (
        ("kernel_share_pct", row["kernel_s_per_token"], step_s),  # of a decode step, the GPU's own part
        ("bandwidth_share_pct", _median(runs, "achieved_bytes_per_s"), _median(runs, "limit_bytes_per_s")),
        ("compute_share_pct", _median(runs, "achieved_flop_per_s"), _median(runs, "limit_flop_per_s")),
    ):
        row[name] = 100 * done / limit if done is not None and limit else None
    row["bound"] = next((bound for bound in runs.get("bound", []) if isinstance(bound, str)), None)
    row["monitor"] = first.monitor_source
    row["utilization_pct"] = _median(runs, "monitor_utilization_pct")
    row["memory_mib"] = _median(runs, "memory_mib")
    on_gpu = first.monitor_source != "process"  # a process's memory is the column before
    row["device_memory_mib"] = _median(runs, "monitor_peak_memory_mib") if on_gpu else None
    row["power_w"] = _median(runs, "monitor_power_w")
    row["clock_mhz"] = _median(runs, "monitor_clock_mhz")
    flags = {flag for found in runs.get("flags", []) if isinstance(found, list) for flag in found}
    row["flags"] = "; ".join(sorted(flags))
    return row


KNEE_PCT = 80  # of the best throughput; beyond the smallest batch that gives it, latency buys little


def sweep(frame: pd.DataFrame) -> pd.DataFrame:
    """Throughput, latency and memory by batch size, a row a precision, engine and size.

    ``knee`` marks the smallest batch with 80 % of the best throughput of its precision and engine.
    """
    columns = ["precision", "engine", "batch_size", "throughput_rps", "throughput_tps", "batch_latency_s", "ttft_s",
               "tpot_s", "memory_mib", "cache_mib", "bound", "knee", "note"]  # fmt: skip
    if frame.empty:
        return pd.DataFrame(columns=columns)
    frame = frame.reindex(columns=list(dict.fromkeys([*columns, *frame]))).sort_values("batch_size", kind="stable")
    parts = []
    for _, rows in frame.groupby(["precision", "engine"], sort=False):
        rates = rows.throughput_rps.astype(float)
        good = rows.index[rates >= rates.max() * KNEE_PCT / 100]
        parts.append(rows.assign(knee=rows.index == good[0] if len(good) else False))
    return pd.concat(parts, ignore_index=True)[columns]


def _median(runs: pd.DataFrame, name: str) -> float | None:
    values = runs[name].dropna().astype(float) if name in runs else pd.Series(dtype=float)
    return float(values.median()) if len(values) else None
