"""Tables from hand-made rows: the right items are paired, and nothing is compared that is not alike."""

import math
from dataclasses import replace

import pandas as pd
import pytest
from example import answers, score

from qnb.accuracy.statistics import Z95
from qnb.ledger import Ledger
from qnb.report import findings, recommend, tables
from qnb.report.accuracy import MEAN
from qnb.report.results import BESIDE, SPEED, Results
from qnb.report.tables import build


def changes(results):
    return build(results, "table2_change").set_index("task")


def test_changes_are_paired_item_by_item(measured):
    row = changes(measured({("bf16", "easy"): [1, 1, 1, 0], ("int8", "easy"): [1, 0, 0, 1]})).loc["easy"]
    assert (row.n_items, row.gained, row.lost, row.change_pp) == (4, 1, 2, -25)
    assert row.change_pct == pytest.approx(-100 / 3) and row.low_pp < -25 < row.high_pp
    assert row.p_mcnemar == row.p_holm == 1 and not row.significant


@pytest.mark.parametrize(
    ("other", "fields", "note"),
    [([1, 1, 1, 1], {"data_sha256": "other"}, "items are others"), ([1, 1], {}, "items are others"),
     ([1, 1, 1, 1], {"items_sha256": "other"}, "gone or was changed"),
     ([1, 1, 1, 1], {"items_file": "items/gone.parquet"}, "gone or was changed"),
     ([None, True, True, True], {}, "not a share")],
)  # fmt: skip
def test_what_is_not_alike_is_named_and_not_compared(other, fields, note, measured):
    table = changes(measured({("bf16", "easy"): [1, 1, 1, 1], ("int8", "easy"): other}, int8=fields))
    assert table.note["easy"].startswith("not compared: ") and note in table.note["easy"] and len(table) == 1


def test_a_group_is_the_items_of_what_is_in_it(measured):
    scores = [score("all", group=True), score("left", group=True), score("l1"), score("l2"), score("r1")]
    groups = {"all": ["l1", "l2", "r1"], "left": ["l1", "l2"]}
    parts = {"bf16": {"l1": [1, 1], "l2": [0, 0], "r1": [1, 0]}, "int8": {"l1": [1, 0], "l2": [0, 0], "r1": [1, 1]}}
    rows = {(name, "all"): pd.concat(answers(*part) for part in tasks.items()) for name, tasks in parts.items()}
    results = measured(rows, every={"scores": scores, "groups": groups})
    table = changes(results)
    assert table.n_items.to_dict() == {"all": 6, "left": 4, f"{MEAN} (1)": 6}
    assert (table.lost["all"], table.lost["left"], table.gained["all"], table.gained["left"]) == (1, 1, 1, 0)
    assert tables.members(results) == {"all": ["left", "r1"], "left": ["l1", "l2"]}
    assert list(tables.compact(results, "table1_accuracy", of="left").iloc[:, 0]) == ["l1", "l2"]


def test_the_mean_is_over_tasks_that_all_formats_answered_and_other_units_and_samples_share_no_cell():
    """The mean of one task with a standard error of 10 points; a sample has a row of its own."""
    scores = pd.DataFrame([
        score("easy", 0.5, precision="bf16"), score("easy", 0.3, precision="int8"), score("hard", precision="bf16"),
        score("hard", precision="int8", n_items=2), score("words", 9.5, "word_perplexity", precision="bf16"),
    ])  # fmt: skip
    results = Results("", "", "", scores=scores.assign(asked=scores.task, unit=[*"%%%%", "word perplexity"]))
    table = build(results, "table1_accuracy").set_index(["task", "metric"])
    words = table.loc["words"].squeeze()
    assert (words.unit, words.bf16, words.n_items) == ("word perplexity", 9.5, 4) and pd.isna(words.bf16_pct)
    mean = table.loc[f"{MEAN} (1)"]
    assert (mean.bf16_pct["mean"], mean.int8_pct["mean"]) == (50, 30)
    assert mean.bf16_pct["mean, 95 % low"] == pytest.approx(50 - 10 * Z95, abs=1e-4)
    assert table.loc["hard"].bf16_pct.notna().tolist() == [True, False]
    shown = tables.compact(results, "table1_accuracy").set_index("BF16")
    assert {"9.5 word perplexity", "50.0 ± 10.0"} <= set(shown.index) and len(shown) == 4


def test_each_task_counts_once_in_the_change_of_the_mean(measured):
    rows = {("bf16", "easy"): [1, 1, 1, 1, 1, 0, 0, 1], ("int8", "easy"): [1, 0, 1, 0, 1, 0, 0, 0],
            ("bf16", "hard"): [0, 1, 1, 0], ("int8", "hard"): [0, 1, 0, 1],
            ("bf16", "text"): [1, 1], ("int8", "text"): [1, 0]}  # fmt: skip
    table = changes(measured(rows, text={"scores": [score("text", 1.0, "bits_per_byte")]}))
    mean = table.loc[f"{MEAN} (2)"]
    assert mean.change_pp == (table.change_pp["easy"] + table.change_pp["hard"]) / 2 == -18.75
    assert mean.low_pp < -18.75 < mean.high_pp and mean.n_items == 12
    assert pd.isna(mean.p_holm) and mean.significant is None and table.significant["easy"] is False
    table = changes(measured({(name, task): [1, 0, 1] for name in ("bf16", "int8") for task in ("easy", "hard")}))
    half = math.hypot(*table.high_pp[["easy", "hard"]]) / 2  # nothing flipped: each task has an interval of its own
    assert table.high_pp[f"{MEAN} (2)"] == pytest.approx(half, abs=1e-5) == -table.low_pp[f"{MEAN} (2)"]


def test_the_probability_of_the_right_choice_is_paired(measured):
    shares = {"bf16": [0.9, 0.8, 0.7, 0.9], "int8": [0.8, 0.8, 0.4, 0.85]}
    rows = {(name, "easy"): answers("easy", [1] * 4, p_correct=values) for name, values in shares.items()}
    row = changes(measured(rows)).iloc[0]
    assert row.p_correct_low_pp < row.p_correct_change_pp == -11.25 < row.p_correct_high_pp < 0 == row.change_pp


def test_gsm8ks_average_is_of_the_strict_readings(measured):
    correct = {("bf16", "gsm8k"): [1, 0], ("bf16", "gsm8k_cot"): [1, 1], ("int8", "gsm8k"): [0, 0],
               ("int8", "gsm8k_cot"): [1, 0]}  # fmt: skip
    for key, values in correct.items():
        strict = score(key[1], sum(values) / 2, "exact_match", filter="strict-match")
        items = {key: answers(key[1], values, "strict-match")}
        results = measured(items, every={"scores": [strict, {**strict, "filter": "flexible", "value": 0.9}]})
    results = replace(results, model="meta-llama/Llama-3.2-1B")
    average = build(results, "table1_accuracy").query("metric == 'mean'").set_index("task").loc["gsm8k_average"]
    assert average.bf16_pct == 75 and average.published_bf16_pct == pytest.approx(5.84)
    change = changes(results).loc["gsm8k_average"]
    assert change.change_pp == -50 and pd.isna(change.p_mcnemar) and "tested each" in change.note


def test_speeds_are_compared_under_the_same_conditions_only(tmp_path):
    """FP16 is twice as fast, INT8 had other prompts, NF4 was disturbed, and INT4 cannot run."""
    ledger = Ledger(tmp_path)
    row = {"stage": "perf", "setting": "bs1", "engine": "eager", "batch_size": 1, "requests": 4, "total_s": 0.5,
           "flags": [], "measured_at": "2026-01-02", "workload": "a"}  # fmt: skip
    different = {"bf16": {"total_s": 1.0}, "fp16": {}, "int8": {"workload": "b", "measured_at": "2026-01-01"},
                 "nf4": {"flags": ["cpu_shared"]}, "int4": {"total_s": None, "note": "not captured"}}  # fmt: skip
    for name, fields in different.items():
        ledger.append({**row, "precision": name, "fingerprint": name, **fields})
    table = build(Results.read(ledger), "table3_bs1").set_index("precision")
    assert table.speedup["fp16"] == 2 and table.speedup[["int8", "nf4", "int4"]].isna().all()
    assert table.note.tolist() == ["", "", tables.OTHER, "not captured", ""] and table["flags"]["nf4"] == "cpu_shared"
    shown = tables.view(table.reset_index(), tables.TIME_SPENT).to_html()
    assert "not captured" in shown and tables.flag_text(["cpu_shared"]) in shown


def test_a_largest_batch_that_took_all_requests_is_that_many_or_more(study):
    study = replace(study, maxbatch=study.maxbatch.assign(capped=study.maxbatch.batch_size == 384))
    assert {"256", "384 or more"} == set(tables.compact(study, "table4_maxbatch")["batch size"])
    assert "batch 384 or more (BF16 256)" in findings.text(study, "maxbatch")


def test_a_row_says_that_its_bfloat16_is_emulated(tmp_path):
    row = {"stage": "perf", "engine": "eager", "setting": "bs1", "repeat": 0, "batch_size": 1, "total_s": 1.0,
           "requests": 1, "new_tokens": 2, "fingerprint": "f"}  # fmt: skip
    ledger = Ledger(tmp_path)
    for name, dtype in (("bf16", "bfloat16"), ("nf4", "float16")):
        ledger.append({**row, "precision": name, "dtype": dtype, "bf16": "emulated"})
    study = Results.read(ledger)
    for frame in (build(study, "table3_bs1"), recommend.summary(study)):
        notes = frame.set_index("precision").note.fillna("")
        assert notes["bf16"] == "bfloat16 is emulated" and notes["nf4"] == ""


def test_knees_are_named_with_what_they_give_and_a_line_that_did_not_bend_has_none():
    """Throughput per second of latency: 4, 8, 6 in BF16, whose knee is 2 rows; 1, 2, 4 in NF4, which had not bent."""
    lines = [("bf16", 1, 4.0, 1.0, []), ("bf16", 2, 8.0, 1.0, []), ("bf16", 4, 12.0, 2.0, []),
             ("nf4", 1, 1.0, 1.0, []), ("nf4", 2, 2.0, 1.0, []), ("nf4", 4, 4.0, 1.0, ["gpu_shared"])]  # fmt: skip
    steps = pd.DataFrame(lines, columns=["precision", "batch_size", "throughput_rps", "batch_latency_s", "flags"])
    steps = steps.assign(engine="eager", total_s=1.0).reindex(columns=[*SPEED, *BESIDE])
    table = build(Results("", "", "", sweep=steps), "sweep")
    assert table.knee.tolist() == [False, True, False, False, False, False]
    for frame in (steps, table):
        bent, straight = tables.knees(frame).to_dict("records")
        assert (bent["knee"], bent["knee_throughput_rps"], bent["knee_batch_latency_s"]) == (2, 8, 1)
        assert (bent["swept_to"], bent["throughput_rps"], bent["batch_latency_s"], bent["note"]) == (4, 12, 2, "")
        assert pd.isna(straight["knee"]) and straight["note"] == "other processes disturbed batches of 4"


def test_every_table_of_an_empty_study_is_empty(tmp_path):
    results = Results.read(Ledger(tmp_path))
    assert all(build(results, name).empty for name in tables.TABLES) and tables.knees(results.sweep).empty


def test_tables_are_saved_as_csv_and_markdown_and_viewed_and_have_a_compact_form_of_texts(study):
    for name in tables.TABLES:
        table = tables.save(study, name)
        kept = pd.read_csv(study.folder / "tables" / f"{name}.csv")
        lines = (study.folder / "tables" / f"{name}.md").read_text().splitlines()
        assert list(kept) == list(table) and len(kept) == len(table) == len(lines) - 2 > 0
        assert tables.view(table).to_html().count("<tr>") == len(table) + 1
        shown = tables.compact(study, name)
        assert len(shown) and all(isinstance(cell, str) and cell for cell in shown.to_numpy().ravel())


def test_what_a_notebook_shows_is_among_the_columns(study):
    frames = {"CHECKPOINTS": study.checkpoints, "PASSES": study.passes, "SEARCHES": study.batches,
              "RECOVERY": build(study, "table2_change"), "TIME_SPENT": build(study, "table4_maxbatch")}  # fmt: skip
    views = [(getattr(tables, name), frame) for name, frame in frames.items()]
    for columns, frame in [*views, *((columns, build(study, name)) for name, columns in tables.MAIN.items())]:
        assert len(set(columns) - {"flags", "note", "ran_as"}) <= 8 and set(columns) <= {*frame, "quantized_pct"}


def test_a_view_says_what_is_missing_and_no_cell_can_end_itself_or_carry_a_tag():
    frame = pd.DataFrame({"task": ["a|b<script>\n| c", "d"], "change_pp": [-1.0, None], "note": ""})
    html = tables.view(frame, ("change_pp", "task", "note", "other")).to_html()
    assert html.index("change in accuracy, points") < html.index("task") and ">-</td>" in html
    assert "<script" not in html and "note" not in html
    row = tables.markdown(frame).splitlines()[2]
    assert row.split() == ["|", "a\\|b&lt;script>", "\\|", "c", "|", "-1.00", "|"]


def test_every_format_shows_the_same_item_of_the_first_task_of_choices(study):
    table = tables.choice_probabilities(study, 1)
    assert list(table.index) == ["bf16", "fp16", "int8", "int4", "nf4"]
    assert table.filter(like="p(choice").sum(axis=1).tolist() == pytest.approx([1.0] * 5)
