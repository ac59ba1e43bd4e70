"""What quantizing costs: accuracy by task, its change against the baseline, and that change's interval."""

from __future__ import annotations

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from qnb.columns import header
from qnb.precision import BASELINE
from qnb.report import paper, theme
from qnb.report.results import Results, task_name
from qnb.report.tables import build, headline

LANES = 0.86  # of a task's height, shared by its formats
NEEDS = f"needs the accuracy of {BASELINE.upper()} and of another format"


def accuracy(results: Results) -> go.Figure:
    """Draw Figure 1: accuracy by task and format, with one standard error."""
    title = "How accurate is each format?"
    if results.scores.empty:
        return theme.nothing(title)
    frame = headline(results.scores)
    frame = frame[frame.group.astype(bool) | (frame.task == frame.asked)]  # a group stands for its subjects
    error = 100 * frame.stderr.astype(float)
    frame = frame.assign(accuracy_pct=100 * frame.value, stderr_pp=error)
    above, below = error.clip(upper=100 - frame.accuracy_pct), error.clip(upper=frame.accuracy_pct)
    frame = _lanes(frame.assign(above=above, below=below), "accuracy_pct", "stderr_pp")
    figure = px.bar(frame, x="accuracy_pct", error_x="above", error_x_minus="below", **_bars(frame))
    if paper.is_published_model(results.model):
        published = paper.accuracy().rename(columns={"accuracy_pct": "published"})
        _published(figure, frame.merge(published, on=["task", "precision"]))
    figure.update_traces(error_x={"color": theme.INK, "thickness": 1.2, "width": 2}, selector={"type": "bar"})
    figure.update_xaxes(title=header("accuracy_pct"), rangemode="tozero")
    return _by_task(figure, frame, title, "whiskers: one standard error; right is better")


def change(results: Results) -> go.Figure:
    """Draw Figure 2: change in accuracy in percent of the baseline's, as the paper shows it."""
    title = f"How much of {BASELINE.upper()}'s accuracy changes?"
    frame = build(results, "table2_change").dropna(subset=["change_pct"])
    if frame.empty:
        return theme.nothing(title, NEEDS)
    frame = _lanes(frame, "change_pct", "change_pp", "p_mcnemar")
    figure = px.bar(frame, x="change_pct", **_bars(frame))
    if paper.is_published_model(results.model):
        _published(figure, frame.assign(published=frame.published_change_pct).dropna(subset=["published"]))
    figure.add_vline(x=0, line_width=1, line_color=theme.INK)
    figure.update_xaxes(title=f"change, % of {BASELINE.upper()}'s accuracy")
    return _by_task(figure, frame, title, "left of the line is a loss; the forest plot has the intervals")


def forest(results: Results) -> go.Figure:
    """Draw the change in accuracy in points with its 95 % interval; filled where it is significant after Holm."""
    title = "Which changes in accuracy are real?"
    frame = build(results, "table2_change").dropna(subset=["change_pp"])
    if frame.empty:
        return theme.nothing(title, NEEDS)
    frame = _lanes(frame, "change_pp", "low_pp", "high_pp", "p_mcnemar", "p_holm").assign(
        above=frame.high_pp - frame.change_pp, below=frame.change_pp - frame.low_pp,
        marker=[theme.symbol(row.precision, "" if row.significant is True else "eager") for row in frame.itertuples()],
    )  # fmt: skip
    figure = px.scatter(
        frame, x="change_pp", y="lane", error_x="above", error_x_minus="below", symbol="marker",
        symbol_map="identity", **theme.by_format(frame),
    )  # fmt: skip
    figure.update_traces(marker_size=9, error_x={"thickness": 1.6, "width": 3})
    figure.add_vline(x=0, line_width=1, line_color=theme.INK)
    figure.update_xaxes(title=header("change_pp"))
    note = f"change against {BASELINE.upper()} with its 95 % interval; filled: significant after Holm"
    return _by_task(figure, frame, title, note)


def _lanes(frame: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Add `lane`, a row's place on the axis of tasks, and `hover`, with the named quantities.

    Each format keeps its lane within every task, the first on top.
    """
    tasks = list(dict.fromkeys(frame.task))
    formats = theme.by_format(frame)["category_orders"]["precision"]
    lanes, hovers = [], []
    for row in frame.to_dict("records"):
        lanes.append(tasks.index(row["task"]) + LANES * ((formats.index(row["precision"]) + 0.5) / len(formats) - 0.5))
        hovers.append(theme.hover({**row, "engine": task_name(row["task"])}, *names))
    return frame.assign(lane=lanes, hover=hovers)


def _bars(frame: pd.DataFrame) -> dict:
    return {"y": "lane", "orientation": "h", "barmode": "overlay", "opacity": 1, **theme.by_format(frame)}


def _published(figure: go.Figure, rows: pd.DataFrame) -> None:
    """Mark the paper's values with a line across each bar."""
    figure.add_scatter(
        x=rows.published, y=rows.lane, mode="markers", name="published", hovertemplate="%{x:.2f} % as published",
        marker={"symbol": "line-ns", "size": 9, "line": {"width": 2, "color": theme.INK}},
    )  # fmt: skip


def _by_task(figure: go.Figure, frame: pd.DataFrame, title: str, note: str) -> go.Figure:
    """Lay out lanes in groups, a group per task, the first on top."""
    tasks, formats = list(dict.fromkeys(frame.task)), frame.precision.nunique()
    figure.update_traces(width=LANES / formats, selector={"type": "bar"})
    for edge in range(1, len(tasks)):
        figure.add_hline(y=edge - 0.5, line_width=1, line_color="#dddddd")
    figure.update_yaxes(
        tickvals=list(range(len(tasks))), ticktext=[theme.label(task) for task in tasks],
        range=[len(tasks) - 0.5, -0.5], showgrid=False, title="",
    )  # fmt: skip
    return theme.finish(figure, title, 160 + len(tasks) * (14 + 13 * formats), note)
