"""What the rows say, in sentences: computed, never typed in.

A sentence names its number, what it is compared with, and n. A difference the sample cannot tell from none is called
that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from qnb.precision import BASELINE
from qnb.report import recommend as choose
from qnb.report import theme as look
from qnb.report.results import Results
from qnb.speed.monitor import BUSY_LIMITS, disturbed

SETTINGS = {"bs1": "batch size 1", "maxbatch": "its largest batch"}
BOUNDS = {"launch": "launch-bound", "bandwidth": "bound by memory bandwidth", "compute": "bound by arithmetic",
          "kernels": "bound by its kernels"}  # fmt: skip


def opening(results: Results) -> str:
    """Say what was measured, of what, and on what."""
    names = _precisions(results)
    if not names:
        return "Nothing was measured yet."
    parts = []
    if len(results.scores):
        whole = results.scores[results.scores.task == results.scores.asked]
        each = whole.drop_duplicates(["precision", "task"]).groupby("precision")["items"].sum()
        parts.append(f"{_counted(len(set(whole.task)), 'task')} of {_counted(int(each.max()), 'item')} together")
    for setting, words in SETTINGS.items():
        frame = results.bs1 if setting == "bs1" else results.maxbatch
        if len(frame):
            parts.append(f"{words} with {_listed(sorted(set(map(str, frame.engine))))}")
    if len(results.sweep):
        engines = _listed(sorted(set(map(str, results.sweep.engine))))
        parts.append(f"batches of 1 to {results.sweep.batch_size.max():,.0f} with {engines}")
    where = f" on {results.device}" if results.device else ""
    what = f": {'; '.join(parts)}" if parts else ""
    were = "was" if len(names) == 1 else "were"
    return f"{_counted(len(names), 'precision')} of {results.model} {were} measured{where}{what}."


def findings(results: Results) -> dict[str, list[str]]:
    """Return sentences about each precision but BF16, which the others are compared with."""
    found = {name: about(results, name) for name in _precisions(results) if name != BASELINE}
    return {name: lines for name, lines in found.items() if lines}


def _precisions(results: Results) -> list[str]:
    frames = (results.checkpoints, results.scores, results.bs1, results.maxbatch, results.sweep)
    return list(dict.fromkeys(str(name) for frame in frames if "precision" in frame for name in frame.precision))


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def about(results: Results, precision: str) -> list[str]:
    """Return what is known of one precision beside BF16: a sentence each on accuracy, tests, perplexity, settings."""
    parts = [*_accuracy(results, precision), _perplexity(results, precision)]
    parts += [_speed(results, precision, setting) for setting in SETTINGS]
    return [part for part in parts if part]


def _accuracy(results: Results, precision: str) -> Iterator[str]:
    known = choose.accuracies(results, choose.OVERALL)
    mine, base = known.get(precision), known.get(BASELINE)
    if not mine or not base or not base["accuracy_pct"]:
        return
    share = 100 * mine["accuracy_pct"] / base["accuracy_pct"]
    text = (
        f"{precision.upper()} keeps {share:.1f} % of {BASELINE.upper()}'s mean accuracy: {mine['accuracy_pct']:.1f} "
        f"against {base['accuracy_pct']:.1f} %"
    )
    if "low_pp" in mine:
        low, high = mine["low_pp"], mine["high_pp"]
        text += (
            f", a change of {mine['change_pp']:+.1f} points (95 % {low:+.1f} to {high:+.1f}, n = {mine['items']:,})"
        )
        text += ", which this sample cannot tell from none" if low <= 0 <= high else ""
    yield f"{text}."
    changes = results.tables[2]
    if "significant" in changes:
        rows = changes[(changes.precision == precision) & changes.significant.eq(True)]
        found = [
            f"{look.name(row.task)} ({row.change_pp:+.1f} points, p = {row.p_holm:.2g})" for row in rows.itertuples()
        ]
        if found:
            yield f"After Holm's correction the change is significant on {_listed(found)}."


def _perplexity(results: Results, precision: str) -> str:
    frame = results.divergence
    rows = frame[frame.precision == precision].to_dict("records") if "perplexity_change_pct" in frame else []
    if not rows or precision == BASELINE or not _known("perplexity_change_pct", rows[0]):
        return ""
    change, low, high = (rows[0].get(f"perplexity_change_pct{end}") for end in ("", "_low", "_high"))
    text = f"Its perplexity is {abs(change):.1f} % {'above' if change >= 0 else 'below'} {BASELINE.upper()}'s"
    detail = f"n = {int(rows[0]['tokens']):,} tokens"
    if low is None or pd.isna(low):
        return f"{text} ({detail})."
    unsure = ", which this text cannot tell from none" if low <= 0 <= high else ""
    return f"{text} (95 % {low:+.1f} to {high:+.1f}, {detail}){unsure}."


def _speed(results: Results, precision: str, setting: str) -> str:
    """Compare with BF16 in the same setting, an engine with itself.

    Without an allocator's reading memory is the weights', as how far a process grows hangs on what it did before.
    """
    frame = results.bs1 if setting == "bs1" else results.maxbatch
    if frame.empty:
        return ""
    pairs = []
    for row in frame[frame.precision == precision].to_dict("records"):
        base = frame[(frame.precision == BASELINE) & (frame.engine == row["engine"])].to_dict("records")
        pairs += [(row, base[0])] if base else []
    if not pairs:
        return ""
    read = _known("peak_reserved_mib", *pairs[0])
    name, words = ("memory_mib", "memory") if read else ("weights_mib", "memory for its weights")
    shares = [100 * row[name] / base[name] for row, base in pairs if _known(name, row, base)]
    room = f" takes {shares[0]:.0f} % of {BASELINE.upper()}'s {words} and" if shares and setting == "bs1" else ""
    rates = [_rate(row, base, setting) for row, base in pairs]
    return f"At {SETTINGS[setting]} {precision.upper()}{room} gives {_listed(rates)}."


def _known(name: str, *rows: dict[str, Any]) -> bool:
    return all(pd.notna(row.get(name)) for row in rows)


def _rate(row: dict[str, Any], base: dict[str, Any], setting: str) -> str:
    """Say a speed beside BF16's: milliseconds a token for one user where measured, else requests a second."""
    if setting == "bs1" and _known("tpot_s", row, base):
        rate = f"{1e3 * row['tpot_s']:.2f} ms a token against {1e3 * base['tpot_s']:.2f}"
        if _known("ttft_s", row, base):
            rate += f", the first after {1e3 * row['ttft_s']:.1f} against {1e3 * base['ttft_s']:.1f} ms"
    else:
        rate = f"{look.number(row['throughput_rps'])} requests/s against {look.number(base['throughput_rps'])}"
    batch = f"batch {row['batch_size']} against {base['batch_size']}" if setting == "maxbatch" else ""
    whose = [str(one["precision"]).upper() for one in (row, base) if disturbed(one.get("flags"))]
    others = f"{' and '.join(whose)} disturbed by other processes" if whose else ""
    bound = "" if BUSY_LIMITS in str(row.get("flags")) else BOUNDS.get(str(row.get("bound")), "")
    detail = [part for part in (str(row["engine"]), bound, batch, others) if part]
    return f"{rate} ({', '.join(detail)})"
