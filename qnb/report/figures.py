"""Frame in, Plotly figure out: the paper's six figures, measured beside published, and the list of all there are.

What was measured here is a filled bar; what the paper published is a hollow one and says so in its name. What the
paper lacks is drawn by `tradeoff` and `cost`.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from qnb.report import cost_figures as cost
from qnb.report import paper
from qnb.report import recommend as choose
from qnb.report import theme as look
from qnb.report import tradeoff_figures as tradeoff
from qnb.report.results import Results
from qnb.report.tables import headline
from qnb.speed.monitor import disturbed

PUBLISHED = "published, Llama-3.2-1B"
KEY = "filled: measured; hollow: published (Llama-3.2-1B, T4)"
METRICS = {
    "throughput_rps": ("throughput", "requests/s", True),
    "seconds_per_request": ("seconds per request", "s", False),
    "utilization_pct": ("utilization", "%", None),
    "memory_mib": ("peak memory", "MiB", False),
}  # name: title, unit, whether more is better (None: neither)
BAR_PX = 12  # height of one lying bar


def accuracy(scores: pd.DataFrame) -> go.Figure:
    """Figure 1: accuracy by task and precision with one standard error, published values hollow.

    Parameters
    ----------
    scores
        A row a task, metric, filter and precision, as `qnb.Study.scores` returns.
    """
    title = "Accuracy by task"
    if scores.empty:
        return look.nothing(title)
    frame = headline(scores)
    # subjects of a group come to dozens; a group and its groups are what a figure can show
    tops = list(dict.fromkeys(frame[frame.group.astype(bool) | (frame.task == frame.asked)].task))
    frame = frame[frame.task.isin(tops)]
    figure = go.Figure()
    for precision, rows in frame.groupby("precision", sort=False):
        hover = [
            f"{precision}, {look.label(row.task)}: {100 * row.value:.2f} %"
            + (f" ± {100 * row.stderr:.2f} (one standard error)" if pd.notna(row.stderr) else "")
            + f"<br>n = {row.n:,}"
            for row in rows.rename(columns={"items": "n"}).itertuples()
        ]
        above, below = (100 * rows.stderr.astype(float).clip(upper=room) for room in (1 - rows.value, rows.value))
        error = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.2, "width": 2}
        _measured(figure, str(precision), rows.task, 100 * rows.value, hover, error_x=error)
    published = paper.accuracy()
    published = published[published.task.isin(tops)]
    for precision, rows in published.groupby("precision", sort=False):
        _published(figure, str(precision), rows.task, 100 * rows.acc)
    figure.update_xaxes(title="accuracy, % ± one standard error", rangemode="tozero")
    return _by_task(figure, tops, title, KEY if len(published) else "")


def _measured(
    figure: go.Figure, precision: str, tasks: pd.Series, values: pd.Series, hover: list, **more: Any
) -> None:
    """Add a precision's bars, a task each, as measured here."""
    figure.add_bar(
        orientation="h", name=precision, legendgroup=precision, y=tasks.map(look.label), x=values,
        marker=look.bars([precision] * len(values)), hovertext=hover, hoverinfo="text", **more,
    )  # fmt: skip


def _published(figure: go.Figure, precision: str, tasks: pd.Series, values: pd.Series) -> None:
    """Add a precision's bars, a task each, as the paper gives them."""
    figure.add_bar(
        orientation="h", name=f"{precision} ({PUBLISHED})", legendgroup=precision, showlegend=False,
        y=tasks.map(look.label), x=values, marker=look.bars([precision] * len(values), filled=False),
        hovertemplate=f"{precision}, %{{y}}: %{{x:.2f}} % as published<extra></extra>",
    )  # fmt: skip


def _by_task(figure: go.Figure, tasks: list[str], title: str, note: str) -> go.Figure:
    """Lay out bars that lie in groups, a group a task, the first on top."""
    figure.update_yaxes(
        autorange="reversed", categoryorder="array", categoryarray=[look.label(task) for task in tasks]
    )
    figure.update_layout(bargap=0.25, bargroupgap=0.05)
    return look.layout(figure, title, 170 + len(tasks) * (BAR_PX * len(figure.data) + 14), note)


def change(table: pd.DataFrame) -> go.Figure:
    """Figure 2: change in accuracy against BF16 in percent of BF16's, published values hollow.

    Parameters
    ----------
    table
        Table 2, as `qnb.Study.table2` returns.
    """
    title = "Relative change in accuracy"
    if table.empty or "change_pct" not in table:
        return look.nothing(title)
    table = table.dropna(subset=["change_pct"])
    figure = go.Figure()
    for precision, rows in table.groupby("precision", sort=False):
        hover = [
            f"{precision}, {look.label(row['task'])}: {row['change_pct']:+.2f} % ({row['change_pp']:+.2f} points)"
            + (f"<br>McNemar p = {row['p_mcnemar']:.3g}" if pd.notna(row["p_mcnemar"]) else "")
            + f"<br>n = {row['items']:,.0f}"
            for row in rows.to_dict("records")
        ]
        _measured(figure, str(precision), rows.task, rows.change_pct, hover)
        known = rows.dropna(subset=["published_change_pct"])
        if len(known):
            _published(figure, str(precision), known.task, known.published_change_pct)
    figure.add_vline(x=0, line_width=1, line_color=look.INK)
    figure.update_xaxes(title="change, % of BF16's accuracy")
    published = any(PUBLISHED in bar.name for bar in figure.data)
    return _by_task(figure, list(dict.fromkeys(table.task)), title, KEY if published else "against BF16")


def _timed(table: pd.DataFrame) -> pd.DataFrame:
    """Leave out the engines that could not run: their rows say why, and have no number to draw."""
    return table.dropna(subset=["throughput_rps"]) if "throughput_rps" in table else table[:0]


def rows_of(table: pd.DataFrame) -> list[str]:
    """Name each row of Table 3 or 4 by its precision, and by its engine where there is more than one."""
    return cost.names(table) if "engine" in table else list(table.precision)


def metrics(table: pd.DataFrame, title: str) -> go.Figure:
    """Figures 3 and 5: throughput, seconds per request, utilization and memory, a panel each with its own unit.

    Parameters
    ----------
    table
        Table 3 or 4, as `qnb.Study.table3` and `table4` return.
    title
        What was run.
    """
    table = _timed(table)
    if table.empty:
        return look.nothing(title)
    named = table.assign(label=rows_of(table))
    marked = {row["label"] for row in named.to_dict("records") if disturbed(row.get("flags"))}
    height = 170 + 4 * (look.GAP_PX + 2 * (BAR_PX + 3) * len(table))
    figure = look.panels(height, [f"{text}, {unit}" for text, unit, _ in METRICS.values()])
    for place, (name, (_, unit, _)) in enumerate(METRICS.items(), 1):
        published = {"memory_mib": "published_vram_mib"}.get(name, f"published_{name}")
        mine = named.dropna(subset=[name])
        # the paper has one row a precision, whatever engines there are here
        papers = named.dropna(subset=[published]).drop_duplicates("precision") if published in named else named[:0]
        counts = [_passes(row, place == 1) for row in mine.to_dict("records")]
        for source, rows, column, notes in (
            ("measured", mine, name, counts),
            (PUBLISHED, papers, published, ["as published"] * len(papers)),
        ):
            values = [float(value) for value in rows.get(column, ())]
            marks = [" (disturbed)" if source == "measured" and name in marked else "" for name in rows.label]
            texts = [look.number(value) + mark for value, mark in zip(values, marks, strict=True)]
            figure.add_bar(
                orientation="h", name=source, y=rows.label, x=values, offsetgroup=source, showlegend=False,
                marker=look.bars(list(rows.precision), filled=source == "measured"), text=texts,
                textposition="outside", textfont={"size": 11}, constraintext="none", cliponaxis=False,
                hoverinfo="text",
                hovertext=[f"{label}: {text} {unit}<br>{note}"
                           for label, text, note in zip(rows.label, texts, notes, strict=True)],
                row=place, col=1,
            )  # fmt: skip
        most = max((*mine[name], *papers.get(published, ())), default=1.0)
        figure.update_xaxes(range=[0, (1.5 if marked else 1.18) * most], row=place)
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(bargap=0.2)
    return look.layout(figure, title, height, KEY)


def _passes(row: dict[str, Any], spread: bool) -> str:
    """Say what a row of Table 3 or 4 is the median of."""
    text = f"n = {row['requests']:,.0f} requests, {row['repeats']:.0f} {'passes' if row['repeats'] > 1 else 'pass'}"
    known = spread and pd.notna(row.get("throughput_spread_pct"))
    return f"{text}, range {row['throughput_spread_pct']:.1f} %" if known else text


def heatmap(table: pd.DataFrame, title: str) -> go.Figure:
    """Figures 4 and 6: each metric scaled over the precisions, 1 the best of them; the cell says the value itself.

    Utilization is scaled by its size: more of it is neither better nor worse.
    """
    table = _timed(table)
    if table.empty:
        return look.nothing(title)
    shown = [name for name in METRICS if name in table and table[name].notna().any()]
    names = rows_of(table)
    shades = pd.DataFrame(index=names)
    for name in shown:
        values = table[name].astype(float)
        span = values.max() - values.min()
        scaled = (values - values.min()) / (span or 1)
        shades[name] = list(scaled if span and METRICS[name][2] is not False else 1 - scaled)  # equal ones are best
    values = table[shown].astype(float).to_numpy()
    marks = ["<br>(disturbed)" if disturbed(row.get("flags")) else "" for row in table.to_dict("records")]
    numbers = [["" if pd.isna(value) else look.number(value) for value in row] for row in values]
    texts = [[text and text + mark for text in row] for row, mark in zip(numbers, marks, strict=True)]
    told = [
        [f"{name}, {METRICS[metric][0]}: {text} {METRICS[metric][1]}{mark}"
         for metric, text in zip(shown, row, strict=True)]
        for name, row, mark in zip(names, numbers, marks, strict=True)
    ]  # fmt: skip
    columns = [f"{METRICS[name][0].replace(' ', '<br>')}<br>{METRICS[name][1]}" for name in shown]
    figure = go.Figure(
        go.Heatmap(
            z=shades.to_numpy(), y=names, x=columns, text=texts, texttemplate="%{text}", colorscale="Blues",
            zmin=0, zmax=1.25, xgap=3, ygap=3, showscale=False, hovertext=told, hoverinfo="text",
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(tickangle=0, tickfont_size=11)
    return look.layout(figure, f"{title}, scaled", 190 + 36 * len(table), "dark is better; of utilization, more")


def compare(frame: pd.DataFrame, title: str, unit: str) -> go.Figure:
    """One quantity, a lying bar a precision and engine, with its interval or range where there is one.

    Parameters
    ----------
    frame
        Columns precision, engine and value; low, high and n (a text) where they are known.
    title, unit
        What the quantity is, and the axis's unit.
    """
    frame = frame.dropna(subset=["value"]) if "value" in frame else frame[:0]
    if frame.empty:
        return look.nothing(title)
    above = (frame.high - frame.value).fillna(0) if "high" in frame else 0 * frame.value
    below = (frame.value - frame.low).fillna(0) if "low" in frame else 0 * frame.value
    hover = [
        f"{name}: {look.number(row['value'])} {unit}"
        + (f"<br>{look.number(row['low'])} to {look.number(row['high'])}" if pd.notna(row.get("low")) else "")
        + (f"<br>n = {row['n']}" if row.get("n") else "")
        for name, row in zip(cost.names(frame), frame.to_dict("records"), strict=True)
    ]
    figure = go.Figure()
    figure.add_bar(
        orientation="h", y=cost.names(frame), x=frame.value, marker=look.bars(list(frame.precision)),
        error_x={"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.2},
        hovertext=hover, hoverinfo="text", showlegend=False,
    )  # fmt: skip
    figure.add_scatter(
        x=(frame.value + above).clip(lower=0), y=cost.names(frame), mode="text", hoverinfo="skip", showlegend=False,
        text=[f" {look.number(value)}" for value in frame.value], textposition="middle right", cliponaxis=False,
    )  # fmt: skip
    low, high = min(0.0, (frame.value - below).min()), max(0.0, (frame.value + above).max())
    figure.update_xaxes(title=unit, range=[low - 0.04 * (high - low) * (low < 0), high + 0.2 * (high - low or 1)])
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(bargap=0.3)
    return look.layout(figure, title, 150 + 34 * len(frame))


def draw_all(results: Results) -> dict[str, go.Figure]:
    """Return every figure by file name, the paper's six first."""
    small, large = "Batch size 1", "Largest batch"
    found = choose.candidates(results, "bs1")
    return {
        "fig1_accuracy": accuracy(results.scores),
        "fig2_change": change(results.tables[2]),
        "fig3_bs1_metrics": metrics(results.tables[3], small),
        "fig4_bs1_heatmap": heatmap(results.tables[3], small),
        "fig5_maxbatch_metrics": metrics(results.tables[4], large),
        "fig6_maxbatch_heatmap": heatmap(results.tables[4], large),
        "forest": tradeoff.forest(results.tables[2]),
        "front_memory": tradeoff.front(found, "memory_mib"),
        "front_tpot": tradeoff.front(found, "tpot_s"),
        "sweep": cost.sweep(results.sweep, results.maxbatch),
        "roofline": cost.roofline(results.speed),
        "token_time": cost.token_time(results.bs1),
        "energy": cost.energy(results.speed),
        "memory": cost.memory(results.speed),
        "timeline_bs1": cost.timeline(results.samples, "bs1"),
        "timeline_maxbatch": cost.timeline(results.samples, "maxbatch"),
    }
