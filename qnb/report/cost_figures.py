"""Where time, memory and energy go, and what the device could do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from qnb.report import panels, theme
from qnb.report.results import Results, stack


def token_time(results: Results) -> go.Figure:
    """Draw where a token's time goes at batch size 1: kernels at work, and the GPU waiting for a launch."""
    title = "Where does a token's time go?"
    runs = results.bs1.dropna(subset=["kernel_s_per_token", "tpot_s"])
    if runs.empty:
        return theme.nothing(title, "kernels are traced on a GPU")
    runs = runs.assign(panel=runs.engine)
    waiting = (runs.tpot_s - runs.kernel_s_per_token).clip(lower=0)
    parts = {"kernels at work": 1e3 * runs.kernel_s_per_token, "waiting for a launch": 1e3 * waiting}
    names = ("tpot_s", "kernel_s_per_token", "kernels_per_token", "gpu_busy_pct", "bound")
    return _parts(runs, parts, names, title, "ms per token at batch size 1; each panel has its own scale")


def energy(results: Results) -> go.Figure:
    """Draw energy per generated token, above idle and the idle device's share, in both settings."""
    title = "What does a token cost in energy?"
    runs = _settings(results).dropna(subset=["energy_j_per_token"])
    if runs.empty:
        return theme.nothing(title, "a GPU's own counter is read")
    above = runs.energy_above_idle_j_per_token.fillna(runs.energy_j_per_token)
    parts = {"above idle": above, "the idle device's share": (runs.energy_j_per_token - above).clip(lower=0)}
    names = ("energy_j_per_token", "energy_above_idle_j_per_token", "power_w")
    return _parts(runs, parts, names, title, "J per generated token; each panel has its own scale")


def memory(results: Results) -> go.Figure:
    """Draw GPU memory by part, in both settings.

    Weights and KV cache are computed. The rest follows from the allocator's two peaks.
    """
    title = "What fills the memory?"
    needed = ["weights_mib", "kv_cache_mib", "peak_allocated_mib", "peak_reserved_mib"]
    runs = _settings(results).dropna(subset=needed)
    if runs.empty:
        return theme.nothing(title, "the allocator of a GPU is read")
    parts = {
        "weights": runs.weights_mib,
        "KV cache": runs.kv_cache_mib,
        "activations": (runs.peak_allocated_mib - runs.weights_mib - runs.kv_cache_mib).clip(lower=0),
        "allocator slack": (runs.peak_reserved_mib - runs.peak_allocated_mib).clip(lower=0),
    }
    return _parts(runs, parts, needed, title, "MiB; each panel has its own scale")


def _settings(results: Results) -> pd.DataFrame:
    """Return the rows of both settings, with `panel`: the setting and its engine."""
    named = [(theme.SETTINGS[name].removeprefix("the "), results.timed(name)) for name in ("bs1", "maxbatch")]
    return stack(frame.assign(panel=[f"{words}, {engine}" for engine in frame.engine]) for words, frame in named)


def _parts(
    runs: pd.DataFrame, parts: Mapping[str, pd.Series], names: Sequence[str], title: str, note: str
) -> go.Figure:
    """Draw parts end to end, from solid to pale; the number is their sum."""
    text = [theme.number(value) for value in sum(parts.values())]
    hover = [theme.hover(row, *names) for row in runs.to_dict("records")]
    shades = {name: 0.3 + 0.7 * (1 - place / (len(parts) - 1)) for place, name in enumerate(parts)}
    return panels.bars(runs.assign(text=text, hover=hover, **parts), shades, title, note)


def roofline(results: Results) -> go.Figure:
    """Draw achieved FLOP/s over FLOP a byte, below the measured roofs; a point per format, engine and batch size."""
    title = "How near are the device's limits?"
    needed = ["bytes_per_step", "flops_per_step", "tpot_s", "peak_bytes_per_s", "peak_flop_per_s"]
    runs = results.speed.dropna(subset=needed)
    if runs.empty:
        return theme.nothing(title, "without a device's measured peaks there are no roofs")
    runs = runs.assign(
        intensity=runs.flops_per_step / runs.bytes_per_step, tflops=runs.flops_per_step / runs.tpot_s / 1e12,
        marker=[theme.symbol(row.precision, row.engine) for row in runs.itertuples()],
        hover=[theme.hover(row, "mbu_pct", "mfu_pct", "bound") for row in runs.to_dict("records")],
    )  # fmt: skip
    look = {"symbol": "marker", "symbol_map": "identity", **theme.by_format(runs)}
    figure = px.scatter(runs, x="intensity", y="tflops", log_x=True, log_y=True, render_mode="svg", **look)
    figure.update_traces(marker_size=9)
    bandwidth, highest = runs.peak_bytes_per_s.max(), runs.peak_flop_per_s.max()
    left, right = runs.intensity.min() / 2, max(runs.intensity.max() * 2, 3 * highest / bandwidth)
    for peak, rows in runs.groupby("peak_flop_per_s"):
        text = f"{bandwidth / 1e12:.3g} TB/s, {peak / 1e12:.4g} TFLOP/s for {', '.join(dict.fromkeys(rows.precision))}"
        figure.add_scatter(
            x=[left, peak / bandwidth, right], y=[left * bandwidth / 1e12, peak / 1e12, peak / 1e12], mode="lines",
            line={"color": theme.QUIET, "width": 1.2}, showlegend=False, hoverinfo="text", hovertext=text,
        )  # fmt: skip
    figure.update_xaxes(title="arithmetic per byte read, FLOP/byte", dtick=1)
    figure.update_yaxes(title="achieved, TFLOP/s", dtick=1)
    note = f"lines: measured limits, {bandwidth / 1e12:.3g} TB/s and up to {highest / 1e12:.3g} TFLOP/s"
    return theme.finish(theme.key(figure, runs), title, 520, f"{note}; a step far below waits for something else")
