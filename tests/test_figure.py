"""Figures and the panel draw what the tables say, and nothing else."""

import pandas as pd
import pytest

from qnb import figure, paper, table, widget


@pytest.fixture
def runs():
    """Two precisions, hand-made: 4 requests in 2 s and in 1 s."""
    row = {"engine": "eager", "batch_size": 1, "requests": 4, "prompt_tokens": 8, "new_tokens": 2, "repeat": 0,
           "monitor_source": "fake", "monitor_utilization_pct": 50.0, "memory_mib": 100.0}  # fmt: skip
    rows = []
    for precision, total_s in (("bf16", 2.0), ("int8", 1.0)):
        times = {"total_s": total_s, "throughput_rps": 4 / total_s, "throughput_tps": 8 / total_s}
        times |= {"seconds_per_request": total_s / 4, "batch_latency_s": total_s / 4}
        rows.append({**row, **times, "precision": precision})
    return pd.DataFrame(rows)


def test_speedup_is_throughput_over_bf16s(runs):
    made = table.performance(runs, 3).set_index("precision")
    assert made.speedup.to_dict() == {"bf16": 1.0, "int8": 2.0}
    assert made.seconds_per_request["int8"] == 0.25


def test_published_values_stand_in_their_own_columns(runs):
    made = table.performance(runs, 3).set_index("precision")
    published = paper.performance(3).set_index("precision")
    assert made.published_throughput_rps["int8"] == published.throughput_rps["int8"] != made.throughput_rps["int8"]


def test_a_figure_draws_measured_and_published(runs):
    made = table.performance(runs, 3)
    drawn = figure.metrics(made, "Batch size 1")
    values = [value for trace in drawn.data if trace.y is not None for value in trace.y]
    assert 4.0 in values and 2.0 in values
    assert made.published_throughput_rps.iloc[0] in values


def test_six_figures_are_saved_and_share_one_library(runs, tmp_path):
    empty = pd.DataFrame()
    drawn = figure.draw_all(empty, {2: empty, 3: table.performance(runs, 3), 4: empty})
    figure.save(drawn, tmp_path)
    pages = sorted(tmp_path.glob("fig*.html"))
    assert [page.name[:4] for page in pages] == [f"fig{number}" for number in range(1, 7)]
    assert all(page.stat().st_size < 500_000 for page in pages)
    assert len(list(tmp_path.glob("plotly*.js"))) == 1


def test_the_panel_redraws_when_a_choice_changes(runs, monkeypatch):
    import ipywidgets
    import plotly.io

    monkeypatch.setattr(plotly.io.renderers, "default", "plotly_mimetype")  # as a notebook has it

    class Measured:
        """What the panel reads of a study."""

        def table3(self):
            return table.performance(runs, 3)

        def table4(self):
            return pd.DataFrame()

    panel = widget.explorer(Measured())

    def walk(box):
        for child in getattr(box, "children", ()):
            yield child
            yield from walk(child)

    parts = list(walk(panel))
    (output,) = (part for part in parts if isinstance(part, ipywidgets.Output))
    before = output.outputs
    metric = next(part for part in parts if "throughput_rps" in str(getattr(part, "options", "")))
    metric.index = (metric.index + 1) % len(metric.options)
    assert before and output.outputs != before
