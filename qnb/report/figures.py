"""Every figure by name, the paper's six first: a study's frames in, a Plotly figure out."""

from __future__ import annotations

from collections.abc import Callable

import plotly.graph_objects as go

from qnb.report.accuracy_figures import accuracy, change, forest
from qnb.report.cost_figures import energy, memory, roofline, token_time
from qnb.report.results import Results
from qnb.report.speed_figures import heatmap, metrics, sweep, timeline
from qnb.report.tradeoff_figures import front

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


def draw_all(results: Results) -> dict[str, go.Figure]:
    """Return every figure by name; those of what was not measured say so."""
    return {name: draw(results) for name, draw in FIGURES.items()}
