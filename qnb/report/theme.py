"""The look of every figure: one Plotly template, a colour and a marker per format, panels two by two.

A format is told by its colour and its marker, an engine by a hollow or a filled marker: both survive print.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping
from html import escape
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from qnb.columns import column, format_value, is_disturbed
from qnb.precision import PRECISIONS
from qnb.report.results import task_name

INK, QUIET = "#222222", "#777777"
MOST_PX = 700  # of a figure's height
TOP_PX, NOTE_PX, FOOT_PX = 46, 17, 56  # of the title, of a line below it, of an axis with its title
NOTE_LETTERS = 60  # in a line below the title, so that it fits a phone
SETTINGS = {"bs1": "batch size 1", "sweep": "batch sizes between", "maxbatch": "the largest batch"}
COUNTS = {"requests": "requests", "passes": "passes", "n_items": "items"}
COLORS = {name: precision.color for name, precision in PRECISIONS.items()}

pio.templates["qnb"] = go.layout.Template(
    layout={
        "font": {"size": 12, "color": INK, "family": "system-ui, 'Liberation Sans', Arial, sans-serif"},
        "title": {"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top",
                  "font": {"size": 16, "weight": 700}, "subtitle": {"font": {"size": 12, "color": QUIET}},
                  "pad": {"l": 12, "t": 14}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "yanchor": "top"},
        "hoverlabel": {"align": "left"},
        "xaxis": {"automargin": True, "zeroline": False, "title": {"font": {"size": 12}}},
        "yaxis": {"automargin": True, "zeroline": False, "title": {"font": {"size": 12}}},
    }
)  # fmt: skip


def label(task: str) -> str:
    """Return a task's name for a figure: Plotly reads tags, so the name is escaped."""
    return escape(task_name(task))


def number(value: float) -> str:
    """Return a value with three significant digits, or all those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def symbol(precision: str, engine: str = "") -> str:
    """Return a point's marker: the format's, hollow for eager; a line for what the paper published."""
    if engine.startswith("published"):
        return "line-ns-open"
    return PRECISIONS[precision].marker + "-open" * (engine == "eager")


def by_format(frame: pd.DataFrame) -> dict[str, Any]:
    """Return what Plotly Express needs to colour a frame by its format and to show its column `hover`."""
    formats = [name for name in PRECISIONS if name in set(frame.precision)]
    return {"color": "precision", "color_discrete_map": COLORS, "category_orders": {"precision": formats},
            "custom_data": ["hover"]}  # fmt: skip


def hover(row: Mapping[str, Any], *names: str) -> str:
    """Return what the pointer shows of a row: its format, engine and batch, the named quantities, and its n."""
    about = [PRECISIONS[row["precision"]].label, escape(str(row.get("engine") or ""))]
    about += [f"batch {row['batch_size']:,.0f}"] if pd.notna(row.get("batch_size")) else []
    lines = [", ".join(filter(None, about))]
    for name in names:
        if value := format_value(name, row.get(name)):
            lines.append(f"{column(name).label}: {value} {column(name).unit}".rstrip())
    lines += [f"n = {row[name]:,.0f} {words}" for name, words in COUNTS.items() if pd.notna(row.get(name))]
    if is_disturbed(row.get("flags")):
        lines.append("disturbed by other processes")
    return "<br>".join(lines)


def log_ticks(values: pd.Series) -> dict[str, Any]:
    """Return a logarithmic axis with its ticks written out: as few round numbers as give three, else the ends."""
    low, high = values.min(), values.max()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        inside = sum(low <= tick <= high for tick in ticks)
        if inside > 2:
            break
    ticks = ticks if inside > 1 else list(dict.fromkeys((low, high)))
    return {"type": "log", "tickvals": ticks, "ticktext": [number(tick) for tick in ticks]}


def finish(figure: go.Figure, title: str, height: int, note: str = "", foot_px: int = FOOT_PX) -> go.Figure:
    """Give a figure the template, a title, a note on how to read it, its height in pixels and its panels' titles.

    The legend lies below the axis, where it takes room from the panels instead of covering them.
    """
    lines = textwrap.wrap(note, NOTE_LETTERS)
    height = min(height, MOST_PX)
    top = TOP_PX + NOTE_PX * len(lines) + 24 * bool(figure.layout.annotations)
    figure.update_layout(
        template="plotly_white+qnb", height=height, margin={"l": 12, "r": 16, "t": top, "b": foot_px},
        title={"text": title, "subtitle": {"text": "<br>".join(lines)}},
        legend={"title": "", "y": -(foot_px - 8) / max(height - top - foot_px, 1)},
    )  # fmt: skip
    left, right = figure.layout.xaxis.domain or (0, 1)
    for panel in figure.layout.annotations:  # Plotly Express names them column=value, in the middle
        panel.update(text=panel.text.partition("=")[2], x=panel.x - (right - left) / 2, xanchor="left",
                     font={"size": 11})  # fmt: skip
    return figure.update_traces(
        hovertemplate="%{customdata[0]}<extra></extra>", selector=lambda trace: trace.customdata is not None
    )


def key(figure: go.Figure, frame: pd.DataFrame) -> go.Figure:
    """Add the engines' markers to the legend, where there are several."""
    engines = list(dict.fromkeys(frame.engine))
    for engine in engines if len(engines) > 1 else ():
        marker = {"symbol": symbol("fp32", engine), "color": QUIET, "size": 9}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=engine, legendgroup=engine, marker=marker)
    return figure


def caption(figure: go.Figure) -> str:
    """Return a figure's title and note as plain text."""
    title = figure.layout.title
    text = ": ".join(filter(None, (title.text, title.subtitle.text)))
    return re.sub(r"<[^>]*>", "", text.replace("<br>", " "))


def nothing(title: str, needs: str = "") -> go.Figure:
    """Return the figure of what was not measured; `needs` says what it takes."""
    figure = finish(go.Figure(), title, 200, needs)
    figure.add_annotation(text="nothing measured yet", showarrow=False, font={"size": 14})
    return figure.update_xaxes(visible=False).update_yaxes(visible=False)


def is_empty(figure: go.Figure) -> bool:
    """Return whether a figure draws nothing."""
    return not figure.data
