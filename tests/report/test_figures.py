"""Figures draw what the frames say, and nothing else; pictures are saved where there is a browser."""

import logging
import re
from dataclasses import replace
from itertools import product

import example
import pandas as pd
import plotly.graph_objects as go
import pytest

from qnb.columns import header
from qnb.ledger import Ledger
from qnb.precision import PRECISIONS
from qnb.report import export, figures, findings, paper, recommend, tables, theme
from qnb.report.accuracy import MEAN, headline
from qnb.report.results import Results
from qnb.report.tables import knees
from qnb.report.verdicts import POOLED, with_pooled

PAPERS = ["fig1_accuracy", "fig2_change", "fig3_bs1_metrics", "fig4_bs1_heatmap", "fig5_maxbatch_metrics",
          "fig6_maxbatch_heatmap"]  # fmt: skip
COUNTS = re.compile("(items|requests|passes): [0-9]")
UNITS = ("%", "points", "requests/s", "MiB", "ms", "s", "J", "W", "FLOP", "batch size")


@pytest.fixture(scope="module")
def drawn(study):
    return figures.draw_all(study)


def points(figure, **chosen):
    """Return a figure's visible values, (format or other x, y) pairs, of the traces whose fields are as `chosen`."""
    traces = [each for each in figure.data if all(each[name] == value for name, value in chosen.items())]
    traces = [each for each in traces if getattr(each, "mode", "") != "text"]  # the numbers beside marks
    return sorted((x, y) for each in traces for x, y in zip(each.x, each.y, strict=True) if x is not None)


def marks(figure):
    """Return each point that the pointer can show: its trace's name, x, y and the custom data, what it shows first."""
    traces = [trace for trace in figure.data if trace.customdata is not None]
    return [(each.name, *point) for each in traces for point in zip(each.x, each.y, each.customdata, strict=True)]


def written(figure):
    """Return each number that stands beside a mark, with its row."""
    texts = figure.select_traces({"mode": "text"})
    return {(row, text.strip()) for trace in texts for row, text in zip(trace.y, trace.text, strict=True)}


def hovers(figure):
    return [str(custom[0]) for *_, custom in marks(figure)]


def changes(**columns):
    """Return a study whose Table 2 is one row a task, by hand."""
    frame = pd.DataFrame({"n_items": 400, "p_mcnemar": 0.01, "p_holm": 0.02, "change_pct": -1.0, **columns})
    study = Results("hand", "m", "d")
    study.cache.update(dict.fromkeys(("changes", "table2_change"), frame.assign(published_change_pct=None)))
    return study


def one_engine(study, engine="eager", **fields):
    return replace(study, bs1=study.bs1[study.bs1.engine == engine].assign(**fields))


def test_every_figure_of_a_study_draws_something_in_a_screens_height_and_the_papers_six_come_first(drawn):
    assert list(drawn)[:6] == PAPERS and len(drawn) == 15
    assert not [name for name, figure in drawn.items() if not figure.data]
    assert max(figure.layout.height for figure in drawn.values()) <= 700
    assert all(len(figure.layout.title.text) <= 40 for figure in drawn.values())  # on a phone


def test_figures_carry_units_and_hovers_their_n(drawn):
    for name, figure in drawn.items():
        texts = [axis.title.text or "" for axis in (*figure.select_xaxes(), *figure.select_yaxes())]
        texts += [note.text or "" for note in figure.layout.annotations] + [theme.caption(figure)]
        texts += list(figure.data[0].x) if "heatmap" in name else []
        assert any(unit in text for unit in UNITS for text in texts), name
        assert name.startswith(("front", "timeline")) or "heatmap" in name or COUNTS.search(str(hovers(figure))), name


def test_nothing_measured_is_said_by_every_figure():
    for figure in figures.draw_all(Results("", "", "")).values():
        assert not figure.data and figure.layout.annotations[0].text == "nothing measured yet"


def test_rows_with_nothing_but_a_time_are_drawn_and_compared(tmp_path):
    ledger = Ledger(tmp_path)
    for precision, total_s in (("bf16", 2.0), ("int8", 1.0)):
        ledger.append({"stage": "perf", "setting": "bs1", "precision": precision, "engine": "eager", "repeat": 0,
                       "fingerprint": "f", "batch_size": 1, "requests": 4, "total_s": total_s})  # fmt: skip
    study = Results.read(ledger)
    assert points(figures.metrics(study, "bs1"), xaxis="x") == [(2.0, "bf16"), (4.0, "int8")]
    assert points(figures.compare(study, "throughput_rps", "bs1", baseline="bf16")) == [(100, "bf16"), (200, "int8")]
    assert figures.measured(study) == {key: ["bs1"] for key in ("throughput_rps", "total_s", "seconds_per_request")}


def test_engines_are_a_pair_of_dots_and_what_was_disturbed_is_starred(study, drawn):
    expected = sorted(zip(study.bs1.throughput_rps, study.bs1.precision, strict=True))
    assert points(drawn["fig3_bs1_metrics"], xaxis="x3") == expected
    assert drawn["fig3_bs1_metrics"].layout.xaxis3.type == "log"
    assert [theme.symbol("nf4", engine) for engine in ("eager", "cuda_graph")] == ["star-open", "star"]
    flags = [["cpu_shared"] if name == "int8" else [] for name in study.bs1.precision[study.bs1.engine == "eager"]]
    figure = figures.metrics(one_engine(study, flags=flags), "bs1")
    assert figure.layout.xaxis3.type == "linear" and figure.layout.xaxis3.range[0] == 0
    starred = [(name, text) for name, text in written(figure) if text.endswith("*")]
    assert {name for name, _ in starred} == {"int8"} and len(starred) == 4 and "disturbed" in theme.caption(figure)
    assert {text[:4] for text in hovers(figure) if text.endswith("disturbed by other processes")} == {"INT8"}
    (cells,) = figures.heatmap(one_engine(study, flags=flags), "bs1").data
    assert [name for name, row in zip(cells.y, cells.text, strict=True) if row[0].endswith("*")] == ["int8<br>eager"]


@pytest.mark.parametrize("names", [["bf16"], PRECISIONS], ids=["one format", "all formats"])
def test_captured_rows_without_fused_kernels_are_named_beside_those_with_them(names, study):
    def flagged(frame):
        is_unfused = (frame.engine == "cuda_graph") & frame.precision.isin(names)
        return frame.assign(flags=[["unfused"] * each for each in is_unfused])

    both = replace(study, **{setting: flagged(study.timed(setting)) for setting in ("bs1", "maxbatch", "sweep")})
    drawn = {name for name, figure in figures.draw_all(both).items() if "fus" in theme.caption(figure)}
    assert drawn == {name for name in figures.FIGURES if names == ["bf16"]} - {"forest", *PAPERS[:2]}
    shown = [tables.compact(both, name) for name in ("table3_bs1", "table4_maxbatch", "sweep", "table3_ablations")]
    shown += [tables.labelled(tables.knees(both.sweep), tables.KNEES), recommend.summary(both)]
    advice = recommend.choose(recommend.candidates(both, "bs1"), recommend.Demand("tpot_s"))
    texts = [theme.caption(figures.compare(both, "tpot_s", "bs1")), *(frame.to_string() for frame in shown)]
    texts += [" ".join(advice.attrs["notes"]), recommend.sentence(both), findings.about(both, "int4")[-1]]
    assert {"fus" in text for text in texts} == {names == ["bf16"]}
    speeds = tables.build(both, "table3_bs1").set_index("engine").speedup  # none of a baseline that is not fused
    assert speeds["eager"].notna().any() and speeds["cuda_graph"].notna().any() != (names == ["bf16"])


def test_published_values_stand_beside_the_same_model_only(study, drawn):
    llama = replace(study, model="meta-llama/Llama-3.2-1B")
    figure = figures.metrics(llama, "bs1")
    published = {(x, y) for _, x, y, custom in marks(figure) if "published" in custom[0]}
    rates = paper.performance(3)
    assert {*zip(rates.throughput_rps, rates.precision, strict=True), (4879.85, "bf16")} <= published
    for draw, value in ((figures.accuracy, 65.49), (figures.change, 0.0)):  # ARC Easy: BF16's, and FP16's change
        lines = [each for each in draw(llama).data if "line-ns-open" in str(each.marker.symbol)]
        assert any(value in each.x for each in lines)
    texts = str([figure.to_dict() for name, figure in drawn.items() if name in PAPERS])
    assert "published" not in texts


def test_the_heatmap_shades_the_best_darkest_and_equal_ones_alike(study):
    one = one_engine(study, peak_memory_mib=100.0)
    (cells,) = figures.heatmap(one, "bs1").data
    shades = pd.DataFrame(cells.z, index=cells.y)
    assert (shades[3] == 1).all()  # memory
    best, worst = shades.loc["fp16<br>eager"], shades.loc["int8<br>eager"]
    assert (best[0], worst[0]) == (1, 0)  # throughput: launches take 12.8 ms and 31 ms
    assert (best[1], worst[1]) == (1, 0)  # seconds per request


def test_a_change_is_drawn_with_its_interval_and_filled_only_if_significant():
    study = changes(task=["arc_easy", "hellaswag"], precision="int4", change_pp=[-9.0, -1.0], low_pp=[-13.0, -3.0],
                    high_pp=[-5.0, 1.0], significant=[True, False])  # fmt: skip
    drawn = {trace.marker.symbol: (*trace.x, *trace.error_x.arrayminus, *trace.error_x.array)
             for trace in figures.forest(study).data if trace.name == "int4"}  # fmt: skip
    assert drawn == {("cross",): (-9, 4, 4), ("cross-open",): (-1, 2, 2)}
    text = hovers(figures.forest(study))[0]
    assert "95 % low: -13" in text and "items: 400" in text


def test_the_mean_is_filled_where_its_interval_leaves_out_0(study):
    rows = with_pooled(study).set_index("precision")
    is_real = rows[rows.task == POOLED].eval("low_pp > 0 or high_pp < 0")
    last = figures.forest(study).select_traces(lambda trace: trace.xaxis == "x2" and trace.marker.symbol)
    assert {trace.name: not trace.marker.symbol[0].endswith("open") for trace in last} == is_real.to_dict()
    assert set(is_real) == {True, False}


def test_a_formats_symbol_and_row_do_not_depend_on_the_order_of_rows():
    rows = {"change_pp": -1.0, "low_pp": -3.0, "high_pp": 1.0, "significant": False, "task": "a"}
    studies = [changes(precision=order, **rows) for order in (["fp16", "nf4"], ["nf4", "fp16"])]
    first, second = ([(trace.y[0], trace.marker.symbol[0]) for trace in figures.forest(study).data if trace.y[0]]
                     for study in studies)  # fmt: skip
    assert first == second and first[0] == ("fp16", "diamond-open")


def test_errors_end_where_accuracy_does():
    values = {"bf16": 0.02, "nf4": 0.99}
    scores = pd.DataFrame([example.score("a", value, asked="a", precision=name, stderr=0.05)
                           for name, value in values.items()])  # fmt: skip
    bars = figures.accuracy(Results("", "m", "d", scores=scores)).select_traces({"mode": "lines+markers"})
    ends = [(bar.x[0] - bar.error_x.arrayminus[0], bar.x[0] + bar.error_x.array[0]) for bar in bars]
    assert ends[::2] == [(pytest.approx(0), pytest.approx(7)), (pytest.approx(94), pytest.approx(100))]  # and the mean


def test_a_sweep_has_a_column_an_engine_a_ring_at_each_knee_and_its_largest_batch(study):
    slow = study.sweep.batch_size.map({64: 10.0}).fillna(1.0)  # so that lines bend at 16
    steps = study.sweep.assign(throughput_rps=study.sweep.throughput_rps / slow,
                               batch_latency_s=study.sweep.batch_latency_s * slow)  # fmt: skip
    figure = figures.sweep(replace(study, sweep=steps))
    panels = [note.text.replace("<br>", " ") for note in figure.layout.annotations]
    assert panels[2:] == ["eager: throughput, requests/s", "cuda_graph: throughput, requests/s"]
    assert {axis.type for axis in (*figure.select_xaxes(), *figure.select_yaxes())} == {"log"}
    eager = sorted(row for frame in (steps, study.maxbatch)
                   for row in zip(frame.batch_size, frame.throughput_rps, frame.engine, strict=True))  # fmt: skip
    assert points(figure, yaxis="y3") == [(size, rate) for size, rate, engine in eager if engine == "eager"]
    rings = [x for _, x, _, custom in marks(figure) if custom[1] == "circle-open"]
    assert sorted(rings) == sorted(2 * list(knees(steps).knee.dropna())) and len(rings) > 2


def test_no_point_lies_above_the_measured_roof_and_the_largest_batches_are_large(study, drawn):
    steps = marks(drawn["roofline"])
    assert len(steps) == len(study.speed)
    assert all(tflops <= min(each * example.BYTES_S, example.FLOP_S) / 1e12 for _, each, tflops, _ in steps)
    assert sum(size > 10 for *_, (_, _, size) in steps) == len(study.maxbatch) < len(steps)


def test_each_roof_is_named_by_its_types_and_close_ones_share_a_label(study):
    types = [["float32"], ["float32", "bfloat16"], ["bfloat16"], ["int8"]]
    roofs = {"flops_by_type": [dict.fromkeys(names, 1) for names in types],
             "peak_flop_per_s": [51.1e12, 64.4e12, 866e12, 1300e12]}  # fmt: skip
    rows = study.bs1.head(4).assign(**roofs)
    figure = figures.roofline(replace(study, bs1=rows, maxbatch=rows[:0], sweep=rows[:0]))
    labels = [(trace.y[1], trace.text[1]) for trace in figure.select_traces({"mode": "lines+text"})]
    assert labels == [
        (1300, "int8: 1,300<br>bfloat16: 866"), (pytest.approx(64.4), "float32 + bfloat16: 64.4<br>float32: 51.1"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "column", "scale", "settings"),
    [("token_time", "tpot_s", 1e3, ["bs1"]), ("energy", "energy_j_per_token", 1, ["bs1", "maxbatch"]),
     ("memory", "peak_reserved_mib", 1, ["bs1", "maxbatch"])],
)  # fmt: skip
def test_parts_add_up_to_the_whole(name, column, scale, settings, study, drawn):
    total = sum(x for x, _ in points(drawn[name]))
    assert total == pytest.approx(scale * sum(study.timed(setting)[column].sum() for setting in settings))


def test_the_timeline_has_a_line_per_quantity_and_format(study, drawn):
    lines = [trace for trace in drawn["timeline_bs1"].data if len(trace.x) == 40]
    assert len(lines) == 4 * 5 and sum(bool(trace.showlegend) for trace in lines) == 5


def test_the_front_holds_what_no_other_beats_in_both(study, drawn):
    frame = pd.DataFrame({"cost": [1, 2, 3, 4, 4], "quality": [40, 39, 45, 45, 50]}, index=list("abcde"))
    assert list(figures.pareto(frame).index) == ["a", "c", "e"]
    front = drawn["front_memory"]
    line = front.data[-1]
    summary = recommend.summary(study).set_index("precision")
    assert list(line.x) == list(summary.peak_memory_mib[["nf4", "int8"]])
    assert [text.strip() for text in line.text] == ["nf4 ?", "int8 ✓"]
    assert {trace.name for trace in front.data if trace.showlegend} == {"bf16 ○", "fp16 ✓", "int4 ✗"}
    assert written(drawn["front_tpot"]) == {(summary.change_pp["int4"], "int4 ✗")}  # it stands apart
    (nf4,) = front.select_traces({"name": "nf4 ?"})
    row = summary.loc["nf4"]
    assert (nf4.y[0], nf4.error_y.array[0]) == (row.change_pp, pytest.approx(row.high_pp - row.change_pp))


def test_without_accuracy_quality_is_divergence_and_without_a_gpu_memory_is_the_weights(study):
    speeds = study.bs1.assign(peak_reserved_mib=None)
    figure = figures.front(replace(study, scores=study.scores[:0], accuracy_rows=study.scores[:0], bs1=speeds),
                           "peak_memory_mib")  # fmt: skip
    assert figure.layout.yaxis.title.text == header("kl_mean_nats") and figure.layout.yaxis.autorange == "reversed"
    assert figure.layout.xaxis.title.text == header("weights_mib")


def test_one_quantity_is_compared_as_it_is_and_with_a_baseline(study):
    scores = headline(study.scores)
    mean = scores[scores.task.str.startswith(MEAN)].set_index("precision").value
    figure = figures.compare(study, "accuracy_pct", MEAN, precisions=["bf16", "int4"])
    assert points(figure) == [(pytest.approx(100 * mean[name]), name) for name in ("int4", "bf16")]
    relative = figures.compare(study, "accuracy_pct", MEAN, baseline="bf16")
    (dot,) = relative.select_traces({"name": "int4"})
    low_pp = recommend.summary(study).set_index("precision").low_pp["int4"]
    assert dot.error_x.arrayminus[0] == pytest.approx(dot.x[0] - 100 - low_pp / mean["bf16"])
    assert not figures.compare(study, "tpot_s", "bs1", precisions=["fp32"]).data


def test_pages_share_one_library_and_pictures_say_what_they_need(study, tmp_path, monkeypatch, caplog):
    from choreographer.browsers.chromium import Chromium

    monkeypatch.setattr(Chromium, "find_browser", lambda *_, **__: None)
    with caplog.at_level(logging.WARNING):
        drawn = export.save_figures(study, tmp_path)
    assert "kaleido_get_chrome" in caplog.text
    assert {path.stem for path in tmp_path.glob("*.html")} == set(drawn) and not list(tmp_path.glob("*.png"))
    assert all(path.stat().st_size < 500_000 for path in tmp_path.glob("*.html"))
    assert len(list(tmp_path.glob("plotly*.js"))) == 1
    assert export.pictures({"a": theme.nothing("a")}, tmp_path) == ""  # nothing to draw needs no browser


def test_pictures_are_drawn_again_where_their_page_changed(tmp_path, monkeypatch):
    figures, asked = {name: go.Figure(go.Bar(y=[1]), {"title_text": name}) for name in "ab"}, []

    def pictures(figures, folder):
        asked.append(set(figures))
        for name, kind in product(figures, export.KINDS):
            (folder / f"{name}.{kind}").touch()

    monkeypatch.setattr(export, "draw_all", lambda _: figures)
    monkeypatch.setattr(export, "pictures", pictures)
    study = Results("name", "model", "device")
    export.save_figures(study, tmp_path)
    (tmp_path / "plotly.min.js").unlink()
    export.save_figures(study, tmp_path)
    assert (tmp_path / "plotly.min.js").exists()
    (tmp_path / "b.svg").unlink()
    export.save_figures(study, tmp_path)
    figures["a"].data[0].y = [2]
    export.save_figures(study, tmp_path)
    export.save_figures(replace(study, device="another device"), tmp_path)
    assert asked == [{"a", "b"}, set(), {"b"}, {"a"}, {"a", "b"}]
    assert "another device" in (tmp_path / "a.html").read_text()
    figures["a"].data[0].y = [3]
    export.save_figures(study, tmp_path, with_pictures=False)
    assert not (tmp_path / "a.png").exists()  # it would show what the page no longer does


def test_a_browser_that_fails_costs_the_pictures_and_not_the_run(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", "/bin/false")
    assert "did not draw" in export.pictures({"a": drawn["forest"]}, tmp_path)
