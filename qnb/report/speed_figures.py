"""What quantizing gives: speed, utilization and memory, over batch sizes and over time, and where each is spent."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from qnb.columns import column, format_number, header
from qnb.flags import is_disturbed
from qnb.report import paper, theme
from qnb.report.findings import SETTINGS
from qnb.report.results import Results, stack
from qnb.report.tables import knees

METRICS = ("throughput_rps", "seconds_per_request", "utilization_pct", "peak_memory_mib")
SWEPT = ("throughput_rps", "batch_latency_s")
NEAR = 5  # times another: limits of a device that share a label
TIMELINE = ("utilization_pct", "memory_mib", "process_memory_mib", "power_w", "clock_mhz")


def _disturbed(runs: pd.DataFrame) -> str:
    """Return what a note adds where an asterisk marks a row."""
    return "; *: disturbed by other processes" if runs["flags"].map(is_disturbed).any() else ""


def metrics(results: Results, setting: str) -> go.Figure:
    """Draw Figures 3 and 5: four panels of what one setting costs.

    Parameters
    ----------
    results
        A study's frames.
    setting
        ``"bs1"`` or ``"maxbatch"``.
    """
    title = f"What do you get at {SETTINGS[setting]}?"
    frame = theme.panels(results.timed(setting), METRICS, "throughput_spread_pct")
    note = ("hollow: eager; filled: cuda_graph; panels with lines are logarithmic" if frame.engine.nunique() > 1
            else "each panel has its own unit")  # fmt: skip
    note += _disturbed(frame) + theme.fusing(frame)
    if paper.is_published_model(results.model):
        published = paper.performance(3 if setting == "bs1" else 4).rename(columns={"vram_mib": "peak_memory_mib"})
        published = published[published.precision.isin(frame.precision)].assign(engine=theme.PUBLISHED)
        frame, note = stack([frame, theme.panels(published, METRICS)]), f"{note}; |: published"
    return theme.dots(frame, title, note)


def heatmap(results: Results, setting: str) -> go.Figure:
    """Draw Figures 4 and 6: each quantity shaded from the worst format to the best; the cell holds the value.

    Utilization is shaded by its size: more of it is neither better nor worse.
    """
    title, runs = f"Which is best at {SETTINGS[setting]}?", results.timed(setting)
    names = [name for name in METRICS if runs[name].notna().any()]
    if not names:
        return theme.nothing(title)
    values = runs[names].astype(float)
    scores = values * [-1 if column(name).better == "less" else 1 for name in names]
    shades = ((scores - scores.min()) / (scores.max() - scores.min())).fillna(1)  # equal ones are best
    texts = pd.DataFrame({name: theme.numbers(values[name] * column(name).scale, runs["flags"]) for name in names})
    figure = go.Figure(
        go.Heatmap(
            z=shades.where(values.notna()), y=runs.precision + "<br>" + runs.engine,
            x=[theme.wrapped(header(name), 12) for name in names], text=texts.where(values.notna().to_numpy(), ""),
            hovertext=[[hover] * len(names) for hover in theme.hovers(runs, *names)], hoverinfo="text",
            texttemplate="%{text}", colorscale="Blues", zmin=0, zmax=1.25, xgap=3, ygap=3, showscale=False,
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", tickfont={"size": 10}).update_xaxes(tickangle=0, tickfont={"size": 10})
    note = "dark is better; of utilization, more" + _disturbed(runs) + theme.fusing(runs)
    return theme.finish(figure, title, 180 + 34 * len(shades), note)


def sweep(results: Results) -> go.Figure:
    """Draw throughput and batch latency over batch size, a column of panels per engine.

    A ring marks the knee. A large point is the largest batch, where its prompts and texts are as long as the line's.
    """
    title = "When do rows stop being free?"
    steps = results.sweep
    if steps.empty:
        return theme.nothing(title, "sweep_batch says up to which batch size")
    alike = ["precision", "engine", "prompt_tokens", "new_tokens"]
    largest = results.maxbatch.merge(steps[alike].drop_duplicates(), on=alike)
    rows = stack([steps.assign(size=5), largest.assign(size=12)]).sort_values("batch_size", kind="stable")
    frame = theme.panels(rows, SWEPT, "prompt_tokens", "new_tokens", "batch_spread_pct")
    knee = knees(steps).set_index(["precision", "engine"]).knee.fillna(0)  # no line bends at 0
    ring = [knee[row.precision, row.engine] == row.batch_size for row in frame.itertuples()]
    frame = frame.assign(
        panel=frame.engine + ": " + frame.panel, size=frame["size"].mask(ring, 16),
        symbol=frame.precision.map(theme.symbol).mask(ring, "circle-open"),
    )  # fmt: skip
    figure = px.line(
        frame, x="batch_size", y="value", markers=True, **theme.facets(frame.engine.nunique(), 620, 0.1),
        **theme.by_format(frame, "symbol", "size"),
    )  # fmt: skip
    theme.style_points(figure, "symbol", "size")
    figure.update_xaxes(type="log", tickvals=[4**power for power in range(8)], tickangle=0)
    note = "logarithmic; ring: knee" + "; large point: the largest batch" * bool(len(largest)) + theme.fusing(rows)
    return theme.finish_lines(figure.update_yaxes(**theme.LOG_AXIS), header("batch_size"), title, 620, note)


def timeline(results: Results) -> go.Figure:
    """Draw the monitor's readings in the fastest engine's first pass at batch size 1: a panel a quantity."""
    title, samples = f"The device at {SETTINGS['bs1']}", results.samples
    names = [name for name in TIMELINE if name in samples and samples[name].notna().any()]
    if not names:
        return theme.nothing(title)
    samples = samples[samples.engine.isin(samples.engine.tail(1))]
    frame, height = theme.panels(samples, names), 340 if len(names) < 3 else 560
    look = {**theme.facets(2, height, 0.12), **theme.by_format(frame)}
    figure = px.line(frame, x="t_s", y="value", render_mode="svg", **look).update_yaxes(rangemode="tozero")
    note = f"with {frame.engine.iloc[0]}{theme.fusing(results.bs1)}"
    return theme.finish_lines(figure, "time, s", title, height, note)


def token_time(results: Results) -> go.Figure:
    """Draw where a token's time goes at batch size 1: kernels at work, and the GPU waiting for a launch."""
    runs = results.bs1.dropna(subset=["tpot_s"]).assign(panel=lambda runs: runs.engine)
    kernel_s = runs.kernel_s_per_token
    parts = {"kernels at work": 1e3 * kernel_s, "waiting for a launch": 1e3 * (runs.tpot_s - kernel_s).clip(lower=0)}
    note = "ms per token at batch size 1"
    if kernel_s.isna().all():
        parts, note = {"time per token": 1e3 * runs.tpot_s}, f"{note}; what a GPU's kernels take of it is not known"
    names = ("tpot_s", "kernel_s_per_token", "kernels_per_token", "gpu_busy_pct", "bound")
    return _parts(runs, parts, names, "Where does a token's time go?", note)


def energy(results: Results) -> go.Figure:
    """Draw energy per generated token, above idle and the idle device's share, in both settings."""
    runs = _settings(results)
    above = runs.energy_above_idle_j_per_token.fillna(runs.energy_j_per_token)
    parts = {"above idle": above, "the idle device's share": (runs.energy_j_per_token - above).clip(lower=0)}
    names = ("energy_j_per_token", "energy_above_idle_j_per_token", "power_w")
    return _parts(runs, parts, names, "What does a token cost in energy?", "J per token; read from a GPU's counter")


def memory(results: Results) -> go.Figure:
    """Draw GPU memory by part, in both settings.

    Weights and KV cache are computed. The rest follows from the allocator's two peaks.
    """
    runs = _settings(results)
    activations_mib = (runs.peak_allocated_mib - runs.weights_mib - runs.kv_cache_mib).clip(lower=0)
    slack_mib = (runs.peak_reserved_mib - runs.peak_allocated_mib).clip(lower=0)
    parts = {"weights": runs.weights_mib, "KV cache": runs.kv_cache_mib, "activations": activations_mib,
             "allocator slack": slack_mib}  # fmt: skip
    names = ["weights_mib", "kv_cache_mib", "peak_allocated_mib", "peak_reserved_mib"]
    return _parts(runs, parts, names, "What fills the memory?", "MiB; read from a GPU's allocator")


def _settings(results: Results) -> pd.DataFrame:
    """Return the rows of both settings, with `panel`: the setting and its engine."""
    runs = results.speed[results.speed.setting != "sweep"]
    return runs.assign(panel=[f"{SETTINGS[row.setting]}, {row.engine}" for row in runs.itertuples()])


def _parts(
    runs: pd.DataFrame, parts: Mapping[str, pd.Series], names: Sequence[str], title: str, note: str
) -> go.Figure:
    """Draw the rows of which all parts are known."""
    runs = runs.assign(**parts, hover=theme.hovers(runs, *names)).dropna(subset=[*parts])
    if runs.empty:
        return theme.nothing(title, note)
    note += f"; each panel has its own scale{_disturbed(runs)}{theme.fusing(runs)}"
    return theme.stacked(runs, [*parts], title, note)


def roofline(results: Results) -> go.Figure:
    """Draw achieved FLOP/s over FLOP a byte, below the measured roofs; a point per format, engine and batch size.

    A roof's label stands above its bend, where no point can lie.
    """
    title = "How near are the device's limits?"
    needed = ["bytes_per_step", "flops_per_step", "tpot_s", "peak_bytes_per_s", "peak_flop_per_s"]
    runs = results.speed.dropna(subset=needed)
    if runs.empty:
        return theme.nothing(title, "without a device's measured peaks there are no roofs")
    runs = runs.assign(
        intensity=runs.flops_per_step / runs.bytes_per_step, tflops=runs.flops_per_step / runs.tpot_s / 1e12,
        hover=theme.hovers(runs, "mbu_pct", "mfu_pct", "bound"),
    )  # fmt: skip
    figure = theme.points(runs, "intensity", "tflops", log_x=True, log_y=True)
    bandwidth, types = runs.peak_bytes_per_s.max() / 1e12, runs.flops_by_type.map(" + ".join)
    peaks = runs.groupby(types).peak_flop_per_s.max().sort_values(ascending=False) / 1e12
    left = min(runs.intensity.min() / 2, peaks.iloc[-1] / bandwidth / 8)  # room for the last label
    right = max(runs.intensity.max() * 2, 3 * peaks.iloc[0] / bandwidth)
    for _, near in peaks.groupby((peaks.shift() > NEAR * peaks).cumsum()):
        label = "<br>".join(f"{types}: {format_number(peak, 3)}" for types, peak in near.items())
        figure.add_scatter(
            x=[x for peak in near for x in (left, peak / bandwidth, right, None)],
            y=[y for peak in near for y in (left * bandwidth, peak, peak, None)], mode="lines+text",
            text=["", label], textposition="top left", textfont={"size": 11, "color": theme.QUIET},
            line={"color": theme.QUIET, "width": 1.2}, showlegend=False, hoverinfo="skip",
        )  # fmt: skip
    span = [math.log10(runs.tflops.min()) - 0.3, math.log10(peaks.iloc[0]) + 0.2 * len(peaks)]  # room for the labels
    figure.update_xaxes(title="arithmetic per byte read, FLOP/byte", dtick=1, tickformat=",~g")
    figure.update_yaxes(title="achieved, TFLOP/s", dtick=1, tickformat=",~g", range=span)
    note = f"lines: measured limits, {bandwidth:.3g} TB/s and TFLOP/s by type; close ones share a label; hollow: eager"
    return theme.finish(figure, title, 520, note + theme.fusing(runs))
