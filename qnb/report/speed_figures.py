"""What quantizing gives: speed, utilization and memory in one setting, over batch sizes, and over time."""

from __future__ import annotations

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from qnb.columns import column, header, is_disturbed
from qnb.report import panels, paper, theme
from qnb.report.results import Results, stack
from qnb.report.tables import knees

METRICS = ("throughput_rps", "seconds_per_request", "utilization_pct", "peak_memory_mib")
SWEPT = ("throughput_rps", "batch_latency_s")
TIMELINE = ("utilization_pct", "memory_mib", "power_w", "clock_mhz")
DISTURBED = "; *: disturbed by other processes"
PAPER = "published (T4)"  # in place of an engine


def metrics(results: Results, setting: str) -> go.Figure:
    """Draw Figures 3 and 5: four panels of what one setting costs, bars for one engine and dots for several.

    Parameters
    ----------
    results
        A study's frames.
    setting
        ``"bs1"`` or ``"maxbatch"``.
    """
    title = f"What do you get at {theme.SETTINGS[setting]}?"
    frame = _long(results, setting)
    if frame.empty:
        return theme.nothing(title)
    note = DISTURBED * any(frame.text.str.endswith("*"))
    if paper.is_published_model(results.model):
        published = paper.performance(3 if setting == "bs1" else 4).rename(columns={"vram_mib": "peak_memory_mib"})
        published = published[published.precision.isin(frame.precision)].melt("precision", METRICS, "panel")
        published = published.assign(panel=published.panel.map(header), engine=PAPER, text="", hover=PAPER)
        frame = stack([frame, published])
    if frame.engine.nunique() > 1:
        return panels.dots(frame, title, f"logarithmic: equal distances are equal ratios{note}")
    return panels.bars(frame, {"value": 1.0}, title, f"the paper's four quantities{note}")


def _long(results: Results, setting: str) -> pd.DataFrame:
    """Return a row per quantity, format and engine; an asterisk marks what other processes disturbed."""
    rows = [
        {"panel": header(name), "precision": row["precision"], "engine": row["engine"], "value": row[name],
         "text": theme.number(row[name]) + "*" * is_disturbed(row["flags"]),
         "hover": theme.hover(row, name, "throughput_spread_pct")}
        for name in METRICS for row in results.timed(setting).to_dict("records") if pd.notna(row[name])
    ]  # fmt: skip
    return pd.DataFrame(rows)


def heatmap(results: Results, setting: str) -> go.Figure:
    """Draw Figures 4 and 6: each quantity shaded from the worst format to the best; the cell holds the value.

    Utilization is shaded by its size: more of it is neither better nor worse.
    """
    title = f"Which is best at {theme.SETTINGS[setting]}?"
    frame = _long(results, setting)
    if frame.empty:
        return theme.nothing(title)
    several = frame.engine.nunique() > 1
    frame["row"] = frame.precision + (" · " + frame.engine if several else "")
    cells = frame.set_index(["row", "panel"])[["value", "text", "hover"]].unstack(sort=False)
    scaled = (cells.value - cells.value.min()) / (cells.value.max() - cells.value.min()).replace(0, 1)
    for name in METRICS:
        panel = header(name)
        if panel in scaled and (column(name).better == "less" or not scaled[panel].any()):  # equal ones are best
            scaled[panel] = 1 - scaled[panel]
    figure = go.Figure(
        go.Heatmap(
            z=scaled.to_numpy(), y=list(scaled.index),
            x=[name.replace(",", "").replace(" ", "<br>") for name in scaled],
            text=cells.text.fillna(""), hovertext=cells.hover, hoverinfo="text", texttemplate="%{text}",
            colorscale="Blues", zmin=0, zmax=1.25, xgap=3, ygap=3, showscale=False,
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed").update_xaxes(tickangle=0, tickfont_size=11)
    note = "dark is better; of utilization, more" + DISTURBED * any(frame.text.str.endswith("*"))
    return theme.finish(figure, title, 180 + 30 * len(scaled), note)


def sweep(results: Results) -> go.Figure:
    """Draw throughput and batch latency over batch size, a column of panels per engine.

    A ring marks the knee. A large point is the largest batch, where its prompts and texts are as long as the line's.
    """
    title = "When do rows stop being free?"
    steps = results.sweep
    if steps.empty:
        return theme.nothing(title, "without a GPU only where sweep_batch asks for it")
    alike = ["precision", "engine", "prompt_tokens", "new_tokens"]
    largest = results.maxbatch.merge(steps[alike].drop_duplicates(), on=alike)
    bends = knees(steps).set_index(["precision", "engine"]).knee.fillna(0)  # no line bends at 0
    rows = stack([steps.assign(size=5), largest.assign(size=12)]).sort_values("batch_size", kind="stable")
    frame = pd.DataFrame(
        {**row, "quantity": name, "value": row[name],
         "ring": bends[row["precision"], row["engine"]] == row["batch_size"],
         "hover": theme.hover(row, name, "prompt_tokens", "new_tokens", "batch_spread_pct")}
        for name in SWEPT for row in rows.to_dict("records")
    )  # fmt: skip
    look = {**theme.by_format(frame), "custom_data": ["hover", "ring", "size"]}
    figure = px.line(
        frame, x="batch_size", y="value", markers=True, facet_row="quantity", facet_col="engine",
        facet_row_spacing=0.06, facet_col_spacing=0.03, **look,
    )  # fmt: skip
    for line in figure.data:
        marker = theme.symbol(line.name)
        line.marker = {"symbol": ["circle-open" if ring else marker for _, ring, _ in line.customdata],
                       "size": [16 if ring else size for _, ring, size in line.customdata]}  # fmt: skip
    figure.update_xaxes(**theme.log_ticks(frame.batch_size), title="").update_xaxes(title=header("batch_size"), row=1)
    columns = frame.engine.nunique()
    for row, name in enumerate(reversed(SWEPT)):  # Plotly Express counts rows from below
        first = "" if row == 0 else str(1 + row * columns)
        figure.update_yaxes(**theme.log_ticks(rows[name]), matches=f"y{first}", title="", row=row + 1)
        figure.update_yaxes(title=header(name), matches=None, row=row + 1, col=1)
    figure.layout.annotations = [each for each in figure.layout.annotations if each.text.startswith("engine=")]
    note = "logarithmic; ring: knee" + "; large point: the largest batch" * bool(len(largest))
    return theme.finish(figure, title, 620, note)


def timeline(results: Results, setting: str) -> go.Figure:
    """Draw the monitor's readings in the first pass: a panel per quantity, a line per format and engine."""
    title = f"The device at {theme.SETTINGS[setting]}"
    samples = results.samples
    samples = samples[samples.setting == setting] if len(samples) else samples
    names = [name for name in TIMELINE if name in samples and samples[name].notna().any()]
    if not names:
        return theme.nothing(title)
    frame = samples.melt(["t_s", "precision", "engine"], names, "panel").assign(
        panel=lambda rows: rows.panel.map(header),
        hover=lambda rows: [f"{row.precision}, {row.engine}, {row.t_s:.1f} s: {theme.number(row.value)}"
                            for row in rows.itertuples()],
    )  # fmt: skip
    several = frame.engine.nunique() > 1
    dashes = {engine: "dot" if several and engine == "eager" else "solid" for engine in frame.engine.unique()}
    figure = px.line(
        frame, x="t_s", y="value", line_dash="engine", line_dash_map=dashes, render_mode="svg",
        **theme.by_format(frame), **panels.two_by_two(frame, 560, spacing=0.14),
    )  # fmt: skip
    for line in figure.data:  # one entry of the legend per format
        line.name, _, engine = line.name.partition(", ")
        line.showlegend = line.showlegend and engine in ("", frame.engine.iloc[0])
    figure.update_yaxes(matches=None, showticklabels=True, rangemode="tozero", title="").update_xaxes(title="")
    figure.update_xaxes(title="time, s", row=1)
    note = "dotted: eager; " * several + "memory: the whole device's, on a CPU the process's"
    return theme.finish(figure, title, 560, note)
