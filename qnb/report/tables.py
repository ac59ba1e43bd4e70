"""The paper's four tables and those around them, made of a study's frames; published values have their own columns.

The published values are Llama-3.2-1B's (accuracy on a T1000, performance on a T4). They stand beside that model alone,
under their own name, never in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from qnb.accuracy.statistics import Change, compare, holm, mean_interval, mean_of_independent
from qnb.columns import flag_text, format_value, header, is_disturbed
from qnb.errors import InputError
from qnb.ledger import write_atomic
from qnb.precision import BASELINE
from qnb.report import paper
from qnb.report.batch_plans import plans
from qnb.report.results import SPEED, Results, flag_list, in_order, stack

# the metric a task is known by: accuracy for choices, strict exact match for generated answers
HEADLINE = ("acc", "exact_match")
MEAN = "mean over tasks"
# The paper's "GSM8K (average of strict and CoT)" is the mean of two strict readings: the 5-shot task's, and the 8-shot
# chain-of-thought one's
AVERAGED = {"gsm8k_average": ("gsm8k", "gsm8k_cot")}
SIGNIFICANT = 0.05
Z95 = 1.96  # standard errors each way
LINE = ["precision", "engine"]  # one line of a sweep
OTHER = "not measured like the newest row: other prompts, device, memory or cap"
PUBLISHED = ("throughput_rps", "seconds_per_request", "utilization_pct", "vram_mib", "speedup")

# all columns of a table, as its file has them
ALL_CHANGES = ("task", "precision", "n_items", "baseline_pct", "accuracy_pct", "change_pp", "low_pp", "high_pp",
               "change_pct", "gained", "lost", "p_mcnemar", "p_correct_change_pp", "p_correct_low_pp",
               "p_correct_high_pp", "note", "p_holm", "significant")  # fmt: skip
ESTIMATES = ("perplexity", "perplexity_change_pct", "kl_mean_nats", "kl_p99_nats", "same_top1_pct")
ALL_DIVERGENCE = ("precision", "prompt_source", "tokens", "context", "stride",
                  *(name + end for name in ESTIMATES for end in ("", "_low", "_high")))  # fmt: skip
SENSITIVITY = ("precision", "setting", "task", "n_items", "n_choices", "mean_abs_logprob_diff",
               "max_abs_logprob_diff", "answers_changed", "accuracy_change_pp")  # fmt: skip
ALL_SWEPT = (*SPEED, "batch_spread_pct", "knee")
ALL_SPEEDS = (*SPEED, "speedup", "engine_speedup", *(f"published_{name}" for name in PUBLISHED))

# the columns that a notebook shows (SPEED_MAIN: of Tables 3 and 4)
CHECKPOINTS = ("precision", "bits_per_weight", "weights_mib", "file_mib", "quantize_s", "save_s", "load_s",
               "reload_identical")  # fmt: skip
CHANGES = ("task", "precision", "n_items", "change_pp", "low_pp", "high_pp", "p_holm", "significant")
DIVERGENCE = ("precision", "tokens", "perplexity", "perplexity_change_pct", "perplexity_change_pct_low",
              "perplexity_change_pct_high", "kl_mean_nats", "same_top1_pct")  # fmt: skip
PASSES = ("precision", "engine", "repeat", "requests", "total_s", "tpot_s", "stop_reason", "note")
SPEED_MAIN = ("precision", "engine", "batch_size", "peak_memory_mib", "tpot_s", "throughput_rps",
              "energy_j_per_token", "speedup")  # fmt: skip
TIME_SPENT = ("precision", "engine", "ttft_s", "tpot_s", "kernels_per_token", "gpu_busy_pct", "mbu_pct", "bound",
              "flags", "note")  # fmt: skip
SEARCHES = ("precision", "engine", "batch_size", "capped", "limit_mib", "prompt_tokens", "new_tokens")
PLANS = ("precision", "engine", "n_prompts", "order", "largest_batch", "batches", "padding_pct", "note")


def headline(scores: pd.DataFrame) -> pd.DataFrame:
    """Keep one metric a task: accuracy, or exact match, read strictly where there are several ways; then the means.

    `MEAN` weighs every task that all formats answered alike, as the paper's "aggregate accuracy" does. Its standard
    error takes the tasks as independent.
    """
    if scores.empty:
        return scores
    shown = _one_filter(scores[scores.metric.isin(HEADLINE)])
    whole = shown[shown.task == shown.asked]
    averages = [_means(whole[whole.task.isin(tasks)], name, len(tasks)) for name, tasks in AVERAGED.items()]
    common = whole.groupby("task").filter(
        lambda rows: rows.precision.nunique() == whole.precision.nunique() and rows.n_items.nunique() == 1
    )
    return stack([shown, *averages, _means(common, f"{MEAN} ({common.task.nunique()})")])


def _one_filter(frame: pd.DataFrame) -> pd.DataFrame:
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
    return means[means.tasks >= least].drop(columns="tasks").reset_index().assign(**about)


def _accuracy(results: Results) -> pd.DataFrame:
    """Table 1: a row a task, metric and number of items; a column a format in percent and its error in points.

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
    keys, rows = ["task", "metric", "filter", "n_items", "n_total"], []
    for key, group in stack([results.scores, means, *ends]).groupby(keys, sort=False, dropna=False):
        row = dict(zip(keys, key, strict=True))
        for score in group.itertuples():
            row[f"{score.precision}_pct"] = 100 * score.value
            row[f"{score.precision}_stderr_pp"] = 100 * score.stderr if pd.notna(score.stderr) else None
        if row["metric"] in ("acc", "mean") and row["task"] in published:
            row |= {f"published_{name}_pct": value for name, value in published[row["task"]].items()}
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
            try:
                both = _pairs(results, base, row)
                compared = _compare(row, both)
            except InputError as error:
                compared = [{"task": task, "precision": precision, "note": f"not compared: {error}"}]
            rows += compared
            if any(each["task"] == task and "n_items" in each for each in compared):
                pairs[str(task), precision] = both
    table = pd.DataFrame([*rows, *_averaged(pairs)]).reindex(columns=list(ALL_CHANGES))
    tested = table.p_mcnemar.notna()
    table.loc[tested, "p_holm"] = holm(list(table.p_mcnemar[tested]))
    table["significant"] = (table.p_holm < SIGNIFICANT).astype(object).where(tested, None)
    published = paper.accuracy().rename(columns={"change_pct": "published_change_pct"}).drop(columns="accuracy_pct")
    return table.fillna({"note": ""}).merge(published, how="left").round(6)


def _pairs(results: Results, base: Mapping[str, Any], row: Mapping[str, Any]) -> pd.DataFrame:
    """Return a row an item that both formats answered, the baseline's columns as ``_base``.

    Raises
    ------
    InputError
        They answered other items, or the items' file is not the one that the row was counted from.
    """
    items = [results.items(each) for each in (base, row)]
    if any(frame is None for frame in items):
        raise InputError("the items' file is gone or was changed")
    # right or wrong by item, generated answers as `headline` reads them
    indexed = [_one_filter(frame).set_index(["task", "doc_id"]) for frame in items]
    before, now = (frame.reindex(columns=["correct", "p_correct"]) for frame in indexed)
    both = before.join(now, lsuffix="_base", how="inner", validate="one_to_one")
    if row["data_sha256"] != base["data_sha256"] or not len(both) == len(before) == len(now):
        raise InputError(f"the items are others than {BASELINE}'s")
    return both.reset_index()


def _compare(row: Mapping[str, Any], pairs: pd.DataFrame) -> list[dict[str, Any]]:
    """Compare a task's items, and those of each group in it, which lm-eval weighs by their items.

    Raises
    ------
    InputError
        No score is a share of items that are right.
    """
    rows = []
    for task in dict.fromkeys(score["task"] for score in row["scores"] if score["metric"] in HEADLINE):
        part = pairs if task == row["task"] else pairs[pairs.task.isin(row["groups"].get(task, ()))]
        if len(part) and part[["correct_base", "correct"]].notna().all(axis=None):
            change = compare(list(part.correct_base), list(part.correct))
            rows.append(_row(task, row["precision"], change, **_p_correct(part)))
    if not rows:
        raise InputError("its score is not a share of right answers")
    return rows


def _row(task: str, precision: str, change: Change, **more: Any) -> dict[str, Any]:
    points = {"baseline_pct": 100 * change.baseline, "accuracy_pct": 100 * change.accuracy}
    relative = {"change_pp": change.change_pp, "change_pct": change.change_pct}
    return {"task": task, "precision": precision, **asdict(change), **points, **relative, **more}


def _p_correct(pairs: pd.DataFrame) -> dict[str, float | None]:
    """Return how the mean probability of the right choice changed, where all items are choices."""
    change_pp = 100 * (pairs.p_correct - pairs.p_correct_base).astype(float)
    if change_pp.isna().any():
        return {}
    low, high = mean_interval(change_pp.to_numpy()) or (None, None)
    return {"p_correct_change_pp": change_pp.mean(), "p_correct_low_pp": low, "p_correct_high_pp": high}


def _averaged(pairs: Mapping[tuple[str, str], pd.DataFrame]) -> Iterator[dict[str, Any]]:
    """Yield the means' changes: of GSM8K's strict readings, and over the tasks compared for every format."""
    tasks, precisions = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True)) if pairs else ([], [])
    common = tuple(task for task in tasks if all((task, precision) in pairs for precision in precisions))
    for name, parts in {**AVERAGED, f"{MEAN} ({len(common)})": common}.items():
        for precision in precisions:
            answers = [pairs[task, precision] for task in parts if (task, precision) in pairs]
            if len(answers) == len(parts) > 0:
                note = f"mean of {', '.join(parts)}, which are tested each"
                yield _row(name, precision, _mean_change(answers), gained=None, lost=None, note=note)


def _mean_change(parts: Sequence[pd.DataFrame]) -> Change:
    """Return the mean change over tasks, each weighing the same, with its interval."""
    before, now = (fmean(part[name].mean() for part in parts) for name in ("correct_base", "correct"))
    interval = mean_interval(*(100 * (part.correct.astype(float) - part.correct_base) for part in parts))
    if interval is None:  # nothing flipped: each task has an interval of its own
        changes = [compare(list(part.correct_base), list(part.correct)) for part in parts]
        interval = mean_of_independent((change.change_pp, change.low_pp, change.high_pp) for change in changes)[1:]
    return Change(sum(map(len, parts)), before, now, 0, 0, math.nan, *interval)


def _performance(results: Results, setting: str, number: int) -> pd.DataFrame:
    """Tables 3 and 4: a row a format and engine, medians over passes, published columns last.

    ``seconds_per_request`` is total time over requests (the paper's "average latency"); ``batch_latency_s`` is what a
    request really waits for. ``speedup`` is throughput over BF16's with the same engine, ``engine_speedup`` over
    eager's of the same format. Both are empty where the two rows were measured under other conditions, or other
    processes disturbed one. ``note`` says why an engine could not run. Published values stand beside eager alone.
    """
    table = _with_unable(results, setting)
    rate = table.throughput_rps.mask(table["flags"].map(is_disturbed).astype(bool))
    base, eager = rate.where(table.precision == BASELINE), rate.where(table.engine == "eager")
    published = paper.performance(number).set_index("precision")[list(PUBLISHED)].add_prefix("published_")
    table = table.join(published, on="precision").assign(
        speedup=rate / base.groupby([table.engine, table.conditions]).transform("first"),
        engine_speedup=rate / eager.groupby([table.precision, table.conditions]).transform("first"),
    )
    table.loc[table.engine != "eager", list(published)] = None
    return _finished(table, ALL_SPEEDS)


def _sweep(results: Results) -> pd.DataFrame:
    """Throughput, latency and memory by batch size, a row a format, engine and size.

    ``bound`` is empty where it cannot be told without a trace of the kernels. ``knee`` marks the batch size with the
    most throughput per second of latency.
    """
    table = _with_unable(results, "sweep")
    bends = pd.MultiIndex.from_frame(knees(results.sweep).dropna(subset=["knee"])[[*LINE, "knee"]])
    return _finished(table.assign(knee=pd.MultiIndex.from_frame(table[[*LINE, "batch_size"]]).isin(bends)), ALL_SWEPT)


def _with_unable(results: Results, setting: str) -> pd.DataFrame:
    """Return the medians of a setting, and the rows of what could not run."""
    passes = results.passes[results.passes.setting == setting]
    unable = passes[passes.total_s.isna()].drop_duplicates([*LINE, "batch_size"])
    return in_order(stack([results.timed(setting), unable]).sort_values("batch_size", kind="stable"))


def _finished(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Select columns, flags as text; note where a row was measured under other conditions than the newest."""
    newest = table.sort_values("measured_at", kind="stable").conditions.tail(1)
    is_other = table.conditions.notna() & ~table.conditions.isin(newest)
    note = (table.note.fillna("") + is_other.map({True: f"; {OTHER}", False: ""})).str.removeprefix("; ")
    return table.assign(note=note, flags=table["flags"].map("; ".join))[list(columns)].round(6)


def knees(steps: pd.DataFrame) -> pd.DataFrame:
    """Return where the lines of a sweep bend, and what their largest batches reach; a row a format and engine.

    The knee is the batch size with the most throughput per second of latency (Kleinrock, "Power and deterministic
    rules of thumb for probabilistic problems in computer communications", ICC 1979): below it a larger batch raises
    throughput by a greater share than latency, above it latency by the greater one. ``knee`` and what it gives are
    empty where a line had not bent by ``swept_to``, the largest batch run. ``note`` names disturbed sizes.

    Parameters
    ----------
    steps
        `qnb.report.results.Results.sweep`, or the table of it.
    """
    names = ["batch_size", "throughput_rps", "batch_latency_s"]
    steps = steps.dropna(subset=names).sort_values("batch_size", kind="stable")
    power = (steps.throughput_rps / steps.batch_latency_s).groupby([steps.precision, steps.engine])
    best = steps.loc[power.idxmax()].set_index(LINE)[names].rename(columns={"batch_size": "knee"})
    last = steps.groupby(LINE).tail(1).set_index(LINE)[names].rename(columns={"batch_size": "swept_to"})
    best = best.where(best.knee < last.swept_to.reindex(best.index))
    disturbed = steps[steps["flags"].map(flag_list).map(is_disturbed).astype(bool)].groupby(LINE).batch_size
    note = disturbed.agg(lambda sizes: f"other processes disturbed batches of {', '.join(map(str, sizes))}")
    table = best.rename(columns=lambda name: name if name == "knee" else f"knee_{name}").join(last).assign(note=note)
    return in_order(table.reset_index()).astype({"knee": "Int64", "note": object}).fillna({"note": ""})


def choice_probabilities(results: Results, item: int = 0) -> pd.DataFrame:
    """Return one item of the first multiple-choice task as each format sees it: the paper's p(y_i) of each choice."""
    rows: dict[str, dict[str, Any]] = {}
    first = None
    for row in results.accuracy_rows.to_dict("records"):
        items = results.items(row) if first in (None, row["task"]) else None
        if items is not None and "probabilities" in items:
            first, answer = row["task"], items.iloc[item]
            shares = {f"p(choice {number})": share for number, share in enumerate(answer.probabilities)}
            rows[row["precision"]] = {**shares, "picked": answer.picked, "gold": answer.gold}
    return pd.DataFrame(rows).T.infer_objects()


TABLES: dict[str, Callable[[Results], pd.DataFrame]] = {
    "table1_accuracy": _accuracy,
    "table2_change": _change,
    "divergence": lambda results: results.divergence.reindex(columns=list(ALL_DIVERGENCE)),
    "batch_sensitivity": lambda results: results.batch_sensitivity.reindex(columns=list(SENSITIVITY)).rename(
        columns={"setting": "scorer"}
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
    """Return a table, made once a study, or the one that was kept. Do not write into it.

    Published columns are left out where another model than the published one was measured.
    """
    if name not in results.built:
        table = results.tables[name] if name in results.tables else TABLES[name](results)
        is_published = paper.is_published_model(results.model)
        results.built[name] = table if is_published else table.filter(regex="^(?!published_)")
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
    return flag_text(flag_list(value)) if name == "flags" else format_value(name, value)


def markdown(frame: pd.DataFrame) -> str:
    """Return a frame as a Markdown table for pasting; a cell can neither end itself nor carry a tag."""
    escapes = str.maketrans({"\\": "\\\\", "|": "\\|", "<": "&lt;", "\n": " "})
    text = as_text(frame).map(lambda cell: cell.translate(escapes))
    return text.to_markdown(index=False, headers=[header(name) for name in text], disable_numparse=True) + "\n"


def view(frame: pd.DataFrame, columns: Sequence[str] | None = None) -> Styler:
    """Return a frame for display: the columns that are there and hold something, labelled, with units, no index."""
    text = as_text(frame[[name for name in columns or frame if name in frame]]).replace("", "-")
    return text.rename(columns=header).style.format(escape="html").hide(axis="index")
