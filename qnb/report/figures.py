"""Every figure by name, the paper's six first; those of accuracy, of trade-offs, and of one quantity of choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from qnb.columns import column, header
from qnb.precision import BASELINE
from qnb.report import paper, theme
from qnb.report.findings import SETTINGS
from qnb.report.recommend import FITS, RULED_OUT, UNSURE, Advice, candidates, facts
from qnb.report.results import SPEED, Results
from qnb.report.speed_figures import energy, heatmap, memory, metrics, roofline, sweep, timeline, token_time
from qnb.report.scores import MEAN, headline
from qnb.report.tables import build
from qnb.report.verdicts import accuracies

ACCURACY = "accuracy_pct"
QUANTITIES = [name for name in SPEED if column(name).unit]
NEEDS = f"needs the accuracy of {BASELINE.upper()} and of another format"
CHANGE = ("change_pp", "low_pp", "high_pp")
OPACITY = {FITS: 1.0, UNSURE: 0.45, RULED_OUT: 0.15}


def accuracy(results: Results) -> go.Figure:
    """Draw Figure 1: accuracy by task and format, with one standard error."""
    title = "How accurate is each format?"
    if results.scores.empty:
        return theme.nothing(title)
    frame = headline(results.scores)
    frame = frame[frame.group.astype(bool) | (frame.task == frame.asked)]  # a group stands for its subjects
    share, error = 100 * frame.value, 100 * frame.stderr.astype(float)
    frame = frame.assign(accuracy_pct=share, above=error.clip(upper=100 - share), below=error.clip(upper=share))
    published = paper.accuracy().set_index(["task", "precision"]).accuracy_pct.rename("published")
    frame = frame.join(published, on=["task", "precision"])
    return _bars(results, frame, "accuracy_pct", title, "whiskers: one standard error; right is better")


def change(results: Results) -> go.Figure:
    """Draw Figure 2: change in accuracy in percent of the baseline's, as the paper shows it."""
    title = f"How much of {BASELINE.upper()}'s accuracy changes?"
    frame = build(results, "table2_change").dropna(subset=["change_pct"])
    if frame.empty:
        return theme.nothing(title, NEEDS)
    frame = frame.rename(columns={"published_change_pct": "published"}).assign(above=math.nan, below=math.nan)
    return _bars(results, frame, "change_pct", title, "left of 0 is a loss; the forest plot has the intervals")


def forest(results: Results) -> go.Figure:
    """Draw the change in accuracy in points with its 95 % interval; filled where it is significant after Holm."""
    title = "Which changes in accuracy are real?"
    frame = build(results, "table2_change").dropna(subset=["change_pp"])
    if frame.empty:
        return theme.nothing(title, NEEDS)
    engines = frame.significant.eq(True).map({True: "significant after Holm", False: "not significant"})
    frame = _with_interval(frame).assign(
        engine=engines, name=frame.task.map(theme.label), hover=theme.hovers(frame, *CHANGE, "p_mcnemar", "p_holm")
    )
    figure = theme.points(frame, "change_pp", "name", error_x="above", error_x_minus="below", orientation="h")
    figure.update_xaxes(title=header("change_pp"))
    return _by_task(figure, frame, title, f"change against {BASELINE.upper()} with its 95 % interval")


def _bars(results: Results, frame: pd.DataFrame, value: str, title: str, note: str) -> go.Figure:
    """Draw a bar per task and format, and a line across it at the column `published`, beside the paper's model."""
    is_published = paper.is_published_model(results.model)
    frame = frame.assign(
        name=frame.task.map(theme.label), hover=theme.hovers(frame, value, *["published"] * is_published)
    )
    look = {"y": "name", "orientation": "h", **theme.by_format(frame)}
    figure = px.bar(frame, x=value, error_x="above", error_x_minus="below", barmode="group", **look)
    figure.update_traces(error_x={"color": theme.INK, "thickness": 1.2, "width": 2})
    if is_published:
        lines = px.scatter(frame, x="published", **look)
        marker = {"symbol": "line-ns", "size": 9, "line": {"width": 2, "color": theme.INK}}
        figure.add_traces(lines.update_traces(marker=marker, showlegend=False).data)
        note += "; black lines: published"
    figure.update_xaxes(title=header(value))
    return _by_task(figure, frame, title, note)


def _by_task(figure: go.Figure, frame: pd.DataFrame, title: str, note: str) -> go.Figure:
    """Group what is drawn by task, the first on top; each format keeps its place within every task."""
    tasks = list(dict.fromkeys(frame.name))
    for trace in figure.data:
        trace.offsetgroup = trace.name
    figure.update_layout(scattermode="group", scattergap=0.25)
    figure.update_yaxes(categoryorder="array", categoryarray=tasks, autorange="reversed", showgrid=False, title="")
    figure.update_xaxes(zeroline=True, zerolinecolor=theme.INK)
    return theme.finish(figure, title, 160 + len(tasks) * (14 + 13 * frame.precision.nunique()), note)


def _with_interval(frame: pd.DataFrame) -> pd.DataFrame:
    """Add how far the 95 % interval of a change reaches above and below it."""
    return frame.assign(above=frame.high_pp - frame.change_pp, below=frame.change_pp - frame.low_pp)


def front(results: Results, cost: str) -> go.Figure:
    """Draw mean accuracy over a cost at batch size 1, with the Pareto front through the best.

    Parameters
    ----------
    results
        A study's frames.
    cost
        A speed's or a memory's column of which less is better.
    """
    title = f"Accuracy against {column(cost).label.rsplit('(')[-1].rstrip(')')}"
    frame = candidates(results, "bs1").dropna(subset=[cost, "accuracy_pct"])
    if frame.empty:
        return theme.nothing(title, "needs accuracy and a speed of the same format")
    frame = _with_interval(frame).assign(
        cost=frame[cost] * column(cost).scale, hover=theme.hovers(frame, cost, "accuracy_pct", *CHANGE)
    )
    figure = theme.points(frame, "cost", "accuracy_pct", error_y="above", error_y_minus="below")
    edge = pareto(frame)
    figure.add_scatter(
        x=edge.cost, y=edge.accuracy_pct, mode="lines+text", text=[f"  {name}" for name in edge.precision],
        textposition="top right", line={"shape": "hv", "color": "#999999", "dash": "dot"}, hoverinfo="skip",
        name="Pareto front", cliponaxis=False,
    )  # fmt: skip
    figure.update_xaxes(title=header(cost), **theme.LOG_AXIS).update_yaxes(title="mean accuracy over tasks, %")
    note = "up and left is better; bars: 95 % interval of the change; points on the line are Pareto-optimal"
    return theme.finish(figure, title, 460, note)


def pareto(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that no other beats in both `cost` (less is better) and `accuracy_pct`, by cost."""
    frame = frame.sort_values(["cost", "accuracy_pct"], ascending=[True, False])
    return frame[frame.accuracy_pct > frame.accuracy_pct.cummax().shift(fill_value=-math.inf)]


def decision(advice: Advice) -> go.Figure:
    """Draw speed over memory, with what is allowed: solid fits, pale may fit, faint does not.

    Parameters
    ----------
    advice
        As `qnb.report.recommend.choose` returns it.
    """
    title = "What fits, and what is recommended?"
    demand, speed = advice.demand, column(advice.demand.rank_by)
    frame = advice.candidates.dropna(subset=["peak_memory_mib", demand.rank_by])
    if frame.empty:
        return theme.nothing(title)
    frame = frame.assign(
        speed=frame[demand.rank_by] * speed.scale, opacity=frame.fit.map(OPACITY),
        size=[20 if name in advice.of(FITS).index[:1] else 10 for name in frame.index],
        hover=["<br>".join(filter(None, (f"{name}: {row.fit}", facts(row, demand), row.reasons)))
               for name, row in frame.iterrows()],
    )  # fmt: skip
    figure = theme.points(frame, "peak_memory_mib", "speed", "opacity", "size")
    theme.style_points(figure, "opacity", "size")
    limit = {"line_color": theme.QUIET, "line_dash": "dash", "line_width": 1.5}
    if demand.memory_mib is not None:
        figure.add_vline(x=demand.memory_mib, **limit)
    if demand.speed_limit:  # a rate of 0 asks for nothing, and has no place on a logarithmic axis
        figure.add_hline(y=demand.speed_limit * speed.scale, **limit)
    figure.update_xaxes(title=header("peak_memory_mib"), rangemode="tozero")
    figure.update_yaxes(title=header(demand.rank_by), **theme.LOG_AXIS)
    note = "solid: fits; pale: may fit; faint: does not; large: recommended; dashed: what is allowed"
    return theme.finish(figure, title, 460, note)


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
    setting, task
        Of a speed: ``"bs1"`` or ``"maxbatch"``. Of accuracy: a task, or the mean over tasks.
    precisions
        These formats only; empty takes all.
    baseline
        Give values in percent of this format's, of the same engine; empty gives them as they are.
    """
    frame = _with_range(results, quantity, setting, task)
    unit, scale = column(quantity).unit, column(quantity).scale
    if baseline:
        of_engine = frame[frame.precision == baseline].set_index("engine")[quantity]
        unit, scale = f"% of {baseline}", 100 / frame.engine.map(of_engine).astype(float)
    frame = frame.assign(
        value=frame[quantity] * scale, above=frame.above * scale, below=frame.below * scale,
        panel=[f"{engine}, {unit}" if engine else unit for engine in frame.engine],
        hover=theme.hovers(frame, quantity, "change_pp", "low_pp", "high_pp"),
    )  # fmt: skip
    frame = frame[frame.precision.isin(precisions or frame.precision)].dropna(subset=["value"])
    title = column(quantity).label[:1].upper() + column(quantity).label[1:]
    if frame.empty:
        return theme.nothing(title)
    where = theme.label(task) if quantity == ACCURACY else SETTINGS[setting]
    return theme.bars(frame.assign(text=theme.numbers(frame.value)), {"value": 1.0}, title, where)


def _with_range(results: Results, quantity: str, setting: str, task: str) -> pd.DataFrame:
    """Return a quantity's rows, and how far its interval or range reaches `above` and `below` it, if there is one."""
    if quantity == ACCURACY:
        frame = accuracies(results, task).reset_index(names="precision").assign(engine="")
        return _with_interval(frame)
    frame = results.timed(setting)
    if quantity != "throughput_rps":  # the one whose range over passes is kept
        return frame.assign(above=math.nan, below=math.nan)
    return frame.assign(above=frame.high_rps - frame.throughput_rps, below=frame.throughput_rps - frame.low_rps)


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
