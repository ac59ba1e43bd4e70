"""What is lost against what is gained: Pareto fronts over a cost, and a deployment's choice."""

from __future__ import annotations

import math

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from qnb.columns import column, header
from qnb.report import theme
from qnb.report.recommend import FITS, RULED_OUT, UNSURE, Advice, candidates, facts
from qnb.report.results import Results


def front(results: Results, cost: str) -> go.Figure:
    """Draw mean accuracy over a cost at batch size 1, with the Pareto front through the best.

    Parameters
    ----------
    results
        A study's frames.
    cost
        A speed's or a memory's column of which less is better.
    """
    words = column(cost).label
    title = f"Accuracy against {words.rsplit('(')[-1].rstrip(')')}"
    frame = candidates(results, "bs1").dropna(subset=[cost, "accuracy_pct"])
    if frame.empty:
        return theme.nothing(title, "needs accuracy and a speed of the same format")
    frame = frame.assign(
        cost=frame[cost] * column(cost).scale,
        above=frame.high_pp - frame.change_pp, below=frame.change_pp - frame.low_pp,
        marker=[theme.symbol(row.precision, row.engine) for row in frame.itertuples()],
        hover=[theme.hover(row, cost, "accuracy_pct", "change_pp", "low_pp", "high_pp")
               for row in frame.to_dict("records")],
    )  # fmt: skip
    figure = px.scatter(
        frame, x="cost", y="accuracy_pct", error_y="above", error_y_minus="below", symbol="marker",
        symbol_map="identity", **theme.by_format(frame),
    )  # fmt: skip
    figure.update_traces(marker_size=11, error_y={"thickness": 1.2, "width": 3})
    edge = pareto(frame)
    figure.add_scatter(
        x=edge.cost, y=edge.accuracy_pct, mode="lines+text", text=[f"  {name}" for name in edge.precision],
        textposition="top right", line={"shape": "hv", "color": "#999999", "dash": "dot"}, hoverinfo="skip",
        name="Pareto front", cliponaxis=False,
    )  # fmt: skip
    figure.update_xaxes(title=header(cost), **theme.log_ticks(frame.cost))
    figure.update_yaxes(title="mean accuracy over tasks, %")
    note = "up and left is better; bars: 95 % interval of the change; points on the line are Pareto-optimal"
    return theme.finish(theme.key(figure, frame), title, 460, note)


def pareto(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that no other beats in both `cost` (less is better) and `accuracy_pct`, by cost."""
    frame = frame.sort_values(["cost", "accuracy_pct"], ascending=[True, False])
    return frame[frame.accuracy_pct > frame.accuracy_pct.cummax().shift(fill_value=-math.inf)]


def decision(advice: Advice) -> go.Figure:
    """Draw speed over memory, with what is allowed: solid fits, pale may fit, faint does not, a ring is recommended.

    Parameters
    ----------
    advice
        As `qnb.report.recommend.choose` returns it.
    """
    title = "What fits, and what is recommended?"
    demand, speed = advice.demand, column(advice.demand.rank_by)
    frame = _candidates(advice)
    frame = frame.dropna(subset=["peak_memory_mib", demand.rank_by])
    if frame.empty:
        return theme.nothing(title)
    frame = frame.assign(speed=frame[demand.rank_by] * speed.scale)
    look = {**theme.by_format(frame), "custom_data": ["hover", "opacity"]}
    figure = px.scatter(frame, x="peak_memory_mib", y="speed", symbol="marker", symbol_map="identity", **look)
    for points in figure.data:
        points.marker.update(opacity=[row[1] for row in points.customdata], size=12)
    best = frame[frame.index.isin(advice.of(FITS).index[:1])]
    figure.add_scatter(
        x=best.peak_memory_mib, y=best.speed, mode="markers+text", text=[f"   {name}" for name in best.index],
        textposition="middle right", hoverinfo="skip", showlegend=False, cliponaxis=False,
        marker={"symbol": "circle-open", "size": 24, "color": theme.INK, "line": {"width": 2}},
    )  # fmt: skip
    limit = {"line_color": theme.QUIET, "line_dash": "dash", "line_width": 1.5}
    if demand.memory_mib is not None:
        figure.add_vline(x=demand.memory_mib, **limit)
    if demand.speed_limit:  # a rate of 0 asks for nothing, and has no place on a logarithmic axis
        figure.add_hline(y=demand.speed_limit * speed.scale, **limit)
    figure.update_xaxes(title=header("peak_memory_mib"), rangemode="tozero")
    figure.update_yaxes(title=header(demand.rank_by), **theme.log_ticks(frame.speed))
    note = "solid: fits; pale: may fit; faint: does not; ring: recommended; dashed: what is allowed"
    return theme.finish(theme.key(figure, frame), title, 460, note)


def _candidates(advice: Advice) -> pd.DataFrame:
    """Return a row per candidate: its marker, its opacity, and what the pointer shows."""
    frame = advice.candidates
    return frame.assign(
        opacity=frame.verdict.map({FITS: 1.0, UNSURE: 0.45, RULED_OUT: 0.15}),
        marker=[theme.symbol(row.precision, row.engine) for row in frame.itertuples()],
        hover=["<br>".join(filter(None, (f"{name}: {row.verdict}", facts(row, advice.demand), row.reasons)))
               for name, row in frame.iterrows()],
    )  # fmt: skip
