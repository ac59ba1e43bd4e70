"""Four panels for Jupyter, Colab and Voila: playground, live monitor, explorer and chooser.

A figure is put into an Output widget by assigning its ``outputs``: drawing inside ``with output:`` can stop a
headless run for good, and FigureWidget leaves megabytes of state in an executed notebook. Every control is a
browser's own, so the keyboard reaches all of them, and each has its words beside it. Of a study the panels ask for
``results()``, ``precisions`` and ``continuation()``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
import plotly.graph_objects as go

from qnb.columns import column, header
from qnb.errors import InputError
from qnb.precision import BASELINE, PRECISIONS
from qnb.report import comparison, recommend, theme
from qnb.report.results import Results, read_reference, task_name
from qnb.report.tables import MEAN
from qnb.report.tradeoff_figures import decision

REFERENCE = Path(__file__).parents[2] / "outputs" / "reference"
WIDE = {"description_width": "9rem"}
NOTHING = "Nothing measured yet: run 02_accuracy, 03_perf_bs1 or 04_perf_maxbatch first."


def show(output: widgets.Output, figure: go.Figure) -> None:
    """Make a figure the only content of `output`, as the notebook's own renderer shows it."""
    bundle = figure._repr_mimebundle_()  # what IPython itself asks a figure for
    output.outputs = ({"output_type": "display_data", "data": bundle, "metadata": {}},)


def sources(study: Any) -> dict[str, Results]:
    """Return what a panel can show: this study if anything was measured, then the studies kept in the repository."""
    mine = study.results()
    return ({f"this study ({mine.name})": mine} if mine.rows else {}) | {
        f"kept: {name}": results for name, results in read_reference(REFERENCE).items()
    }


def _row(width: str = "30rem") -> widgets.Layout:
    return widgets.Layout(width=f"min(100%, {width})")


def _dropdown(words: str, options: Sequence[Any], **value: Any) -> widgets.Dropdown:
    return widgets.Dropdown(options=options, description=words, style=WIDE, layout=_row(), **value)


def _several(names: Sequence[str]) -> widgets.SelectMultiple:
    about = {"description": "formats", "rows": len(names), "style": WIDE, "layout": _row()}
    return widgets.SelectMultiple(options=names, value=tuple(names), **about)


def _observe(controls: Sequence[widgets.Widget], call: Callable[[], None]) -> None:
    for control in controls:
        control.observe(lambda _: call(), names="value")


def _choose_study(
    study: Any, usable: Callable[[Results], bool], build: Callable[[Results], list[widgets.Widget]]
) -> widgets.VBox:
    """Return a panel that lists the studies that can be shown, above what `build` makes of the one chosen."""
    studies = {name: results for name, results in sources(study).items() if usable(results)}
    if not studies:
        return widgets.VBox([widgets.Label(NOTHING)])
    source, below = _dropdown("study", list(studies)), widgets.VBox()

    def rebuild() -> None:
        below.children = build(studies[source.value])

    _observe([source], rebuild)
    rebuild()
    return widgets.VBox([source, below])


def explorer(study: Any) -> widgets.VBox:
    """Return a panel that draws one quantity, for a setting, a task, formats, against a baseline."""
    return _choose_study(study, lambda results: bool(comparison.measured(results)), _explorer)


def _explorer(results: Results) -> list[widgets.Widget]:
    settings_of = comparison.measured(results)
    settings = [name for name in comparison.SETTINGS if len(results.timed(name))]
    names = results.precisions
    quantity = _dropdown("quantity", [(header(name), name) for name in settings_of])
    setting = _dropdown("setting", [(theme.SETTINGS[name], name) for name in settings])
    task = _dropdown("task", [(task_name(name), name) for name in recommend.tasks(results)])
    ticked = _several(names)
    baseline = _dropdown("compared with", [("nothing: as measured", ""), *((name, name) for name in names)])
    output = widgets.Output()

    def redraw() -> None:
        of_accuracy = quantity.value == comparison.ACCURACY
        task.disabled, setting.disabled = not of_accuracy, of_accuracy
        if not of_accuracy and setting.value not in settings_of[quantity.value]:
            setting.value = settings_of[quantity.value][0]  # draws again
        choice = (quantity.value, setting.value or "bs1", task.value or MEAN)
        show(output, comparison.compare(results, *choice, ticked.value, baseline.value))

    controls = [quantity, setting, task, ticked, baseline]
    _observe(controls, redraw)
    redraw()
    return [*controls, output]


def chooser(study: Any) -> widgets.VBox:
    """Return a panel that recommends a format for a memory, a speed and a tolerated loss, and says why."""
    return _choose_study(study, lambda results: bool(len(results.bs1) or len(results.maxbatch)), _chooser)


def _chooser(results: Results) -> list[widgets.Widget]:
    settings_of = comparison.measured(results)
    speeds = [
        (f"{header(name)}, {theme.SETTINGS[setting]}", (setting, name))
        for name in recommend.SPEEDS for setting in settings_of.get(name, ())
    ]  # fmt: skip
    ranked = _dropdown("ranked by", speeds)
    # a study without accuracy cannot be asked for it
    tasks = [*((task_name(name), name) for name in recommend.tasks(results)), ("do not ask", "")]
    task = _dropdown("accuracy on", tasks)
    limits, words, output = widgets.VBox(), widgets.HTML(), widgets.Output()
    sliders: dict[str, widgets.FloatSlider] = {}

    def candidates() -> pd.DataFrame:
        return recommend.candidates(results, ranked.value[0], task.value or MEAN)

    def limit() -> None:
        sliders.clear()
        sliders.update(_limits(candidates(), ranked.value[1], bool(task.value)))
        limits.children = list(sliders.values())
        _observe(limits.children, decide)
        decide()

    def decide() -> None:
        name = ranked.value[1]
        values = {key: slider.value for key, slider in sliders.items()}
        values["speed_limit"] /= column(name).scale
        advice = recommend.choose(candidates(), recommend.Demand(name, **values))
        words.value = _spoken(recommend.explain(advice))
        show(output, decision(advice))

    _observe([ranked, task], limit)
    limit()
    return [ranked, task, limits, words, output]


def _limits(candidates: pd.DataFrame, speed: str, accuracy: bool) -> dict[str, widgets.FloatSlider]:
    """Return a slider per limit, by its name in `recommend.Demand`; at first they allow everything but a loss."""
    sliders = {}
    memory_mib = 1.1 * candidates.peak_memory_mib.max()
    if not math.isnan(memory_mib):
        sliders["memory_mib"] = _slider("memory, MiB, at most", memory_mib, memory_mib, 10)
    about, more = column(speed), column(speed).better == "more"
    top = 1.1 * about.scale * candidates[speed].max()
    short = about.label.rpartition("(")[2].rstrip(")")  # TPOT: a slider has little room
    words = f"{short}, {about.unit}, at {'least' if more else 'most'}"
    sliders["speed_limit"] = _slider(words, top, 0 if more else top, top / 100)
    if accuracy:
        sliders["loss_pp"] = _slider("loss, points, at most", 10, 2, 0.1)
    return sliders


def _slider(words: str, high: float, value: float, step: float) -> widgets.FloatSlider:
    step = float(f"{step:.1g}")
    return widgets.FloatSlider(
        min=0, max=step * math.ceil(high / step), value=value, step=step, description=words, continuous_update=False,
        readout_format=f".{max(0, -math.floor(math.log10(step)))}f", layout=_row(),
        style={"description_width": "11rem"},
    )  # fmt: skip


def _spoken(said: Mapping[str, Sequence[str]]) -> str:
    """Return headed lines as HTML that a screen reader speaks when it changes."""
    parts = []
    for heading, lines in said.items():
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        parts.append(f"<p style='margin:.6em 0 0'><b>{escape(heading)}</b></p><ul style='margin:0'>{items}</ul>")
    return f"<div role='status' aria-live='polite' style='line-height:1.4;max-width:46rem'>{''.join(parts)}</div>"


def playground(study: Any) -> widgets.VBox:
    """Return a panel that continues a prompt in the formats selected, side by side, and marks where they differ.

    BF16 is what they are compared with. Nothing is loaded before the button is pressed.
    """
    example = "The capital of France is"
    prompt = widgets.Textarea(example, description="prompt", rows=3, style=WIDE, layout=_row("46rem"))
    ticked = _several([precision.name for precision in study.precisions])
    tokens = widgets.IntSlider(
        24, min=4, max=128, description="new tokens", continuous_update=False, style=WIDE, layout=_row()
    )
    button = widgets.Button(description="Continue", button_style="primary", tooltip="Generate in each format selected")
    words = widgets.HTML()

    def run(_: widgets.Button) -> None:
        texts: dict[str, list[str]] = {}
        button.disabled = True
        try:
            for name in dict.fromkeys([BASELINE, *ticked.value]):  # BF16 first: the others are compared with it
                words.value = f"<p role='status'>{escape(name)} is at work …</p>{side_by_side(texts)}"
                texts[name] = study.continuation(prompt.value, name, tokens.value)
            words.value = side_by_side(texts)
        except InputError as error:
            words.value = f"<p role='alert'>{escape(str(error))}</p>"
        finally:
            button.disabled = False

    button.on_click(run)
    return widgets.VBox([prompt, ticked, tokens, button, words])


def side_by_side(texts: Mapping[str, Sequence[str]]) -> str:
    """Return continuations as HTML columns; tokens that differ from BF16's at their place are marked.

    Parameters
    ----------
    texts
        Tokens as text, by format; BF16's is what the others are compared with.
    """
    base, columns = texts.get(BASELINE, []), []
    for name, pieces in texts.items():
        other = [place < len(base) and piece != base[place] for place, piece in enumerate(pieces)]
        marks = {False: "{}", True: "<mark style='background:#ffe08a;text-decoration:underline'>{}</mark>"}
        text = "".join(marks[mark].format(escape(piece)) for piece, mark in zip(pieces, other, strict=True))
        note = f"differs at token {other.index(True) + 1}" if any(other) else "as BF16"
        columns.append(
            f"<section aria-label='{escape(name)}' style='flex:1 1 14rem;min-width:0;border-top:4px solid "
            f"{PRECISIONS[name].color};padding:.3rem .5rem'><b>{escape(name)}</b> "
            f"<small>{'the baseline' if name == BASELINE else note}</small>"
            f"<div style='white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5'>{text}</div></section>"
        )
    return f"<div style='display:flex;flex-wrap:wrap;gap:.5rem'>{''.join(columns)}</div>"


class LiveMonitor:
    """Draw utilization, memory and power while a block runs: ``with LiveMonitor(study.sensor()): ...``.

    It watches and keeps nothing. Three lines of SVG once a second are so little work that what is timed does not
    notice.

    Parameters
    ----------
    sample
        Returns a reading: quantity to value. An error of any kind is a reading that is missing.
    period_s
        Seconds between two readings.
    """

    def __init__(self, sample: Callable[[], Mapping[str, float]], period_s: float = 1.0) -> None:
        self._sample, self._period_s = sample, period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="qnb-live", daemon=True)
        self._readings: list[Mapping[str, float]] = []
        self.panel = widgets.HTML("The monitor draws once a second.")

    def __enter__(self) -> LiveMonitor:
        from IPython.display import display

        display(self.panel)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._period_s):
            try:
                self._readings.append(self._sample())
            except Exception:  # noqa: S112  a broken sensor must not break a measurement
                continue
            self.panel.value = sparklines(self._readings[-SHOWN:], self._period_s)


SHOWN = 240  # readings drawn, the newest
WIDTH_PX, HEIGHT_PX = 240, 36


def sparklines(readings: Sequence[Mapping[str, float]], period_s: float) -> str:
    """Return readings as lines of SVG, a row per quantity, each with its newest value in words."""
    rows = []
    for name in ("utilization_pct", "memory_mib", "power_w"):
        values = [reading[name] for reading in readings if name in reading]
        if not values:
            continue
        scale = HEIGHT_PX / (100.0 if name.endswith("_pct") else max(values) or 1.0)
        points = " ".join([f"{place},{HEIGHT_PX - scale * value:.1f}" for place, value in enumerate(values)])
        peak = f"highest of {len(values) * period_s:,.0f} s: {max(values):,.0f}"
        words = escape(f"{header(name)}: {values[-1]:,.0f} ({peak})")
        rows.append(
            "<div style='display:flex;flex-wrap:wrap;gap:.75rem;align-items:center'>"
            f"<svg role='img' aria-label='{words}' viewBox='0 -1 {max(len(values) - 1, 1)} {HEIGHT_PX + 2}' "
            f"width='{WIDTH_PX}' height='{HEIGHT_PX}' preserveAspectRatio='none' style='background:#f4f4f4'>"
            "<polyline fill='none' stroke='#1f4e9c' stroke-width='1.5' vector-effect='non-scaling-stroke' "
            f"points='{points}'/></svg><span>{words}</span></div>"
        )
    return "".join(rows)
