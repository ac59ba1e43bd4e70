"""Every figure by name, the paper's six first; and one quantity of choice."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from qnb.columns import column, format_number, header
from qnb.flags import is_disturbed
from qnb.precision import BASELINE
from qnb.report import paper, recommend, theme
from qnb.report.accuracy import headline
from qnb.report.findings import SETTINGS
from qnb.report.results import SPEED, Results, stack
from qnb.report.tables import build, knees
from qnb.report.verdicts import CHANGE, POOLED, Verdict, accuracies, tasks, with_pooled

ACCURACY = "accuracy_pct"
QUANTITIES = [name for name in SPEED if column(name).unit]
QUALITIES = ("change_pp", "kl_mean_nats", "perplexity_change_pct")  # the first that was measured is drawn
SIGNS = {str(verdict): verdict.text for verdict in Verdict}
COST_TICKS = [digit * 10.0**power for power in range(-6, 9) for digit in (1, 1.5, 2, 3, 5, 7)]
METRICS = ("throughput_rps", "seconds_per_request", "utilization_pct", "peak_memory_mib")
SWEPT = ("throughput_rps", "batch_latency_s")
NEAR = 5  # times another: limits of a device that share a label
TIMELINE = ("utilization_pct", "memory_mib", "process_memory_mib", "power_w", "clock_mhz")


# What quantizing costs


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
            "the verdict rests on the pooled interval")  # fmt: skip
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
    ends = [math.log10(costs.min()) - 0.15, math.log10(costs.max()) + 0.15]
    figure.update_xaxes(title=header(cost), type="log", tickvals=COST_TICKS, tickformat=",~g", range=ends)
    figure.update_yaxes(title=header(quality), autorange="reversed" if is_loss else True)
    note = "up and left is better; dotted line: Pareto-optimal; sign beside a name: its verdict; costs are logarithmic"
    return theme.finish(figure, title, 420, note + "; bars: 95 % interval" * (not is_loss) + theme.fusing(results.bs1))


def _points_and_front(frame: pd.DataFrame, quality: str) -> go.Figure:
    """Draw a point per format, and the line through the best; a name that another would cover is in the legend."""
    figure = theme.points(frame, "cost", quality, error_y="above", error_y_minus="below")
    names = {row.precision: f"{row.precision} {SIGNS[row.verdict]}" for row in frame.itertuples()}
    edge = pareto(frame)
    is_apart = frame.cost > 1.05 * frame.cost.shift(fill_value=0)
    others = frame[is_apart & is_apart.shift(-1, fill_value=True) & ~frame.precision.isin(edge.precision)]
    for trace in figure.data:
        trace.update(name=names[trace.name], showlegend=trace.name not in {*edge.precision, *others.precision})
    is_near = edge.cost.shift(-1) < 1.03 * edge.cost  # to the next point, which has its name above it
    places = is_near.map({True: "bottom left", False: "top left"})
    for rows, mode, place in ((others, "text", "bottom right"), (edge, "lines+text", places)):
        figure.add_scatter(
            x=rows.cost, y=rows[quality], text=theme.PAD + rows.precision.map(names) + theme.PAD, mode=mode,
            textposition=place, textfont_size=11, hoverinfo="skip", showlegend=False, cliponaxis=False,
            line={"color": theme.QUIET, "dash": "dot", "shape": "hv"},
        )  # fmt: skip
    return figure


def pareto(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that no other beats in both `cost` (less is better) and `quality` (more is), by cost."""
    frame = frame.sort_values(["cost", "quality"], ascending=[True, False])
    return frame[frame.quality > frame.quality.cummax().shift(fill_value=-math.inf)]


# What it gives


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
    note = "blue is better, or more utilization" + _disturbed(runs) + theme.fusing(runs)
    return theme.finish(figure, title, 180 + 34 * len(shades), note)


def sweep(results: Results) -> go.Figure:
    """Draw throughput and batch latency over batch size, a column of panels per engine.

    A ring marks the knee. A large point is the largest batch, where its prompts and texts are as long as the line's.
    """
    title = "When does batching stop being free?"
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
        hover=theme.hovers(runs, "mbu_pct", "mfu_pct", "bound"), size=runs.setting.map({"maxbatch": 15}).fillna(9),
    )  # fmt: skip
    figure = theme.points(runs, "intensity", "tflops", "size", log_x=True, log_y=True, opacity=1)
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
    figure.update_layout(legend_itemsizing="constant")
    note = f"lines: measured limits, {bandwidth:.3g} TB/s and TFLOP/s by type; close ones share a label; hollow: eager"
    return theme.finish(figure, title, 540, note + "; large: the largest batch" + theme.fusing(runs))


# One quantity, and all figures


def measured(results: Results) -> dict[str, list[str]]:
    """Return the quantities that were measured, each with its settings; accuracy with its tasks."""
    settings = {name: [each for each in SETTINGS if results.timed(each)[name].notna().any()] for name in QUANTITIES}
    return {name: places for name, places in {ACCURACY: tasks(results), **settings}.items() if places}


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
