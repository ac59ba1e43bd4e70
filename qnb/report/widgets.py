"""Four panels for Jupyter, Colab and Voila: playground, live monitor, explorer and chooser.

A figure is put into an Output widget by assigning its ``outputs``: drawing inside ``with output:`` can stop a
headless run for good, and FigureWidget leaves megabytes of state in an executed notebook. Every control is a
browser's own, so the keyboard reaches all of them, and each has its words beside it. Of a study the panels ask for
``results()``, ``precisions`` and ``continuation()``.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import ipywidgets as widgets
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader

from qnb.columns import column, header
from qnb.errors import InputError
from qnb.precision import BASELINE, PRECISIONS
from qnb.report import figures, recommend, verdicts
from qnb.report.findings import SETTINGS
from qnb.report.results import Results, read_reference, task_name
from qnb.report.tables import labelled

REFERENCE = Path(__file__).parents[2] / "outputs" / "reference"
NOTHING = "Nothing measured yet: run 02_accuracy, 03_perf_bs1 or 04_perf_maxbatch first."
SHOWN = 240  # the live monitor's newest readings
WIDTH_PX, HEIGHT_PX = 240, 36  # of one of its lines
HTML: Any = Environment(loader=PackageLoader("qnb", "data"), autoescape=True).get_template("panels.html").module


def _with_words(kind: type[widgets.Widget], words: str, **options: Any) -> Any:
    """Return a control with its words beside it."""
    layout = widgets.Layout(width="min(100%, 34rem)")
    return kind(description=words, style={"description_width": "11rem"}, layout=layout, **options)


def _formats(names: Sequence[str]) -> widgets.SelectMultiple:
    return _with_words(widgets.SelectMultiple, "formats", options=names, value=tuple(names), rows=len(names))


def _observe(controls: Sequence[widgets.Widget], call: Callable[[], None]) -> None:
    """Call now, and whenever a control changes."""
    for control in controls:
        control.observe(lambda _: call(), names="value")
    call()


def _above(words: str, options: Sequence[Any], build: Callable[[Any], list[widgets.Widget]]) -> list[widgets.Widget]:
    """Return a choice, and below it what `build` makes of the option chosen."""
    choice, below = _with_words(widgets.Dropdown, words, options=options), widgets.VBox()

    def rebuild() -> None:
        below.children = build(choice.value)

    _observe([choice], rebuild)
    return [choice, below]


def show(output: widgets.Output, figure: go.Figure) -> None:
    """Make a figure the only content of `output`, as the notebook's own renderer shows it."""
    bundle = figure._repr_mimebundle_()  # what IPython itself asks a figure for
    output.outputs = ({"output_type": "display_data", "data": bundle, "metadata": {}},)


def _choose_study(
    study: Any, usable: Callable[[Results], bool], build: Callable[[Results], list[widgets.Widget]]
) -> widgets.VBox:
    """Return a panel that lists the studies that can be shown, above what `build` makes of the one chosen."""
    mine = study.results()
    studies = {f"this study ({mine.name})": mine}
    studies |= {f"reference: {name}": results for name, results in read_reference(REFERENCE).items()}
    studies = {name: results for name, results in studies.items() if usable(results)}
    if not studies:
        return widgets.VBox([widgets.Label(NOTHING)])
    return widgets.VBox(_above("study", list(studies), lambda name: build(studies[name])))


def explorer(study: Any) -> widgets.VBox:
    """Return a panel that draws one quantity, for a setting, a task, formats, against a baseline."""
    return _choose_study(study, lambda results: bool(figures.measured(results)), _explorer)


def _explorer(results: Results) -> list[widgets.Widget]:
    places, names = figures.measured(results), results.precisions
    baselines = [("nothing: as measured", ""), *zip(names, names, strict=True)]
    quantity = _with_words(widgets.Dropdown, "quantity", options=[(header(name), name) for name in places])
    place = _with_words(widgets.Dropdown, "of", options=[""])
    baseline = _with_words(widgets.Dropdown, "compared with", options=baselines)
    selected, output = _formats(names), widgets.Output()

    def offer() -> None:
        place.options = [(SETTINGS.get(each) or task_name(each), each) for each in places[quantity.value]]

    def redraw() -> None:
        if place.value in places[quantity.value]:  # not while its options change
            show(output, figures.compare(results, quantity.value, place.value, selected.value, baseline.value))

    _observe([quantity], offer)  # first, so that what is drawn is of a place that has the quantity
    _observe([quantity, place, baseline, selected], redraw)
    return [quantity, place, baseline, selected, output]


def chooser(study: Any) -> widgets.VBox:
    """Return a panel that recommends a format for a memory, a speed and a tolerated loss, and says why."""
    return _choose_study(study, lambda results: bool(len(results.bs1) or len(results.maxbatch)), _chooser)


def _chooser(results: Results) -> list[widgets.Widget]:
    speeds = [
        (f"{header(name)}, {SETTINGS[setting]}", (setting, name))
        for name in recommend.SPEEDS for setting in figures.measured(results).get(name, ())
    ]  # fmt: skip
    return _above("ranked by", speeds, lambda chosen: _limited(results, *chosen))


def _limited(results: Results, setting: str, speed: str) -> list[widgets.Widget]:
    """Return a slider per limit in `recommend.Demand`, at first allowing all but a loss, and the advice below them."""
    candidates = recommend.candidates(results, setting)
    sliders, words = {}, widgets.HTML()
    memory_mib = 1.1 * candidates.peak_memory_mib.fillna(candidates.weights_mib).max()
    top = 1.1 * column(speed).scale * candidates[speed].max()
    if not math.isnan(memory_mib):
        sliders["memory_mib"] = _slider("memory, MiB, at most", memory_mib, memory_mib, 10)
    short = column(speed).label.rpartition("(")[2].rstrip(")")  # TPOT: a slider has little room
    bound, value = ("least", 0) if column(speed).better == "more" else ("most", top)
    sliders["speed_limit"] = _slider(f"{short}, {column(speed).unit}, at {bound}", top, value, top / 100)
    if candidates.low_pp.notna().any():
        sliders["loss_pp"] = _slider("loss, points, at most", 20, results.margin_pp, 0.1, least=0.1)

    def decide() -> None:
        values = {"loss_pp": results.margin_pp, **{name: slider.value for name, slider in sliders.items()}}
        values["speed_limit"] /= column(speed).scale
        chosen = recommend.choose(candidates, recommend.Demand(speed, **values))
        shown = ["precision", "engine", "fit", "peak_memory_mib", speed, *verdicts.CHANGE, "reasons"]
        words.value = HTML.advice(chosen.attrs["notes"], labelled(chosen, shown))

    _observe(list(sliders.values()), decide)
    return [*sliders.values(), words]


def _slider(words: str, high: float, value: float, step: float, least: float = 0) -> widgets.FloatSlider:
    step = float(f"{step:.1g}")
    limits = {"min": least, "max": step * math.ceil(high / step), "step": step, "readout_format": ".4g"}
    return _with_words(widgets.FloatSlider, words, value=value, continuous_update=False, **limits)


def playground(study: Any) -> widgets.VBox:
    """Return a panel that continues a prompt in the formats selected, side by side, and marks where they differ.

    BF16 is what they are compared with. Nothing is loaded before the button is pressed.
    """
    prompt = _with_words(widgets.Textarea, "prompt", value="The capital of France is", rows=3)
    selected = _formats([precision.name for precision in study.precisions])
    tokens = _with_words(widgets.IntSlider, "new tokens", value=24, min=4, max=128, continuous_update=False)
    button = widgets.Button(description="Continue", button_style="primary", tooltip="Generate in each format selected")
    words = widgets.HTML()

    def run(_: widgets.Button) -> None:
        texts: dict[str, list[str]] = {}
        button.disabled = True
        try:
            for name in dict.fromkeys([BASELINE, *selected.value]):  # BF16 first: the others are compared with it
                words.value = HTML.working(name, compared(texts))
                texts[name] = study.continuation(prompt.value, name, tokens.value)
            words.value = HTML.continuations(compared(texts))
        except InputError as error:
            words.value = HTML.problem(error)
        finally:
            button.disabled = False

    button.on_click(run)
    return widgets.VBox([prompt, selected, tokens, button, words])


def compared(texts: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Return a column per format: its tokens, each with whether it differs from BF16's at its place.

    Parameters
    ----------
    texts
        Tokens as text, by format.
    """
    base, columns = texts.get(BASELINE, []), []
    for name, tokens in texts.items():
        differs = [place < len(base) and token != base[place] for place, token in enumerate(tokens)]
        note = f"differs at token {differs.index(True) + 1}" if any(differs) else "as BF16"
        note = "the baseline" if name == BASELINE else note
        marked = list(zip(tokens, differs, strict=True))
        columns.append({"name": name, "color": PRECISIONS[name].color, "note": note, "tokens": marked})
    return columns


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

    def __enter__(self) -> Self:
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


def sparklines(readings: Sequence[Mapping[str, float]], period_s: float) -> str:
    """Return readings as lines of SVG, a row per quantity, each with its newest value in words."""
    lines = []
    for name in ("utilization_pct", "memory_mib", "process_memory_mib", "power_w"):
        values = [reading[name] for reading in readings if name in reading]
        if not values:
            continue
        scale = HEIGHT_PX / (100.0 if name.endswith("_pct") else max(values) or 1.0)
        peak = f"highest of {len(values) * period_s:,.0f} s: {max(values):,.0f}"
        lines.append({
            "points": " ".join([f"{place},{HEIGHT_PX - scale * value:.1f}" for place, value in enumerate(values)]),
            "span": max(len(values) - 1, 1), "words": f"{header(name)}: {values[-1]:,.0f} ({peak})",
        })  # fmt: skip
    return HTML.sparklines(lines, WIDTH_PX, HEIGHT_PX)
