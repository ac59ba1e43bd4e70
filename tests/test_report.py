"""The report is one page, computed from rows, and what it was given stays text."""

import csv
import json
import os
import re
import shutil
from dataclasses import replace

import example
import pandas as pd
import pytest
import yaml

from qnb import Study
from qnb.__main__ import _results, main
from qnb.precision import PRECISIONS
from qnb.provenance import ROOT
from qnb.report import figures as figure
from qnb.report import findings as summary
from qnb.report import model_card as modelcard
from qnb.report import page as report
from qnb.report import results
from qnb.report import tables as table
from qnb.report import theme as look

EVIL = "<script>alert(1)</script>/x\"onload='alert(2)"


@pytest.fixture(scope="module")
def page(report_page):
    return report_page.read_text()


def body(page):
    """Return what follows plotly.js, which has strings of its own that look like markup."""
    return page.split("</head>")[-1]


def test_the_page_is_one_small_file_with_plotly_in_it_once(page, report_page):
    assert report_page.stat().st_size < 8e6
    assert page.count("* plotly.js v") == 1
    assert not re.search(r'(src|href|action)="(?!#)', body(page))  # the browser's test sees that nothing is asked for


def test_the_page_holds_every_table_and_figure_the_card_the_audit_and_limits(page):
    for text in ("Table 1", "Table 2", "Table 3", "Table 4", "The study's card", "Provenance", "Limits",
                 "2,000 requests were run", "Example GPU", "throttled"):  # fmt: skip
        assert text in page, text
    assert len(re.findall(r'<div class="figure"', page)) == 16


def test_the_page_holds_perplexity_where_it_was_measured(studied, page):
    measured = replace(studied.results(), divergence=pd.DataFrame([{"precision": "nf4", "perplexity": 24.27}]))
    assert "Perplexity, and how far" in report.page(measured) and "24.27" in report.page(measured)
    assert "Perplexity, and how far" not in page


def test_what_a_model_or_a_row_says_stays_text(tmp_path):
    """A model's name, a note and a task that carry tags reach the page, cards and tables as text."""
    study = Study(
        precisions="bf16, int8", output=example.write(tmp_path / "study", EVIL, ("bf16", "int8"), ("eager",))
    )
    study.ledger.append({"stage": "perf", "precision": "int8", "engine": EVIL, "note": EVIL})
    text = body(study.report().read_text())
    assert "alert(1)" in text and "&lt;script&gt;alert(1)" in text
    assert not re.search(r"<script>alert|<[^>]*onload=", text)
    card = (study.folder / "cards" / "int8" / "README.md").read_text()
    assert "alert(1)" in card and "<script" not in card.split("---\n", 2)[2]
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])  # it is no name on the hub


def test_generated_text_and_a_tasks_name_stay_text_in_figures_and_markdown():
    from qnb.report import widgets as widget

    assert "<script>" not in widget.side_by_side({"bf16": ["<script>", "x"], "int8": ["<script>", "</mark><img>"]})
    frame = table.pd.DataFrame({"task": ["a|b<script>\n| c"], "change_pp": [-1.0]})
    (row,) = table.markdown(frame).splitlines()[2:]
    assert row == "| a\\|b&lt;script> \\| c | -1.00 |"


def test_sentences_are_the_rows_arithmetic(studied):
    found = studied.results()
    (first, *rest) = summary.about(found, "int4")
    values = table.headline(found.scores).set_index(["task", "precision"]).value
    mean, base = (100 * values[f"{table.AGGREGATE} (3)", name] for name in ("int4", "bf16"))
    assert f"keeps {100 * mean / base:.1f} % of BF16's mean accuracy: {mean:.1f} against {base:.1f} %" in first
    assert "n = 1,200" in first and "cannot tell" not in first and "ARC Easy" in rest[0]
    rows = found.bs1.set_index(["precision", "engine"])
    share = rows.memory_mib["int4", "eager"] / rows.memory_mib["bf16", "eager"]
    assert f"takes {100 * share:.0f} % of BF16's memory" in rest[1] and "(eager, launch-bound)" in rest[1]
    assert f"{1e3 * rows.tpot_s['int4', 'eager']:.2f} ms a token" in rest[1]
    assert "cannot tell from none" in summary.about(found, "fp16")[0]


def test_a_process_growth_is_no_memory_of_a_format(studied):
    """Without a GPU it hangs on what the process ran before: sentences take the weights', and the limits say so."""
    found = studied.results()
    grown = replace(found, bs1=found.bs1.drop(columns="peak_reserved_mib").assign(memory_mib=1.0))
    weights = found.bs1.drop_duplicates("precision").set_index("precision").weights_mib
    share = 100 * weights.int4 / weights.bf16
    assert any(
        f"takes {share:.0f} % of BF16's memory for its weights" in told for told in summary.about(grown, "int4")
    )
    assert any("how far a process grew" in told for told in report.limits(grown))
    assert not any("how far a process grew" in told for told in report.limits(found))


@pytest.mark.parametrize(
    ("change", "low", "high", "words"),
    [
        (46.9, 38.0, 54.7, "46.9 % above BF16's (95 % +38.0 to +54.7, n = 1,024 tokens)."),
        (-0.1, -0.4, 0.2, "0.1 % below BF16's (95 % -0.4 to +0.2, n = 1,024 tokens), which this text cannot tell"),
        (2.0, None, None, "2.0 % above BF16's (n = 1,024 tokens)."),
    ],
)
def test_what_perplexity_shows_is_told(change, low, high, words, studied):
    changes = {"perplexity_change_pct": change, "perplexity_change_pct_low": low, "perplexity_change_pct_high": high}
    frame = pd.DataFrame([{"precision": "int4", "tokens": 1024, **changes}])
    told = summary.about(replace(studied.results(), divergence=frame), "int4")
    assert any(f"Its perplexity is {words}" in sentence for sentence in told)


def test_what_other_processes_disturbed_is_called_that(studied):
    found = studied.results()
    flags = [["other processes used 45 % of the CPU"] if name == "int4" else [] for name in found.maxbatch.precision]
    told = summary.about(replace(found, maxbatch=found.maxbatch.assign(flags=flags)), "int4")[-1]
    assert "INT4 disturbed by other processes" in told and "disturbed" not in summary.about(found, "int4")[-1]
    other = "other processes used 45 % of the CPU; x"
    frame = found.tables[4].dropna(subset=["throughput_rps"])
    frame = frame.assign(flags=frame.precision.map(lambda name: other if name == "int4" else "throttled: x"))
    mine = {label for label, name in zip(figure.rows_of(frame), frame.precision, strict=True) if name == "int4"}
    for bars in figure.metrics(frame, "x").data:
        marked = {label for label, text in zip(bars.y, bars.text, strict=True) if "disturbed" in text}
        assert marked == (mine if bars.name == "measured" else set())
    (cells,) = figure.heatmap(frame, "x").data
    for label, texts, hovers in zip(cells.y, cells.text, cells.hovertext, strict=True):
        assert all(("disturbed" in one) == (label in mine) for one in (*filter(None, texts), *hovers))


def test_an_empty_study_says_so_and_still_makes_a_page(tmp_path):
    text = Study(output=tmp_path).report().read_text()
    assert "Nothing was measured yet." in text and "No accuracy was measured" in text
    assert "Not measured here: Accuracy by task," in text and "&lt;b&gt;" not in text


def test_kept_tables_give_the_same_frames(studied, report_page, tmp_path):
    (tmp_path / "gpu-example").mkdir()
    for path in (studied.folder / "tables").glob("*.csv"):
        (tmp_path / "gpu-example" / path.name).write_bytes(path.read_bytes())
    (kept,) = results.reference(tmp_path).values()
    mine = studied.results()
    assert (kept.device, kept.model) == ("gpu", "example")
    assert summary.about(kept, "int4")[0] == summary.about(mine, "int4")[0]
    assert kept.bs1.throughput_rps.tolist() == pytest.approx(mine.bs1.throughput_rps.tolist(), rel=1e-4)


def test_the_repositorys_kept_runs_can_be_read():
    kept = results.reference(ROOT / "outputs" / "reference")
    assert kept and all(summary.findings(one) for one in kept.values())
    assert all(len(one.sweep) for name, one in kept.items() if "shape" in name)


@pytest.mark.parametrize(
    ("content", "said"),
    [("hello world\n1 2\n", "has no column precision or engine"), ("", "is no table"),
     ("precision,engine,batch_size,throughput_rps\nfp99,eager,1,2\n", "has precision fp99; there are "),
     ("precision,engine,batch_size,throughput_rps\nfp16,eager,one,2\n", "has text, 0 or less in column batch_size"),
     ("precision,engine,batch_size,throughput_rps\nfp16,eager,1,0\n", "0 or less in column throughput_rps"),
     (None, "is no table")],
)  # fmt: skip
def test_a_kept_file_that_is_no_table_is_named(content, said, tmp_path, capsys):
    path = tmp_path / "gpu-model" / "sweep.csv"
    path.parent.mkdir()
    path.mkdir() if content is None else path.write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert str(path) in told and said in told and len(told.splitlines()) == 1


def test_a_kept_sweep_of_an_earlier_version_is_drawn(tmp_path):
    (tmp_path / "gpu-model").mkdir()
    rows = "precision,engine,batch_size,throughput_rps,batch_latency_s\nfp16,eager,1,2,0.5\nfp16,eager,2,3,0.7\n"
    (tmp_path / "gpu-model" / "sweep.csv").write_text(rows)
    (kept,) = results.reference(tmp_path).values()
    drawn = figure.draw_all(kept)["sweep"]
    lines = [trace for trace in drawn.data if trace.mode == "lines+markers"]
    assert [list(trace.y) for trace in lines] == [[2, 3], [0.5, 0.7]]
    assert look.title(drawn) == "Throughput and latency by batch: log axes" and lines[0].hovertext[0].endswith(
        "requests/s"
    )


def test_tables_are_kept_as_csv_and_markdown(studied):
    studied.results()
    for path in (studied.folder / "tables").glob("*.csv"):
        with path.open() as file:
            rows = list(csv.DictReader(file))
        lines = path.with_suffix(".md").read_text().splitlines()
        assert len(lines) == len(rows) + 2 and all(line.startswith("|") and line.endswith("|") for line in lines)


def test_a_report_builds_every_table_that_rows_give(studied, report_page):
    kept = {path.stem for path in (studied.folder / "tables").glob("*.csv")}
    assert {name for name in studied._makers() if len(studied.build(name))} == kept >= {"examples", "sweep"}


def test_a_card_holds_scores_as_the_hub_reads_them_and_leaves_the_checkpoint_sealed(studied, tmp_path):
    path = modelcard.write(studied.results(), PRECISIONS["int4"], tmp_path / "cards")
    assert path == tmp_path / "cards" / "int4" / "README.md"
    head = yaml.safe_load(path.read_text().split("---\n")[1])
    assert head["base_model"] == "example/one-billion" and "bitsandbytes" in head["tags"]
    fetched = replace(studied.results(), model="example/one-billion@0123abc")  # as a model of the hub is called
    page = modelcard.card(fetched, PRECISIONS["int4"])
    again = yaml.safe_load(page.split("---\n")[1])
    assert (again["base_model"], again["model-index"][0]["name"]) == ("example/one-billion", "one-billion-int4")
    assert "example/one-billion (commit 0123abc) converted to **int4**" in page
    page = modelcard.card(replace(fetched, model="shape:llama-3.2-1b"), PRECISIONS["int4"])
    assert "base_model" not in page and "which has random weights" in page
    (index,) = head["model-index"]
    scores = {one["dataset"]["config"]: one["metrics"][0]["value"] for one in index["results"][:2]}
    shown = studied.table1().set_index("task").int4_pct
    assert scores == pytest.approx(
        {"ARC-Easy": shown["arc_easy"] / 100, "ARC-Challenge": shown["arc_challenge"] / 100}
    )


def test_a_model_card_is_one_the_hub_can_load(studied):
    from huggingface_hub import ModelCard

    card = ModelCard(modelcard.card(studied.results(), PRECISIONS["nf4"]))
    assert card.data.eval_results and json.dumps(card.data.to_dict())


def test_provenance_names_the_ledger_by_its_bytes(page, studied):
    from hashlib import sha256

    assert sha256(studied.ledger.path.read_bytes()).hexdigest() in page


def test_a_run_says_what_was_disturbed_and_whether_the_report_is_older(studied, tmp_path):
    folder = shutil.copytree(studied.folder, tmp_path / "study")
    kept = Study(precisions="all", output=folder)
    (folder / "report.html").unlink(missing_ok=True)
    assert f"no report yet: python -m qnb report {folder} draws the figures and writes one" in _results(kept)
    page = kept.report()
    assert f"report: {page}" in _results(kept) and not any("disturbed" in line for line in _results(kept))
    row = next(row for row in kept.ledger if row["stage"] == "perf" and row["setting"] == "bs1" and row["repeat"] == 0)
    kept.ledger.append({**row, "flags": ["another process used the GPU"]})
    os.utime(page, (0, 0))
    older, slowed = _results(kept)[-2:]
    assert older.startswith(f"report: {page} (older than the newest measurements; python -m qnb report {folder}")
    assert slowed.startswith(
        f"disturbed by other processes in 03: {row['precision']}; the same command with --only 03"
    )
    row = next(row for row in kept.ledger if row["stage"] == "sweep" and row["precision"] == "nf4")
    kept.ledger.append({**row, "flags": ["another process used the GPU"]})
    assert _results(kept)[-1].startswith("disturbed by other processes in 04: nf4; ")


@pytest.mark.parametrize("lines", [b"", b"torn", b"\x00\xff no row\n"])
def test_a_ledger_without_a_readable_row_costs_no_report(lines, tmp_path, capsys):
    (tmp_path / "report.html").write_text("the good one")
    (tmp_path / "ledger.jsonl").write_bytes(lines)
    assert main(["report", str(tmp_path)]) == 2
    assert "has no line that is a row" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "the good one"


def test_a_sweep_alone_has_its_sentence_and_its_knees_in_the_report(studied):
    whole = studied.results()
    none = dict.fromkeys(results.TABLES, pd.DataFrame())
    text = report.page(results.Results("one", "m", "d", none, sweep=whole.sweep))
    assert f"batches of 1 to {whole.sweep.batch_size.max():,} with eager and cuda_graph" in text
    table_of = text.split("<caption>The sweep: where throughput")[1].split("</table>")[0]
    assert "swept to" in table_of and "note" not in table_of
    assert table_of.count("<tr>") == 1 + len(table.knees(whole.sweep))


def test_limits_name_what_rows_flag(studied):
    found = report.limits(studied.results())
    assert "int4, eager, batch 384; int4, cuda_graph, batch 384: throttled." in found  # a line a flag
    many = studied.results().sweep
    small = studied.results().bs1  # the same batch size as in the sweep: named once
    many = report.limits(replace(studied.results(), sweep=many.assign(flags=[["short"]] * len(many)),
                                 bs1=small.assign(flags=[["short"]] * len(small))))  # fmt: skip
    (short,) = [text for text in many if text.endswith(": short.")]
    assert short.count("batch") == report.MOST_NAMED and f"; and {len(studied.results().sweep) - 12} more: " in short
    assert not any("of a sample" in text for text in found)
    some = studied.results()
    some = report.limits(replace(some, scores=some.scores.assign(of=some.scores["items"].where(
        some.scores.task != "arc_easy", 5000))))  # fmt: skip
    assert "Accuracy is of a sample of the items: arc_easy 400 of 5,000." in some
    alone = studied.results()
    alone = replace(alone, scores=alone.scores[alone.scores.precision == "nf4"])
    assert any("bf16 was not asked" in text for text in report.limits(alone))
    assert not any("One pass only" in text for text in found)  # a sweep's spread is that of its batches
    once = report.limits(replace(studied.results(), bs1=studied.results().bs1.assign(repeats=1)))
    assert "One pass only, so no spread is known: batch size 1." in once
    swept = studied.results().sweep
    wide = swept.assign(throughput_spread_pct=[30.0] + [1.0] * (len(swept) - 1))
    wide = report.limits(replace(studied.results(), sweep=wide))
    assert f"In 1 of the sweep's {len(swept)} rows its fastest batch was over 20 % faster than its slowest." in wide
