"""Panels over what a study measured, in Jupyter, Colab and Voila; but for the playground they read and never compute.

A figure is put into an Output widget by assigning its ``outputs``: drawing inside ``with output:`` can stop a
headless run for good, and FigureWidget leaves megabytes of state in an executed notebook. Every control is a
browser's own, so the keyboard reaches all of them, and each has its words beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go

from qnb.errors import InputError
from qnb.precision import BASELINE, PRECISIONS
from qnb.provenance import ROOT
from qnb.report import explore, results
from qnb.report import figures as figure
from qnb.report import recommend as choose
from qnb.report import theme as look
from qnb.report import tradeoff_figures as tradeoff
from qnb.report.results import Results
from qnb.study import Study

REFERENCE = ROOT / "outputs" / "reference"
WIDE = {"description_width": "9rem"}
NOTHING = "Nothing measured yet: run 02_accuracy, 03_perf_bs1 or 04_perf_maxbatch first."


def show(output: widgets.Output, drawn: go.Figure) -> None:
    """Make `drawn` the only content of `output`, as the notebook's own renderer would show it."""
    bundle = drawn._repr_mimebundle_()  # what IPython itself asks a figure for
    output.outputs = ({"output_type": "display_data", "data": bundle, "metadata": {}},)


def _row(width: str = "30rem") -> widgets.Layout:
    return widgets.Layout(width=f"min(100%, {width})")


def _dropdown(words: str, options: Any, value: Any = None) -> widgets.Dropdown:
    kept = {"value": value} if value is not None else {}
    return widgets.Dropdown(options=options, description=words, style=WIDE, layout=_row(), **kept)


def _observe(controls: Sequence[widgets.Widget], call: Callable[..., None]) -> None:
    for control in controls:
        control.observe(lambda _: call(), names="value")


def sources(study: Study) -> dict[str, Results]:
    """Return what a panel can show: this study where something was measured, then the runs kept in the repository."""
    mine = study.results()
    found = {f"this study ({mine.name})": mine} if mine.rows else {}
    return found | {f"kept: {name}": kept for name, kept in results.reference(REFERENCE).items()}


def explorer(study: Study) -> widgets.VBox:
    """Return a panel that draws one quantity, for a setting, a task, an engine, precisions, against a baseline."""
    known = {name: found for name, found in sources(study).items() if explore.measured(found)}
    if not known:
        return widgets.VBox([widgets.Label(NOTHING)])
    source = _dropdown("study", list(known))
    controls, output = widgets.VBox(), widgets.Output()

    def rebuild() -> None:
        chosen = known[source.value]
        kinds = explore.measured(chosen)
        quantity = _dropdown("quantity", [(_title(name), name) for name in kinds])
        settings = [name for name in explore.SETTINGS if len(explore.speeds(chosen, name))]
        setting = _dropdown("setting", [(explore.SETTINGS[name], name) for name in settings])
        task = _dropdown("task", [(look.name(name), name) for name in choose.tasks(chosen)])
        engines = sorted({str(name) for kept in settings for name in explore.speeds(chosen, kept).engine})
        engine = _dropdown("engine", [("all", ""), *((name, name) for name in engines)], "")
        names = _precisions(chosen)
        ticked = widgets.SelectMultiple(
            options=names, value=tuple(names), description="precisions", rows=len(names), style=WIDE, layout=_row()
        )
        baseline = _dropdown("compared with", [("nothing: as measured", ""), *((name, name) for name in names)], "")

        def redraw() -> None:
            of_accuracy = quantity.value == explore.ACCURACY
            task.disabled, setting.disabled, engine.disabled = not of_accuracy, of_accuracy, of_accuracy
            if not of_accuracy and setting.value not in kinds[quantity.value]:
                setting.value = kinds[quantity.value][0]  # draws again
            given = (quantity.value, setting.value or "bs1", task.value or choose.OVERALL, engine.value)
            show(output, figure.compare(*explore.values(chosen, *given, ticked.value, baseline.value)))

        shown = [quantity, setting, task, engine, ticked, baseline]
        _observe(shown, redraw)
        controls.children = shown
        redraw()

    _observe([source], rebuild)
    rebuild()
    return widgets.VBox([source, controls, output])


def _title(quantity: str) -> str:
    words, unit, _ = explore.QUANTITIES[quantity]
    return f"{words}, {unit}"


def _precisions(chosen: Results) -> list[str]:
    frames = (chosen.scores, chosen.bs1, chosen.maxbatch)
    found = {str(name) for frame in frames if "precision" in frame for name in frame.precision}
    return [name for name in PRECISIONS if name in found]


def chooser(study: Study) -> widgets.VBox:
    """Return a panel that recommends a precision for a memory, a speed and a tolerated loss, and says why."""
    known = {name: found for name, found in sources(study).items() if len(found.bs1) or len(found.maxbatch)}
    if not known:
        return widgets.VBox([widgets.Label(NOTHING)])
    source = _dropdown("study", list(known))
    questions, limits, words, output = widgets.VBox(), widgets.VBox(), widgets.HTML(), widgets.Output()

    def rebuild() -> None:
        chosen = known[source.value]
        speed = _dropdown("ranked by", _rankings(chosen))
        # a study without accuracy cannot be asked for it
        tasks = [*((look.name(name), name) for name in choose.tasks(chosen)), ("do not ask", "")]
        task = _dropdown("accuracy on", tasks)
        sliders: dict[str, widgets.FloatSlider] = {}

        def candidates() -> list[choose.Candidate]:
            return choose.candidates(chosen, speed.value[0], task.value or choose.OVERALL)

        def limit() -> None:
            sliders.clear()
            sliders.update(_limits(candidates(), speed.value[1], bool(task.value)))
            limits.children = list(sliders.values())
            _observe(limits.children, decide)
            decide()

        def decide() -> None:
            advice = choose.choose(candidates(), _demand(sliders, speed.value[1]))
            words.value = _told(choose.explain(advice))
            show(output, tradeoff.decision(advice))

        _observe([speed, task], limit)
        questions.children = [speed, task]
        limit()

    _observe([source], rebuild)
    rebuild()
    return widgets.VBox([source, questions, limits, words, output])


def _rankings(chosen: Results) -> list[tuple[str, tuple[str, str]]]:
    """Return the speeds that were measured, in words, each with its setting and name."""
    found = explore.measured(chosen)
    return [
        (f"{words}, {unit}, {explore.SETTINGS[setting]}", (setting, name))
        for name, (words, unit, _, _) in choose.SPEEDS.items()
        for setting in found.get(name, ())
    ]


def _limits(found: Sequence[choose.Candidate], speed: str, accuracy: bool) -> dict[str, widgets.FloatSlider]:
    """Return a slider a limit, by its name in `choose.Demand`; at first they allow everything but a loss."""
    sliders = {}
    memory = [one.memory_mib for one in found if one.memory_mib is not None]
    if memory:
        sliders["memory_mib"] = _slider("memory, MiB, at most", 1.1 * max(memory), 1.1 * max(memory), 10)
    words, unit, factor, more = choose.SPEEDS[speed]
    top = 1.1 * factor * max(value for one in found if (value := getattr(one, speed)) is not None)
    words = {"tpot_s": "TPOT"}.get(speed, words)
    label = f"{words}, {unit}, at {'least' if more else 'most'}"
    sliders["speed_limit"] = _slider(label, top, 0 if more else top, top / 100)
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


def _demand(sliders: dict[str, widgets.FloatSlider], speed: str) -> choose.Demand:
    asked = {name: slider.value for name, slider in sliders.items()}
    asked["speed_limit"] /= choose.SPEEDS[speed][2]
    return choose.Demand(speed, **asked)


def _told(said: dict[str, list[str]]) -> str:
    """Return headed lines as HTML that a screen reader speaks when it changes."""
    parts = []
    for heading, lines in said.items():
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        parts.append(f"<p style='margin:.6em 0 0'><b>{escape(heading)}</b></p><ul style='margin:0'>{items}</ul>")
    return f"<div role='status' aria-live='polite' style='line-height:1.4;max-width:46rem'>{''.join(parts)}</div>"


def playground(study: Study) -> widgets.VBox:
    """Return a panel that continues a prompt in the precisions ticked, side by side, and marks where they part.

    BF16 is what they part from. Nothing is loaded before the button is pressed.
    """
    names = [precision.name for precision in study.precisions]
    prompt = widgets.Textarea(
        value="The capital of France is",
        description="prompt",
        rows=3,
        style=WIDE,
        layout=_row("46rem"),
    )
    ticks = [
        widgets.Checkbox(value=True, description=name, indent=False, layout=widgets.Layout(width="8rem"))
        for name in names
    ]
    tokens = widgets.IntSlider(
        value=24, min=4, max=128, description="new tokens", continuous_update=False, style=WIDE, layout=_row()
    )
    button = widgets.Button(
        description="Continue", button_style="primary", tooltip="Generate in every precision ticked"
    )
    words = widgets.HTML()

    def run(_: widgets.Button) -> None:
        wanted = [name for name, tick in zip(names, ticks, strict=True) if tick.value]
        made: dict[str, list[str]] = {}
        button.disabled = True
        try:
            for name in dict.fromkeys([BASELINE, *wanted]):  # BF16 first: the others are compared with it
                words.value = f"<p role='status'>{escape(name)} is at work …</p>{side_by_side(made)}"
                made[name] = study.continuation(prompt.value, name, tokens.value)
            words.value = side_by_side(made)
        except InputError as error:
            words.value = f"<p role='alert'>{escape(str(error))}</p>"
        finally:
            button.disabled = False

    button.on_click(run)
    boxes = widgets.HBox(ticks, layout=widgets.Layout(flex_flow="row wrap"))
    return widgets.VBox([prompt, boxes, tokens, button, words])


def side_by_side(made: dict[str, list[str]]) -> str:
    """Return continuations as HTML columns; tokens that differ from BF16's at their place are marked.

    Parameters
    ----------
    made
        Tokens as text, by precision; BF16's is what the others are compared with.
    """
    base = made.get(BASELINE, [])
    columns = []
    for name, pieces in made.items():
        parted = next((at for at, (mine, its) in enumerate(zip(pieces, base, strict=False)) if mine != its), None)
        text = "".join(
            f"<mark style='background:#ffe08a;text-decoration:underline'>{escape(piece)}</mark>"
            if at < len(base) and piece != base[at] else escape(piece)
            for at, piece in enumerate(pieces)
        )  # fmt: skip
        note = "the baseline" if name == BASELINE else "as BF16" if parted is None else f"parts at token {parted + 1}"
        columns.append(
            f"<section aria-label='{escape(name)}' style='flex:1 1 14rem;min-width:0;border-top:4px solid "
            f"{PRECISIONS[name].color};padding:.3rem .5rem'><b>{escape(name)}</b> <small>{note}</small>"
            f"<div style='white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5'>{text}</div></section>"
        )
    return f"<div style='display:flex;flex-wrap:wrap;gap:.5rem'>{''.join(columns)}</div>"
