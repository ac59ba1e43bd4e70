"""Small multiples, two by two: lying bars, and pairs of dots where engines are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from qnb.report import theme

ROW_PX, GAP_PX = 22, 52  # of a format, and between two panels for the lower one's title
ROOM = 0.5  # of what an axis spans, for the numbers at its ends


def two_by_two(frame: pd.DataFrame, height: int, spacing: float = 0.05) -> dict[str, Any]:
    """Return what Plotly Express needs for a panel per name in column `panel`, in a figure of that height."""
    gap = GAP_PX / (height - 120) if frame.panel.nunique() > 2 else 0
    return {"facet_col": "panel", "facet_col_wrap": 2, "facet_col_spacing": spacing, "facet_row_spacing": gap}


def bars(frame: pd.DataFrame, parts: Mapping[str, float], title: str, note: str = "") -> go.Figure:
    """Draw a bar per format, its parts end to end, with its text at its end.

    Parameters
    ----------
    frame
        Columns panel, precision, text, hover and each of `parts`; above and below, an interval's ends, where they are
        known.
    parts
        Columns, each with its opacity in the format's colour.
    title, note
        What the figure shows, and how it is read.
    """
    errors = {"error_x": "above", "error_x_minus": "below"} if "above" in frame else {}
    last = list(parts)[-1]
    frame = frame.assign(end=frame[list(parts)].sum(axis=1) + (frame.above.fillna(0) if errors else 0))
    long = frame.melt([name for name in frame if name not in parts], list(parts), "part", "length")
    long["text"] = long.text.where(long.part == last, "")
    look = {**theme.by_format(frame), "color": "part", "custom_data": ["hover", "end"]}
    height = _height(frame)
    figure = px.bar(long, x="length", y="precision", text="text", **errors, **look, **two_by_two(frame, height))
    for bar in figure.data:
        bar.marker = {"color": [theme.COLORS[name] for name in bar.y], "opacity": parts[bar.name]}
        bar.update(textposition="inside" if errors else "outside", insidetextanchor="start", cliponaxis=False,
                   textfont={"size": 11}, showlegend=False,
                   error_x={"color": theme.INK, "thickness": 1.2})  # fmt: skip
    for axis, ends in _ends(figure):
        axis.range = [0, (1 + ROOM) * (max(ends) or 1.0)]
    for part, opacity in parts.items() if len(parts) > 1 else ():
        figure.add_bar(x=[None], y=[None], name=part, legendgroup=part, marker_color=f"rgba(34,34,34,{opacity})")
    figure.update_layout(bargap=0.25)
    return _finish(figure, title, height, note, legend=len(parts) > 1)


def dots(frame: pd.DataFrame, title: str, note: str = "") -> go.Figure:
    """Draw a row per format, a dot per engine, those with a text joined; logarithmic where all values are above 0.

    Parameters
    ----------
    frame
        Columns panel, precision, engine, value, text and hover.
    title, note
        What the figure shows, and how it is read.
    """
    cells = ["panel", "precision"]
    joined = frame.assign(value=frame.value.where(frame.text != ""))
    least = joined.groupby(cells).value.transform("min")
    frame = frame.assign(
        join=(joined.value - least).fillna(0), none=0.0,
        side=["left" if low else "right" for low in frame.value == least],
        marker=[theme.symbol(row.precision, row.engine) for row in frame.itertuples()],
        text=frame.text.mask(frame.duplicated([*cells, "text"]), ""),
    )  # fmt: skip
    look = {**theme.by_format(frame), "custom_data": ["hover", "value", "side", "marker"]}
    height = _height(frame)
    figure = px.scatter(
        frame, x="value", y="precision", text="text", error_x="none", error_x_minus="join", **look,
        **two_by_two(frame, height),
    )  # fmt: skip
    for trace in figure.data:
        trace.marker = {"symbol": [row[3] for row in trace.customdata], "size": 10, "color": trace.marker.color}
        trace.textposition = [f"middle {row[2]}" for row in trace.customdata]
        trace.update(showlegend=False, cliponaxis=False, textfont={"size": 11}, error_x={"width": 0, "thickness": 2})
    for axis, values in _ends(figure):
        low, high = min(values), max(values)
        if low > 0:
            room = ROOM * (math.log10(high / low) or 1.0)
            axis.update(type="log", range=[math.log10(low) - room, math.log10(high) + room])
        else:
            axis.range = [-ROOM * high, (1 + ROOM) * high]
    return _finish(theme.key(figure, frame), title, height, note)


def _height(frame: pd.DataFrame) -> int:
    rows = math.ceil(frame.panel.nunique() / 2)
    return min(theme.MOST_PX, 140 + rows * (ROW_PX * frame.precision.nunique() + 10) + (rows - 1) * GAP_PX)


def _ends(figure: go.Figure) -> list[tuple[Any, list[float]]]:
    """Return what each panel's axis has to reach, from the second column of the custom data."""
    ends: dict[str, list[float]] = {}
    for trace in figure.data:
        ends.setdefault(trace.xaxis.replace("x", "xaxis"), []).extend(float(row[1]) for row in trace.customdata)
    figure.update_xaxes(matches=None)
    return [(figure.layout[name], values) for name, values in ends.items()]


def _finish(figure: go.Figure, title: str, height: int, note: str, legend: bool = True) -> go.Figure:
    """Leave out the axes' numbers, since each value has its own."""
    figure.update_xaxes(showticklabels=False, showgrid=False, title="").update_yaxes(showgrid=False, title="")
    return theme.finish(figure, title, height, note, foot_px=48 if legend else 16)
