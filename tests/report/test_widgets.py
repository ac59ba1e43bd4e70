"""Panels without a browser: their parts follow one another, and what watches a run leaves it alone."""

import time
import timeit
from dataclasses import replace

import ipywidgets
import pandas as pd
import pytest

from qnb import InputError, Study
from qnb.columns import header
from qnb.report import widgets
from qnb.report.findings import SETTINGS
from qnb.speed.monitor import Sensor

CONTROLS = (ipywidgets.Dropdown, ipywidgets.FloatSlider, ipywidgets.IntSlider, ipywidgets.SelectMultiple,
            ipywidgets.Textarea, ipywidgets.Button)  # fmt: skip


@pytest.fixture(autouse=True)
def renderer(monkeypatch):
    import plotly.io

    monkeypatch.setattr(plotly.io.renderers, "default", "plotly_mimetype")  # as a notebook has it


def walk(box):
    for child in getattr(box, "children", ()):
        yield child
        yield from walk(child)


def part(panel, kind, words=""):
    return next(each for each in walk(panel) if isinstance(each, kind) and each.description.startswith(words))


def figure_of(panel):
    (output,) = (each for each in walk(panel) if isinstance(each, ipywidgets.Output))
    (shown,) = output.outputs
    return shown["data"]["application/vnd.plotly.v1+json"]


def test_every_control_has_words_beside_it(studied):
    for panel in (widgets.explorer(studied), widgets.chooser(studied), widgets.playground(studied)):
        controls = [each for each in walk(panel) if isinstance(each, CONTROLS)]
        assert controls and all(each.description for each in controls)


def test_the_explorer_redraws_when_a_choice_changes_and_changes_no_frame(studied):
    frame = studied.results().bs1.copy()
    panel = widgets.explorer(studied)
    before = figure_of(panel)["layout"]["title"]["text"]
    part(panel, ipywidgets.Dropdown, "quantity").value = "tpot_s"
    assert before == "Accuracy" and "TPOT" in figure_of(panel)["layout"]["title"]["text"]
    assert list(part(panel, ipywidgets.Dropdown, "of").options) == [(words, name) for name, words in SETTINGS.items()]
    part(panel, ipywidgets.SelectMultiple).value = ("bf16", "nf4")
    part(panel, ipywidgets.Dropdown, "compared").value = "bf16"
    dots = [dot for dot in figure_of(panel)["data"] if dot["mode"] == "lines+markers"]  # both engines of a format
    assert [list(dot["y"]) for dot in dots] == [["bf16", "bf16"], ["nf4", "nf4"]]
    pd.testing.assert_frame_equal(frame, studied.results().bs1)


def test_the_explorer_shows_kept_studies_on_a_machine_that_measured_nothing(tmp_path):
    panel = widgets.explorer(Study(output=tmp_path))
    source = part(panel, ipywidgets.Dropdown, "study")
    assert all(name.startswith("reference: ") for name in source.options) and source.options
    for name in source.options:
        source.value = name
        assert figure_of(panel)["data"]


def test_the_choosers_words_and_table_follow_its_sliders(studied):
    panel = widgets.chooser(studied)

    def words():
        return part(panel, ipywidgets.HTML).value

    assert "Recommended: int8 (cuda_graph)" in words()
    part(panel, ipywidgets.FloatSlider, "TPOT").value = 10  # eager takes 13 ms and more, captured 2.2 and less
    rows = words().split("<tr>")[2:]
    assert len(rows) == 10 and all(("10 ms or less" in row) == ("eager" in row) for row in rows)
    part(panel, ipywidgets.FloatSlider, "memory").value = 700
    assert "Recommended: nothing" in words() and "✓" not in words()
    part(panel, ipywidgets.FloatSlider, "memory").value = 2100
    part(panel, ipywidgets.FloatSlider, "loss").value = 0.1
    assert "Recommended: bf16 (cuda_graph)" in words()
    assert "cannot tell" in words() and "✗ ruled out" in words()
    part(panel, ipywidgets.Dropdown, "ranked").value = ("maxbatch", "throughput_rps")
    assert "requests/s, at least" in part(panel, ipywidgets.FloatSlider, "throughput").description


def test_a_new_study_says_what_to_run_first(tmp_path, monkeypatch):
    monkeypatch.setattr(widgets, "REFERENCE", tmp_path / "none")
    study = Study(output=tmp_path / "study")
    for panel in (widgets.explorer(study), widgets.chooser(study)):
        assert "03_perf_bs1" in panel.children[0].value


def test_the_chooser_recommends_nothing_but_bf16_whose_accuracy_is_known(studied):
    unknown = replace(studied.results(), scores=pd.DataFrame(), accuracy_rows=pd.DataFrame())
    *_, words = widgets._limited(unknown, "bs1", "tpot_s")
    assert "Recommended: bf16 (cuda_graph)" in words.value and "accuracy was not measured" in words.value


def test_tokens_that_differ_from_bf16s_are_marked_and_nothing_else():
    texts = {"bf16": [" a", " b", " c"], "int8": [" a", "</mark><script>", " c"], "nf4": [" a", " b", " c"]}
    html = widgets.HTML.continuations(widgets.compared(texts))
    assert html.count("<mark") == 1 and ">&lt;/mark&gt;&lt;script&gt;</mark>" in html
    assert "differs at token 2" in html and html.count("as BF16") == 1


def test_the_playground_shows_what_each_selected_format_says_and_errors_as_words(studied, monkeypatch):
    calls = []

    def continuation(prompt, precision, new_tokens):
        calls.append(precision)
        if not prompt.strip():
            raise InputError("the prompt is <empty>")
        return [prompt, precision]

    monkeypatch.setattr(studied, "continuation", continuation)
    panel = widgets.playground(studied)
    assert calls == []  # nothing is loaded for looking
    part(panel, ipywidgets.SelectMultiple).value = ("int8",)
    button, words = part(panel, ipywidgets.Button), part(panel, ipywidgets.HTML)
    part(panel, ipywidgets.Textarea).value = "<i>hello"
    button.click()
    assert calls == ["bf16", "int8"] and "&lt;i&gt;hello" in words.value and "<i>" not in words.value
    part(panel, ipywidgets.Textarea).value = " "
    button.click()
    assert 'role="alert"' in words.value and "&lt;empty&gt;" in words.value and not button.disabled


def test_the_live_monitor_draws_while_the_block_runs_and_ends_with_it(capsys):
    readings = [{"utilization_pct": 10.0}, {"utilization_pct": 30.0}]
    with widgets.LiveMonitor(iter(readings * 1000).__next__, period_s=0.02) as monitor:
        before = monitor.panel.value
        deadline = time.monotonic() + 5
        while "highest" not in monitor.panel.value and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "<svg" not in before and "utilization, %" in monitor.panel.value
    assert not monitor._thread.is_alive()


def test_a_sensor_that_fails_leaves_the_block_alone():
    monitor = widgets.LiveMonitor(lambda: 1 / 0, period_s=0.01)
    with pytest.raises(KeyError), monitor:
        time.sleep(0.05)
        raise KeyError("the run's own")
    assert "<svg" not in monitor.panel.value and not monitor._thread.is_alive()


def test_drawing_the_monitor_costs_a_run_less_than_a_thousandth():
    """Once a second: a millisecond of it is a thousandth."""
    readings = [{"utilization_pct": 50.0, "memory_mib": 100.0 + at, "power_w": 70.0} for at in range(widgets.SHOWN)]
    taken_s = timeit.repeat(lambda: widgets.sparklines(readings, 1.0), timer=time.process_time, repeat=50, number=1)
    assert min(taken_s) < 1e-3  # what else the machine does only adds
    text = widgets.sparklines(readings, 1.0)
    assert text.count("<svg") == 3 and header("memory_mib") in text
    assert header("process_memory_mib") in widgets.sparklines([Sensor("cpu").sample()], 1.0)
