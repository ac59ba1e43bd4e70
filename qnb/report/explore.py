"""One quantity of a study as a tidy frame: for precisions, an engine, a task, beside a baseline or alone."""

from __future__ import annotations

from collections.abc import Collection

import pandas as pd

from qnb.precision import BASELINE
from qnb.report import recommend as choose
from qnb.report import tables as table
from qnb.report import theme as look
from qnb.report.results import Results

ACCURACY = "accuracy_pct"
# name of a quantity: its words, unit, factor to that unit
QUANTITIES = {
    ACCURACY: ("accuracy", "%", 1.0),
    "throughput_rps": ("throughput", "requests/s", 1.0),
    "throughput_tps": ("throughput", "tokens/s", 1.0),
    "tpot_s": ("time per output token (TPOT)", "ms", 1000.0),
    "ttft_s": ("time to first token (TTFT)", "ms", 1000.0),
    "seconds_per_request": ("seconds per request", "s", 1.0),
    "batch_latency_s": ("latency of a batch", "s", 1.0),
    "memory_mib": ("peak memory", "MiB", 1.0),
    "utilization_pct": ("utilization", "%", 1.0),
    "power_w": ("power", "W", 1.0),
    "energy_j_per_token": ("energy a token", "J", 1.0),
}
SETTINGS = {"bs1": "batch size 1", "maxbatch": "largest batch"}


def speeds(results: Results, setting: str) -> pd.DataFrame:
    """Return the rows of a setting."""
    return results.bs1 if setting == "bs1" else results.maxbatch


def measured(results: Results) -> dict[str, list[str]]:
    """Return the quantities that were measured, each with the settings it was measured in; accuracy has none."""
    found: dict[str, list[str]] = {ACCURACY: []} if len(results.scores) else {}
    for name in QUANTITIES:
        for setting in SETTINGS:
            frame = speeds(results, setting)
            if name in frame and frame[name].notna().any():
                found.setdefault(name, []).append(setting)
    return found


def values(
    results: Results,
    quantity: str,
    setting: str = "bs1",
    task: str = choose.OVERALL,
    engine: str = "",
    precisions: Collection[str] = (),
    baseline: str = "",
) -> tuple[pd.DataFrame, str, str]:
    """Return a quantity's frame, title and unit, ready for `qnb.report.figures.compare`.

    Parameters
    ----------
    results
        A study's frames.
    quantity
        A name in `QUANTITIES`.
    setting
        Of a speed: ``"bs1"`` or ``"maxbatch"``.
    task
        Of accuracy: a task, or the mean over tasks.
    engine
        Of a speed: only this one; empty takes all.
    precisions
        Only these; empty takes all.
    baseline
        Give values in percent of this precision's, of the same engine; empty gives them as they are. An accuracy's
        interval is then that of its change, which is known against BF16 only.
    """
    words, unit, factor = QUANTITIES[quantity]
    if quantity == ACCURACY:
        frame, title = _accuracy(results, task), f"Accuracy, {look.label(task)}"
    else:
        frame, title = (
            _speed(results, quantity, setting, factor),
            f"{words[0].upper()}{words[1:]}, {SETTINGS[setting]}",
        )
        frame = frame[frame.engine == engine] if engine and len(frame) else frame
    if baseline and len(frame):
        base = frame[frame.precision == baseline].set_index("engine").value
        share = 100 / frame.engine.map(base)  # NaN where the baseline was not measured with that engine
        frame = frame.assign(value=frame.value * share, low=frame.low * share, high=frame.high * share)
        if quantity == ACCURACY:  # the same items, paired: Table 2's interval, which is of BF16 alone
            changes = choose.accuracies(results, task) if baseline == BASELINE else {}
            for end in ("low", "high"):
                moved = frame.precision.map({name: change.get(f"{end}_pp") for name, change in changes.items()})
                frame[end] = 100 + moved.astype(float) * share
        title, unit = f"{title}, relative", f"% of {baseline}"
    if precisions and len(frame):
        frame = frame[frame.precision.isin(precisions)]
    return frame.reset_index(drop=True), title, unit


def _speed(results: Results, quantity: str, setting: str, factor: float) -> pd.DataFrame:
    frame = speeds(results, setting)
    if quantity not in frame:
        return pd.DataFrame()
    made = frame[["precision", "engine"]].assign(value=frame[quantity] * factor, low=float("nan"), high=float("nan"))
    if quantity == "throughput_rps":  # the one whose range over repeats is kept
        made = made.assign(low=frame.low_rps, high=frame.high_rps)
    counts = zip(frame.get("requests", 0), frame.get("repeats", 1), strict=False)
    return made.assign(n=[f"{requests:,.0f} requests, {repeats:.0f} passes" for requests, repeats in counts])


def _accuracy(results: Results, task: str) -> pd.DataFrame:
    if results.scores.empty:
        return pd.DataFrame()
    frame = table.headline(results.scores)
    asked = frame.task.str.startswith(table.AGGREGATE) if task == choose.OVERALL else frame.task == task
    rows = frame[asked].drop_duplicates("precision")
    error = 196 * rows.stderr.astype(float)  # 95 %, in points
    value = 100 * rows.value
    counts = [f"{count:,} items" for count in rows["items"]]
    return pd.DataFrame(
        {
            "precision": rows.precision,
            "engine": "",
            "value": value,
            "low": (value - error).clip(lower=0),
            "high": (value + error).clip(upper=100),
            "n": counts,
        }
    )
