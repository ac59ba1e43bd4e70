"""The paper's four tables from the ledger's rows, the published values in columns of their own.

The published values are Llama-3.2-1B's (accuracy on a T1000, performance on a T4). They stand beside whatever model
was measured, under their own name, never in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from qnb.accuracy.statistics import compare, holm, mean_interval, mean_of_independent
from qnb.errors import InputError
from qnb.precision import BASELINE
from qnb.report import paper
from qnb.speed.batch_search import Probe, fit, knee, plans
from qnb.speed.monitor import disturbed
from qnb.speed.roofline import SHARES, bound, shares

# the metric a task is known by: accuracy for choices, strict exact match for generated answers
HEADLINE = ("acc", "exact_match")
AGGREGATE = "mean over tasks"
# GSM8K has four readings: the 5-shot task and the 8-shot chain-of-thought one, each with the answer read strictly
# (the number after "####", or after "The answer is") and flexibly (the last number there is). What the paper calls
# "GSM8K (average of strict and CoT)" is the mean of the two strict ones
AVERAGED = {"gsm8k_average": ("gsm8k", "gsm8k_cot")}
SIGNIFICANT = 0.05
Z95 = 1.96  # standard errors each way


def scores(frame: pd.DataFrame) -> pd.DataFrame:
    """Unfold accuracy rows to a row a task, metric, filter and precision; ``asked`` is the task that was asked for."""
    rows = [
        {"precision": row["precision"], "asked": row["task"], "limit": row["limit"], "of": None, **score}
        for row in frame.to_dict("records")
        for score in row["scores"]
    ]
    return pd.DataFrame(rows)


def stacked(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of several frames, one below the other, with every column that any of them has.

    A column that is empty in one frame has no say in the type of the whole, whatever pandas' version.
    """
    parts = list(parts)
    columns = list(dict.fromkeys(name for part in parts for name in part))
    told = [part.dropna(axis="columns", how="all") for part in parts if len(part)]
    return pd.concat(told, ignore_index=True).reindex(columns=columns) if told else pd.DataFrame(columns=columns)


def headline(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep one metric a task: accuracy, or exact match, read strictly where there are several ways; then the means.

    The aggregate weighs every task that all precisions answered alike, as the paper's "aggregate accuracy" does; its
    standard error takes the tasks as independent.
    """
    if frame.empty:
        return frame
    kept = _read_one_way(frame[frame.metric.isin(HEADLINE)])
    whole = kept[kept.task == kept.asked]
    parts = [kept]
    for name, tasks in AVERAGED.items():
        parts.append(_means(whole[whole.task.isin(tasks)], name, len(tasks)))
    common = whole.groupby("task").filter(lambda rows: alike(rows, whole))
    parts.append(_means(common, AGGREGATE, 1))
    return stacked(parts)


def _read_one_way(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep one filter a task, by which its answers are read: the strict one, or none, or its first."""

    def first(filters: pd.Series) -> str:
        return str(min(filters, key=lambda name: {"strict-match": 0, "none": 1}.get(name, 2)))

    return frame[frame["filter"] == frame.groupby("task")["filter"].transform(first)] if len(frame) else frame


def alike(rows: pd.DataFrame, every: pd.DataFrame) -> bool:
    """Return whether a task's rows are of every precision there is, on as many items each."""
    return set(rows.precision) == set(every.precision) and rows["items"].nunique() == 1


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
                "of": group["of"].sum() if group["of"].notna().all() else None,
                "shots": 0,
                "group": True,
            }
        )
    return pd.DataFrame(rows)


def accuracy(frame: pd.DataFrame) -> pd.DataFrame:
    """Table 1: a row a task, metric and number of items; a column a precision in percent and its error in points.

    Metrics are lm-eval's, with the mean probability of the right choice (``p_correct``) beside them; ``mean`` rows are
    averages of others, followed by their 95 % intervals, 1.96 standard errors each way. Rows of a sample never share
    a cell with rows of a whole task: ``items``, and ``of`` how many there are, are part of the key.
    """
    if frame.empty:
        return frame
    published = paper.accuracy().set_index(["task", "precision"]).acc
    every = headline(frame)
    frame = stacked([frame, *_ends(every[every.metric == "mean"])])
    keys = ["task", "metric", "filter", "items", "of"]
    rows = []
    for key, group in frame.groupby(keys, sort=False, dropna=False):
        row = dict(zip(keys, key, strict=True))
        for score in group.itertuples():
            row[f"{score.precision}_pct"] = 100 * score.value
            row[f"{score.precision}_stderr_pp"] = 100 * score.stderr if score.stderr is not None else None
        if row["metric"] in ("acc", "mean") and row["task"] in published:
            for precision, share in published[row["task"]].items():
                row[f"published_{precision}_pct"] = 100 * share
        rows.append(row)
    return pd.DataFrame(rows).round(4)


def _ends(means: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Yield rows of means, and of the ends of their 95 % intervals."""
    if len(means):
        yield means
        for end, sign in (("low", -1), ("high", 1)):
            value = means.value + sign * Z95 * means.stderr.astype(float)
            yield means.assign(metric=f"mean, 95 % {end}", value=value.clip(0, 1), stderr=None)


def change(frame: pd.DataFrame, items: Callable[[dict[str, Any]], pd.DataFrame | None]) -> pd.DataFrame:
    """Table 2: a row a task and precision, the change against BF16 with its interval and paired test.

    Only answers to the same items are compared; where there are none, ``note`` says why. ``p_holm`` is McNemar's p
    corrected for all cells of the table, and ``significant`` whether it is below 0.05. ``p_correct`` columns are the
    change of the mean probability of the right choice, on the same items. Means over tasks have an interval, for which
    each task's items are resampled by themselves; their parts are tested, they are not.

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
    pairs: dict[tuple[str, str], pd.DataFrame] = {}  # by task and precision
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
            elif row.get("data_sha256") != base.get("data_sha256"):
                note = f"not compared: its questions are others than {BASELINE}'s"
            elif before is None or (now := items(row)) is None:
                note = "not compared: the items' file is gone or was changed"
            elif len(both := _pairs(before, now)) != len(_correct(before)):
                note = f"not compared: the items are others than {BASELINE}'s"
            else:
                groups = row.get("groups")
                if made := list(
                    _paired(str(asked), precision, mine, both, groups if isinstance(groups, dict) else {})
                ):
                    pairs[str(asked), precision] = both
                    rows += made
                    continue
                note = "not compared: its score is not a share of right answers"
            rows.append({"task": asked, "precision": precision, "note": note})
    if not rows:
        return pd.DataFrame()
    shown = headline(all_scores)
    counted = set(shown[shown.task == shown.asked].task)  # what Table 1's means are of
    table = pd.DataFrame([*rows, *_averaged({key: both for key, both in pairs.items() if key[0] in counted})])
    if "p_mcnemar" in table:
        tested = table.p_mcnemar.notna()
        table.loc[tested, "p_holm"] = holm(list(table.p_mcnemar[tested]))
        table["significant"] = (table.p_holm < SIGNIFICANT).astype(object).where(tested, None)
    keys = zip(table.task, table.precision, strict=True)
    table["published_change_pct"] = [published.get(key) for key in keys]
    table["note"] = table.note.fillna("") if "note" in table else ""
    return table.round(6)


def _paired(
    asked: str, precision: str, mine: pd.DataFrame, pairs: pd.DataFrame, groups: dict[str, Sequence[str]]
) -> Iterator[dict[str, Any]]:
    """Compare one task's items, and those of each group in it, which lm-eval weighs by their items."""
    kept = mine[mine.metric.isin(HEADLINE) & ((mine.task == asked) | mine.group.astype(bool))]
    for task in kept.task.unique():
        part = pairs if task == asked else pairs[pairs.task.isin(groups.get(task, ()))]
        if part.empty or part[["correct_base", "correct"]].isna().any(axis=None):
            continue  # right and wrong are what is paired; a task that gives shares has neither
        paired = compare(list(part.correct_base), list(part.correct))
        yield {
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
            "p_mcnemar": paired.p_value,
            **_belief(part),
        }


def _belief(pairs: pd.DataFrame) -> dict[str, float | None]:
    """Return how the mean probability of the right choice changed, where all items are choices."""
    if "p_correct" not in pairs or pairs[["p_correct_base", "p_correct"]].isna().any(axis=None):
        return {}
    moved = 100 * (pairs.p_correct - pairs.p_correct_base)
    low, high = mean_interval(moved.to_numpy()) or (None, None)
    return {"p_correct_change_pp": float(moved.mean()), "p_correct_low_pp": low, "p_correct_high_pp": high}


def _averaged(pairs: dict[tuple[str, str], pd.DataFrame]) -> Iterator[dict[str, Any]]:
    """Yield the means' changes: of GSM8K's strict readings, and over the tasks compared for every precision."""
    precisions = list(dict.fromkeys(precision for _, precision in pairs))
    whole = {key: both for key, both in pairs.items() if not both[["correct_base", "correct"]].isna().any(axis=None)}
    common = [task for task in dict.fromkeys(task for task, _ in whole)
              if all((task, precision) in whole for precision in precisions)]  # fmt: skip
    for name, tasks in {**AVERAGED, f"{AGGREGATE} ({len(common)})": tuple(common)}.items():
        for precision in precisions:
            parts = [whole[task, precision] for task in tasks if (task, precision) in whole]
            if len(parts) < max(2, len(tasks)):
                continue  # one task is its own mean
            before, now = (sum(100 * part[column].mean() for part in parts) / len(parts)
                           for column in ("correct_base", "correct"))  # fmt: skip
            flips = [100 * (part.correct.astype(float) - part.correct_base.astype(float)).to_numpy() for part in parts]
            low, high = mean_interval(*flips) or _of_parts(parts)
            yield {
                "task": name,
                "precision": precision,
                "items": sum(map(len, parts)),
                "baseline_pct": before,
                "accuracy_pct": now,
                "change_pp": now - before,
                "low_pp": low,
                "high_pp": high,
                "change_pct": 100 * (now / before - 1) if before else None,
                "note": f"mean of {', '.join(tasks)}, which are tested each",
            }


def _of_parts(parts: Iterable[pd.DataFrame]) -> tuple[float, float]:
    """Return the interval of the mean change over tasks on which nothing flipped, from each task's own."""
    changes = [compare(list(part.correct_base), list(part.correct)) for part in parts]
    return mean_of_independent((change.change_pp, change.low_pp, change.high_pp) for change in changes)[1:]


def _pairs(before: pd.DataFrame, now: pd.DataFrame) -> pd.DataFrame:
    """Return a row an item that both answered, with ``_base`` columns of the first."""
    return _correct(before).join(_correct(now), lsuffix="_base", how="inner", validate="one_to_one").reset_index()


def _correct(items: pd.DataFrame) -> pd.DataFrame:
    """Return right or wrong by (task, doc_id), generated answers as `headline` reads them."""
    kept = _read_one_way(items)
    return kept.set_index(["task", "doc_id"])[[name for name in ("correct", "p_correct") if name in kept]]


def divergence(frame: pd.DataFrame) -> pd.DataFrame:
    """Perplexity and divergence from BF16, a row a precision, each with its 95 % interval."""
    rows = []
    for row in frame.to_dict("records"):
        told = ("precision", "text", "tokens", "context", "stride", "disk_mib")
        found: dict[str, Any] = {name: row.get(name) for name in told}
        for name in ("perplexity", "perplexity_change_pct", "kl_mean_nats", "kl_p99_nats", "same_top1_pct"):
            estimate = row.get(name)
            estimate = estimate if isinstance(estimate, dict) else {}
            found |= {name: estimate.get("value"), f"{name}_low": estimate.get("low"),
                      f"{name}_high": estimate.get("high")}  # fmt: skip
        rows.append(found)
    return pd.DataFrame(rows)


def drift(frame: pd.DataFrame) -> pd.DataFrame:
    """How far scores moved between the usual batches and each row alone, a row a precision and scorer."""
    names = ["precision", "engine", "task", "items", "choices", "mean_abs_logprob_diff", "max_abs_logprob_diff", "answers_changed",
             "accuracy_change_pp"]  # fmt: skip
    return frame[names].rename(columns={"engine": "scorer"}) if len(frame) else frame


def performance(frame: pd.DataFrame, number: int) -> pd.DataFrame:
    """Tables 3 and 4: a row a precision and engine, medians over passes, published columns last.

    ``seconds_per_request`` is total time over requests (the paper's "average latency"); ``batch_latency_s`` is what a
    request really waits for. ``speedup`` is throughput over BF16's with the same engine on the same workload, device
    and memory, ``engine_speedup`` over eager's of the same precision; empty where that was not measured so, and where
    other processes disturbed either. ``note`` says why an engine could not run, and which rows were not measured like
    the newest. Published values stand beside eager alone, the engine they are of.
    """
    if frame.empty:
        return frame
    published = paper.performance(number).set_index("precision")
    rows: list[dict[str, Any]] = []
    timed: dict[tuple[Any, ...], dict[str, Any]] = {}
    newest = _newest(frame)
    for (precision, engine), runs in frame.groupby(["precision", "engine"], sort=False):
        last = runs.iloc[-1]
        like = _like(last)
        row: dict[str, Any] = {"precision": precision, "engine": engine, "batch_size": int(last.batch_size)}
        if pd.notna(last.get("throughput_rps")):
            row |= _performance(runs)
            timed[precision, engine, like] = row
        row["note"] = _noted(last, newest)
        if engine == "eager":
            for name in ("throughput_rps", "seconds_per_request", "utilization_pct", "vram_mib", "speedup"):
                row[f"published_{name}"] = published[name].get(precision)
        rows.append({**row, "like": like})
    for row in rows:
        precision, engine, like = row["precision"], row["engine"], row.pop("like")
        for name, other in (("speedup", (BASELINE, engine, like)), ("engine_speedup", (precision, "eager", like))):
            row[name], mine, base = None, timed.get((precision, engine, like)), timed.get(other)
            if mine and base and not (disturbed(mine["flags"]) or disturbed(base["flags"])):
                row[name] = mine["throughput_rps"] / base["throughput_rps"]
    result = pd.DataFrame(rows)
    order = [name for name in result if not str(name).startswith("published_")]
    return result[order + [name for name in result if name not in order]].round(6)


OTHER = "not measured like the newest row: other prompts, device, memory or cap"
ALIKE = ("workload", "device", "memory_limit_mib", "cap")  # in these two rows must not differ to be compared
# what a notebook shows of Tables 3 and 4, and the report first; their files have all columns
MAIN = (
    "precision", "engine", "batch_size", "throughput_rps", "tpot_s", "seconds_per_request", "batch_latency_s",
    "utilization_pct", "weights_mib", "memory_mib", "energy_j_per_request", "energy_above_idle_j_per_request",
    "speedup", "engine_speedup", "flags", "note", "published_throughput_rps", "published_seconds_per_request",
    "published_utilization_pct", "published_vram_mib", "published_speedup",
)  # fmt: skip
MEDIANS = (
    "throughput_rps", "throughput_tps", "total_s", "seconds_per_request", "batch_latency_s", "ttft_s", "tpot_s",
    "itl_p50_s", "itl_p95_s", "itl_p99_s", "latency_p50_s", "latency_p95_s", "latency_p99_s", "kernel_s_per_token",
    "kernels_per_token", "weights_mib", "cache_mib", "peak_reserved_mib", "energy_j_per_request",
    "energy_above_idle_j_per_request", "energy_j_per_token", "energy_above_idle_j_per_token",
)  # fmt: skip


def _like(row: pd.Series) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in ALIKE)


def _newest(frame: pd.DataFrame) -> tuple[str, ...] | None:
    return _like(frame.sort_values("measured_at", kind="stable").iloc[-1]) if "measured_at" in frame else None


def _noted(row: pd.Series, newest: tuple[str, ...] | None) -> str:
    """Return a row's own note, and whether it was not measured like the newest."""
    note = row.get("note")
    notes = [note if isinstance(note, str) else "", OTHER if newest and _like(row) != newest else ""]
    return "; ".join(filter(None, notes))


def _flags(runs: pd.DataFrame) -> str:
    """Return the flags of all rows as a table's text."""
    return "; ".join(sorted({flag for found in runs.get("flags", []) if isinstance(found, list) for flag in found}))


def _performance(runs: pd.DataFrame) -> dict[str, Any]:
    """Return what the passes of one precision and engine come to."""
    last = runs.iloc[-1]
    row: dict[str, Any] = {
        "capped": last.get("capped") is True or last.get("capped") == 1,
        "requests": int(last.requests),
        "prompt_tokens": int(last.prompt_tokens),
        "new_tokens": int(last.new_tokens),
        "repeats": len(runs),
        "stopped": last.get("stopped") or "",
    }
    row |= {name: _median(runs, name) for name in MEDIANS}
    rates = runs.throughput_rps
    row["throughput_spread_pct"] = 100 * (rates.max() / rates.min() - 1) if len(rates) > 1 else None
    parts = shares({name: _median(runs, name) for pair in SHARES.values() for name in pair})
    row |= {name: None if part is None else 100 * part for name, part in zip(SHARES, parts, strict=True)}
    row["bound"] = bound(*parts)
    row["monitor"] = last.monitor_source
    row["utilization_pct"] = _median(runs, "utilization_pct")
    row["memory_mib"] = _median(runs, "memory_mib")
    on_gpu = last.monitor_source != "process"  # a process's memory is the column before
    row["device_memory_mib"] = _median(runs, "monitor_peak_memory_mib") if on_gpu else None
    row["power_w"] = _median(runs, "power_w")
    row["clock_mhz"] = _median(runs, "clock_mhz")
    row["flags"] = _flags(runs)
    return row


def with_spread(frame: pd.DataFrame) -> pd.DataFrame:
    """Add ``throughput_spread_pct``: how much faster the fastest of a pass's batches was than the slowest."""
    times = frame.get("batch_s", pd.Series(None, frame.index, dtype=object))
    spread = [100 * (max(batch_s) / min(batch_s) - 1) if isinstance(batch_s, list) and len(batch_s) > 1 else None
              for batch_s in times]  # fmt: skip
    return frame.assign(throughput_spread_pct=pd.Series(spread, frame.index, dtype=float))


def sweep(frame: pd.DataFrame) -> pd.DataFrame:
    """Throughput, latency and memory by batch size, a row a precision, engine and size.

    ``throughput_spread_pct`` is that of a size's batches, see `with_spread`; ``bound`` is empty where roofs do not
    tell, as a sweep's kernels are not traced; ``knee`` marks the batch size with the most throughput a second of
    latency, see `qnb.speed.batch_search.knee`; ``note`` says too which rows were not measured like the newest.
    """
    columns = ["precision", "engine", "batch_size", "requests", "prompt_tokens", "new_tokens", "throughput_rps",
               "throughput_spread_pct", "throughput_tps", "batch_latency_s", "ttft_s", "tpot_s", "memory_mib",
               "cache_mib", "bound", "knee", "flags", "note"]  # fmt: skip
    if frame.empty:
        return pd.DataFrame(columns=columns)
    newest = _newest(frame)
    notes = [_noted(row, newest) for _, row in frame.iterrows()]
    flags = [_flags(frame.iloc[[place]]) for place in range(len(frame))]
    frame = with_spread(frame).assign(flags=flags, note=notes)
    frame = frame.reindex(columns=list(dict.fromkeys([*columns, *frame]))).sort_values("batch_size", kind="stable")
    lines = frame.groupby(["precision", "engine"], sort=False)
    made = pd.concat([rows.assign(knee=rows.batch_size == bend(rows)) for _, rows in lines], ignore_index=True)
    return made[columns]


LINE = ["batch_size", "throughput_rps", "batch_latency_s"]


def bend(rows: pd.DataFrame) -> int | None:
    """Return the knee of one line of a sweep, rows with `LINE`; None where it had not bent."""
    timed = rows.dropna(subset=LINE).sort_values("batch_size")
    return knee(*(list(timed[name]) for name in LINE)) if len(timed) else None


def knees(steps: pd.DataFrame) -> pd.DataFrame:
    """Where the lines of a sweep bend, and what their largest batches reach; a row a precision and engine.

    ``knee``, a batch size, and what it gives are empty where a line had not bent by ``swept_to``, the largest one run,
    which the last two numbers are of; ``note`` names sizes that other processes disturbed.

    Parameters
    ----------
    steps
        `sweep` or `qnb.report.results.Results.sweep`.
    """
    rows = []
    timed = steps.dropna(subset=LINE) if set(LINE) <= set(steps) else steps.head(0)
    for (precision, engine), line in timed.groupby(["precision", "engine"], sort=False) if len(timed) else ():
        at, last = line[line.batch_size == bend(line)], line.loc[line.batch_size.idxmax()]
        hit = [f"{int(row.batch_size)}" for row in line.itertuples() if disturbed(getattr(row, "flags", None))]
        rows.append(
            {
                "precision": precision,
                "engine": engine,
                "knee": int(at.batch_size.iloc[0]) if len(at) else None,
                "knee_throughput_rps": at.throughput_rps.iloc[0] if len(at) else None,
                "knee_batch_latency_s": at.batch_latency_s.iloc[0] if len(at) else None,
                "swept_to": int(last.batch_size),
                "throughput_rps": last.throughput_rps,
                "batch_latency_s": last.batch_latency_s,
                "note": f"other processes disturbed batches of {', '.join(hit)}" if hit else "",
            }
        )
    columns = ["precision", "engine", "knee", "knee_throughput_rps", "knee_batch_latency_s", "swept_to",
               "throughput_rps", "batch_latency_s", "note"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns).astype({"knee": "Int64"})


def examples(searches: pd.DataFrame, drawn: pd.DataFrame) -> pd.DataFrame:
    """Plan batches for each number of prompts, a row a precision, engine, number and order; see `qnb.speed.batch_search.plans`.

    ``largest_batch`` is of the longest prompt, and ``estimate_error_pct`` by how much it may be off for the grain of memory
    readings alone. Where there is no plan, ``note`` says why.

    Parameters
    ----------
    searches
        Rows of stage *batch*.
    drawn
        The row of stage *lengths*; empty where none was asked for.
    """
    columns = ["precision", "engine", "examples", "order", "longest_tokens", "largest_batch", "estimate_error_pct", "batches",
               "mean_batch", "padding_pct", "limit_mib", "note"]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for row in searches.to_dict("records"):
        for prompts in drawn.to_dict("records"):
            about = {"precision": row["precision"], "engine": row["engine"], "limit_mib": row["limit_mib"]}
            rows += [{**about, **plan} for plan in _planned(row, prompts)]
    whole = ["examples", "longest_tokens", "largest_batch", "batches"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(whole, "Int64")).round(6)


def _planned(row: dict[str, Any], prompts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the plans that one search's line gives for each number of prompts."""
    asked: dict[int, list[int]] = {}
    for count in prompts["examples"]:
        asked.setdefault(min(count, len(prompts["lengths"])), []).append(count)
    for count, wanted in asked.items():
        notes = []
        if wanted != [count]:
            numbers = " and ".join(f"{number:,}" for number in wanted)
            notes.append(f"{prompts['prompts']} has no more prompts; {numbers} were asked for")
        try:
            if pd.isna(row.get("prompt_tokens")):
                raise InputError("the search's row does not say how long its prompt was; search with overwrite")
            new_tokens = int(row["new_tokens"])
            line = fit([Probe(**probe) for probe in row["probes"]], int(row["prompt_tokens"]) + new_tokens)
            most = math.inf if pd.isna(prompts["window"]) else int(prompts["window"]) - new_tokens
            lengths = [int(min(tokens, most)) for tokens in prompts["lengths"][:count]]
            if cut := sum(tokens > most for tokens in prompts["lengths"][:count]):
                notes.append(f"cut to the context window: {cut:,}")
            for plan in plans(lengths, new_tokens, line, row["limit_mib"]):
                yield {**asdict(plan), "estimate_error_pct": line.estimate_error_pct(row["limit_mib"]), "note": "; ".join(notes)}
        except InputError as error:
            yield {"examples": count, "note": "; ".join([*notes, str(error)])}


def _median(runs: pd.DataFrame, name: str) -> float | None:
    values = runs[name].dropna().astype(float) if name in runs else pd.Series(dtype=float)
    return float(values.median()) if len(values) else None


@dataclass(frozen=True, slots=True)
class Grid:
    """A table as text."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


def grid(frame: pd.DataFrame, caption: str = "") -> Grid:
    """Return a frame as text: empty columns left out, numbers in the digits that carry them.

    Percents and points have two decimals, as in the paper.
    """
    rows = [[_cell(str(name), row[name]) for name in frame] for row in frame.to_dict("records")]
    told = [place for place in range(len(frame.columns)) if any(row[place] for row in rows)]
    names = [str(frame.columns[place]) for place in told]
    return Grid(caption, names, [[row[place] for place in told] for row in rows])


def _cell(name: str, value: Any) -> str:
    if value is None or (not isinstance(value, str | list) and pd.isna(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if name.endswith("_p") and value < 1e-6:  # tables are rounded to six places
            return "< 0.000001"
        if name.endswith(("_pct", "_pp")):
            return f"{value:.2f}"
        return f"{value:,.0f}" if value == round(value) and abs(value) >= 100 else f"{value:,.4g}"
    return str(value)


def markdown(frame: pd.DataFrame) -> str:
    """Return a frame as a Markdown table for pasting; a cell can neither end itself nor carry a tag."""
    made = grid(frame)

    def line(cells: list[str]) -> str:
        kept = (
            cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for cell in cells
        )
        return f"| {' | '.join(kept)} |"

    rule = "|" + "|".join("---" if place == 0 else "---:" for place in range(len(made.columns))) + "|"
    return "\n".join([line(made.columns), rule, *map(line, made.rows)]) + "\n"
