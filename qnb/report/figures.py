"""Every figure by name, the paper's six first; those of accuracy, of trade-offs, and of one quantity of choice."""

import math
from collections.abc import Callable, Collection

import pandas as pd
import plotly.graph_objects as go

from qnb.columns import column, header
from qnb.precision import BASELINE
from qnb.report import paper, recommend, theme
from qnb.report.findings import SETTINGS
from qnb.report.results import SPEED, Results, stack
from qnb.report.scores import headline
from qnb.report.speed_figures import energy, heatmap, memory, metrics, roofline, sweep, timeline, token_time
from qnb.report.tables import build
from qnb.report.verdicts import CHANGE, POOLED, Verdict, accuracies, tasks, with_pooled

ACCURACY = "accuracy_pct"
QUANTITIES = [name for name in SPEED if column(name).unit]
QUALITIES = ("change_pp", "kl_mean_nats", "perplexity_change_pct")  # the first that was measured is drawn
SIGNS = {str(verdict): verdict.text for verdict in Verdict}
COST_TICKS = [digit * 10.0**power for power in range(-6, 9) for digit in (1, 1.5, 2, 3, 5, 7)]


def accuracy(results: Results) -> go.Figure:
    """Draw Figure 1: accuracy by task and format, with one standard error."""
    title = "How accurate is each format?"
    if results.scores.empty:
        return theme.nothing(title)
    frame = headline(results.scores)
    frame = frame[frame.group.astype(bool) | (frame.task == frame.asked)]  # a group stands for its subjects
    share, error = 100 * frame.value, 100 * frame.stderr.astype(float)
    note = "lines: one standard error; right is better; each panel has its own scale"
    frame = frame.assign(accuracy_pct=share, above=error.clip(upper=100 - share), below=error.clip(upper=share))
    return _by_task(results, frame.assign(engine=""), ACCURACY, title, note)


def change(results: Results) -> go.Figure:
    """Draw Figure 2: change in accuracy in percent of the baseline's, as the paper shows it."""
    frame = build(results, "table2_change").assign(engine="")
    note = "left of 0 is a loss; the forest plot has the intervals"
    return _by_task(results, frame, "change_pct", f"How much of {BASELINE.upper()}'s accuracy changes?", note)


def forest(results: Results) -> go.Figure:
    """Draw the change in accuracy in points with its 95 % interval, filled where it is significant.

    A task's change is so after Holm's correction. The mean is not tested: its interval leaves out 0.
    """
    frame = with_pooled(results)
    is_real = frame.significant.eq(True) | ((frame.task == POOLED) & (frame.low_pp * frame.high_pp > 0))
    engines = is_real.map({True: "significant", False: "not significant"})
    note = ("left of 0 is a loss; lines: 95 % interval; filled: significant (tasks: after Holm); "
            "the verdict rests on the mean's interval")  # fmt: skip
    return _by_task(results, _with_interval(frame).assign(engine=engines), "change_pp",
                    "Which changes in accuracy are real?", note)  # fmt: skip


def _by_task(results: Results, frame: pd.DataFrame, name: str, title: str, note: str) -> go.Figure:
    """Draw a panel per task, and what the paper published beside its own model."""
    frame = frame.dropna(subset=[name])
    if name in (published := paper.accuracy()) and paper.is_published_model(results.model):
        there = published.merge(frame[["task", "precision"]].drop_duplicates()).dropna(subset=[name])
        frame = stack([frame, there.assign(engine=theme.PUBLISHED)])
    shown = list(dict.fromkeys(frame.task))
    most, asked = theme.most_panels(frame.precision.nunique()), set(results.scores.get("asked", ()))
    if len(shown) > most:
        note = f"{note}; {len(shown) - most} more tasks are in the tables"
        first = sorted(shown[:-1], key=lambda task: task not in asked)[: most - 1]  # a group before its parts
        shown = [*(task for task in shown if task in first), shown[-1]]  # the last is the mean
    frame = frame.assign(
        panel=frame.task.map(theme.label), value=frame[name], text=theme.numbers(frame[name]),
        hover=theme.hovers(frame, name, "low_pp", "high_pp", "p_mcnemar", "p_holm"),
    )[frame.task.isin(shown)]  # fmt: skip
    is_change = name.startswith("change")
    return theme.dots(frame, title, note, header(name) if is_change else "")


def _with_interval(frame: pd.DataFrame) -> pd.DataFrame:
    """Add how far the 95 % interval of a change reaches above and below it."""
    return frame.assign(above=frame.high_pp - frame.change_pp, below=frame.change_pp - frame.low_pp)


def front(results: Results, cost: str) -> go.Figure:
    """Draw quality over a cost with each format's better engine, and the Pareto front through the best.

    Parameters
    ----------
    results
        A study's frames.
    cost
        ``"tpot_s"``, or ``"peak_memory_mib"``, which is the weights where no allocator was read.
    """
    title = f"What does saving {'time' if cost == 'tpot_s' else 'memory'} cost?"
    frame = recommend.summary(results)
    frame = frame.assign(tpot_s=frame[["tpot_eager_s", "tpot_captured_s"]].min(axis=1), engine="")
    if cost == "peak_memory_mib" and frame[cost].isna().all():
        cost = "weights_mib"
    is_base = frame.precision == BASELINE
    quality = next((name for name in QUALITIES if any(frame[name][~is_base].notna())), QUALITIES[0])
    frame = frame.assign(**{quality: frame[quality].mask(is_base, 0.0)}).dropna(subset=[cost, quality])
    if len(frame) < 2:
        return theme.nothing(title, f"{theme.NEEDS}, and what each format takes")
    is_loss, costs = column(quality).better == "less", frame[cost] * column(cost).scale
    frame = _with_interval(frame).assign(
        cost=costs, quality=frame[quality] * (-1 if is_loss else 1),
        hover=theme.hovers(frame, cost, quality, *CHANGE[1:], "words"),
    )  # fmt: skip
    figure = _points_and_front(frame.sort_values(["cost", "quality"]), quality)
    ends = [math.log10(costs.min()) - 0.15, math.log10(costs.max()) + 0.05]
    figure.update_xaxes(title=header(cost), type="log", tickvals=COST_TICKS, tickformat=",~g", range=ends)
    figure.update_yaxes(title=header(quality), autorange="reversed" if is_loss else True)
    note = "up and left is better; dotted line: Pareto-optimal; sign beside a name: its verdict; costs are logarithmic"
    return theme.finish(figure, title, 420, note + "; bars: 95 % interval" * (not is_loss) + theme.fusing(results.bs1))


def _points_and_front(frame: pd.DataFrame, quality: str) -> go.Figure:
    """Draw a point per format, and the line through the best: their names stand beside them, others in the legend."""
    figure = theme.points(frame, "cost", quality, error_y="above", error_y_minus="below")
    names = {row.precision: f"{row.precision} {SIGNS[row.verdict]}" for row in frame.itertuples()}
    edge = pareto(frame)
    for trace in figure.data:
        trace.update(name=names[trace.name], showlegend=trace.name not in set(edge.precision))
    is_near = edge.cost.shift(-1) < 1.03 * edge.cost  # to the next point, which has its name above it
    return figure.add_scatter(
        x=edge.cost, y=edge[quality], text=theme.PAD + edge.precision.map(names) + theme.PAD, mode="lines+text",
        textposition=is_near.map({True: "bottom left", False: "top left"}), textfont_size=11, hoverinfo="skip",
        line={"color": theme.QUIET, "dash": "dot", "shape": "hv"}, showlegend=False, cliponaxis=False,
    )  # fmt: skip


def pareto(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that no other beats in both `cost` (less is better) and `quality` (more is), by cost."""
    frame = frame.sort_values(["cost", "quality"], ascending=[True, False])
    return frame[frame.quality > frame.quality.cummax().shift(fill_value=-math.inf)]


def measured(results: Results) -> dict[str, list[str]]:
    """Return the quantities that were measured, each with its settings; accuracy with its tasks."""
    places = {ACCURACY: tasks(results)}
    for name in QUANTITIES:
        places[name] = [setting for setting in SETTINGS if results.timed(setting)[name].notna().any()]
    return {name: each for name, each in places.items() if each}


def compare(
    results: Results, quantity: str, place: str, precisions: Collection[str] = (), baseline: str = ""
) -> go.Figure:
    """Draw one quantity, a dot per engine; of accuracy with a 95 % interval.

    Parameters
    ----------
    results
        A study's frames.
    quantity
        A name in `measured`. The interval of an accuracy is that of its change against BF16.
    place
        ``"bs1"`` or ``"maxbatch"``; of accuracy a task.
    precisions
        These formats only; empty takes all.
    baseline
        Give values in percent of this format's, of the same engine; empty gives them as they are.
    """
    title = column(quantity).label[:1].upper() + column(quantity).label[1:]
    if quantity == ACCURACY:
        frame = _with_interval(accuracies(results, place).reset_index(names="precision").assign(engine=""))
    else:
        frame = results.timed(place)
    frame = theme.panels(frame, [quantity], *CHANGE)
    if baseline:
        scale = 100 / frame.engine.map(frame[frame.precision == baseline].set_index("engine").value)
        scaled = {name: frame[name] * scale for name in ("value", "above", "below") if name in frame}
        frame = frame.assign(panel=f"% of {baseline}", **scaled, text=theme.numbers(scaled["value"]))
    frame = frame[frame.precision.isin(precisions or frame.precision)].dropna(subset=["value"])
    note = f"{SETTINGS.get(place) or theme.label(place)}; hollow: eager"
    return theme.dots(frame, title, note + theme.fusing(frame))


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
    "timeline_bs1": timeline,
}


def draw_all(results: Results) -> dict[str, go.Figure]:
    """Return every figure by name, drawn once a study; those of what was not measured say so."""
    return dict(results.once("figures", lambda: {name: draw(results) for name, draw in FIGURES.items()}))
