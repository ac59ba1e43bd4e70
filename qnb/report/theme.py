"""The look of every figure, but for the formats' colours and markers, which `qnb.precision` sets: one Plotly template.

Colour and marker identify the format, a hollow or filled marker the engine. Both survive print.
"""

import math
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import plotly.io as pio

from qnb.columns import column, format_number, format_value, header
from qnb.flags import is_disturbed
from qnb.precision import BASELINE, PRECISIONS
from qnb.report.results import stack, task_name, unfused

CONFIG = {"responsive": True, "showSendToCloud": False}  # of figures in pages: nothing is uploaded from them
INK, QUIET = "#222222", "#6b6b6b"
MOST_PX = 700  # of a figure's height
TOP_PX, NOTE_PX, FOOT_PX = 46, 17, 56  # of the title, of a line below it, of an axis with its title
ROW_PX, LEAST_ROW_PX = 23, 15  # of a format in a panel
GAP_PX = 52  # between two panels, for the lower one's title
ROOM = 0.5  # of what an axis spans, for the numbers at its ends
MARK = 0.2  # of that room, for half a mark
PAD = "\u2002\u2009"  # between a mark and its number
NOTE_LETTERS = 54  # in a line below the title, so that it fits a phone
PANEL_LETTERS = (24, 14)  # in a line of a panel's title, of two side by side and of three
NEEDS = f"needs the accuracy of {BASELINE.upper()} and of another format"
HOLLOW = ("eager", "not significant")
PUBLISHED = "published"  # in place of an engine
LOG_AXIS = {"type": "log", "tickvals": [digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5)],
            "tickformat": ",~g"}  # fmt: skip

pio.templates["qnb"] = go.layout.Template(
    layout={
        "font": {"size": 12, "color": INK, "family": "system-ui, 'Liberation Sans', Arial, sans-serif"},
        "title": {"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top",
                  "font": {"size": 16, "weight": 700}, "subtitle": {"font": {"size": 12, "color": QUIET}},
                  "pad": {"l": 12, "t": 14}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "yanchor": "top"},
        **{axis: {"zeroline": False, "title": {"font": {"size": 12}}} for axis in ("xaxis", "yaxis")},
    }
)  # fmt: skip


def symbol(precision: str, engine: str = "") -> str:
    """Return a point's marker: the format's, hollow for eager; a line for what the paper published."""
    return "line-ns-open" if engine == PUBLISHED else PRECISIONS[precision].marker + "-open" * (engine in HOLLOW)


def by_format(frame: pd.DataFrame, *custom: str) -> dict[str, Any]:
    """Return what Plotly Express needs to colour a frame by its format and to show its column `hover`."""
    formats = {name: PRECISIONS[name].color for name in PRECISIONS if name in set(frame.precision)}
    return {"color": "precision", "color_discrete_map": formats, "category_orders": {"precision": [*formats]},
            "custom_data": ["hover", *custom]}  # fmt: skip


def hovers(frame: pd.DataFrame, *names: str) -> list[str]:
    """Return what the pointer shows of each row: its format and engine, the named quantities, and its counts."""
    texts = []
    for row in frame.to_dict("records"):
        lines = [", ".join(filter(None, (PRECISIONS[row["precision"]].label, escape(str(row.get("engine") or "")))))]
        for name in ("batch_size", *names, "requests", "passes", "n_items"):
            if value := format_value(name, row.get(name)):
                lines.append(f"{column(name).label}: {value} {column(name).unit}".rstrip())
        texts.append("<br>".join([*lines, *["disturbed by other processes"] * is_disturbed(row.get("flags"))]))
    return texts


def panels(frame: pd.DataFrame, names: Sequence[str], *also: str) -> pd.DataFrame:
    """Return a row per row and named quantity: `panel`, `value`, `text`, and `hover`, which shows `also` too.

    An asterisk in a text marks what other processes disturbed.
    """
    values = {name: frame[name].astype(float) * column(name).scale for name in names}
    parts = [frame.assign(panel=header(name), value=values[name], hover=hovers(frame, name, *also)) for name in names]
    long = stack(parts).dropna(subset=["value"])
    return long.assign(text=numbers(long.value, long.get("flags")))


def fusing(runs: pd.DataFrame) -> str:
    """Return what a note adds where a figure shows captured rows with and without fused kernels."""
    return f"; captured without fusing kernels: {names}" if (names := unfused(runs)) else ""


def points(frame: pd.DataFrame, x: str, y: str, *properties: str, **more: Any) -> go.Figure:
    """Draw a point per row of a frame with `hover`: a colour per format, hollow for eager; more columns style it."""
    frame = frame.assign(symbol=[symbol(row.precision, row.engine) for row in frame.itertuples()])
    figure = px.scatter(frame, x=x, y=y, render_mode="svg", **by_format(frame, "symbol", *properties), **more)
    style_points(figure.update_traces(marker_size=10), "symbol", *properties)
    return figure


def stacked(frame: pd.DataFrame, parts: Sequence[str], title: str, note: str) -> go.Figure:
    """Draw panels with a bar per format: parts end to end, from solid to pale, and their sum.

    Parameters
    ----------
    frame
        Columns panel, precision and hover, and the length of each part.
    parts
        Names of columns, as the legend has them.
    title, note
        What the figure shows, and how it is read.
    """
    opacity = {name: 1 - 0.7 * place / max(len(parts) - 1, 1) for place, name in enumerate(parts)}
    total = frame[[*parts]].sum(axis=1)
    frame = frame.assign(low=0.0, high=total, is_low=False, text=numbers(total, frame.get("flags")))
    long = frame.melt(["panel", "precision", "hover"], parts, "part", "length")
    look = {**by_format(frame), **facets(*_shape(frame)), "color": "part"}
    figure = px.bar(long, x="length", y="precision", **look).update_traces(showlegend=False)
    for bar in figure.data:
        bar.marker = {"color": [PRECISIONS[name].color for name in bar.y], "opacity": opacity[bar.name]}
    for part in parts if len(parts) > 1 else ():
        shade = f"rgba(107,107,107,{opacity[part]})"  # a legend shows no opacity of its own
        figure.add_bar(x=[None], y=[None], name=part, legendgroup=part, marker_color=shade)
    return _finish_panels(_add_numbers(figure, frame), frame, title, note)


def dots(frame: pd.DataFrame, title: str, note: str, change: str = "") -> go.Figure:
    """Draw panels with a row per format: a dot per engine, joined, with its number and what is known of its error.

    A panel of several engines is logarithmic where all values are above 0. Other panels without errors begin at 0.

    Parameters
    ----------
    frame
        Columns panel, precision, engine, value, text and hover; above and below, an error's sides, where it is known.
    title, note
        What the figure shows, and how it is read.
    change
        The title of an axis that all panels share, with a line at 0; values then have no numbers.
    """
    if frame.empty:
        return nothing(title, NEEDS if change else "")
    frame = frame.assign(**{name: frame.get(name, math.nan) for name in ("above", "below")})
    mine = frame.engine != PUBLISHED
    text = frame.text.where(mine, "")
    twice = frame.assign(text=text).duplicated(["panel", "precision", "text"])
    highest = frame.value.where(mine).groupby([frame.panel, frame.precision]).transform("max")
    frame = frame.assign(
        joined=mine, symbol=[symbol(row.precision, row.engine) for row in frame.itertuples()],
        low=frame.value - frame.below.fillna(0), high=frame.value + frame.above.fillna(0),
        is_low=mine & (frame.value < highest), text=text.mask(twice, ""),
    )  # fmt: skip
    figure = px.line(
        frame, x="value", y="precision", markers=True, line_group="joined", error_x="above", error_x_minus="below",
        **by_format(frame, "symbol"), **facets(*_shape(frame)),
    )  # fmt: skip
    figure.update_traces(showlegend=False, cliponaxis=False, marker_size=9, error_x={"thickness": 1.5, "width": 0})
    style_points(figure, "symbol")
    figure = figure if change else _add_numbers(figure, frame)
    return _finish_panels(figure, frame, title, note, change)


def _add_numbers(figure: go.Figure, frame: pd.DataFrame) -> go.Figure:
    """Write each row's `text` beyond its `low` or `high` end, and give each panel an axis with room for it."""
    look = {**by_format(frame), **facets(*_shape(frame)), "color": None, "custom_data": ["side"]}
    frame = frame.assign(
        end=frame.high.mask(frame.is_low, frame.low), text=PAD + frame.text + PAD,
        side=frame.is_low.map({True: "middle left", False: "middle right"}),
    )  # fmt: skip
    texts = px.scatter(frame, x="end", y="precision", text="text", **look).data
    for trace, (_, rows) in zip(texts, frame.groupby("panel", sort=False), strict=True):
        trace.update(mode="text", textposition=[row[0] for row in trace.customdata], customdata=None, textfont_size=11)
        figure.add_trace(trace.update(hoverinfo="skip", hovertemplate=None, cliponaxis=False))
        low, high, kind = rows.low.min(), rows.high.max(), "linear"
        if frame.is_low.any() and low > 0:
            low, high, kind = math.log10(low), math.log10(high), "log"
        elif (rows.low == rows.high).all():  # no errors
            low = min(low, 0.0)
        room = ROOM * (high - low or 1.0)
        is_marked = "value" in rows and rows.value.eq(0).any()
        begin = room if low else MARK * room * is_marked  # a mark at 0 needs room for its half
        span = [low - begin, high + room]
        figure.layout[trace.xaxis.replace("x", "xaxis")].update(type=kind, range=span)
    return figure.update_xaxes(matches=None)


def style_points(figure: go.Figure, *properties: str) -> None:
    """Give every point a marker of its own: custom data holds the hover text, then the named properties."""
    for trace in figure.select_traces(lambda trace: trace.customdata is not None):
        for place, name in enumerate(properties, 1):
            trace.marker[name] = [row[place] for row in trace.customdata]


def facets(columns: int, height: int, gap: float = 0.03) -> dict[str, Any]:
    """Return what Plotly Express needs for a panel per name in column `panel`, in a figure so high."""
    spacing = min(0.9, GAP_PX / (height - TOP_PX - FOOT_PX - 2 * NOTE_PX))
    return {"facet_col": "panel", "facet_col_wrap": columns, "facet_col_spacing": gap, "facet_row_spacing": spacing}


def _shape(frame: pd.DataFrame) -> tuple[int, int]:
    """Return how many panels stand side by side, and the figure's height in pixels."""
    panels = frame.panel.nunique()
    columns = min(panels, 2 if panels < 5 else 3)
    rows = math.ceil(panels / columns)
    return columns, min(MOST_PX, 150 + rows * (ROW_PX * frame.precision.nunique() + 10) + (rows - 1) * GAP_PX)


def most_panels(formats: int) -> int:
    """Return how many panels of so many formats fit a figure without rows that touch each other."""
    return 3 * max(1, int((MOST_PX - 150 + GAP_PX) / (LEAST_ROW_PX * formats + 10 + GAP_PX)))


def _finish_panels(figure: go.Figure, frame: pd.DataFrame, title: str, note: str, change: str = "") -> go.Figure:
    """Leave out the axes' numbers where each value has its own."""
    columns, height = _shape(frame)
    is_roomy = frame.panel.nunique() <= 2 * columns and frame.precision.nunique() < 10
    break_name = "-no-<br>" if is_roomy else "-no-"  # the longest takes a phone's width
    names = [name.replace("-no-", break_name) for name in PRECISIONS]
    figure.update_yaxes(showgrid=False, title="", tickvals=list(PRECISIONS), ticktext=names, tickfont={"size": 11})
    if change:
        figure.update_xaxes(zeroline=True, zerolinecolor=QUIET, showticklabels=True, tickangle=0, nticks=5, title="")
        figure.update_xaxes(title=change, row=1, col=1)
    else:
        figure.update_xaxes(showticklabels=False, showgrid=False, title="")
    return finish(figure, title, height, note)


def finish_lines(figure: go.Figure, x_title: str, title: str, height: int, note: str) -> go.Figure:
    """Give every panel a vertical axis of its own, and the lowest ones the horizontal axis's title."""
    figure.update_yaxes(title="", matches=None, showticklabels=True).update_xaxes(title="")
    return finish(figure.update_xaxes(title=x_title, row=1), title, height, note)


def finish(figure: go.Figure, title: str, height: int, note: str = "") -> go.Figure:
    """Give a figure the template, a title, a note on how to read it, its height in pixels and its panels' titles.

    The legend lies below the axis, where it takes room from the panels instead of covering them.
    """
    is_narrow = len({axis.domain for axis in figure.select_xaxes()}) > 2
    for panel in figure.layout.annotations:  # Plotly Express names them column=value
        panel.update(text=wrapped(panel.text.partition("=")[2], PANEL_LETTERS[is_narrow]), font={"size": 11})
    note, lines = wrapped(note, NOTE_LETTERS), [panel.text.count("<br>") + 2 for panel in figure.layout.annotations]
    top = TOP_PX + NOTE_PX * (note.count("<br>") + bool(note)) + 14 * max(lines, default=0)
    height = min(height, MOST_PX)
    figure.update_layout(
        template="plotly_white+qnb", height=height, margin={"l": 12, "r": 16, "t": top, "b": FOOT_PX}, bargap=0.25,
        title={"text": title, "subtitle": {"text": note}},
        legend={"title": "", "y": -(FOOT_PX - 8) / max(height - top - FOOT_PX, 1)},
    )  # fmt: skip
    return figure.update_traces(
        hovertemplate="%{customdata[0]}<extra></extra>", selector=lambda trace: trace.customdata is not None
    )


def wrapped(text: str, letters: int) -> str:
    """Break a text between words into lines of so many letters, as Plotly writes them."""
    return "<br>".join(textwrap.wrap(text, letters, break_long_words=False))


def numbers(values: pd.Series, flags: pd.Series | None = None) -> list[str]:
    """Return values as the short texts beside marks.

    With the rows' flags an asterisk marks what other processes disturbed.
    """
    stars = ["*" * is_disturbed(each) for each in flags] if flags is not None else [""] * len(values)
    return [format_number(value, 3) + star for value, star in zip(values, stars, strict=True)]


def caption(figure: go.Figure) -> str:
    """Return a figure's title as plain text, with its note in parentheses."""
    title, note = figure.layout.title.text or "", figure.layout.title.subtitle.text
    return (f"{title} ({note})" if note else title).replace("<br>", " ")


def label(task: str) -> str:
    """Return a task's name for a figure: Plotly reads tags, so the name is escaped."""
    return escape(task_name(task))


def nothing(title: str, needs: str = "") -> go.Figure:
    """Return the figure of what was not measured, which has no data; `needs` says what it takes."""
    figure = finish(go.Figure(), title, 200, needs)
    figure.add_annotation(text="nothing measured yet", showarrow=False, font={"size": 14})
    return figure.update_xaxes(visible=False).update_yaxes(visible=False)
