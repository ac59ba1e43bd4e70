"""The look of every figure: one Plotly template and the three ways to draw.

Colour and marker identify the format (`qnb.precision` sets them). A hollow or filled marker identifies the engine.
Both survive print.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import plotly.io as pio

from qnb.columns import column, format_value, header, is_disturbed
from qnb.precision import PRECISIONS
from qnb.report.results import stack, task_name

INK, QUIET = "#222222", "#777777"
MOST_PX = 700  # of a figure's height
TOP_PX, NOTE_PX, FOOT_PX = 46, 17, 56  # of the title, of a line below it, of an axis with its title
ROW_PX, GAP_PX = 22, 52  # of a format in a panel, and between two panels for the lower one's title
ROOM = 0.5  # of what an axis spans, for the numbers at its ends
NOTE_LETTERS = 60  # in a line below the title, so that it fits a phone
HOLLOW = ("eager", "not significant")
PUBLISHED = "published (T4)"  # in place of an engine
LOG_AXIS = {"type": "log", "tickvals": [digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5)],
            "tickformat": ",~g"}  # fmt: skip
COLORS = {name: precision.color for name, precision in PRECISIONS.items()}

pio.templates["qnb"] = go.layout.Template(
    layout={
        "font": {"size": 12, "color": INK, "family": "system-ui, 'Liberation Sans', Arial, sans-serif"},
        "title": {"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top",
                  "font": {"size": 16, "weight": 700}, "subtitle": {"font": {"size": 12, "color": QUIET}},
                  "pad": {"l": 12, "t": 14}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "yanchor": "top"},
        "xaxis": {"zeroline": False, "title": {"font": {"size": 12}}},
        "yaxis": {"zeroline": False, "title": {"font": {"size": 12}}},
    }
)  # fmt: skip


def symbol(precision: str, engine: str = "") -> str:
    """Return a point's marker: the format's, hollow for eager; a line for what the paper published."""
    return "line-ns-open" if engine == PUBLISHED else PRECISIONS[precision].marker + "-open" * (engine in HOLLOW)


def symbols(frame: pd.DataFrame) -> list[str]:
    """Return the marker of each row."""
    return [symbol(row.precision, row.engine) for row in frame.itertuples()]


def by_format(frame: pd.DataFrame, *custom: str) -> dict[str, Any]:
    """Return what Plotly Express needs to colour a frame by its format and to show its column `hover`."""
    formats = [name for name in PRECISIONS if name in set(frame.precision)]
    return {"color": "precision", "color_discrete_map": COLORS, "category_orders": {"precision": formats},
            "custom_data": ["hover", *custom]}  # fmt: skip


def hovers(frame: pd.DataFrame, *names: str) -> list[str]:
    """Return what the pointer shows of each row: its format and engine, the named quantities, and its counts."""
    return [_hover(row, names) for row in frame.to_dict("records")]


def _hover(row: Mapping[str, Any], names: Iterable[str]) -> str:
    lines = [", ".join(filter(None, (PRECISIONS[row["precision"]].label, escape(str(row.get("engine") or "")))))]
    for name in ("batch_size", *names, "requests", "passes", "n_items"):
        if value := format_value(name, row.get(name)):
            lines.append(f"{column(name).label}: {value} {column(name).unit}".rstrip())
    lines += ["disturbed by other processes"] * is_disturbed(row.get("flags"))
    return "<br>".join(lines)


def panels(frame: pd.DataFrame, names: Sequence[str], *also: str) -> pd.DataFrame:
    """Return a row per row and named quantity: `panel` says which, `value`, and `hover`, which shows `also` too."""
    values = {name: frame[name].astype(float) * column(name).scale for name in names}
    parts = [frame.assign(panel=header(name), value=values[name], hover=hovers(frame, name, *also)) for name in names]
    return stack(parts).dropna(subset=["value"])


def points(frame: pd.DataFrame, x: str, y: str, *custom: str, **more: Any) -> go.Figure:
    """Draw a point per row of a frame with `hover`: a colour per format, hollow for eager."""
    figure = px.scatter(
        frame.assign(marker=symbols(frame)), x=x, y=y, symbol="marker", symbol_map="identity", render_mode="svg",
        **by_format(frame, *custom), **more,
    )  # fmt: skip
    return _add_engines(figure.update_traces(marker_size=10), frame)


def bars(frame: pd.DataFrame, parts: Mapping[str, float], title: str, note: str = "") -> go.Figure:
    """Draw panels with a bar per format, its parts end to end, with its text at its end.

    Parameters
    ----------
    frame
        Columns panel, precision, text, hover and each of `parts`; above and below, an interval's two sides, where
        they are known.
    parts
        Columns, each with its opacity in the format's colour.
    title, note
        What the figure shows, and how it is read.
    """
    whiskers = ["above", "below"]
    frame = frame.assign(**{name: frame.get(name, math.nan) for name in whiskers})
    ends = frame[[*parts, "above"]].sum(axis=1)
    frame = frame.assign(gap=frame.above.fillna(0), room=ROOM * ends.groupby(frame.panel).transform("max"))
    shades = {**parts, "gap": 0.0, "room": 0.0}  # the text stands in the room, beyond the whisker
    long = frame.melt(["panel", "precision", "text", "hover", *whiskers], list(shades), "part", "length")
    long["text"] = long.text.where(long.part == "room", "")
    long[whiskers] = long[whiskers].where(long.part == list(parts)[-1])
    look = {**by_format(frame), "color": "part", "error_x": "above", "error_x_minus": "below"}
    figure = px.bar(long, x="length", y="precision", text="text", **look, **_two_by_two(frame))
    for bar in figure.data:
        bar.marker = {"color": [COLORS[name] for name in bar.y], "opacity": shades[bar.name]}
    figure.update_traces(
        textposition="inside", insidetextanchor="start", insidetextfont={"size": 11, "color": INK},
        textangle=0, constraintext="none", showlegend=False, error_x={"color": INK, "thickness": 1.2, "width": 3},
    )  # fmt: skip
    for part, opacity in parts.items() if len(parts) > 1 else ():
        figure.add_bar(x=[None], y=[None], name=part, legendgroup=part, marker_color=f"rgba(34,34,34,{opacity})")
    return _finish_panels(figure.update_xaxes(matches=None), frame, title, note)


def dots(frame: pd.DataFrame, title: str, note: str = "") -> go.Figure:
    """Draw panels with a row per format, a dot per engine, those with a text joined; logarithmic if all are above 0.

    Parameters
    ----------
    frame
        Columns panel, precision, engine, value, text and hover.
    title, note
        What the figure shows, and how it is read.
    """
    least = frame.value.where(frame.text != "").groupby([frame.panel, frame.precision]).transform("min")
    frame = frame.assign(
        symbol=symbols(frame), joined=frame.text != "",
        side=["middle left" if low else "middle right" for low in frame.value == least],
        text=frame.text.mask(frame.duplicated(["panel", "precision", "text"]), ""),
    )  # fmt: skip
    look = by_format(frame, "symbol", "side")
    figure = px.line(
        frame, x="value", y="precision", text="text", markers=True, line_group="joined", **look, **_two_by_two(frame)
    )
    style_points(figure, "symbol")
    for trace in figure.data:
        trace.textposition = [row[2] for row in trace.customdata]
    figure.update_traces(showlegend=False, cliponaxis=False, textfont_size=11, marker_size=10)
    figure.update_xaxes(matches=None)
    for name in {trace.xaxis for trace in figure.data}:
        values = [x for trace in figure.select_traces({"xaxis": name}) for x in trace.x]
        if min(values) > 0:
            low, high = math.log10(min(values)), math.log10(max(values))
            room = ROOM * (high - low or 1.0)
            figure.layout[name.replace("x", "xaxis")].update(type="log", range=[low - room, high + room])
    return _finish_panels(_add_engines(figure, frame), frame, title, note)


def style_points(figure: go.Figure, *properties: str) -> None:
    """Give every point a marker of its own: custom data holds the hover text, then the named properties."""
    for trace in figure.select_traces(lambda trace: trace.customdata is not None):
        for place, name in enumerate(properties, 1):
            trace.marker[name] = [row[place] for row in trace.customdata]


def _two_by_two(frame: pd.DataFrame) -> dict[str, Any]:
    """Return what Plotly Express needs for a panel per name in column `panel`."""
    gap = GAP_PX / (_height(frame) - 120) if frame.panel.nunique() > 2 else 0
    return {"facet_col": "panel", "facet_col_wrap": 2, "facet_col_spacing": 0.05, "facet_row_spacing": gap}


def _height(frame: pd.DataFrame) -> int:
    rows = math.ceil(frame.panel.nunique() / 2)
    return min(MOST_PX, 140 + rows * (ROW_PX * frame.precision.nunique() + 10) + (rows - 1) * GAP_PX)


def _finish_panels(figure: go.Figure, frame: pd.DataFrame, title: str, note: str) -> go.Figure:
    """Leave out the axes' numbers, since each value has its own."""
    figure.update_xaxes(showticklabels=False, showgrid=False, title="").update_yaxes(showgrid=False, title="")
    return finish(figure, title, _height(frame), note)


def _add_engines(figure: go.Figure, frame: pd.DataFrame) -> go.Figure:
    """Add the engines' markers to the legend, where there are several."""
    engines = list(dict.fromkeys(frame.engine))
    for engine in engines if len(engines) > 1 else ():
        marker = {"symbol": symbol("fp32", engine), "color": QUIET, "size": 9}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=engine, legendgroup=engine, marker=marker)
    return figure


def finish(figure: go.Figure, title: str, height: int, note: str = "") -> go.Figure:
    """Give a figure the template, a title, a note on how to read it, its height in pixels and its panels' titles.

    The legend lies below the axis, where it takes room from the panels instead of covering them.
    """
    lines = textwrap.wrap(note, NOTE_LETTERS)
    height = min(height, MOST_PX)
    top = TOP_PX + NOTE_PX * len(lines) + 24 * bool(figure.layout.annotations)
    figure.update_layout(
        template="plotly_white+qnb", height=height, margin={"l": 12, "r": 16, "t": top, "b": FOOT_PX}, bargap=0.25,
        title={"text": title, "subtitle": {"text": "<br>".join(lines)}},
        legend={"title": "", "y": -(FOOT_PX - 8) / max(height - top - FOOT_PX, 1)},
    )  # fmt: skip
    for panel in figure.layout.annotations:  # Plotly Express names them column=value
        panel.update(text=panel.text.partition("=")[2], font={"size": 11})
    return figure.update_traces(
        hovertemplate="%{customdata[0]}<extra></extra>", selector=lambda trace: trace.customdata is not None
    )


def numbers(values: pd.Series) -> list[str]:
    """Return values as the short texts beside marks: three significant digits, or all those before the point."""
    return [f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" for value in values]


def caption(figure: go.Figure) -> str:
    """Return a figure's title and note as plain text."""
    title = figure.layout.title
    return ": ".join(filter(None, (title.text, title.subtitle.text))).replace("<br>", " ")


def label(task: str) -> str:
    """Return a task's name for a figure: Plotly reads tags, so the name is escaped."""
    return escape(task_name(task))


def nothing(title: str, needs: str = "") -> go.Figure:
    """Return the figure of what was not measured, which has no data; `needs` says what it takes."""
    figure = finish(go.Figure(), title, 200, needs)
    figure.add_annotation(text="nothing measured yet", showarrow=False, font={"size": 14})
    return figure.update_xaxes(visible=False).update_yaxes(visible=False)
