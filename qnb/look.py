"""How every figure looks: one colour and hatch a precision, one marker an engine, units on axes.

Colours alone vanish in print and for some eyes, so whatever a colour says is said again by a hatch, a marker or a
word. Bars lie down and figures grow downwards: at a phone's 390 pixels width is what is scarce.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from qnb.precision import PRECISIONS

INK, CLEAR = "#222222", "rgba(255,255,255,0)"
HATCHES = dict(zip(PRECISIONS, ("|", "", "/", "x", "+", "\\", "-", "-", "+"), strict=True))
DASHES = dict(
    zip(PRECISIONS, ("dot", "solid", "dash", "dashdot", "dot", "longdash", "dot", "longdashdot", "dash"), strict=True)
)
# where a point's label stands: points of two precisions often coincide
SIDES = dict(
    zip(
        PRECISIONS,
        ("top center", "top left", "bottom left", "top right", "bottom center", "middle left", "bottom right",
         "middle right", "top right"), strict=True,
    )
)  # fmt: skip
MARKERS = {"eager": "circle", "graphed": "diamond", "continuous": "square"}
OTHER_MARKER = "x"  # of an engine that has none of its own yet
LABELS = {
    "arc_challenge": "ARC Challenge", "arc_easy": "ARC Easy", "gsm8k": "GSM8K", "gsm8k_cot": "GSM8K CoT",
    "gsm8k_average": "GSM8K average",
    "hellaswag": "HellaSwag", "mmlu": "MMLU", "mmlu_humanities": "MMLU humanities", "mmlu_other": "MMLU other",
    "mmlu_social_sciences": "MMLU social sciences", "mmlu_stem": "MMLU STEM", "sample_easy": "easy questions",
    "sample_hard": "hard questions", "sample_completion": "completion", "sample_arithmetic": "arithmetic",
    "sample_exam": "exam", "sample_exam_humanities": "exam humanities", "sample_exam_other": "exam other",
    "sample_exam_social_sciences": "exam social sciences", "sample_exam_stem": "exam STEM",
}  # fmt: skip
TOP_PX, BOTTOM_PX, GAP_PX = 76, 60, 58


def name(task: str) -> str:
    """Return a task's name as people read it."""
    return LABELS.get(task, str(task))


def label(task: str) -> str:
    """Return a task's name for a figure: Plotly reads tags, so a name that is not ours is escaped."""
    return escape(name(task))


def number(value: float) -> str:
    """Return a value in the digits that carry it: three, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ticks(low: float, high: float) -> dict[str, Any]:
    """Return the ticks of a logarithmic axis, each written out: Plotly's own leave a lone 2 for 200."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return {"type": "log", "tickvals": values, "ticktext": [number(value) for value in values]}


def bars(precisions: Sequence[str], filled: bool = True, hatch: str | None = None) -> dict[str, Any]:
    """Return the marker of bars, one a precision: filled for what was measured here, hollow for what was published.

    The hatch is the precision's, in white on its colour or in its colour on nothing; another one may be given.
    """
    colors = [PRECISIONS[precision].color for precision in precisions]
    shapes = [HATCHES[precision] if hatch is None else hatch for precision in precisions]
    blank = ["white" if filled else CLEAR] * len(colors)  # as many as colours, or Plotly picks one that contrasts
    back, front = (colors, blank) if filled else (blank, colors)
    pattern = {"shape": shapes, "size": 6, "solidity": 0.22 if filled else 0.14, "bgcolor": back, "fgcolor": front}
    return {"color": back, "line": {"color": colors, "width": 1.2}, "pattern": pattern}


def marker(precision: str, engine: str, size: int = 11) -> dict[str, Any]:
    """Return a point's marker: the precision's colour, the engine's shape."""
    symbol = MARKERS.get(engine, OTHER_MARKER)
    return {"color": PRECISIONS[precision].color, "symbol": symbol, "size": size, "line": {"color": INK, "width": 1}}


def title(figure: go.Figure) -> str:
    """Return a figure's title and the smaller line below it as plain text."""
    return re.sub(r"<[^>]*>", "", figure.layout.title.text.replace("<br>", ": "))


def layout(figure: go.Figure, title: str, height: int = 420, note: str = "") -> go.Figure:
    """Give a figure its title, a smaller line below it, its height and its margins, all in pixels.

    The legend lies below the axis, where it pushes the margin instead of covering what is drawn.
    """
    text = f"<b>{title}</b>" + (f"<br><sup>{note}</sup>" if note else "")
    figure.update_layout(
        template="plotly_white",
        title={"text": text, "font": {"size": 16}, "x": 0, "xref": "container", "xanchor": "left",
               "y": 1 - (20 if note else 14) / height, "yref": "container", "yanchor": "top", "pad": {"l": 12}},
        font={"size": 12, "color": INK, "family": "system-ui, 'Liberation Sans', Arial, sans-serif"},
        height=height,
        margin={"l": 12, "r": 16, "t": TOP_PX, "b": BOTTOM_PX},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "yanchor": "top",
                "y": -54 / max(height - TOP_PX - BOTTOM_PX, 1), "traceorder": "normal"},
        hoverlabel={"align": "left"},
    )  # fmt: skip
    return figure.update_yaxes(automargin=True).update_xaxes(automargin=True)


def panels(figure_height: int, titles: Sequence[str], **more: Any) -> go.Figure:
    """Return a figure of panels, one above the other, for a figure of that height; titles stand on the left."""
    room = figure_height - TOP_PX - BOTTOM_PX
    figure = make_subplots(
        len(titles), 1, subplot_titles=titles, vertical_spacing=GAP_PX / room if len(titles) > 1 else 0, **more
    )
    return figure.update_annotations(x=0, xanchor="left", font_size=13)


def nothing(title: str) -> go.Figure:
    """Return the figure of what was not measured yet."""
    figure = layout(go.Figure(), title, 220)
    figure.add_annotation(text="nothing measured yet", showarrow=False, font={"size": 14})
    return figure.update_xaxes(visible=False).update_yaxes(visible=False)


def is_empty(figure: go.Figure) -> bool:
    """Return whether a figure draws nothing."""
    return not figure.data


def key(figure: go.Figure, engine: str) -> None:
    """Add an engine's marker to the legend."""
    symbol = MARKERS.get(engine, OTHER_MARKER)
    figure.add_scatter(
        x=[None], y=[None], mode="markers", name=engine or "engine not recorded",
        marker={"symbol": symbol, "size": 11, "color": "white", "line": {"color": INK, "width": 1.5}},
    )  # fmt: skip
