"""How every figure looks: one colour and hatch a precision, one marker an engine, units on axes.

Colours alone vanish in print and for some eyes, so whatever a colour says is said again by a hatch, a marker or a
word. Bars lie down and figures grow downwards: at a phone's 390 pixels width is what is scarce.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from qnb.precision import PRECISIONS

Box = tuple[float, float, float, float]  # left, bottom, right, top
INK, QUIET, CLEAR = "#222222", "#666666", "rgba(255,255,255,0)"
HATCHES = dict(zip(PRECISIONS, ("|", "", "/", "x", "+", "\\", "-", "-", "+"), strict=True))
DASHES = dict(
    zip(PRECISIONS, ("dot", "solid", "dash", "dashdot", "dot", "longdash", "dot", "longdashdot", "dash"), strict=True)
)
# where a point's label stands first: points of two precisions often coincide
SIDES = dict(
    zip(
        PRECISIONS,
        ("top center", "top left", "bottom left", "top right", "bottom center", "middle left", "bottom right",
         "middle right", "top right"), strict=True,
    )
)  # fmt: skip
MARKERS = {"eager": "circle", "cuda_graph": "diamond"}
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
PANEL_PX, MARKER_PX, LETTER_PX, LINE_PX = 810, 6, 7, 13  # a picture's panel; half a marker; of a label


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
    """Return the ticks of a logarithmic axis, each written out: Plotly's own leave a lone 2 for 200.

    They are at 1, 2 and 5 of each power of ten, or where `low` and `high` are too near for two of them, even steps.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    if sum(low <= value <= high for value in values) < 2:
        size = (high - low or low) / 3
        power = 10.0 ** math.floor(math.log10(size))
        step = power * max(digit for digit in (1, 2, 5) if digit * power <= size)
        values = [step * count for count in range(max(1, math.floor(low / step)), math.ceil(high / step) + 1)]
    told = {number(value): value for value in values}
    return {"type": "log", "tickvals": list(told.values()), "ticktext": list(told)}


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


def part_labels(figure: go.Figure) -> go.Figure:
    """Move points' labels to the sides where they cover the least of other labels and points.

    Places are reckoned for the width that pictures have; in a narrower window labels are nearer to each other.
    """
    room = (PANEL_PX, (figure.layout.height or 420) - TOP_PX - BOTTOM_PX)
    points = [trace for trace in figure.data if "markers" in (trace.mode or "") and trace.x is not None]
    scales = [_scale(figure, axis) for axis in "xy"]
    at = [[(scales[0](x) * room[0], scales[1](y) * room[1]) for x, y in zip(trace.x, trace.y, strict=True)
           if x is not None] for trace in points]  # fmt: skip
    near = 2 * MARKER_PX  # of another's point: a label there would seem to be its
    markers = [[(x - near, y - near, x + near, y + near) for x, y in part] for part in at]
    choices: dict[int, dict[str, Box]] = {}  # by trace: a label's box at each side, the wanted one first
    for place, (trace, part) in enumerate(zip(points, at, strict=True)):
        if text := next((one.strip() for one in trace.text or () if one.strip()), ""):
            sides = dict.fromkeys((trace.textposition, *SIDES.values()))
            choices[place] = {side: _box(part[0], (LETTER_PX * len(text), LINE_PX), side) for side in sides}
    for _ in range(3):  # as the first choices were made without knowing of the last
        for place, boxes in choices.items():
            others = [mine[points[other].textposition] for other, mine in choices.items() if other != place]
            others += [box for other, part in enumerate(markers) if other != place for box in part]
            points[place].textposition = min(boxes, key=lambda side: sum(_shared(boxes[side], box) for box in others))
    return figure


def _scale(figure: go.Figure, axis: str) -> Callable[[float], float]:
    """Return where a value lies on an axis, 0 to 1, as nearly as is known before it is drawn."""
    drawn = figure.layout[f"{axis}axis"]
    place = math.log10 if drawn.type == "log" else float
    known = [trace[axis] for trace in figure.data if trace[axis] is not None]
    values = [place(value) for part in known for value in part if value is not None]
    low, high = drawn.range or (min(values, default=0.0), max(values, default=1.0))
    return lambda value: (place(value) - low) / ((high - low) or 1.0)


def _box(point: tuple[float, float], size: tuple[float, float], side: str) -> Box:
    """Return left, bottom, right and top of a label of that size beside a point, in pixels, upwards."""
    vertical, horizontal = side.split()
    ends = []
    for middle, long, way in zip(
        point, size, ({"left": -1, "center": 0, "right": 1}[horizontal],
                      {"bottom": -1, "middle": 0, "top": 1}[vertical]), strict=True):  # fmt: skip
        start = middle + way * (MARKER_PX + long / 2) - long / 2
        ends.append((start, start + long))
    (left, right), (bottom, top) = ends
    return left, bottom, right, top


def _shared(one: Box, other: Box) -> float:
    """Return the pixels that two boxes have in common."""
    wide, high = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    return max(wide, 0.0) * max(high, 0.0)


def panels(figure_height: int, titles: Sequence[str], **more: Any) -> go.Figure:
    """Return a figure of panels, one above the other, for a figure of that height; titles stand on the left."""
    room = figure_height - TOP_PX - BOTTOM_PX
    figure = make_subplots(
        len(titles), 1, subplot_titles=titles, vertical_spacing=GAP_PX / room if len(titles) > 1 else 0, **more
    )
    return figure.update_annotations(x=0, xanchor="left", font_size=13)


def nothing(title: str, needs: str = "") -> go.Figure:
    """Return the figure of what was not measured yet; `needs` says what it would take."""
    figure = layout(go.Figure(), title, 220)
    text = "nothing measured yet" + (f"<br><sup>{needs}</sup>" if needs else "")
    figure.add_annotation(text=text, showarrow=False, font={"size": 14})
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
