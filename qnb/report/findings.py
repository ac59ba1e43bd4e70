"""What the rows say, in sentences: computed, never typed in.

A sentence names its number, what it is compared with, and n. A difference that the sample cannot tell from none is
called that.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from qnb.columns import Flag, format_value, is_disturbed
from qnb.precision import BASELINE
from qnb.report.recommend import accuracies
from qnb.report.results import Results, task_name
from qnb.report.tables import build

SETTINGS = {"bs1": "batch size 1", "maxbatch": "the largest batch"}
BASE = BASELINE.upper()
BOUNDS = {"launch": "launch-bound", "bandwidth": "bound by memory bandwidth", "compute": "bound by arithmetic",
          "kernel_inefficiency": "bound by inefficient kernels"}  # fmt: skip


def opening(results: Results) -> str:
    """Say what was measured, of what, and on what."""
    if not results.precisions:
        return "Nothing was measured yet."
    parts = [words for setting, words in SETTINGS.items() if len(results.timed(setting))]
    if len(results.scores):
        whole = results.scores[results.scores.task == results.scores.asked].drop_duplicates(["precision", "task"])
        items = whole.groupby("precision").n_items.sum().max()
        parts.insert(0, f"accuracy ({whole.task.nunique()} tasks, {items:,.0f} items)")
    if len(results.sweep):
        parts.append(f"batches of 1 to {results.sweep.batch_size.max():,}")
    what = f"; measured: {', '.join(parts)}" if parts else ""
    return f"{len(results.precisions)} formats of {results.model} on {results.device or 'an unnamed device'}{what}."


def findings(results: Results) -> dict[str, list[str]]:
    """Return sentences about each format but BF16, which the others are compared with."""
    sentences = {name: about(results, name) for name in results.precisions if name != BASELINE}
    return {name: lines for name, lines in sentences.items() if lines}


def about(results: Results, precision: str) -> list[str]:
    """Return what is known of a format beside BF16: accuracy, tests, perplexity, memory and speed."""
    return [*_accuracy(results, precision), *_perplexity(results, precision), *_memory(results, precision),
            *_speed(results, precision, "bs1"), *_speed(results, precision, "maxbatch")]  # fmt: skip


def _accuracy(results: Results, precision: str) -> Iterator[str]:
    known = accuracies(results)
    mine, base = known.get(precision), known.get(BASELINE)
    if not mine or not base or not base["accuracy_pct"]:
        return
    share = 100 * mine["accuracy_pct"] / base["accuracy_pct"]
    yield (
        f"{precision.upper()} keeps {share:.1f} % of {BASE}'s mean accuracy: "
        f"{mine['accuracy_pct']:.1f} against {base['accuracy_pct']:.1f} %."
    )
    if "low_pp" in mine:
        interval = f"95 %: {mine['low_pp']:+.1f} to {mine['high_pp']:+.1f}, n = {mine['n_items']:,}"
        unsure = " This sample cannot tell it from none." if mine["low_pp"] <= 0 <= mine["high_pp"] else ""
        yield f"The change is {mine['change_pp']:+.1f} points ({interval}).{unsure}"
    changes = build(results, "table2_change")
    significant = changes[(changes.precision == precision) & changes.significant.eq(True)]
    if len(significant):
        tasks = [f"{task_name(row.task)} ({row.change_pp:+.1f} points, p {'= ' if row.p_holm >= 1e-6 else ''}"
                 f"{format_value('p_holm', row.p_holm)})" for row in significant.itertuples()]  # fmt: skip
        yield f"After Holm's correction the change is significant on {', '.join(tasks)}."


def _perplexity(results: Results, precision: str) -> Iterator[str]:
    frame = results.divergence
    rows = frame[frame.precision == precision].dropna(subset=["perplexity_change_pct"]) if len(frame) else frame
    for row in rows.itertuples():
        change, low, high = (getattr(row, f"perplexity_change_pct{end}") for end in ("", "_low", "_high"))
        interval = f"95 %: {low:+.1f} to {high:+.1f}, " if pd.notna(low) else ""
        unsure = " This text cannot tell the difference from none." if pd.notna(low) and low <= 0 <= high else ""
        words = f"{abs(change):.1f} % {'above' if change >= 0 else 'below'} {BASE}'s"
        yield f"Its perplexity is {words} ({interval}n = {row.tokens:,.0f} tokens).{unsure}"


def _memory(results: Results, precision: str) -> Iterator[str]:
    """Compare peak memory on a GPU, else the weights: how far a process grows depends on what it did before."""
    frame = results.bs1
    name, words = ("peak_memory_mib", "peak memory at batch size 1")
    if frame.peak_reserved_mib.isna().all():
        name, words = "weights_mib", "memory for weights"
    memory_mib = frame.drop_duplicates("precision").set_index("precision")[name].dropna()
    if {precision, BASELINE} <= set(memory_mib.index):
        yield f"It takes {100 * memory_mib[precision] / memory_mib[BASELINE]:.0f} % of {BASE}'s {words}."


def _speed(results: Results, precision: str, setting: str) -> Iterator[str]:
    """Compare each engine with itself in BF16: time per token at batch size 1, else throughput."""
    frame = results.timed(setting)
    bases = frame[frame.precision == BASELINE].set_index("engine").to_dict("index")
    name, unit = ("tpot_s", "ms per token") if setting == "bs1" else ("throughput_rps", "requests/s")
    for row in frame[frame.precision == precision].to_dict("records"):
        base = bases.get(row["engine"])
        if base is None or pd.isna(row[name]) or pd.isna(base[name]):
            continue
        mine, other = (format_value(name, each[name]) for each in (row, base))
        sizes = f", batch {row['batch_size']} against {base['batch_size']}" if setting == "maxbatch" else ""
        bound = "" if Flag.PEAKS_DISTURBED in row["flags"] else BOUNDS.get(str(row["bound"]), "")
        disturbed = [f"other processes disturbed {label}" for label, each in ((precision.upper(), row), (BASE, base))
                     if is_disturbed(each["flags"])]  # fmt: skip
        detail = "; ".join(filter(None, (bound, *disturbed)))
        yield (
            f"At {SETTINGS[setting]} with {row['engine']} it gives {mine} {unit} against {other}{sizes}"
            f"{f' ({detail})' if detail else ''}."
        )
