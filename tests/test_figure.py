"""Figures draw what the frames say, and nothing else; pictures are saved where there is a browser."""

import itertools
import math
from dataclasses import replace

import example
import pandas as pd
import plotly.graph_objects as go
import pytest

from qnb.precision import PRECISIONS
from qnb.report import cost_figures as cost
from qnb.report import export, paper, results
from qnb.report import figures as figure
from qnb.report import recommend as choose
from qnb.report import tables as table
from qnb.report import theme as look
from qnb.report import tradeoff_figures as tradeoff

EMPTY = pd.DataFrame()
PAPERS = ["fig1_accuracy", "fig2_change", "fig3_bs1_metrics", "fig4_bs1_heatmap", "fig5_maxbatch_metrics",
          "fig6_maxbatch_heatmap"]  # fmt: skip


@pytest.fixture
def runs():
    """Two precisions, hand-made: 4 requests in 2 s and in 1 s."""
    row = {"engine": "eager", "batch_size": 1, "requests": 4, "prompt_tokens": 8, "new_tokens": 2, "repeat": 0,
           "monitor_source": "fake", "utilization_pct": 50.0, "memory_mib": 100.0}  # fmt: skip
    rows = []
    for precision, total_s in (("bf16", 2.0), ("int8", 1.0)):
        times = {"total_s": total_s, "throughput_rps": 4 / total_s, "throughput_tps": 8 / total_s}
        times |= {"seconds_per_request": total_s / 4, "batch_latency_s": total_s / 4}
        rows.append({**row, **times, "precision": precision})
    return pd.DataFrame(rows)


def drawn_values(drawn):
    return [value for trace in drawn.data if trace.x is not None for value in trace.x]


def test_speedup_is_throughput_over_bf16s(runs):
    made = table.performance(runs, 3).set_index("precision")
    assert made.speedup.to_dict() == {"bf16": 1.0, "int8": 2.0}
    assert made.seconds_per_request["int8"] == 0.25


def test_rows_that_cannot_be_compared_say_so(runs):
    """INT8 was measured with other prompts before, or beside another process: it has no speedup, and the table why."""
    runs = runs.assign(measured_at="2026-01-02T00:00:00", workload="new")
    runs.loc[runs.precision == "int8", ["measured_at", "workload"]] = "2026-01-01T00:00:00", "old"
    made = table.performance(runs, 3).set_index("precision")
    assert made.note.to_dict() == {"bf16": "", "int8": table.OTHER} and pd.isna(made.speedup["int8"])
    busy = [["other processes used 40 % of the CPU"] if name == "bf16" else [] for name in runs.precision]
    made = table.performance(runs.assign(workload="one", flags=busy), 3).set_index("precision")
    assert made.speedup.isna().all() and list(made.note) == ["", ""] and "40 %" in made["flags"]["bf16"]


def test_what_is_equal_is_not_drawn_as_worst(runs):
    """One row, or rows with one memory, are the best there is: dark, whether more or less of it is better."""
    made = table.performance(runs.assign(memory_mib=100.0), 3)
    shades = pd.DataFrame(figure.heatmap(made, "x").data[0].z, columns=list(figure.METRICS)[:4])
    assert (shades.memory_mib == 1).all() and sorted(shades.throughput_rps) == [0, 1]


def test_published_values_stand_in_their_own_columns(runs):
    made = table.performance(runs, 3).set_index("precision")
    published = paper.performance(3).set_index("precision")
    assert made.published_throughput_rps["int8"] == published.throughput_rps["int8"] != made.throughput_rps["int8"]


def test_a_figure_draws_measured_and_published(runs):
    made = table.performance(runs, 3)
    values = drawn_values(figure.metrics(made, "Batch size 1"))
    assert 4.0 in values and 2.0 in values
    assert made.published_throughput_rps.iloc[0] in values


@pytest.fixture(scope="module")
def drawn(studied):
    return figure.draw_all(studied.results())


def test_every_figure_of_a_study_draws_something_and_the_papers_six_come_first(drawn):
    assert list(drawn)[:6] == PAPERS and len(drawn) == 16
    assert not [name for name, one in drawn.items() if look.is_empty(one)]


def test_axes_carry_units_and_hovers_their_n(drawn):
    for name, one in drawn.items():
        texts = [axis.title.text or "" for axis in (*one.select_xaxes(), *one.select_yaxes())]
        texts += [note.text or "" for note in one.layout.annotations]
        texts += list(map(str, one.data[0].x)) if "heatmap" in name else []
        units = ("%", "points", "requests/s", "MiB", "ms", "s", "J", "W", "FLOP", "batch size")
        assert any(unit in text for unit in units for text in texts), name
        hovers = [str(trace.hovertext) for trace in one.data if trace.hovertext is not None]
        hovers += [trace.hovertemplate for trace in one.data if trace.hovertemplate]
        assert "heatmap" in name or any("n = " in text for text in hovers), name


def test_a_study_without_new_columns_still_has_its_old_figures(runs):
    """Rows of an earlier version, or of a CPU: what they lack is said, not guessed."""
    one = [cost.roofline(runs), cost.token_time(runs), cost.memory(runs), cost.energy(runs), tradeoff.forest(EMPTY)]
    for drawn in (*one, cost.sweep(EMPTY, runs), cost.timeline(EMPTY, "bs1"), tradeoff.front([], "tpot_s")):
        assert look.is_empty(drawn) and drawn.layout.annotations[0].text.startswith("nothing measured yet")


@pytest.mark.parametrize("only", ["scores", "bs1", "maxbatch", "sweep", "samples", "checkpoints", "divergence"])
def test_a_study_of_one_stage_alone_is_drawn(only, studied):
    """Each notebook runs alone, and a report is made of what there is."""
    whole = studied.results()
    part = results.Results("one", "m", "d", dict.fromkeys(results.TABLES, EMPTY), **{only: getattr(whole, only)})
    shown = {name for name, one in figure.draw_all(part).items() if not look.is_empty(one)}
    wants = {"scores": "fig1_accuracy", "bs1": "token_time", "maxbatch": "roofline", "sweep": "sweep",
             "samples": "timeline_bs1"}  # fmt: skip
    assert wants.get(only) in shown or (only not in wants and not shown)


def test_a_sweep_has_a_panel_an_engine_and_a_star_only_of_its_own_lengths(studied):
    whole = studied.results()
    slow = whole.sweep.batch_size.map({64: 10.0}).fillna(1.0)  # so that there is a knee
    bent = {"throughput_rps": whole.sweep.throughput_rps / slow, "batch_latency_s": whole.sweep.batch_latency_s * slow}
    whole = replace(whole, sweep=whole.sweep.assign(**bent))
    drawn = cost.sweep(whole.sweep, whole.maxbatch)
    titles = [note.text for note in drawn.layout.annotations]
    assert titles == ["throughput with eager, requests/s", "throughput with cuda_graph, requests/s",
                      "batch latency with eager, s", "batch latency with cuda_graph, s"]  # fmt: skip
    assert {trace.yaxis for trace in drawn.data if (trace.marker.symbol or "") == "diamond"} == {"y2", "y4"}
    assert drawn.layout.yaxis2.matches == "y" and drawn.layout.yaxis4.matches == "y3"

    def stars(figure, symbol="star"):
        return sorted((trace.yaxis, trace.legendgroup, x, y) for trace in figure.data
                      if trace.marker.symbol == symbol for x, y in zip(trace.x, trace.y, strict=True))  # fmt: skip

    places = {("eager", "throughput_rps"): "y", ("cuda_graph", "throughput_rps"): "y2",
              ("eager", "batch_latency_s"): "y3", ("cuda_graph", "batch_latency_s"): "y4"}  # fmt: skip
    assert stars(drawn) == sorted(
        (place, row["precision"], row["batch_size"], row[name])
        for row in whole.maxbatch.to_dict("records") for (engine, name), place in places.items()
        if row["engine"] == engine
    )  # fmt: skip
    made = table.sweep(whole.sweep)
    bent = made[made.knee]
    assert stars(drawn, "circle-open") == sorted(
        (place, row["precision"], row["batch_size"], row[name]) for row in bent.to_dict("records")
        for (engine, name), place in places.items() if row["engine"] == engine
    ) and len(bent)  # fmt: skip
    assert {axis.type for axis in (*drawn.select_xaxes(), *drawn.select_yaxes())} == {"log"}
    one = next(trace for trace in drawn.data if trace.mode == "lines+markers" and trace.yaxis == "y2")
    row = whole.sweep[(whole.sweep.engine == "cuda_graph")].iloc[0]
    assert one.hovertext[0] == (
        f"{row.precision}, cuda_graph, batch 1: {look.number(row.throughput_rps)} requests/s"
        "<br>prompts of 128 tokens, 100 new ones<br>fastest batch "
        f"{row.throughput_spread_pct:.1f} % faster than the slowest<br>n = {row.requests:.0f} requests, 1 pass"
    )
    other = cost.sweep(whole.sweep, whole.maxbatch.assign(new_tokens=7))
    assert not stars(other) and "star" not in look.title(other)
    assert look.title(drawn).endswith("128 + 100 tokens; log axes; ring: knee; star: largest timed")
    short = whole.sweep.precision == "int4"
    mixed = whole.sweep.assign(new_tokens=whole.sweep.new_tokens.where(~short, 7))
    assert "unlike lengths" in look.title(cost.sweep(mixed, EMPTY))


def test_what_was_timed_beside_others_is_marked(studied):
    whole = studied.results()
    flags = [["other processes used 40 % of the CPU"] if name == "int8" else [] for name in whole.bs1.precision]
    busy = replace(whole, bs1=whole.bs1.assign(flags=flags))
    drawn = figure.draw_all(busy)
    for name, labelled in (("front_tpot", True), ("front_memory", False)):
        texts = [text for trace in drawn[name].data for text in trace.text or ()]
        assert any("int8 (disturbed)" in text for text in texts) == labelled, name
        assert not any("bf16 (disturbed)" in text for text in texts)
    for name in ("roofline", "token_time"):
        told = [trace.hovertext for trace in drawn[name].data if trace.hovertext is not None]
        hovers = [text for texts in told for text in ([texts] if isinstance(texts, str) else texts)]
        marked = [text for text in hovers if text.endswith("disturbed by other processes")]
        assert marked and all(text.startswith("int8") for text in marked), name


def test_no_precision_shares_colour_and_hatch_with_another():
    looks = [(one.color, look.HATCHES[name]) for name, one in PRECISIONS.items()]
    assert len({color for color, _ in looks}) == len(set(looks)) == len(PRECISIONS)
    assert len({look.HATCHES[name] for name in ("bf16", "fp16", "int8", "int4", "nf4")}) == 5


def test_a_change_is_drawn_with_its_interval_and_marked_only_if_significant():
    changes = pd.DataFrame([
        {"task": "arc_easy", "precision": "int4", "change_pp": -9.0, "low_pp": -13.0, "high_pp": -5.0, "items": 400,
         "p_mcnemar": 1e-5, "p_holm": 1e-4, "significant": True},
        {"task": "hellaswag", "precision": "int4", "change_pp": -1.0, "low_pp": -3.0, "high_pp": 1.0, "items": 500,
         "p_mcnemar": 0.4, "p_holm": 0.4, "significant": False},
    ])  # fmt: skip
    points, stars = tradeoff.forest(changes).data
    assert list(points.x) == [-9, -1] and list(points.error_x.arrayminus) == [4, 2]
    assert list(stars.text) == [" ✱"] and list(stars.x) == [-5] and stars.y[0] == points.y[0]  # at its own bar's end
    assert points.marker.color[0] == PRECISIONS["int4"].color and points.marker.color[1] == "white"
    assert "n = 400" in points.hovertext[0] and "-13.00 to -5.00" in points.hovertext[0]


def test_the_front_holds_what_no_other_beats_in_both():
    frame = pd.DataFrame({"cost": [1, 2, 3, 4, 4], "accuracy_pct": [40, 39, 45, 45, 50]}, index=list("abcde"))
    assert list(tradeoff.pareto(frame).index) == ["a", "c", "e"]


def test_memory_by_part_adds_up_to_what_the_allocator_reserved(studied):
    rows = studied.results().speed
    drawn = cost.memory(rows)
    bars = [trace for trace in drawn.data if isinstance(trace, go.Bar) and trace.y[0] is not None]
    at_one = rows[rows.setting == "bs1"]
    total = sum(sum(bar.x) for bar in bars[:4])
    assert total == pytest.approx(at_one.peak_reserved_mib.sum())


def test_kernels_and_gaps_add_up_to_a_tokens_time(studied):
    rows = studied.results().bs1
    kernels, gaps = cost.token_time(rows).data[:2]
    assert sum(kernels.x) + sum(gaps.x) == pytest.approx(1e3 * rows.tpot_s.sum())


def test_no_point_lies_above_the_measured_roof(studied):
    rows = studied.results().speed
    drawn = cost.roofline(rows)
    points = [trace for trace in drawn.data if trace.mode == "markers+text"]
    assert sum(len(trace.x) for trace in points) == len(rows)
    for trace in points:
        for intensity, tflops in zip(trace.x, trace.y, strict=True):
            assert tflops <= min(intensity * example.BYTES_S, example.FLOP_S) / 1e12


def test_errors_end_where_accuracy_does():
    scores = pd.DataFrame({"task": "a", "asked": "a", "precision": ["bf16", "nf4"], "metric": "acc", "filter": "none",
                           "value": [0.02, 0.99], "stderr": 0.05, "items": 20, "of": 20, "limit": 20,
                           "group": False})  # fmt: skip
    bars = [bar for bar in figure.accuracy(scores).data if bar.error_x.array is not None]
    ends = [(bar.x[0] - bar.error_x.arrayminus[0], bar.x[0] + bar.error_x.array[0]) for bar in bars]
    assert ends == [(pytest.approx(0), pytest.approx(7)), (pytest.approx(94), pytest.approx(100))]


def test_roofs_bear_the_names_of_their_precisions_together_where_they_are_near():
    rows = pd.DataFrame({"precision": ["bf16", "nf4", "int4", "fp32"], "engine": "eager", "batch_size": 1,
                         "bytes_per_step": 1e9, "flops_per_step": 1e9, "achieved_flop_per_s": 1e11,
                         "limit_bytes_per_s": 1e12, "limit_flop_per_s": [8e14, 9e14, 6e13, 5e13]})  # fmt: skip
    drawn = cost.roofline(rows)
    named = [(trace.text[0], trace.x[0], trace.y[0]) for trace in drawn.data if trace.mode == "text"]
    assert named == [("fp32, int4", 60, 60), ("bf16, nf4", 900, 900)]  # each at its highest roof's ridge
    assert sum(trace.mode == "lines" for trace in drawn.data) == 4


def test_repeats_become_their_median_with_their_range(studied):
    one = studied.results().bs1.iloc[0]
    passes = [row for row in studied.ledger if row["stage"] == "perf" and row["setting"] == "bs1"]
    passes = [
        row["throughput_rps"] for row in passes if (row["precision"], row["engine"]) == (one.precision, one.engine)
    ]
    assert one.repeats == 3 and one.throughput_rps == sorted(passes)[1]
    assert (one.low_rps, one.high_rps) == (min(passes), max(passes))


@pytest.mark.parametrize(
    "steps_ms, bound", [((10, 14, 14), "launch"), ((10, 10, 14), "compute"), ((10, 14, 11.5), "kernels")]
)
def test_what_bounds_a_row_is_of_its_medians_in_tables_and_figures(runs, steps_ms, bound):
    """Kernels of 9 ms, traced beside the first pass, and products that take 5.5 at best: a pass may say another."""
    first = runs[runs.engine == "eager"].iloc[:1]
    passes = pd.concat([
        first.assign(
            tpot_s=step_ms / 1e3, kernel_s_per_token=None if place else 0.009, achieved_bytes_per_s=1e-3 / step_ms,
            limit_bytes_per_s=1.0, achieved_flop_per_s=5.5 / step_ms, limit_flop_per_s=1.0, bound="bandwidth",
            stopped="limit" if place else "",
        ) for place, step_ms in enumerate(steps_ms)
    ])  # fmt: skip
    for told in (results.medians(passes), table.performance(passes, 3)):
        assert (told.bound.item(), told.stopped.item()) == (bound, "limit")


def test_a_name_from_a_data_set_is_text_not_markup():
    assert look.label("<img src=x onerror=alert(1)>") == "&lt;img src=x onerror=alert(1)&gt;"


def test_pages_share_one_library(runs, tmp_path):
    empty = {number: EMPTY for number in range(1, 5)}
    drawn = {"a": figure.metrics(table.performance(runs, 3), "Batch size 1"), "b": figure.change(empty[2])}
    export.pages(drawn, tmp_path)
    assert sorted(page.name for page in tmp_path.glob("*.html")) == ["a.html", "b.html"]
    assert all(page.stat().st_size < 500_000 for page in tmp_path.glob("*.html"))
    assert len(list(tmp_path.glob("plotly*.js"))) == 1


def test_without_a_browser_pictures_say_so_and_what_to_do(runs, tmp_path, monkeypatch):
    from choreographer.browsers.chromium import Chromium

    monkeypatch.setattr(Chromium, "find_browser", lambda **_: None)
    drawn = {"a": figure.metrics(table.performance(runs, 3), "Batch size 1")}
    assert "kaleido_get_chrome" in export.pictures(drawn, tmp_path) and not list(tmp_path.iterdir())
    assert export.pictures({"b": figure.change(EMPTY)}, tmp_path) == ""  # nothing to draw needs no browser


def test_a_browser_that_fails_costs_the_pictures_and_not_the_run(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", "/bin/false")
    drawn = {"a": figure.metrics(table.performance(runs, 3), "Batch size 1")}
    assert "did not draw" in export.pictures(drawn, tmp_path)


def test_candidates_join_speed_and_accuracy(studied):
    found = {one.name: one for one in choose.candidates(studied.results(), "bs1")}
    assert len(found) == 10 and found["bf16 (eager)"].change_pp == 0
    int4 = found["int4 (cuda_graph)"]
    assert int4.items == sum(count for count, _ in example.TASKS.values())
    assert int4.low_pp < int4.change_pp < int4.high_pp < 0
    changes = studied.results().tables[2]
    assert int4.change_pp == pytest.approx(changes[changes.precision == "int4"].change_pp.mean())


def test_labels_of_points_that_nearly_coincide_keep_off_each_other():
    """Nine points in a heap, their labels all to the right at first; one that stands alone stays as it was."""
    figure = go.Figure()
    for place, precision in enumerate(PRECISIONS):
        at = {"x": [10 ** (2 + 0.02 * place)], "y": [5 + 0.3 * (place % 2)]}
        figure.add_scatter(**at, mode="markers+text", text=[f" {precision} "], textposition="middle right")
    figure.add_scatter(x=[1.0], y=[0.0], mode="markers+text", text=["alone"], textposition="bottom left")
    figure.update_xaxes(type="log")
    look.layout(figure, "heap", 430)

    def covered():
        """Count the pairs of labels that share a place, the panel reaching from 1 to 10 ** 2.16 and from 0 to 5.3."""
        width, height = look.PANEL_PX / 2.16, (430 - look.TOP_PX - look.BOTTOM_PX) / 5.3
        boxes = [
            look._box((width * math.log10(one.x[0]), height * one.y[0]),
                      (look.LETTER_PX * len(one.text[0].strip()), look.LINE_PX), one.textposition)
            for one in figure.data[:-1]
        ]  # fmt: skip
        return sum(look._shared(one, other) > 0 for one, other in itertools.combinations(boxes, 2))

    before = covered()
    look.part_labels(figure)
    assert before > 5 and covered() < before / 2
    assert figure.data[-1].textposition == "bottom left"


@pytest.mark.parametrize(
    ("low", "high", "first", "last"), [(1, 1000, 1, 1000), (182, 263, 180, 260), (240, 240, 200, 250)]
)
def test_a_logarithmic_axis_has_ticks_however_short_it_is(low, high, first, last):
    made = look.ticks(low, high)
    assert made["type"] == "log" and {first, last} <= {round(value, 6) for value in made["tickvals"]}
    assert made["ticktext"] == [look.number(value) for value in made["tickvals"]]
    assert len(made["ticktext"]) == len(set(made["ticktext"])) > 1
