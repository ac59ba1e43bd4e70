"""One quantity of a study, a bar per format: which quantities there are, and the figure of one."""

from __future__ import annotations

from collections.abc import Collection

import pandas as pd
import plotly.graph_objects as go

from qnb.columns import column
from qnb.precision import BASELINE
from qnb.report import panels, theme
from qnb.report.recommend import accuracies
from qnb.report.results import Results
from qnb.report.tables import MEAN, headline

ACCURACY = "accuracy_pct"
QUANTITIES = (
    ACCURACY, "throughput_rps", "throughput_tps", "tpot_s", "ttft_s", "seconds_per_request", "batch_latency_s",
    "peak_memory_mib", "utilization_pct", "power_w", "energy_j_per_token",
)  # fmt: skip
SETTINGS = ("bs1", "maxbatch")


def measured(results: Results) -> dict[str, list[str]]:
    """Return the quantities that were measured, each with the settings it was measured in; accuracy has none."""
    quantities: dict[str, list[str]] = {ACCURACY: []} if len(results.scores) else {}
    for name in QUANTITIES[1:]:
        if settings := [each for each in SETTINGS if results.timed(each)[name].notna().any()]:
            quantities[name] = settings
    return quantities


def compare(
    results: Results,
    quantity: str,
    setting: str = "bs1",
    task: str = MEAN,
    precisions: Collection[str] = (),
    baseline: str = "",
) -> go.Figure:
    """Draw one quantity with its interval or range where there is one, a panel per engine.

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
    precisions
        These formats only; empty takes all.
    baseline
        Give values in percent of this format's, of the same engine; empty gives them as they are. An accuracy's
        interval is then that of its change, which is known against BF16 only.
    """
    about, unit = column(quantity), column(quantity).unit
    title, where = about.label[:1].upper() + about.label[1:], theme.SETTINGS[setting]
    frame = _accuracy(results, task) if quantity == ACCURACY else _speed(results, quantity, setting)
    if baseline:
        frame, unit = _relative(frame, baseline), f"% of {baseline}"
    frame = frame[frame.precision.isin(precisions or frame.precision)].dropna(subset=["value"])
    if frame.empty:
        return theme.nothing(title)
    panel = [f"{engine}, {unit}" if engine else unit for engine in frame.engine]
    hover = [theme.hover(row, quantity, "change_pp", "low_pp", "high_pp") for row in frame.to_dict("records")]
    frame = frame.assign(panel=panel, hover=hover, text=[theme.number(value) for value in frame.value],
                         above=frame.high - frame.value, below=frame.value - frame.low)  # fmt: skip
    return panels.bars(frame, {"value": 1.0}, title, theme.label(task) if quantity == ACCURACY else where)


def _speed(results: Results, quantity: str, setting: str) -> pd.DataFrame:
    frame = results.timed(setting)
    ranged = quantity == "throughput_rps"  # the one whose range over passes is kept
    low, high = (frame.low_rps, frame.high_rps) if ranged else (float("nan"), float("nan"))
    return frame.assign(value=frame[quantity] * column(quantity).scale, low=low, high=high)


def _accuracy(results: Results, task: str) -> pd.DataFrame:
    """Return accuracy in percent with its 95 % interval, and that of its change against BF16 in points."""
    frame = headline(results.scores)
    rows = frame[frame.task.str.startswith(task) if task == MEAN else frame.task == task].drop_duplicates("precision")
    changes = accuracies(results, task)[["change_pp", "low_pp", "high_pp"]]
    value, error = 100 * rows.value, 196 * rows.stderr.astype(float)
    low, high = (value - error).clip(lower=0), (value + error).clip(upper=100)
    rows = rows.assign(engine="", accuracy_pct=value, value=value, low=low, high=high)
    return rows.merge(changes, left_on="precision", right_index=True)


def _relative(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Return values in percent of the baseline's with the same engine; NaN where that was not measured."""
    share = 100 / frame.engine.map(frame[frame.precision == baseline].set_index("engine").value)
    scaled = frame.assign(value=frame.value * share, low=frame.low * share, high=frame.high * share)
    if "low_pp" not in frame:
        return scaled
    if baseline != BASELINE:
        return scaled.assign(low=float("nan"), high=float("nan"))
    return scaled.assign(low=100 + frame.low_pp * share, high=100 + frame.high_pp * share)
