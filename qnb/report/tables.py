"""The paper's four tables and those around them, made of a study's frames; published values have their own columns.

The published values are Llama-3.2-1B's (accuracy on a T1000, performance on a T4). They stand beside whatever model
was measured, under their own name, never in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from qnb.accuracy.statistics import compare, holm, mean_interval, mean_of_independent
from qnb.columns import flag_text, format_value, header, is_disturbed
from qnb.ledger import write_atomic
from qnb.precision import BASELINE
from qnb.report import paper
from qnb.report.batch_plans import plans
from qnb.report.results import SPEED, Results, in_order, stack

# the metric a task is known by: accuracy for choices, strict exact match for generated answers
HEADLINE = ("acc", "exact_match")
MEAN = "mean over tasks"
# The paper's "GSM8K (average of strict and CoT)" is the mean of two strict readings: the 5-shot task's, and the 8-shot
# chain-of-thought one's
AVERAGED = {"gsm8k_average": ("gsm8k", "gsm8k_cot")}
SIGNIFICANT = 0.05
Z95 = 1.96  # standard errors each way
CHANGE = ("task", "precision", "n_items", "baseline_pct", "accuracy_pct", "change_pp", "low_pp", "high_pp",
          "change_pct", "gained", "lost", "p_mcnemar", "p_correct_change_pp", "p_correct_low_pp", "p_correct_high_pp",
          "note", "p_holm", "significant", "published_change_pct")  # fmt: skip
ESTIMATES = ("perplexity", "perplexity_change_pct", "kl_mean_nats", "kl_p99_nats", "same_top1_pct")
DIVERGENCE = ("precision", "prompt_source", "tokens", "context", "stride",
              *(name + end for name in ESTIMATES for end in ("", "_low", "_high")))  # fmt: skip
SENSITIVITY = ("precision", "scorer", "task", "n_items", "n_choices", "mean_abs_logprob_diff",
               "max_abs_logprob_diff", "answers_changed", "accuracy_change_pp")  # fmt: skip
SWEEP = ("precision", "engine", "batch_size", "requests", "prompt_tokens", "new_tokens", "throughput_rps",
         "batch_spread_pct", "throughput_tps", "batch_latency_s", "ttft_s", "tpot_s", "peak_memory_mib",
         "kv_cache_mib", "bound", "knee", "flags", "note")  # fmt: skip
PUBLISHED = ("throughput_rps", "seconds_per_request", "utilization_pct", "vram_mib", "speedup")
# what a notebook shows of Tables 3 and 4, and the report first; their files have all columns
MAIN = (
    "precision", "engine", "batch_size", "throughput_rps", "tpot_s", "seconds_per_request", "batch_latency_s",
    "utilization_pct", "weights_mib", "peak_memory_mib", "energy_j_per_request", "energy_above_idle_j_per_request",
    "speedup", "engine_speedup", "flags", "note", *(f"published_{name}" for name in PUBLISHED),
)  # fmt: skip
LINE = ["precision", "engine"]  # one line of a sweep
OTHER = "not measured like the newest row: other prompts, device, memory or cap"


def headline(scores: pd.DataFrame) -> pd.DataFrame:
    """Keep one metric a task: accuracy, or exact match, read strictly where there are several ways; then the means.

    `MEAN` weighs every task that all formats answered alike, as the paper's "aggregate accuracy" does. Its standard
    error takes the tasks as independent.
    """
    if scores.empty:
        return scores
    shown = _one_filter(scores[scores.metric.isin(HEADLINE)])
    whole = shown[shown.task == shown.asked]
    parts = [shown] + [_means(whole[whole.task.isin(tasks)], name, len(tasks)) for name, tasks in AVERAGED.items()]
    common = whole[whole.task.isin(common_tasks(shown))]
    return stack([*parts, _means(common, f"{MEAN} ({common.task.nunique()})", 1)])


def common_tasks(shown: pd.DataFrame) -> list[str]:
    """Return the tasks of a headline that every format answered, on as many items each."""
    whole = shown[(shown.task == shown.asked) & (shown.metric != "mean")]
    formats = whole.precision.nunique()
    return [
        str(task)
        for task, rows in whole.groupby("task", sort=False)
        if rows.precision.nunique() == formats and rows.n_items.nunique() == 1
    ]


def _one_filter(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep one filter a task, by which its answers are read: the strict one, or none, or its first."""
    order = {"strict-match": 0, "none": 1}
    best = {task: min(names, key=lambda name: order.get(name, 2)) for task, names in frame.groupby("task")["filter"]}
    return frame[frame["filter"] == frame.task.map(best)]


def _means(whole: pd.DataFrame, name: str, least: int) -> pd.DataFrame:
    """Return a row a format: the mean over its tasks, where there are at least so many."""
    rows = []
    for precision, group in whole.groupby("precision", sort=False):
        if len(group) >= least:
            about = {"precision": precision, "asked": name.partition(" (")[0], "task": name, "metric": "mean"}
            sums = {column: group[column].sum(skipna=False) for column in ("n_items", "n_total")}
            error = math.sqrt((group.stderr.astype(float) ** 2).sum(skipna=False)) / len(group)
            rows.append({**about, "filter": "none", "limit": group.limit.iloc[0], "value": group.value.mean(),
                         "stderr": error, **sums, "shots": 0, "group": True})  # fmt: skip
    return pd.DataFrame(rows)


def _accuracy(results: Results) -> pd.DataFrame:
    """Table 1: a row a task, metric and number of items; a column a format in percent and its error in points.

    ``p_correct`` is the mean probability of the right choice, ``mean`` an average of other rows, followed by the ends
    of its 95 % interval. Rows of a sample never share a cell with rows of a whole task: ``n_items`` and ``n_total``
    are part of the key.
    """
    if results.scores.empty:
        return pd.DataFrame()
    published = paper.accuracy().set_index(["task", "precision"]).acc
    means = headline(results.scores).query("metric == 'mean'")
    ends = [
        means.assign(
            metric=f"mean, 95 % {end}", value=(means.value + sign * Z95 * means.stderr).clip(0, 1), stderr=None
        )
        for end, sign in (("low", -1), ("high", 1))
    ]
    keys = ["task", "metric", "filter", "n_items", "n_total"]
    rows = []
    for key, group in stack([results.scores, means, *ends]).groupby(keys, sort=False, dropna=False):
        row = dict(zip(keys, key, strict=True))
        for score in group.itertuples():
            row[f"{score.precision}_pct"] = 100 * score.value
            row[f"{score.precision}_stderr_pp"] = 100 * score.stderr if pd.notna(score.stderr) else None
        if row["metric"] in ("acc", "mean") and row["task"] in published:
            row |= {f"published_{name}_pct": 100 * share for name, share in published[row["task"]].items()}
        rows.append(row)
    return pd.DataFrame(rows).round(4)


def _change(results: Results) -> pd.DataFrame:
    """Table 2: a row a task and format, the change against BF16 with its interval and paired test.

    Only answers to the same items are compared; where there are none, ``note`` says why. ``p_holm`` is McNemar's p
    corrected for all cells of the table, and ``significant`` whether it is below 0.05. ``p_correct`` columns are the
    change of the mean probability of the right choice. Means over tasks have an interval, for which each task's items
    are resampled by themselves; their parts are tested, they are not.
    """
    rows: list[dict[str, Any]] = []
    pairs: dict[tuple[str, str], pd.DataFrame] = {}  # by task and format
    for task, group in results.accuracy_rows.groupby("task", sort=False) if len(results.accuracy_rows) else ():
        measured = {row["precision"]: row for row in group.to_dict("records")}
        base = measured.pop(BASELINE, None)
        for precision, row in measured.items() if base else ():
            both = _pairs(results, base, row)
            compared = [] if isinstance(both, str) else list(_compare(row, both))
            if compared:
                pairs[str(task), precision] = both
            else:
                reason = both if isinstance(both, str) else "its score is not a share of right answers"
                compared = [{"task": task, "precision": precision, "note": f"not compared: {reason}"}]
            rows += compared
    shown = headline(results.scores)
    counted = set(shown[shown.task == shown.asked].task) if rows else set()  # what Table 1's means are of
    rows += _averaged({key: both for key, both in pairs.items() if key[0] in counted})
    table = pd.DataFrame(rows).reindex(columns=list(CHANGE))
    tested = table.p_mcnemar.notna()
    table.loc[tested, "p_holm"] = holm(list(table.p_mcnemar[tested]))
    table["significant"] = (table.p_holm < SIGNIFICANT).astype(object).where(tested, None)
    published = paper.accuracy().set_index(["task", "precision"]).change_pct
    table["published_change_pct"] = [published.get(key) for key in zip(table.task, table.precision, strict=True)]
    return table.assign(note=table.note.fillna("")).round(6)


def _pairs(results: Results, base: Mapping[str, Any], row: Mapping[str, Any]) -> pd.DataFrame | str:
    """Return a row an item that both formats answered, the baseline's as ``_base``; a text says why there is none."""
    if row["limit"] != base["limit"]:
        return f"limit {row['limit']}, {BASELINE} has {base['limit']}"
    if row["data_sha256"] != base["data_sha256"]:
        return f"its questions are others than {BASELINE}'s"
    before, now = results.items(base), results.items(row)
    if before is None or now is None:
        return "the items' file is gone or was changed"
    both = _answers(before).join(_answers(now), lsuffix="_base", how="inner", validate="one_to_one")
    return both.reset_index() if len(both) == len(_answers(before)) else f"the items are others than {BASELINE}'s"


def _answers(items: pd.DataFrame) -> pd.DataFrame:
    """Return right or wrong by (task, doc_id), generated answers as `headline` reads them."""
    return _one_filter(items).set_index(["task", "doc_id"]).reindex(columns=["correct", "p_correct"])


def _compare(row: Mapping[str, Any], pairs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Compare a task's items, and those of each group in it, which lm-eval weighs by their items."""
    asked = row["task"]
    names = [score["task"] for score in row["scores"]
             if score["metric"] in HEADLINE and (score["group"] or score["task"] == asked)]  # fmt: skip
    for task in dict.fromkeys(names):
        part = pairs if task == asked else pairs[pairs.task.isin(row["groups"].get(task, ()))]
        if not _is_counted(part):
            continue
        change = compare(list(part.correct_base), list(part.correct))
        yield {
            "task": task, "precision": row["precision"], "n_items": change.items,
            "baseline_pct": 100 * change.baseline, "accuracy_pct": 100 * change.accuracy,
            "change_pp": change.change_pp, "low_pp": change.low_pp, "high_pp": change.high_pp,
            "change_pct": change.change_pct, "gained": change.gained, "lost": change.lost,
            "p_mcnemar": change.p_value, **_p_correct(part),
        }  # fmt: skip


def _is_counted(pairs: pd.DataFrame) -> bool:
    """Return whether every item is right or wrong; a task that gives shares has neither to pair."""
    return len(pairs) > 0 and not pairs[["correct_base", "correct"]].isna().any(axis=None)


def _p_correct(pairs: pd.DataFrame) -> dict[str, float | None]:
    """Return how the mean probability of the right choice changed, where all items are choices."""
    change_pp = 100 * (pairs.p_correct - pairs.p_correct_base).astype(float)
    if change_pp.isna().any():
        return {}
    low, high = mean_interval(change_pp.to_numpy()) or (None, None)
    return {"p_correct_change_pp": change_pp.mean(), "p_correct_low_pp": low, "p_correct_high_pp": high}


def _averaged(pairs: Mapping[tuple[str, str], pd.DataFrame]) -> Iterator[dict[str, Any]]:
    """Yield the means' changes: of GSM8K's strict readings, and over the tasks compared for every format."""
    whole = {key: both for key, both in pairs.items() if _is_counted(both)}
    precisions = list(dict.fromkeys(precision for _, precision in pairs))
    common = [task for task in dict.fromkeys(task for task, _ in whole)
              if all((task, precision) in whole for precision in precisions)]  # fmt: skip
    for name, tasks in {**AVERAGED, f"{MEAN} ({len(common)})": tuple(common)}.items():
        for precision in precisions:
            parts = [whole[task, precision] for task in tasks if (task, precision) in whole]
            if len(parts) == len(tasks) > 1:  # one task is its own mean
                yield {"task": name, "precision": precision, **_mean_change(parts),
                       "note": f"mean of {', '.join(tasks)}, which are tested each"}  # fmt: skip


def _mean_change(parts: Sequence[pd.DataFrame]) -> dict[str, Any]:
    """Return the mean change over tasks, each weighing the same, with its interval."""
    before, now = (100 * sum(part[name].mean() for part in parts) / len(parts) for name in ("correct_base", "correct"))
    flips = [100 * (part.correct.astype(float) - part.correct_base.astype(float)).to_numpy() for part in parts]
    interval = mean_interval(*flips)
    if interval is None:  # nothing flipped: each task has an interval of its own
        changes = [compare(list(part.correct_base), list(part.correct)) for part in parts]
        interval = mean_of_independent((change.change_pp, change.low_pp, change.high_pp) for change in changes)[1:]
    return {"n_items": sum(map(len, parts)), "baseline_pct": before, "accuracy_pct": now, "change_pp": now - before,
            "low_pp": interval[0], "high_pp": interval[1],
            "change_pct": 100 * (now / before - 1) if before else None}  # fmt: skip


def _performance(results: Results, setting: str, number: int) -> pd.DataFrame:
    """Tables 3 and 4: a row a format and engine, medians over passes, published columns last.

    ``seconds_per_request`` is total time over requests (the paper's "average latency"); ``batch_latency_s`` is what a
    request really waits for. ``speedup`` is throughput over BF16's with the same engine, ``engine_speedup`` over
    eager's of the same format. Both are empty where the two rows were measured under other conditions, or other
    processes disturbed one. ``note`` says why an engine could not run. Published values stand beside eager alone.
    """
    passes = getattr(results, f"{setting}_passes")
    unable = passes[passes.total_s.isna()].drop_duplicates(["precision", "engine"])
    table = in_order(stack([results.timed(setting), unable]))
    if table.empty:
        return table
    rates = {(row.precision, row.engine, row.conditions): row.throughput_rps for row in table.itertuples()
             if not is_disturbed(row.flags)}  # fmt: skip
    rows = list(zip(table.precision, table.engine, table.conditions, strict=True))
    table["speedup"] = [_ratio(rates, row, (BASELINE, *row[1:])) for row in rows]
    table["engine_speedup"] = [_ratio(rates, row, (row[0], "eager", row[2])) for row in rows]
    published = paper.performance(number).set_index("precision")
    for name in PUBLISHED:
        table[f"published_{name}"] = table.precision.map(published[name]).where(table.engine == "eager")
    table = table.assign(note=_notes(table), flags=table["flags"].map("; ".join))
    columns = [*SPEED, "speedup", "engine_speedup", *(f"published_{name}" for name in PUBLISHED)]
    return table[columns].round(6)


def _ratio(rates: Mapping[Any, float], row: Any, base: Any) -> float | None:
    return rates[row] / rates[base] if row in rates and base in rates else None


def _notes(frame: pd.DataFrame) -> list[str]:
    """Return each row's own note, and whether it was measured under other conditions than the newest row."""
    newest = frame.sort_values("measured_at", kind="stable").conditions.iloc[-1]
    other = frame.conditions.notna() & frame.conditions.ne(newest)
    return ["; ".join(filter(None, (note if isinstance(note, str) else "", OTHER * is_other)))
            for note, is_other in zip(frame.note, other, strict=True)]  # fmt: skip


def _sweep(results: Results) -> pd.DataFrame:
    """Throughput, latency and memory by batch size, a row a format, engine and size.

    ``bound`` is empty where it cannot be told without a trace of the kernels. ``knee`` marks the batch size with the
    most throughput per second of latency.
    """
    table = stack([results.sweep, results.sweep_rows[results.sweep_rows.total_s.isna()]])
    if table.empty:
        return pd.DataFrame(columns=list(SWEEP))
    table = in_order(table.sort_values("batch_size", kind="stable"))
    bends = knees(results.sweep).dropna(subset=["knee"]).set_index([*LINE, "knee"]).index
    table["knee"] = pd.MultiIndex.from_frame(table[[*LINE, "batch_size"]]).isin(bends)
    return table.assign(note=_notes(table), flags=table["flags"].map("; ".join))[list(SWEEP)].round(6)


def knees(steps: pd.DataFrame) -> pd.DataFrame:
    """Return where the lines of a sweep bend, and what their largest batches reach; a row a format and engine.

    The knee is the batch size with the most throughput per second of latency (Kleinrock, "Power and deterministic
    rules of thumb for probabilistic problems in computer communications", ICC 1979): below it a larger batch raises
    throughput by a greater share than latency, above it latency by the greater one. ``knee`` and what it gives are
    empty where a line had not bent by ``swept_to``, the largest batch run. ``note`` names disturbed sizes.

    Parameters
    ----------
    steps
        `qnb.report.results.Results.sweep`.
    """
    steps = steps.dropna(subset=["throughput_rps", "batch_latency_s"]).sort_values("batch_size", kind="stable")
    power = (steps.throughput_rps / steps.batch_latency_s).groupby([steps.precision, steps.engine])
    best, last = steps.loc[power.idxmax()].set_index(LINE), steps.groupby(LINE).tail(1).set_index(LINE)
    knee = best[best.batch_size < last.batch_size.reindex(best.index)]
    disturbed = steps[steps["flags"].map(is_disturbed).astype(bool)].groupby(LINE).batch_size
    note = disturbed.agg(lambda sizes: f"other processes disturbed batches of {', '.join(map(str, sizes))}")
    table = pd.DataFrame(
        {"knee": knee.batch_size, "knee_throughput_rps": knee.throughput_rps,
         "knee_batch_latency_s": knee.batch_latency_s, "swept_to": last.batch_size,
         "throughput_rps": last.throughput_rps, "batch_latency_s": last.batch_latency_s, "note": note},
        index=last.index,
    )  # fmt: skip
    return in_order(table.reset_index()).astype({"knee": "Int64", "note": object}).fillna({"note": ""})


def choice_probabilities(results: Results, item: int = 0) -> pd.DataFrame:
    """Return one item of the first multiple-choice task as each format sees it: the paper's p(y_i) of each choice."""
    rows: dict[str, dict[str, Any]] = {}
    first = None
    for row in results.accuracy_rows.to_dict("records"):
        items = results.items(row) if first in (None, row["task"]) else None
        if items is not None and "probabilities" in items:
            first = row["task"]
            answer = items.iloc[item]
            shares = {f"p(choice {number})": share for number, share in enumerate(answer.probabilities)}
            rows[row["precision"]] = {**shares, "picked": answer.picked, "gold": answer.gold}
    return pd.DataFrame(rows).T.infer_objects()


def _columns(frame: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    return frame.reindex(columns=list(names)) if len(frame) else pd.DataFrame()


TABLES: dict[str, Callable[[Results], pd.DataFrame]] = {
    "table1_accuracy": _accuracy,
    "table2_change": _change,
    "divergence": lambda results: _columns(results.divergence, DIVERGENCE),
    "batch_sensitivity": lambda results: _columns(
        results.batch_sensitivity.rename(columns={"setting": "scorer"}), SENSITIVITY
    ),
    "table3_bs1": lambda results: _performance(results, "bs1", 3),
    "table4_maxbatch": lambda results: _performance(results, "maxbatch", 4),
    "table3_ablations": lambda results: paper.ablations(results.bs1, 3),
    "table4_ablations": lambda results: paper.ablations(results.maxbatch, 4),
    "table3_t4_estimate": lambda results: paper.t4_estimate(results.bs1, 3),
    "table4_t4_estimate": lambda results: paper.t4_estimate(results.maxbatch, 4),
    "sweep": _sweep,
    "batch_plans": plans,
}


def build(results: Results, name: str) -> pd.DataFrame:
    """Return a table, made once a study; one that was kept is returned as it was. Do not write into it."""
    if name not in results.built:
        results.built[name] = results.tables[name] if name in results.tables else TABLES[name](results)
    return results.built[name]


def save(results: Results, name: str) -> pd.DataFrame:
    """Write a table below ``tables/`` as CSV and Markdown, and return it; an empty one is not written."""
    table = build(results, name)
    if len(table) and results.folder is not None:
        write_atomic(results.folder / "tables" / f"{name}.csv", table.to_csv(index=False))
        write_atomic(results.folder / "tables" / f"{name}.md", markdown(table))
    return table


def as_text(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame's cells as text, in the units of `qnb.columns.header`, without columns that are empty."""
    text = pd.DataFrame({name: [_cell(str(name), value) for value in frame[name]] for name in frame}, dtype=object)
    return text[[name for name in text if any(text[name])]]


def _cell(name: str, value: Any) -> str:
    flags = value.split("; ") if isinstance(value, str) else value
    return flag_text(flags) if name == "flags" and isinstance(flags, list) else format_value(name, value)


def markdown(frame: pd.DataFrame) -> str:
    """Return a frame as a Markdown table for pasting; a cell can neither end itself nor carry a tag."""
    escapes = str.maketrans({"\\": "\\\\", "|": "\\|", "<": "&lt;", "\n": " "})
    text = as_text(frame).map(lambda cell: cell.translate(escapes))
    return text.to_markdown(index=False, headers=[header(name) for name in text], disable_numparse=True) + "\n"
