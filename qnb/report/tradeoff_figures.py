"""What is lost against what is gained: changes in accuracy with their intervals, and Pareto fronts over a cost.

A precision is on the front when no other is both as accurate and as cheap. Where intervals overlap the front is a
guess, so they are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict

import pandas as pd
import plotly.graph_objects as go

from qnb.precision import BASELINE, PRECISIONS
from qnb.report import theme as look
from qnb.report.recommend import SPEEDS, Advice, Candidate, facts

# name of a cost: its axis's title, factor to the unit there, short name
COSTS = {
    "memory_mib": ("peak memory, MiB", 1.0, "memory"),
    "tpot_s": ("time per output token (TPOT), ms", 1000.0, "TPOT"),
}


def forest(changes: pd.DataFrame) -> go.Figure:
    """Change in accuracy against BF16 in points with its 95 % interval, a row a task and precision.

    A filled marker is a change that Holm's correction over the whole table leaves significant; a hollow one is not.

    Parameters
    ----------
    changes
        Table 2, as `qnb.Study.table2` returns.
    """
    title = f"Change in accuracy against {BASELINE.upper()}"
    if not {"change_pp", "low_pp", "high_pp"} <= set(changes):
        return look.nothing(title)
    changes = changes.dropna(subset=["change_pp"])
    figure = go.Figure()
    tasks, shown = list(dict.fromkeys(changes.task)), list(dict.fromkeys(changes.precision))
    for place, (precision, rows) in enumerate(changes.groupby("precision", sort=False)):
        color = PRECISIONS[str(precision)].color
        significant = rows.get("significant", pd.Series(False, rows.index)).eq(True)  # empty is not
        # a precision keeps its height within a task, the first one on top
        heights = [-tasks.index(task) + 0.36 - 0.72 * (place + 0.5) / len(shown) for task in rows.task]
        low, high = (rows[name].astype(float).fillna(rows.change_pp) for name in ("low_pp", "high_pp"))
        hover = [_hover(row) for row in rows.to_dict("records")]
        figure.add_scatter(
            name=str(precision), x=rows.change_pp, y=heights, mode="markers", hovertext=hover, hoverinfo="text",
            marker={"size": 9, "color": ["white" if not is_so else color for is_so in significant],
                    "line": {"color": color, "width": 2}, "symbol": _symbol(place)},
            error_x={"type": "data", "symmetric": False, "array": high - rows.change_pp,
                     "arrayminus": rows.change_pp - low, "color": color, "thickness": 1.6, "width": 3},
        )  # fmt: skip
        figure.add_scatter(  # at the bars' ends, where no other precision's line is covered
            x=high[significant], y=[height for height, is_so in zip(heights, significant, strict=True) if is_so],
            mode="text", text=[" ✱"] * int(significant.sum()), textposition="middle right", showlegend=False,
            hoverinfo="skip",
        )  # fmt: skip
    figure.add_vline(x=0, line_width=1, line_color=look.INK)
    for edge in range(1, len(tasks)):
        figure.add_hline(y=0.5 - edge, line_width=1, line_color="#dddddd")
    figure.update_xaxes(title="change, percentage points", zeroline=False)
    figure.update_yaxes(
        tickvals=[-place for place in range(len(tasks))], ticktext=[look.label(task) for task in tasks],
        range=[0.5 - len(tasks), 0.5], showgrid=False, zeroline=False,
    )  # fmt: skip
    note = "bars: 95 % intervals; filled and ✱: significant after Holm"
    return look.layout(figure, title, 150 + len(tasks) * (16 + 17 * len(shown)), note)


def _symbol(place: int) -> str:
    return ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon", "star")[place % 8]


def _hover(row: dict) -> str:
    """Say a change in full: value, interval, test, n."""
    text = f"{row['precision']}, {look.label(row['task'])}: {row['change_pp']:+.2f} points"
    if pd.notna(row.get("low_pp")):
        text += f"<br>95 %: {row['low_pp']:+.2f} to {row['high_pp']:+.2f}"
    if pd.notna(row.get("p_mcnemar")):
        text += f"<br>McNemar p = {row['p_mcnemar']:.3g}"
    if pd.notna(row.get("p_holm")):
        text += f", after Holm {row['p_holm']:.3g}"
    return f"{text}<br>n = {row['items']:,.0f}"


def front(found: Iterable[Candidate], cost: str, task: str = "mean over tasks") -> go.Figure:
    """Accuracy over a cost, a point a precision and engine, with the Pareto front through the best.

    Error bars are the 95 % interval of the change against BF16: BF16 itself has none.

    Parameters
    ----------
    found
        What was measured, as `qnb.report.recommend.candidates` returns.
    cost
        A name in `COSTS`.
    task
        Whose accuracy it is.
    """
    words, factor, short = COSTS[cost]
    title = f"Accuracy against {short}"
    frame = pd.DataFrame([{**asdict(one), "name": one.name} for one in found])
    if not {cost, "accuracy_pct"} <= set(frame):
        return look.nothing(title)
    frame = frame.dropna(subset=[cost, "accuracy_pct"])
    if frame.empty:
        return look.nothing(title)
    frame = frame.assign(cost=frame[cost] * factor)
    figure = go.Figure()
    edge = pareto(frame)
    figure.add_scatter(
        x=edge.cost, y=edge.accuracy_pct, mode="lines", line={"shape": "hv", "color": "#999999", "dash": "dot"},
        name="Pareto front", hoverinfo="skip", showlegend=len(edge) > 1,
    )  # fmt: skip
    labelled = frame.drop_duplicates(["precision", "cost", "accuracy_pct"]).index
    for engine, rows in frame.groupby("engine", sort=False):
        for row in rows.reset_index(names="place").to_dict("records"):
            known = pd.notna(row["low_pp"]) and row["high_pp"] > row["low_pp"]
            above, below = (row["high_pp"] - row["change_pp"], row["change_pp"] - row["low_pp"]) if known else (0, 0)
            marked = " (disturbed)" if row["disturbed"] and cost in SPEEDS else ""
            interval = f"<br>change {row['low_pp']:+.2f} to {row['high_pp']:+.2f} points (95 %)" if known else ""
            figure.add_scatter(
                x=[row["cost"]], y=[row["accuracy_pct"]], mode="markers+text",
                text=[f" {row['precision']}{marked} " if row["place"] in labelled or marked else ""],
                textposition=look.SIDES[row["precision"]], showlegend=False, cliponaxis=False,
                marker=look.marker(row["precision"], str(engine), 12),
                error_y={"type": "data", "symmetric": False, "array": [above], "arrayminus": [below],
                         "color": PRECISIONS[row["precision"]].color, "thickness": 1.2, "width": 3},
                hovertext=f"{row['name']}: {row['accuracy_pct']:.2f} %, {look.number(row['cost'])} "
                f"{words.rsplit(' ', 1)[1]}{marked}{interval}<br>n = {row['items']:,.0f}",
                hoverinfo="text",
            )  # fmt: skip
        look.key(figure, str(engine))
    low, high = math.log10(frame.cost.min()), math.log10(frame.cost.max())
    room = (high - low) or 1.0
    figure.update_xaxes(
        title=f"{words} (log)", range=[low - 0.12 * room, high + 0.25 * room],
        **look.ticks(frame.cost.min(), frame.cost.max()),
    )  # fmt: skip
    figure.update_yaxes(title="accuracy, %")
    look.layout(figure, title, 430, f"{look.label(task)}; bars: 95 % intervals of the change")
    return look.part_labels(figure)


def pareto(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that no other beats in both ``cost`` (less is better) and ``accuracy_pct``, by cost."""
    kept, best = [], float("-inf")
    for row in frame.sort_values(["cost", "accuracy_pct"], ascending=[True, False]).itertuples():
        if row.accuracy_pct > best:
            kept.append(row.Index)
            best = row.accuracy_pct
    return frame.loc[kept]


def decision(advice: Advice) -> go.Figure:
    """Speed over memory, a point a precision and engine, with what is allowed and what is recommended.

    Filled points are shown to meet everything asked, hollow ones may, crossed ones do not; a ring is the recommended.

    Parameters
    ----------
    advice
        As `qnb.report.recommend.choose` returns.
    """
    demand = advice.demand
    words, unit, factor, _ = SPEEDS[demand.speed]
    title = "What was asked, and what there is"
    figure = go.Figure()
    groups = (("fits", advice.fitting), ("may fit", advice.unsure), ("ruled out", advice.out))
    for state, judged in groups:
        for one in judged:
            candidate, speed = one.candidate, getattr(one.candidate, demand.speed)
            if speed is None or candidate.memory_mib is None:
                continue
            place = {"x": [candidate.memory_mib], "y": [speed * factor]}
            marker = look.marker(candidate.precision, candidate.engine, 13)
            if state != "fits":
                marker |= {"symbol": f"{marker['symbol']}-{'open' if state == 'may fit' else 'x-open'}"}
                marker |= {"line": {"color": marker["color"], "width": 2}}
            if candidate == advice.best:
                ring = {"symbol": "circle-open", "size": 26, "color": look.INK, "line": {"width": 2}}
                figure.add_scatter(**place, mode="markers", marker=ring, hoverinfo="skip", showlegend=False)
            told = (f"{candidate.name}: {state}", facts(candidate, demand), *one.against, *one.unknown)
            figure.add_scatter(
                **place, mode="markers+text", text=[f" {candidate.precision} "],
                textposition=look.SIDES[candidate.precision], marker=marker,
                showlegend=False, cliponaxis=False, hoverinfo="text",
                hovertext="<br>".join(told),
            )  # fmt: skip
    if look.is_empty(figure):
        return look.nothing(title)
    limit = {"line_color": "#555555", "line_dash": "dash", "line_width": 1.5}
    if demand.memory_mib is not None:
        figure.add_vline(x=demand.memory_mib, **limit)
    if demand.speed_limit:  # a rate of nothing asks for nothing, and has no place on a logarithmic axis
        figure.add_hline(y=demand.speed_limit * factor, **limit)
    figure.update_xaxes(title="peak memory, MiB", rangemode="tozero")
    speeds = [point.y[0] for point in figure.data]
    figure.update_yaxes(title=f"{words}, {unit} (log)", **look.ticks(min(speeds), max(speeds)))
    for engine in dict.fromkeys(one.candidate.engine for _, judged in groups for one in judged):
        look.key(figure, engine)
    look.layout(figure, title, 430, "ring: recommended; filled: fits; hollow: may; crossed: does not")
    return look.part_labels(figure)
