"""The paper's four tables and those around them, made of a study's frames; published values have their own columns.

The published values are Llama-3.2-1B's (accuracy on a T1000, performance on a T4). They stand beside that model alone,
under their own name, never in its place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from qnb.accuracy import statistics
from qnb.columns import format_number, format_value, header
from qnb.flags import flag_text, is_disturbed
from qnb.ledger import fingerprint, write_atomic
from qnb.precision import BASELINE, title
from qnb.report import accuracy, paper, verdicts
from qnb.report.batch_plans import plans
from qnb.report.results import NOT_FUSED, ORIGIN, SPEED, Results, flag_list, in_order, is_unfused, stack, task_name

LINE = ["precision", "engine"]  # one line of a sweep
# the stage and setting of those rows
MEASURED_BY = {"table1_accuracy": "accuracy", "table2_change": "accuracy", "divergence": "divergence",
               "batch_sensitivity": "batch_sensitivity", "table3_bs1": "perf bs1", "table4_maxbatch": "perf maxbatch",
               "sweep": "sweep"}  # fmt: skip
OTHER = "not measured like the newest row: other prompts, device, memory or cap"
OR_MORE = " or more"  # after a batch size that the requests ended, not the memory
LONG = 60  # characters of a text that may take several lines
PUBLISHED = ("throughput_rps", "seconds_per_request", "utilization_pct", "vram_mib", "speedup")

# all columns of a table, as its file has them
ESTIMATES = ("perplexity", "perplexity_change_pct", "kl_mean_nats", "kl_median_nats", "kl_p99_nats", "kl_p999_nats",
             "same_top1_pct")  # fmt: skip
ALL_DIVERGENCE = ("precision", "prompt_source", "tokens", "context", "stride", "noise_floor_nats",
                  *(name + end for name in ESTIMATES for end in ("", "_low", "_high")))  # fmt: skip
SENSITIVITY = ("precision", "setting", "task", "n_items", "n_choices", "mean_abs_logprob_diff",
               "max_abs_logprob_diff", "answers_changed", "accuracy_change_pp")  # fmt: skip
ALL_SWEPT = (*SPEED, "batch_spread_pct", "knee")
ALL_SPEEDS = (*SPEED, "speedup", "engine_speedup", *(f"published_{name}" for name in PUBLISHED))

# the columns that people compare, at most eight; every other table is shown whole
SPEED_MAIN = ("precision", "engine", "batch_size", "peak_memory_mib", "tpot_s", "throughput_rps", "energy_j_per_token",
              "speedup")  # fmt: skip
MAIN = {
    "table3_bs1": SPEED_MAIN,
    "table4_maxbatch": SPEED_MAIN,
    "divergence": ("precision", "tokens", "perplexity", "perplexity_change_pct", "kl_mean_nats", "kl_median_nats",
                   "kl_p99_nats", "same_top1_pct"),
    "batch_sensitivity": ("precision", "scorer", "n_items", "n_choices", "mean_abs_logprob_diff",
                          "max_abs_logprob_diff", "answers_changed", "accuracy_change_pp"),
    "sweep": ("precision", "engine", "batch_size", "throughput_rps", "batch_latency_s", "tpot_s", "peak_memory_mib",
              "note"),
    "batch_plans": ("precision", "engine", "n_prompts", "order", "largest_batch", "batches", "padding_pct", "note"),
}  # fmt: skip
# other views that a notebook shows
CHECKPOINTS = ("precision", "weights_mib", "bits_per_weight", "quantized_pct", "bits_per_quantized_weight", "file_mib",
               "load_s", "reload_identical", "ran_as")  # fmt: skip
PUSHED = ("precision", "repository", "private", "total_mib", "commit")
RECOVERY = ("task", "precision", "n_items", "recovery_pct", "recovery_low_pct", "recovery_high_pct",
            "answers_changed", "note")  # fmt: skip
VERDICTS = ("precision", "accuracy_pct", "n_items", "change_pp", "low_pp", "high_pp", "words")
PASSES = ("precision", "engine", "repeat", "requests", "ttft_s", "tpot_s", "stop_reason", "note")
TIME_SPENT = ("precision", "engine", "tpot_s", "gpu_busy_pct", "mbu_pct", "bound", "flags", "note")
SEARCHES = ("precision", "engine", "batch_size", "limit_mib", "prompt_tokens", "new_tokens", "note")
KNEES = ("precision", "engine", "knee", "knee_throughput_rps", "knee_batch_latency_s", "swept_to", "throughput_rps",
         "note")  # fmt: skip
ANSWER = ("precision", "weights_mib", "peak_memory_mib", "tpot_captured_s", "tpot_eager_s", "throughput_rps",
          "change_pp", "words", "note")  # fmt: skip
ADVICE = ("precision", "engine", "fit", "peak_memory_mib", "tpot_s", "change_pp", "kl_mean_nats", "words")


def _performance(results: Results, setting: str, number: int) -> pd.DataFrame:
    """Tables 3 and 4: a row a format and engine, medians over passes, published columns last.

    ``seconds_per_request`` is total time over requests (the paper's "average latency"); ``batch_latency_s`` is what a
    request really waits for. ``speedup`` is throughput over BF16's with the same engine, ``engine_speedup`` over
    eager's of the same format. Both are empty where the two rows were measured under other conditions, or other
    processes disturbed one; ``speedup`` is so too where BF16's step is not fused, and others are. ``note`` says why an
    engine could not run. Published values stand beside eager alone.
    """
    table = _with_unable(results, setting)
    rate = table.throughput_rps.mask(table["flags"].map(is_disturbed).astype(bool))
    base, eager = rate.where((table.precision == BASELINE) & ~is_unfused(table)), rate.where(table.engine == "eager")
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
    last = steps.groupby(LINE).tail(1).set_index(LINE)[[*names, "flags"]].rename(columns={"batch_size": "swept_to"})
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
        if items is not None and "loglikelihoods" in items:
            first, answer = row["task"], items.iloc[item]
            shares = statistics.choice_probabilities(answer.loglikelihoods)
            probabilities = {f"p(choice {number})": share for number, share in enumerate(shares)}
            rows[row["precision"]] = {**probabilities, "picked": answer.picked, "gold": answer.gold}
    return pd.DataFrame(rows).T.infer_objects()


def device_peaks(results: Results) -> pd.DataFrame:
    """Return a row a peak of the device: what it is of, its value and unit."""
    peaks = next((row for row in reversed(results.rows) if row["stage"] == "peaks"), {})
    rows = [("copy", peaks["copy_bytes_per_s"] / 1e9, "GB/s")] if peaks.get("copy_bytes_per_s") else []
    for name, rate in peaks.get("matmul_flop_per_s", {}).items():
        rows.append((f"product in {name}", rate / 1e12, "Top/s" if name == "int8" else "TFLOP/s"))
    rows += [("power when idle", peaks["idle_power_w"], "W")] if peaks.get("idle_power_w") is not None else []
    return pd.DataFrame(rows, columns=["peak", "measured", "unit"])


TABLES: dict[str, Callable[[Results], pd.DataFrame]] = {
    "table1_accuracy": accuracy.table1,
    "table2_change": accuracy.changes,
    "divergence": lambda results: results.divergence.reindex(columns=list(ALL_DIVERGENCE)),
    "batch_sensitivity": lambda results: results.batch_sensitivity.reindex(columns=list(SENSITIVITY)).rename(
        columns={"setting": "scorer"}
    ),
    "table3_bs1": lambda results: _performance(results, "bs1", 3),
    "table4_maxbatch": lambda results: _performance(results, "maxbatch", 4),
    "table3_ablations": lambda results: paper.ablations(results.bs1, 3),
    "table4_ablations": lambda results: paper.ablations(results.maxbatch, 4),
    "sweep": _sweep,
    "batch_plans": plans,
}


def build(results: Results, name: str) -> pd.DataFrame:
    """Return a table, made once a study, with where its rows come from. Do not write into it.

    Published columns are left out where another model than the published one was measured.
    """
    table = results.once(name, lambda: _with_origin(TABLES[name](results), results, name))
    return table if paper.is_published_model(results.model) else table.filter(regex="^(?!published_)")


def _with_origin(table: pd.DataFrame, results: Results, name: str) -> pd.DataFrame:
    """Add the version, device, host and day of a table's rows; a table without formats down has those of all rows."""
    stage, _, setting = MEASURED_BY.get(name, "").partition(" ")
    rows = results.origins[results.origins.stage == stage]
    rows = rows[rows.setting == setting] if setting else rows
    if table.empty or rows.empty:
        return table
    by = [each for each in LINE if each in table]
    texts = rows.assign(all="").groupby(by or "all")[[*ORIGIN]].agg(lambda values: "; ".join(sorted({*values} - {""})))
    return table.join(texts, on=by) if by else table.assign(**texts.iloc[0])


def save(results: Results, name: str) -> pd.DataFrame:
    """Write a table below ``tables/`` as CSV and Markdown, and return it; an empty one is not written."""
    table = build(results, name)
    if len(table) and results.folder is not None:
        write_atomic(results.folder / "tables" / f"{name}.csv", table.to_csv(index=False))
        write_atomic(results.folder / "tables" / f"{name}.md", markdown(table))
    return table


def compact(results: Results, name: str, of: str = "") -> pd.DataFrame:
    """Return what people compare in one of `TABLES`: texts under labels with units.

    Tables 1 and 2 have a column a format, the others at most eight columns. `of` is a group whose members Table 1
    shows, such as MMLU's subjects; empty shows the tasks that were asked for.
    """
    if name == "table1_accuracy":
        return _compact_scores(results, of)
    if name == "table2_change":
        return _compact_changes(results)
    if name == "divergence":
        return _compact_divergence(results)
    return labelled(build(results, name), MAIN.get(name))


def members(results: Results) -> dict[str, list[str]]:
    """Return the tasks in each group, such as MMLU's fields of study, and the subjects in each of these."""
    inside: dict[str, list[str]] = {}
    parts = results.scores[results.scores.task != results.scores.asked] if len(results.scores) else results.scores
    for asked, tasks in parts.groupby("asked", sort=False).task.unique().items() if len(parts) else ():
        rows = results.accuracy_rows
        groups = rows[rows.task == asked].groups.iloc[0] if len(rows) else {}
        fields = {name: list(groups[name]) for name in tasks if name in groups}
        deeper = {task for subjects in fields.values() for task in subjects}
        inside |= {str(asked): [task for task in tasks if task not in deeper], **fields}
    return inside


def _compact_scores(results: Results, of: str) -> pd.DataFrame:
    """Return Table 1 as the paper has it, ``65.5 ± 1.0``: one metric a task, in its own unit where it is no share."""
    if results.scores.empty:
        return pd.DataFrame()
    shares = accuracy.headline(results.scores)
    others = results.scores[~results.scores.task.isin(shares.task)].drop_duplicates(["task", "precision"])
    shown = stack([shares, others])
    is_member = (shown.task != shown.asked) & (shown.metric != "mean")
    shown = shown[is_member & shown.task.isin(members(results)[of]) if of else ~is_member]
    cells = [
        f"{format_number(row.value)} {row.unit}" if row.unit != "%"
        else f"{100 * row.value:.1f}" + (f" ± {100 * row.stderr:.1f}" if pd.notna(row.stderr) else "")
        for row in shown.itertuples()
    ]  # fmt: skip
    return _across(shown.assign(cell=cells), f"{header('accuracy_pct')}, ± one standard error")


def _across(frame: pd.DataFrame, what: str) -> pd.DataFrame:
    """Return texts in column `cell` with tasks down and formats across; `what` says what they are."""
    order = list(dict.fromkeys(frame.task))
    wide = frame.drop_duplicates(["task", "precision"]).pivot(index="task", columns="precision", values="cell")
    items = frame.dropna(subset=["n_items"]).groupby("task").n_items.max().map("{:,.0f}".format)
    wide = wide.loc[order, list(dict.fromkeys(frame.precision))].rename(columns=title)
    wide.insert(0, header("n_items"), items)
    return wide.rename(index=task_name).rename_axis(what, axis=0).rename_axis(None, axis=1).reset_index().fillna("-")


def _compact_changes(results: Results) -> pd.DataFrame:
    """Return Table 2 with a change and its interval in a cell, and the change that the verdict rests on below."""
    frame = verdicts.with_pooled(results)
    frame = frame[frame.task.isin([*verdicts.tasks(results), verdicts.POOLED])]
    if frame.empty:
        return pd.DataFrame()
    star = frame.significant.eq(True).map({True: " *", False: ""})
    cells = [f"{row.change_pp:+.1f} [{row.low_pp:+.1f}, {row.high_pp:+.1f}]" for row in frame.itertuples()]
    return _across(frame.assign(cell=cells + star), f"{header('change_pp')} [95 %]")


def _compact_divergence(results: Results) -> pd.DataFrame:
    """Return perplexity and KL divergence; a divergence that another batch size causes as well is called noise."""
    frame = build(results, "divergence").reindex(columns=ALL_DIVERGENCE)
    shown = labelled(frame, MAIN["divergence"])
    if header("kl_mean_nats") in shown:
        is_noise = frame.kl_mean_nats.le(frame.noise_floor_nats.max()).to_numpy()
        shown[header("kl_mean_nats")] += pd.Series(is_noise).map({True: " (noise)", False: ""})
    return shown


def labelled(frame: pd.DataFrame, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return columns as text under their labels with units, without empty ones; a dash stands in an empty cell.

    An engine says where its kernels are not fused and those of other rows are. A largest batch that took all requests
    is that many or more.
    """
    text = as_text(frame[[name for name in columns or frame if name in frame]])
    if "batch_size" in text and "capped" in frame:
        text["batch_size"] += frame.capped.eq(True).map({True: OR_MORE, False: ""}).to_numpy()
    if "engine" in text:
        text["engine"] += pd.Series(is_unfused(frame).to_numpy()).map({True: NOT_FUSED, False: ""})
    if "task" in text:
        text["task"] = text["task"].map(task_name)
    return text.replace("", "-").rename(columns=header)


def as_text(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame's cells as text, in the units of `qnb.columns.header`, without columns that are empty."""
    text = pd.DataFrame({name: [_cell(str(name), value) for value in frame[name]] for name in frame}, dtype=object)
    return text[[name for name in text if any(text[name])]]


def _cell(name: str, value: Any) -> str:
    if name == "quantity":
        return header(value)
    return flag_text(flag_list(value)) if name == "flags" else format_value(name, value)


def markdown(frame: pd.DataFrame) -> str:
    """Return a frame as a Markdown table for pasting; a cell can neither end itself nor carry a tag."""
    escapes = str.maketrans({"\\": "\\\\", "|": "\\|", "<": "&lt;", "\n": " "})
    text = as_text(frame).map(lambda cell: cell.translate(escapes))
    lines = [[header(name) for name in text], ["---"] * len(text.columns), *text.to_numpy()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def view(frame: pd.DataFrame, columns: Sequence[str] | None = None) -> Styler:
    """Return a frame for display: the columns that are there and hold something, labelled, with units, no index."""
    return styled(labelled(frame, columns))


def styled(text: pd.DataFrame) -> Styler:
    """Return a frame of texts for display, without its index: escaped, words to the left, a line a row.

    Only columns of long texts are broken into lines. An empty frame says so.
    """
    words = [name for name in text if not text[name].str.match(r"[-+<]?\d|-$").all()]
    long = [name for name in words if text[name].str.len().max() > LONG]
    left = ", ".join(f".col{list(text).index(name)}" for name in words)
    styles = [{"selector": left, "props": "text-align: left"}, {"selector": "caption", "props": "white-space: nowrap"}]
    name = fingerprint({"table": text.to_csv()})  # the same table looks the same in a notebook that is drawn again
    shown = text.style.format(escape="html").hide(axis="index").set_table_styles(styles).set_uuid(name)
    shown.set_properties([name for name in text if name not in long], **{"white-space": "nowrap"})
    return shown if len(text.columns) else shown.set_caption("Nothing to show.")
