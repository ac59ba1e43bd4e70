"""Panels without a browser: their parts follow one another, and what watches a run leaves it alone."""

import time

import ipywidgets
import pandas as pd
import pytest

from qnb import InputError, Study
from qnb.report import live
from qnb.report import widgets as widget


@pytest.fixture(autouse=True)
def renderer(monkeypatch):
    import plotly.io

    monkeypatch.setattr(plotly.io.renderers, "default", "plotly_mimetype")  # as a notebook has it


def walk(box):
    for child in getattr(box, "children", ()):
        yield child
        yield from walk(child)


def part(panel, kind, words=""):
    return next(one for one in walk(panel) if isinstance(one, kind) and one.description.startswith(words))


def figure_of(panel):
    (output,) = (one for one in walk(panel) if isinstance(one, ipywidgets.Output))
    (shown,) = output.outputs
    return shown["data"]["application/vnd.plotly.v1+json"]


def test_every_control_has_words_beside_it(studied):
    for panel in (widget.explorer(studied), widget.chooser(studied), widget.playground(studied)):
        kinds = (ipywidgets.Dropdown, ipywidgets.FloatSlider, ipywidgets.IntSlider, ipywidgets.SelectMultiple,
                 ipywidgets.Textarea, ipywidgets.Checkbox, ipywidgets.Button)  # fmt: skip
        controls = [one for one in walk(panel) if isinstance(one, kinds)]
        assert controls and all(one.description for one in controls)


def test_the_explorer_redraws_when_a_choice_changes(studied):
    panel = widget.explorer(studied)
    before = figure_of(panel)["layout"]["title"]["text"]
    part(panel, ipywidgets.Dropdown, "quantity").value = "tpot_s"
    after = figure_of(panel)
    assert "Accuracy" in before and "TPOT" in after["layout"]["title"]["text"]
    assert part(panel, ipywidgets.Dropdown, "task").disabled
    part(panel, ipywidgets.Dropdown, "engine").value = "cuda_graph"
    part(panel, ipywidgets.SelectMultiple).value = ("bf16", "nf4")
    part(panel, ipywidgets.Dropdown, "compared").value = "bf16"
    bars = figure_of(panel)["data"][0]
    assert list(bars["y"]) == ["bf16", "nf4"]


def test_the_explorer_shows_kept_runs_on_a_machine_that_measured_nothing(tmp_path):
    panel = widget.explorer(Study(output=tmp_path))
    source = part(panel, ipywidgets.Dropdown, "study")
    assert all(name.startswith("kept: ") for name in source.options) and len(source.options) >= 2
    for name in source.options:
        source.value = name
        assert figure_of(panel)["data"]


def test_the_choosers_words_and_figure_follow_its_sliders(studied):
    panel = widget.chooser(studied)
    words = part(panel, ipywidgets.HTML)
    assert "Recommended: nf4 (cuda_graph)" in words.value
    part(panel, ipywidgets.FloatSlider, "memory").value = 700
    assert "Recommended: nothing" in words.value
    assert figure_of(panel)["layout"]["shapes"][0]["x0"] == 700
    part(panel, ipywidgets.FloatSlider, "memory").value = 2100
    part(panel, ipywidgets.FloatSlider, "loss").value = 0
    assert "Recommended: bf16 (cuda_graph)" in words.value and "cannot tell" in words.value
    part(panel, ipywidgets.Dropdown, "accuracy").value = ""
    assert "int4 (cuda_graph)" in words.value.split("Second")[1] and "cannot tell" not in words.value
    part(panel, ipywidgets.Dropdown, "ranked").value = ("maxbatch", "throughput_rps")
    assert "requests/s, at least" in part(panel, ipywidgets.FloatSlider, "throughput").description


def test_a_new_study_says_what_to_run_first(tmp_path, monkeypatch):
    monkeypatch.setattr(widget, "REFERENCE", tmp_path / "none")
    study = Study(output=tmp_path / "study")
    for panel in (widget.explorer(study), widget.chooser(study)):
        assert "03_perf_bs1" in panel.children[0].value


def test_tokens_that_part_from_bf16_are_marked_and_nothing_else():
    made = {"bf16": [" a", " b", " c"], "int8": [" a", " x", " c"], "nf4": [" a", " b", " c"]}
    text = widget.side_by_side(made)
    assert text.count("<mark") == 1 and "> x</mark>" in text
    assert "parts at token 2" in text and text.count("as BF16") == 1


def test_the_playground_shows_what_each_ticked_precision_says_and_errors_as_words(studied, monkeypatch):
    asked = []

    def continuation(prompt, precision, new_tokens):
        asked.append(precision)
        if not prompt.strip():
            raise InputError("the prompt is <empty>")
        return [prompt, precision]

    monkeypatch.setattr(studied, "continuation", continuation)
    panel = widget.playground(studied)
    assert asked == []  # nothing is loaded for looking
    for tick in (one for one in walk(panel) if isinstance(one, ipywidgets.Checkbox)):
        tick.value = tick.description == "int8"
    button, words = part(panel, ipywidgets.Button), part(panel, ipywidgets.HTML)
    part(panel, ipywidgets.Textarea).value = "<i>hello"
    button.click()
    assert asked == ["bf16", "int8"] and "&lt;i&gt;hello" in words.value and "<i>" not in words.value
    part(panel, ipywidgets.Textarea).value = " "
    button.click()
    assert "role='alert'" in words.value and "&lt;empty&gt;" in words.value and not button.disabled


def test_a_continuation_is_the_models_own_greedy_text(source, tmp_path):
    """Its pieces joined are what transformers' generate gives for the same prompt."""
    from qnb.precision import PRECISIONS
    from qnb.quantize import checkpoint as model

    study = Study("smollm2-135m", "bf16", tmp_path)
    prompt = "The capital of France is"
    made = "".join(study.continuation(prompt, "bf16", 6))
    network = model.load(study.checkpoint(PRECISIONS["bf16"]), PRECISIONS["bf16"], study.device.kind)
    given = study.tokenizer(prompt, return_tensors="pt").to(network.device)
    whole = network.generate(**given, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0]
    assert made == study.tokenizer.decode(whole[given["input_ids"].shape[1] :])
    with pytest.raises(InputError, match="empty"):
        study.continuation("  ", "bf16")


class Fake:
    """A study whose device is this machine."""

    class device:
        place = "cpu"


def test_the_live_monitor_draws_while_the_block_runs_and_ends_with_it(capsys):
    with live.Monitor(Fake(), period_s=0.02) as monitor:
        before = monitor.panel.value
        deadline = time.monotonic() + 5
        while "<svg" not in monitor.panel.value and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "<svg" not in before and "utilization, %" in monitor.panel.value
    assert not monitor._thread.is_alive()


def test_a_sensor_that_fails_leaves_the_block_alone():
    monitor = live.Monitor(Fake(), period_s=0.01)
    monitor._sensor = None  # whatever is read from it fails
    with pytest.raises(KeyError), monitor:
        time.sleep(0.05)
        raise KeyError("the run's own")
    assert "<svg" not in monitor.panel.value and not monitor._thread.is_alive()


def test_drawing_the_monitor_costs_a_run_less_than_a_thousandth():
    """Once a second: a millisecond of it is a thousandth."""
    readings = [{"utilization_pct": 50.0, "memory_mib": 100.0 + at, "power_w": 70.0} for at in range(live.KEPT)]
    taken_s = []
    for _ in range(50):
        started = time.process_time()
        text = live.draw(readings, 1.0)
        taken_s.append(time.process_time() - started)
    assert min(taken_s) < 1e-3 and text.count("<svg") == 3  # what else the machine does only adds


def test_frames_that_panels_read_are_not_changed_by_them(studied):
    before = studied.results().bs1.copy()
    part(widget.explorer(studied), ipywidgets.Dropdown, "quantity").value = "memory_mib"
    pd.testing.assert_frame_equal(before, studied.results().bs1)
