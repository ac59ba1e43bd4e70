"""Every figure by name, the paper's six first, and one quantity of choice: a study's frames in, a figure out."""

from __future__ import annotations

from collections.abc import Callable, Collection

import plotly.graph_objects as go

from qnb.columns import column
from qnb.precision import BASELINE
from qnb.report import theme
from qnb.report.findings import SETTINGS
from qnb.report.quality_figures import accuracy, change, forest, front
from qnb.report.recommend import accuracies
from qnb.report.results import Results
from qnb.report.speed_figures import energy, heatmap, memory, metrics, roofline, sweep, timeline, token_time
from qnb.report.tables import MEAN

FIGURES: dict[str, Callable[[Results], go.Figure]] = {
    "fig1_accuracy": accuracy,
    "fig2_change": change,
    "fig3_bs1_metrics": lambda results: metrics(results, "bs1"),
    "fig4_bs1_heatmap": lambda results: heatmap(results, "bs1"),
    "fig5_maxbatch_metrics": lambda results: metrics(results, "maxbatch"),
    "fig6_maxbatch_heatmap": lambda results: heatmap(results, "maxbatch"),
    "forest": forest,
    "front_memory": lambda results: front(results, "peak_memory_mib"),
    "front_tpot": lambda results: front(results, "tpot_s"),
    "sweep": sweep,
    "roofline": roofline,
    "token_time": token_time,
    "energy": energy,
    "memory": memory,
    "timeline_bs1": lambda results: timeline(results, "bs1"),
    "timeline_maxbatch": lambda results: timeline(results, "maxbatch"),
}
ACCURACY = "accuracy_pct"
QUANTITIES = (
    "throughput_rps", "throughput_tps", "tpot_s", "ttft_s", "seconds_per_request", "batch_latency_s",
    "peak_memory_mib", "utilization_pct", "power_w", "energy_j_per_token",
)  # fmt: skip


def draw_all(results: Results) -> dict[str, go.Figure]:
    """Return every figure by name; those of what was not measured say so."""
    return {name: draw(results) for name, draw in FIGURES.items()}


def measured(results: Results) -> dict[str, list[str]]:
    """Return the quantities that were measured, each with the settings it was measured in; accuracy has none."""
    quantities: dict[str, list[str]] = {ACCURACY: []} if len(results.scores) else {}
    for name in QUANTITIES:
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
    """Draw one quantity, a panel per engine: throughput with its range over passes, accuracy with a 95 % interval.

    Parameters
    ----------
    results
        A study's frames.
    quantity
        `ACCURACY` or a name in `QUANTITIES`. The interval of an accuracy is that of its change against BF16.
    setting
        Of a speed: ``"bs1"`` or ``"maxbatch"``.
    task
        Of accuracy: a task, or the mean over tasks.
    precisions
        These formats only; empty takes all.
    baseline
        Give values in percent of this format's, of the same engine; empty gives them as they are.
    """
    about, where = column(quantity), SETTINGS[setting]
    if quantity == ACCURACY:
        frame, where = accuracies(results, task).reset_index(names="precision").assign(engine=""), theme.label(task)
        frame = frame.assign(above=frame.high_pp - frame.change_pp, below=frame.change_pp - frame.low_pp)
    else:
        frame = results.timed(setting)
    if quantity == "throughput_rps":  # the one whose range over passes is kept
        frame = frame.assign(above=frame.high_rps - frame.throughput_rps, below=frame.throughput_rps - frame.low_rps)
    unit, values = f"% of {baseline}" if baseline else about.unit, frame[quantity].astype(float)
    scale = 100 / frame.engine.map(values[frame.precision == baseline].set_axis(...)) if baseline else about.scale
    return frame, unit, scale, BASELINE, where
