"""Where time, memory and energy go: what bounds a step, and what a token is charged.

A step of decoding reads all weights once and multiplies them by as many rows as the batch has, so its arithmetic a
byte grows with the batch: small batches end at the memory's roof, large ones at the arithmetic units', and a step
whose kernels wait for their launches ends below both.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from qnb.precision import PRECISIONS
from qnb.report import theme as look
from qnb.report.results import ALIKE
from qnb.report.tables import LINE, bend, stacked
from qnb.speed.monitor import disturbed

SETTINGS = {"bs1": "batch size 1", "sweep": "batch sizes between", "maxbatch": "largest batch"}
TIMELINE = {
    "utilization_pct": "utilization, %",
    "memory_mib": "memory, MiB",
    "power_w": "power, W",
    "clock_mhz": "clock, MHz",
}
SWEPT = (("throughput", "requests/s"), ("batch latency", "s"))
GREY = "#777777"


def _have(frame: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Return the rows that have all of `names`; none, with columns to look them up by, where one is missing."""
    if set(names) <= set(frame):
        return frame.dropna(subset=list(names))
    return frame[:0].reindex(columns=frame.columns.union(sorted({*ALIKE, *names})))


def names(frame: pd.DataFrame, several: bool = False) -> list[str]:
    """Name each row by its precision, and by its engine where there are `several` or more than one here."""
    several = several or frame.engine.nunique() > 1
    pairs = zip(frame.precision, frame.engine, strict=True)
    return [f"{precision} · {engine}" if several and engine else str(precision) for precision, engine in pairs]


def _repeats(row: dict[str, Any]) -> str:
    requests, passes = (row[name] if pd.notna(row.get(name)) else 0 for name in ("requests", "repeats"))
    marked = "<br>disturbed by other processes" if disturbed(row.get("flags")) else ""
    if not requests:  # of a bench's table
        return marked
    return f"<br>n = {requests:,.0f} requests, {f'{passes:.0f} passes' if passes > 1 else '1 pass'}{marked}"


def sweep(steps: pd.DataFrame, largest: pd.DataFrame) -> go.Figure:
    """Throughput and batch latency over batch size, a line a precision and engine, a star at the largest batch.

    A largest batch of prompts or texts of other lengths than the line's is left out.

    Parameters
    ----------
    steps
        `qnb.report.results.Results.sweep`.
    largest
        `qnb.report.results.Results.maxbatch`.
    """
    title = "Throughput and latency by batch"
    alike = ["precision", "engine", "prompt_tokens", "new_tokens"]
    steps, largest = _have(steps, *LINE), _have(largest, *LINE, *alike)
    if steps.empty:
        return look.nothing(title, "without a GPU only where sweep_batch asks for it")
    steps = steps.reindex(columns=list(dict.fromkeys([*steps, *alike])))
    if len(largest):
        largest = largest.merge(steps[alike].drop_duplicates(), on=alike)
    engines = list(dict.fromkeys(steps.engine))
    told = {engine: f" with {engine}" if len(engines) > 1 else "" for engine in engines}
    titles = [f"{what}{told[engine]}, {unit}" for what, unit in SWEPT for engine in engines]
    height = 240 + 200 * len(titles)
    figure = look.panels(height, titles, shared_xaxes=True)
    named: set[str] = set()
    ringed = False
    for (precision, engine), rows in steps.groupby(["precision", "engine"], sort=False):
        bent = rows.batch_size == bend(rows)
        ringed |= bool(bent.any())
        end = largest[(largest.precision == precision) & (largest.engine == engine)]
        color = PRECISIONS[str(precision)].color
        for place, (name, (_, unit)) in enumerate(zip(LINE[1:], SWEPT, strict=True)):
            about = {"row": 1 + place * len(engines) + engines.index(engine), "col": 1, "hoverinfo": "text",
                     "legendgroup": str(precision)}  # fmt: skip
            line = stacked([rows, end]).sort_values("batch_size")
            figure.add_scatter(
                x=line.batch_size, y=line[name], mode="lines+markers", name=str(precision),
                showlegend=precision not in named,
                line={"color": color, "dash": look.DASHES[str(precision)], "width": 1.8},
                marker=look.marker(str(precision), str(engine), 8),
                hovertext=[_swept(one, name, unit) for one in line.to_dict("records")], **about,
            )  # fmt: skip
            named.add(str(precision))
            for some, ring, more in (
                (rows[bent], {"symbol": "circle-open", "size": 17, "line": {"width": 2}}, "the knee"),
                (end, {"symbol": "star", "size": 14, "line": {"color": look.INK, "width": 1}}, "the largest"),
            ):
                figure.add_scatter(
                    x=some.batch_size, y=some[name], mode="markers", showlegend=False, marker={"color": color, **ring},
                    hovertext=[f"{_swept(one, name, unit)}<br>{more}" for one in some.to_dict("records")], **about,
                )  # fmt: skip
    sizes = sorted({*steps.batch_size, *largest.batch_size})
    shown = [size for size in sizes if size & (size - 1) == 0] or sizes
    shown = shown[:: max(1, len(shown) // 6)]
    figure.update_xaxes(type="log", tickvals=shown, ticktext=[str(int(size)) for size in shown])
    figure.update_xaxes(title="batch size", row=len(titles))
    for place in range(len(titles)):  # engines share a scale
        first = 1 + place // len(engines) * len(engines)
        values = stacked([steps, largest])[LINE[1 + place // len(engines)]]
        low, high = values.min(), values.max()
        figure.update_yaxes(
            row=place + 1, **({"type": "log", "dtick": 1} if high > 100 * low else look.ticks(low, high))
        )
        if place + 1 > first:
            figure.update_yaxes(matches=f"y{first}" if first > 1 else "y", row=place + 1)
    lengths = [tuple(row) for row in steps[alike[2:]].dropna().drop_duplicates().to_numpy()]
    notes = ["unlike lengths"] if len(lengths) > 1 else ["{:.0f} + {:.0f} tokens".format(*one) for one in lengths]
    notes += ["log axes", *["ring: knee"] * ringed, *["star: largest timed"] * bool(len(largest))]
    return look.layout(figure, title, height, "; ".join(notes))


def _swept(row: dict[str, Any], name: str, unit: str) -> str:
    text = f"{row['precision']}, {row['engine']}, batch {row['batch_size']}: {look.number(row[name])} {unit}"
    if pd.notna(row["prompt_tokens"]):
        text += f"<br>prompts of {row['prompt_tokens']:.0f} tokens, {row['new_tokens']:.0f} new ones"
    if name == "throughput_rps" and pd.notna(row.get("throughput_spread_pct")):
        text += f"<br>fastest batch {row['throughput_spread_pct']:.1f} % faster than the slowest"
    return text + _repeats(row)


def roofline(runs: pd.DataFrame) -> go.Figure:
    """Achieved FLOP/s over FLOP a byte, below the device's measured roofs; a point a precision, engine and batch.

    Parameters
    ----------
    runs
        `qnb.report.results.Results.speed`.
    """
    title = "Roofline of a decoding step"
    runs = _have(
        runs, "bytes_per_step", "flops_per_step", "achieved_flop_per_s", "limit_bytes_per_s", "limit_flop_per_s"
    )
    if runs.empty:
        return look.nothing(title)
    runs = runs.assign(intensity=runs.flops_per_step / runs.bytes_per_step)
    bandwidth, peak = runs.limit_bytes_per_s.max(), runs.limit_flop_per_s.max()
    left, right = runs.intensity.min() / 2, max(runs.intensity.max() * 2, 3 * peak / bandwidth)
    figure = go.Figure()
    roofs = [(float(limit), list(dict.fromkeys(rows.precision))) for limit, rows in runs.groupby("limit_flop_per_s")]
    for limit, names in roofs:
        figure.add_scatter(
            x=[left, limit / bandwidth, right], y=[left * bandwidth / 1e12, limit / 1e12, limit / 1e12], mode="lines",
            line={"color": GREY, "width": 1.2}, showlegend=False, hoverinfo="text",
            hovertext=f"limits: {bandwidth / 1e12:.3g} TB/s, {limit / 1e12:.4g} TFLOP/s for {', '.join(names)}",
        )  # fmt: skip
    for limit, names in _near(roofs):  # left of a ridge and above its roof no point can be
        figure.add_scatter(
            x=[limit / bandwidth], y=[limit / 1e12], mode="text", text=[", ".join(names)], textposition="top left",
            textfont={"size": 10, "color": GREY}, showlegend=False, hoverinfo="skip",
        )  # fmt: skip
    named: set[str] = set()
    for engine, some in runs.groupby("engine", sort=False):
        for precision, rows in some.groupby("precision", sort=False):
            figure.add_scatter(
                x=rows.intensity, y=rows.achieved_flop_per_s / 1e12, mode="markers+text", name=str(precision),
                text=[str(precision)] + [""] * (len(rows) - 1), textposition=look.SIDES[str(precision)],
                textfont={"size": 10},
                legendgroup=str(precision), showlegend=precision not in named,
                marker=look.marker(str(precision), str(engine)), hoverinfo="text",
                hovertext=[_roof_hover(row) for row in rows.to_dict("records")],
            )  # fmt: skip
            named.add(str(precision))
        look.key(figure, str(engine))
    figure.update_xaxes(type="log", title="arithmetic a byte, FLOP/byte (log)", dtick=1)
    figure.update_yaxes(type="log", title="achieved, TFLOP/s (log)", dtick=1)
    note = f"lines: measured limits; slope {bandwidth / 1e12:.3g} TB/s, roof {peak / 1e12:.3g} TFLOP/s"
    return look.part_labels(look.layout(figure, title, 480, note))


def _near(roofs: list[tuple[float, list[str]]]) -> list[tuple[float, list[str]]]:
    """Join rising roofs too near each other for labels of their own: the highest of them, and all their precisions."""
    joined: list[tuple[float, list[str]]] = []
    for limit, names in roofs:
        before = joined.pop() if joined and limit < 1.5 * joined[-1][0] else (limit, [])
        joined.append((limit, list(dict.fromkeys([*before[1], *names]))))
    return joined


def _roof_hover(row: dict[str, Any]) -> str:
    text = f"{row['precision']}, {row['engine']}, batch {row['batch_size']}"
    share = 100 * row["achieved_flop_per_s"] / row["limit_flop_per_s"]
    text += f"<br>{row['achieved_flop_per_s'] / 1e12:.3g} TFLOP/s, {share:.1f} % of the limit"
    if pd.notna(row.get("achieved_bytes_per_s")):
        share = 100 * row["achieved_bytes_per_s"] / row["limit_bytes_per_s"]
        text += f"<br>{row['achieved_bytes_per_s'] / 1e9:,.3g} GB/s, {share:.1f} % of the limit"
    return text + (f"<br>bound by {row['bound']}" if row.get("bound") else "") + _repeats(row)


def _stacked(
    panels: list[tuple[str, pd.DataFrame]], parts: dict[str, tuple[str, bool]], title: str, unit: str, note: str = ""
) -> go.Figure:
    """Draw lying bars, a panel a setting, a bar a row, the parts one after the other.

    `parts` names columns, each with its hatch and whether it is filled; ``hover`` and ``total`` are columns too.
    """
    panels = [(name, frame) for name, frame in panels if len(frame)]
    if not panels:
        return look.nothing(title)
    counts = [len(frame) for _, frame in panels]
    several = any(frame.engine.nunique() > 1 for _, frame in panels)
    height = 150 + (look.GAP_PX + 20) * (len(panels) - 1) + 34 * sum(counts)
    figure = look.panels(height, [SETTINGS[name] for name, _ in panels], row_heights=counts)
    for place, (_, frame) in enumerate(panels, 1):
        for part, (hatch, filled) in parts.items():
            figure.add_bar(
                orientation="h", y=names(frame, several), x=frame[part], showlegend=False, hovertext=frame.hover,
                marker=look.bars(list(frame.precision), filled, hatch), hoverinfo="text", row=place, col=1,
            )  # fmt: skip
        figure.add_scatter(
            x=frame.total, y=names(frame, several), mode="text",
            text=[f" {look.number(value)}" for value in frame.total], textposition="middle right",
            showlegend=False, hoverinfo="skip", cliponaxis=False, row=place, col=1,
        )  # fmt: skip
        figure.update_xaxes(range=[0, 1.18 * frame.total.max()], row=place)
        figure.update_yaxes(autorange="reversed", row=place)
    for part, (hatch, filled) in parts.items():
        pattern = {
            "shape": hatch,
            "size": 6,
            "bgcolor": GREY if filled else "white",
            "fgcolor": "white" if filled else GREY,
        }
        marker = {"color": GREY if filled else "white", "line": {"color": GREY, "width": 1}, "pattern": pattern}
        figure.add_bar(x=[None], y=[None], orientation="h", name=part, marker=marker)
    figure.update_xaxes(tickformat="~r", separatethousands=True)
    figure.update_xaxes(title=unit, row=len(panels))
    figure.update_layout(barmode="stack", bargap=0.3)
    return look.layout(figure, title, height, note)


def token_time(runs: pd.DataFrame) -> go.Figure:
    """Where a token's time goes at batch size 1: kernels at work, and the gaps in which the GPU waits for a launch.

    Parameters
    ----------
    runs
        `qnb.report.results.Results.bs1`.
    """
    runs = _have(runs, "kernel_s_per_token", "tpot_s")
    if runs.empty:
        return look.nothing("Where a token's time goes", "kernels are traced on a GPU")
    gap = (runs.tpot_s - runs.kernel_s_per_token).clip(lower=0)
    hover = [
        f"{row['precision']}, {row['engine']}: {1e3 * row['tpot_s']:.2f} ms a token"
        f"<br>kernels {1e3 * row['kernel_s_per_token']:.2f} ms"
        + (f", {row['kernels_per_token']:,.0f} of them" if pd.notna(row.get("kernels_per_token")) else "")
        + f"<br>waiting {100 * max(0, 1 - row['kernel_s_per_token'] / row['tpot_s']):.0f} %"
        + _repeats(row)
        for row in runs.to_dict("records")
    ]
    parts = {"kernels at work": 1e3 * runs.kernel_s_per_token, "waiting for a launch": 1e3 * gap}
    frame = runs.assign(**parts, total=1e3 * runs.tpot_s, hover=hover)
    looks = {"kernels at work": ("", True), "waiting for a launch": ("/", False)}
    return _stacked([("bs1", frame)], looks, "Where a token's time goes", "ms a token, batch size 1")


def energy(runs: pd.DataFrame) -> go.Figure:
    """Energy a generated token, above idle and the idle device's share, at batch size 1 and the largest batch.

    Parameters
    ----------
    runs
        `qnb.report.results.Results.speed`.
    """
    runs = _have(runs, "energy_j_per_token")
    if runs.empty:
        return look.nothing("Energy a token", "a GPU's own counter is read")
    if "energy_above_idle_j_per_token" not in runs:
        runs = runs.assign(energy_above_idle_j_per_token=float("nan"))
    above = runs.energy_above_idle_j_per_token
    total = runs.energy_j_per_token
    hover = [
        f"{row['precision']}, {row['engine']}, batch {row['batch_size']}: {look.number(row['energy_j_per_token'])} J"
        + (f"<br>above idle {look.number(value)} J" if pd.notna(value) else "")
        + _repeats(row)
        for row, value in zip(runs.to_dict("records"), above, strict=True)
    ]
    parts = {"above idle": above.fillna(total), "the idle device's share": (total - above).fillna(0).clip(lower=0)}
    frame = runs.assign(**parts, total=total, hover=hover)
    panels = [(name, frame[frame.setting == name]) for name in ("bs1", "maxbatch")]
    looks = {"above idle": ("", True), "the idle device's share": (".", False)}
    return _stacked(panels, looks, "Energy a token", "J a token")


def memory(runs: pd.DataFrame) -> go.Figure:
    """GPU memory by part: weights, cache, activations, and what the allocator holds beyond them.

    Weights and cache are computed, the rest follows from the allocator's two peaks.

    Parameters
    ----------
    runs
        `qnb.report.results.Results.speed`.
    """
    runs = _have(runs, "weights_mib", "cache_mib", "peak_allocated_mib", "peak_reserved_mib")
    if runs.empty:
        return look.nothing("GPU memory by part", "the allocator of a GPU is read")
    rest = (runs.peak_allocated_mib - runs.weights_mib - runs.cache_mib).clip(lower=0)
    slack = (runs.peak_reserved_mib - runs.peak_allocated_mib).clip(lower=0)
    parts = {"weights": runs.weights_mib, "cache": runs.cache_mib, "activations": rest, "allocator slack": slack}
    hover = [
        f"{row['precision']}, {row['engine']}, batch {row['batch_size']}: {row['peak_reserved_mib']:,.0f} MiB"
        + "".join(f"<br>{name} {values[place]:,.0f}" for name, values in parts.items())
        + _repeats(row)
        for place, row in zip(runs.index, runs.to_dict("records"), strict=True)
    ]
    frame = runs.assign(**parts, total=sum(parts.values()), hover=hover)
    panels = [(name, frame[frame.setting == name]) for name in ("bs1", "maxbatch")]
    looks = {"weights": ("", True), "cache": ("/", True), "activations": ("x", False), "allocator slack": (".", False)}
    return _stacked(panels, looks, "GPU memory by part", "MiB")


def timeline(samples: pd.DataFrame, setting: str) -> go.Figure:
    """The monitor's readings during the first pass: a panel a quantity, a line a precision and engine.

    Parameters
    ----------
    samples
        `qnb.report.results.Results.samples`.
    setting
        ``"bs1"`` or ``"maxbatch"``.
    """
    title = f"The monitor, {SETTINGS[setting]}"
    shown = [name for name in TIMELINE if name in samples and samples[name].notna().any()]
    samples = samples[samples.setting == setting] if shown else samples
    if samples.empty:
        return look.nothing(title)
    height = 150 + 170 * len(shown)
    figure = look.panels(height, [TIMELINE[name] for name in shown], shared_xaxes=True)
    runs = samples.groupby(["precision", "engine"], sort=False)
    several = samples.engine.nunique() > 1
    for (precision, engine), rows in runs:
        name = f"{precision}, {engine}" if several else str(precision)
        end = look.marker(str(precision), str(engine))
        for place, column in enumerate(shown, 1):
            figure.add_scatter(
                x=rows.t_s, y=rows[column], mode="lines+markers", row=place, col=1, name=name, legendgroup=name,
                showlegend=place == 1, marker={**end, "size": [0] * (len(rows) - 1) + [9]},
                line={"color": PRECISIONS[str(precision)].color, "dash": look.DASHES[str(precision)], "width": 1.6},
                hovertemplate=f"{name}, %{{x:.1f}} s: %{{y:,.4g}} {TIMELINE[column].rsplit(' ', 1)[1]}"
                f"<br>n = {len(rows)} readings<extra></extra>",
            )  # fmt: skip
            figure.update_yaxes(rangemode="tozero", row=place)
    figure.update_xaxes(title="seconds since the run began", row=len(shown))
    return look.layout(figure, title, height, "memory: the whole device's, on a CPU the process's")
