"""Frame in, Plotly figure out: the paper's six figures, measured beside published.

One colour a precision everywhere. What was measured here is a filled bar; what the paper published is a hollow one
with a dotted edge and says so in its name. Axes carry units; each bar's text can be read without its colour.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from qnb import paper
from qnb.precision import PRECISIONS
from qnb.table import headline

PUBLISHED = "published, Llama-3.2-1B"
KEY = f"<br><sup>filled: measured here; hollow: {PUBLISHED} on a T4</sup>"
SCALED = ", scaled over the precisions<br><sup>1 is the best of them, of utilization the highest</sup>"
METRICS = {
    "throughput_rps": ("throughput", "requests/s", True),
    "seconds_per_request": ("seconds per request", "s", False),
    "utilization_pct": ("utilization", "%", None),
    "memory_mib": ("peak memory", "MiB", False),
}  # name: title, unit, whether more is better (None: neither)
LABELS = {
    "arc_challenge": "ARC Challenge", "arc_easy": "ARC Easy", "gsm8k": "GSM8K", "gsm8k_cot": "GSM8K CoT",
    "gsm8k_average": "GSM8K average",
    "hellaswag": "HellaSwag", "mmlu": "MMLU", "mmlu_humanities": "MMLU humanities", "mmlu_other": "MMLU other",
    "mmlu_social_sciences": "MMLU social sciences", "mmlu_stem": "MMLU STEM", "sample_easy": "easy questions",
    "sample_hard": "hard questions", "sample_completion": "completion", "sample_arithmetic": "arithmetic",
    "sample_exam": "exam", "sample_exam_humanities": "exam humanities", "sample_exam_other": "exam other",
    "sample_exam_social_sciences": "exam social sciences", "sample_exam_stem": "exam STEM",
}  # fmt: skip


def label(task: str) -> str:
    """Return a task's name as people read it."""
    return LABELS.get(task, task)


def _layout(figure: go.Figure, title: str, height: int = 460) -> go.Figure:
    figure.update_layout(
        title={"text": title, "x": 0.01, "xanchor": "left", "font": {"size": 17}},
        template="plotly_white",
        font={"size": 13},
        height=height,
        margin={"l": 60, "r": 20, "t": 80, "b": 60},
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
        bargap=0.18,
    )
    return figure


def _nothing(title: str) -> go.Figure:
    figure = _layout(go.Figure(), title, 240)
    figure.add_annotation(text="nothing measured yet", showarrow=False, font={"size": 15})
    return figure.update_xaxes(visible=False).update_yaxes(visible=False)


def _solid(precision: str) -> dict[str, Any]:
    return {"color": PRECISIONS[precision].color}


def _hollow(precision: str) -> dict[str, Any]:
    color = PRECISIONS[precision].color
    dots = {"shape": ".", "size": 4, "solidity": 0.15, "bgcolor": "rgba(255,255,255,0)", "fgcolor": color}
    return {"color": "rgba(255,255,255,0)", "line": {"color": color, "width": 1.6}, "pattern": dots}


def _measured(figure: go.Figure, precision: str, tasks: pd.Series, values: pd.Series, hover: str, **more: Any) -> None:
    """Add a precision's bars, a task each, as measured here."""
    names, text = tasks.map(label), f"%{{x}}: {hover}"
    figure.add_bar(name=precision, x=names, y=values, marker=_solid(precision), hovertemplate=text, **more)


def _published(figure: go.Figure, precision: str, tasks: pd.Series, values: pd.Series) -> None:
    """Add a precision's bars, a task each, as the paper gives them."""
    name, text = f"{precision} ({PUBLISHED})", "%{x}: %{y:.2f} % as published"
    figure.add_bar(name=name, x=tasks.map(label), y=values, marker=_hollow(precision), hovertemplate=text)


def accuracy(scores: pd.DataFrame) -> go.Figure:
    """Figure 1: accuracy by task and precision with one standard error, published values hollow.

    Parameters
    ----------
    scores
        A row a task, metric, filter and precision, as `qnb.Study.scores` returns.
    """
    title = "Accuracy by task"
    if scores.empty:
        return _nothing(title)
    frame = headline(scores)
    # subjects of a group come to dozens; a group and its groups are what a figure can show
    tops = set(frame.asked) | set(frame[frame.group.astype(bool)].task)
    frame = frame[frame.task.isin(tops)]
    figure = go.Figure()
    for precision, rows in frame.groupby("precision", sort=False):
        error = {"type": "data", "array": 100 * rows.stderr.astype(float), "thickness": 1.2, "width": 3}
        hover = "%{y:.2f} % ± %{error_y.array:.2f}, n = %{customdata}"
        more = {"error_y": error, "customdata": rows["items"]}
        _measured(figure, str(precision), rows.task, 100 * rows.value, hover, **more)
    published = paper.accuracy()
    published = published[published.task.isin(tops)]
    for precision, rows in published.groupby("precision", sort=False):
        _published(figure, str(precision), rows.task, 100 * rows.acc)
    figure.update_yaxes(title="accuracy, %", rangemode="tozero")
    return _layout(figure, f"{title}, with one standard error")


def change(table: pd.DataFrame) -> go.Figure:
    """Figure 2: change in accuracy against BF16 in percent of BF16's, published values hollow.

    Parameters
    ----------
    table
        Table 2, as `qnb.Study.table2` returns.
    """
    title = "Relative change in accuracy against BF16"
    if table.empty or "change_pct" not in table:
        return _nothing(title)
    table = table.dropna(subset="change_pct")
    figure = go.Figure()
    for precision, rows in table.groupby("precision", sort=False):
        hover = "%{y:.2f} % (%{customdata[0]:.2f} points), McNemar p = %{customdata[1]:.3f}, n = %{customdata[2]}"
        paired = rows[["change_pp", "mcnemar_p", "items"]]
        _measured(figure, str(precision), rows.task, rows.change_pct, hover, customdata=paired)
        known = rows.dropna(subset="published_change_pct")
        if len(known):
            _published(figure, str(precision), known.task, known.published_change_pct)
    figure.add_hline(y=0, line_width=1, line_color="#444")
    figure.update_yaxes(title="change, % of BF16's accuracy")
    return _layout(figure, title)


def metric(table: pd.DataFrame, name: str, figure: go.Figure | None = None, **place: int) -> go.Figure:
    """Draw one metric of Table 3 or 4 as a bar a precision, published hollow beside it."""
    title, unit, _ = METRICS[name]
    figure = figure if figure is not None else _layout(go.Figure(), title + KEY)
    published = {"memory_mib": "published_vram_mib"}.get(name, f"published_{name}")
    for column, marker, source in ((name, _solid, "measured"), (published, _hollow, PUBLISHED)):
        rows = table.dropna(subset=column) if column in table else table[:0]
        for precision, value in zip(rows.precision, rows.get(column, ()), strict=True):
            figure.add_bar(
                name=f"{precision}, {source}",
                x=[precision],
                y=[value],
                offsetgroup=source,
                marker=marker(precision),
                showlegend=False,
                text=[f"{value:,.0f}" if value >= 100 else f"{value:.3g}"],
                textposition="outside",
                textfont={"size": 11},
                textangle=0,
                constraintext="none",
                cliponaxis=False,
                hovertemplate=f"{precision}, {source}: %{{y:.4g}} {unit}<extra></extra>",
                **place,
            )
    figure.update_yaxes(title=unit, rangemode="tozero", **place)
    return figure


def metrics(table: pd.DataFrame, title: str) -> go.Figure:
    """Figures 3 and 5: throughput, seconds per request, utilization and memory, a panel each with its own unit.

    Parameters
    ----------
    table
        Table 3 or 4, as `qnb.Study.table3` and `table4` return.
    title
        What was run.
    """
    if table.empty:
        return _nothing(title)
    figure = make_subplots(2, 2, subplot_titles=[text for text, _, _ in METRICS.values()], vertical_spacing=0.2)
    for place, name in enumerate(METRICS):
        metric(table, name, figure, row=place // 2 + 1, col=place % 2 + 1)
    return _layout(figure, title + KEY, 720)


def heatmap(table: pd.DataFrame, title: str) -> go.Figure:
    """Figures 4 and 6: each metric scaled over the precisions, 1 the best of them; the cell says the value itself.

    Utilization is scaled by its size: more of it is neither better nor worse.
    """
    if table.empty:
        return _nothing(title)
    shown = [name for name in METRICS if table[name].notna().any()]
    shades, texts = [], []
    for name in shown:
        values = table[name].astype(float)
        span = values.max() - values.min()
        scaled = (values - values.min()) / span if span else values * 0 + 1
        shades.append(list(1 - scaled if METRICS[name][2] is False else scaled))
        texts.append([f"{value:.4g} {METRICS[name][1]}" for value in values])
    figure = go.Figure(
        go.Heatmap(
            z=shades, x=list(table.precision), y=[METRICS[name][0] for name in shown], text=texts,
            texttemplate="%{text}", colorscale="Blues", zmin=0, zmax=1.25, xgap=3, ygap=3,
            colorbar={"title": "scaled", "tickvals": [0, 1]},
            hovertemplate="%{y}, %{x}: %{text}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    return _layout(figure, title, 400)


def draw_all(scores: pd.DataFrame, tables: dict[int, pd.DataFrame]) -> dict[str, go.Figure]:
    """Return the paper's six figures by file name.

    Parameters
    ----------
    scores
        As for `accuracy`.
    tables
        Tables 2, 3 and 4 by number.
    """
    small, large = "Batch size 1", "Largest batch"
    return {
        "fig1_accuracy": accuracy(scores),
        "fig2_change": change(tables[2]),
        "fig3_bs1_metrics": metrics(tables[3], small),
        "fig4_bs1_heatmap": heatmap(tables[3], f"{small}{SCALED}"),
        "fig5_maxbatch_metrics": metrics(tables[4], large),
        "fig6_maxbatch_heatmap": heatmap(tables[4], f"{large}{SCALED}"),
    }


def save(figures: dict[str, go.Figure], folder: Path) -> list[Path]:
    """Write each figure as HTML; plotly.js lies once beside them, so no network is needed to look."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.html"
        figure.write_html(path, include_plotlyjs="directory", full_html=True)
        paths.append(path)
    return paths
