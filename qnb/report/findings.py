"""What the rows say, in sentences: computed, never typed in.

A sentence names its number, what it is compared with, and n. A difference that the sample cannot tell from none is
called that.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import pandas as pd

from qnb.columns import column, format_value
from qnb.flags import Flag, is_disturbed
from qnb.precision import BASELINE, title
from qnb.report.recommend import interval_text
from qnb.report.results import Results, is_unfused, task_name
from qnb.report.tables import OR_MORE, build
from qnb.report.verdicts import accuracies

SETTINGS = {"bs1": "batch size 1", "maxbatch": "the largest batch"}
BASE, NOTHING = BASELINE.upper(), "Nothing was measured yet."


def text(results: Results, section: str) -> str:
    """Return the sentences about every format in ``"accuracy"``, ``"bs1"`` or ``"maxbatch"``, one a line."""
    return "\n".join(line for name in results.precisions for line in about(results, name, [section])) or NOTHING


def findings(results: Results) -> dict[str, list[str]]:
    """Return sentences about each format but BF16, which the others are compared with."""
    return {name: lines for name in results.precisions if (lines := about(results, name))}


def about(results: Results, precision: str, sections: Sequence[str] = ("accuracy", *SETTINGS)) -> list[str]:
    """Return what is known of a format beside BF16; nothing of BF16 itself."""
    lines: dict[str, Iterable[str]] = {  # computed where they are asked for
        "accuracy": chain(
            _accuracy(results, precision), _batching(results, precision), _perplexity(results, precision)
        ),
        "bs1": chain(_memory(results, precision), _speed(results, precision, "bs1")),
        "maxbatch": _speed(results, precision, "maxbatch"),
    }
    return [line for section in sections for line in lines[section] if precision != BASELINE]


def _accuracy(results: Results, precision: str) -> Iterator[str]:
    scores, name = accuracies(results), title(precision)
    if {precision, BASELINE} <= set(scores.index):
        mine, base = scores.loc[precision], scores.loc[BASELINE]
        change = f": {interval_text(mine)}.{_chance(mine.low_pp, mine.high_pp)}" if pd.notna(mine.low_pp) else "."
        yield f"{name}'s pooled accuracy is {mine.accuracy_pct:.1f} %, {BASE}'s {base.accuracy_pct:.1f} %{change}"
    changes = build(results, "table2_change")
    significant = changes[(changes.precision == precision) & changes.significant.eq(True)]
    if len(significant):
        tasks = [f"{task_name(row.task)} ({row.change_pp:+.1f} points)" for row in significant.itertuples()]
        yield f"{name}'s change is significant after Holm's correction on {', '.join(tasks)}."


def _batching(results: Results, precision: str) -> Iterator[str]:
    rows = results.batch_sensitivity.reindex(columns=["precision", "setting", "answers_changed", "n_items"])
    for row in rows[(rows.precision == precision) & (rows.setting == "qnb")].itertuples():
        if row.answers_changed:
            share = f"{row.answers_changed} of {row.n_items} answers change"
            yield f"{title(precision)} depends on what shares a batch: {share} when each item is scored alone."


def _perplexity(results: Results, precision: str) -> Iterator[str]:
    rows = build(results, "divergence")
    floor = rows.noise_floor_nats.max()
    for row in rows[rows.precision == precision].to_dict("records"):
        change, low, high = (row[f"perplexity_change_pct{end}"] for end in ("", "_low", "_high"))
        if pd.notna(change):
            interval = f"95 %: {low:+.1f} to {high:+.1f}, " if pd.notna(low) else ""
            words = f"{change:+.1f} % ({interval}{row['tokens']:,.0f} tokens)"
            yield f"{title(precision)}'s perplexity changes by {words}.{_chance(low, high)}"
        if pd.notna(row["kl_mean_nats"]) and row["kl_mean_nats"] <= floor:
            yield f"{title(precision)}'s KL divergence is noise: another batch size alone gives {BASE} as much."


def _chance(low: float, high: float) -> str:
    return " The interval holds 0: this may be chance." if pd.notna(low) and low <= 0 <= high else ""


def _memory(results: Results, precision: str) -> Iterator[str]:
    """Compare peak memory on a GPU, captured where that was timed, else the weights.

    How far a process grows depends on what it did before.
    """
    on_gpu = results.bs1.peak_reserved_mib.notna().any()
    name, words = ("peak_memory_mib", "peak memory at batch size 1") if on_gpu else ("weights_mib", "weights")
    rows = results.bs1[~is_unfused(results.bs1)].drop_duplicates("precision", keep="last")
    memory_mib = rows.set_index("precision")[name].dropna()
    if {precision, BASELINE} <= set(memory_mib.index):
        share_pct = 100 * memory_mib[precision] / memory_mib[BASELINE]
        yield f"{title(precision)} takes {share_pct:.0f} % of {BASE}'s {words}."


def _speed(results: Results, precision: str, setting: str) -> Iterator[str]:
    """Compare each engine with itself in BF16: time per token at batch size 1, else throughput."""
    name = "tpot_s" if setting == "bs1" else "throughput_rps"
    unit = column(name).unit + (" per token" if setting == "bs1" else "")
    frame = results.timed(setting).dropna(subset=[name])
    frame, base = frame[frame.precision == precision], frame[frame.precision == BASELINE]
    for row in frame.merge(base, on="engine", suffixes=("", "_base")).to_dict("records"):
        mine, other = format_value(name, row[name]), format_value(name, row[f"{name}_base"])
        where = f"{title(precision)} at {SETTINGS[setting]} with {row['engine']}"
        parts = [f"{where}: {mine} {unit} ({BASE} {other})"]
        if setting == "maxbatch":
            sizes = [f"{row['batch_size' + end]}" + OR_MORE * (row["capped" + end] is True) for end in ("", "_base")]
            parts.append(f"batch {sizes[0]} ({BASE} {sizes[1]})")
        if isinstance(row["bound"], str) and Flag.PEAKS_DISTURBED not in row["flags"]:
            parts.append(f"bound by {row['bound'].replace('_', ' ')}")
        if is_disturbed([*row["flags"], *row["flags_base"]]):
            parts.append("disturbed by other processes")
        if (Flag.UNFUSED in row["flags"]) != (Flag.UNFUSED in row["flags_base"]):
            parts.append("one of the two captured without fusing kernels")
        yield f"{', '.join(parts)}."
