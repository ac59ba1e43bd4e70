"""Tables from hand-made rows: the right items are paired, and nothing is compared that is not alike."""

import math

import pandas as pd
import pytest

from qnb.ledger import Ledger, write_parquet
from qnb.provenance import ROOT
from qnb.report import tables
from qnb.report.results import BESIDE, SPEED, Results, read_reference
from qnb.report.tables import MEAN, build


def score(task, value=0.5, metric="acc", **fields):
    return {"task": task, "metric": metric, "filter": "none", "value": value, "stderr": 0.1, "n_items": 4,
            "n_total": 4, "shots": 0, "group": False, **fields}  # fmt: skip


def answers(task, correct, kind="none", **columns):
    frame = {"task": task, "doc_id": range(len(correct)), "filter": kind, "correct": correct, **columns}
    return pd.DataFrame(frame).astype({"correct": object if None in correct else bool})


@pytest.fixture
def measured(tmp_path):
    """Returns a function that gives the results of accuracy rows, from their items or from their scores."""
    ledger = Ledger(tmp_path)

    def measure(rows, **fields):
        for (precision, task), items in rows.items():
            row = {"stage": "accuracy", "precision": precision, "task": task, "limit": 4, "scores": [score(task)],
                   "groups": {}, "data_sha256": task}  # fmt: skip
            if isinstance(items, list) and isinstance(items[0], dict):
                row["scores"] = items
            else:
                frame = items if isinstance(items, pd.DataFrame) else answers(task, items)
                file, sha256 = write_parquet(tmp_path, f"items/{task}.{precision}", frame)
                row |= {"items_file": file, "items_sha256": sha256}
            ledger.append({**row, **fields.get(precision, {}), **fields.get("every", {})})
        return Results.read(ledger)

    return measure


def test_tasks_without_a_headline_have_no_mean(measured):
    results = measured({("bf16", "words"): [score("words", 9.5, "word_perplexity")]})
    assert list(build(results, "table1_accuracy").metric) == ["word_perplexity"]
    assert tables.headline(results.scores).empty


def test_changes_are_paired_item_by_item(measured):
    results = measured({("bf16", "easy"): [1, 1, 1, 0], ("int8", "easy"): [1, 0, 0, 1]})
    (row,) = build(results, "table2_change").to_dict("records")
    assert (row["n_items"], row["gained"], row["lost"]) == (4, 1, 2)
    assert row["change_pp"] == -25 and row["change_pct"] == pytest.approx(-100 / 3)
    assert row["low_pp"] < -25 < row["high_pp"] and row["p_mcnemar"] == row["p_holm"] == 1 and not row["significant"]


@pytest.mark.parametrize(
    ("other", "fields", "note"),
    [
        ([1, 1, 1, 1], {"limit": 2}, "limit 2, bf16 has 4"),
        ([1, 1, 1, 1], {"data_sha256": "other"}, "questions are others"),
        ([1, 1, 1, 1], {"items_sha256": "other"}, "gone or was changed"),
        ([1, 1], {}, "items are others"),
        ([None, True, True, True], {}, "not a share of right answers"),
    ],
)
def test_what_is_not_alike_is_named_and_not_compared(other, fields, note, measured):
    results = measured({("bf16", "easy"): [1, 1, 1, 1], ("int8", "easy"): other}, int8=fields)
    (row,) = build(results, "table2_change").to_dict("records")
    assert row["note"].startswith("not compared: ") and note in row["note"] and pd.isna(row["change_pp"])


@pytest.mark.parametrize(
    ("kinds", "chosen"),
    [(("loose", "strict-match"), "strict-match"), (("trimmed", "none"), "none"), (("b", "a"), "b")],
)
def test_an_answer_is_read_one_way(kinds, chosen, measured):
    """Strictly where there is such a filter, else plainly, else as the task's first filter reads it."""
    scores = [score("easy", float(kind == chosen), "exact_match", filter=kind) for kind in kinds]
    rows = {
        (name, "easy"): pd.concat(
            answers("easy", [name == "bf16", True] if kind == chosen else [False, False], kind) for kind in kinds
        )
        for name in ("bf16", "int8")
    }
    results = measured(rows, every={"scores": scores})
    assert list(tables.headline(results.scores).query("task == 'easy'").value) == [1, 1]
    row = build(results, "table2_change").iloc[0]
    assert (row.n_items, row.gained, row.lost) == (2, 0, 1)


def test_a_group_is_the_items_of_what_is_in_it(measured):
    scores = [score("all", group=True), score("left", group=True), score("l1"), score("l2"),
              score("right", group=True), score("r1")]  # fmt: skip
    groups = {"all": ["l1", "l2", "r1"], "left": ["l1", "l2"], "right": ["r1"]}
    parts = {"bf16": {"l1": [1, 1], "l2": [0, 0], "r1": [1, 0]}, "int8": {"l1": [1, 0], "l2": [0, 0], "r1": [1, 1]}}
    rows = {(name, "all"): pd.concat(answers(*part) for part in tasks.items()) for name, tasks in parts.items()}
    table = build(measured(rows, every={"scores": scores, "groups": groups}), "table2_change").set_index("task")
    assert table.n_items.to_dict() == {"all": 6, "left": 4, "right": 2}
    assert table.lost.to_dict() == {"all": 1, "left": 1, "right": 0} and table.gained["right"] == 1


def test_the_mean_is_over_tasks_that_all_formats_answered(measured):
    values = {("bf16", "easy"): 0.5, ("int8", "easy"): 0.3, ("bf16", "hard"): 0.1}
    results = measured({key: [score(key[1], value)] for key, value in values.items()})
    mean = build(results, "table1_accuracy").set_index(["task", "metric"]).loc[f"{MEAN} (1)"]
    assert (mean.bf16_pct["mean"], mean.int8_pct["mean"]) == (50, 30)
    # one task with a standard error of 10 points
    assert mean.bf16_pct["mean, 95 % low"] == pytest.approx(50 - 19.6)
    assert mean.int8_pct["mean, 95 % high"] == pytest.approx(30 + 19.6)


def test_each_task_counts_once_in_the_change_of_the_mean_and_one_without_a_headline_not_at_all(measured):
    rows = {("bf16", "easy"): [1, 1, 1, 1, 1, 0, 0, 1], ("int8", "easy"): [1, 0, 1, 0, 1, 0, 0, 0],
            ("bf16", "hard"): [0, 1, 1, 0], ("int8", "hard"): [0, 1, 0, 1]}  # fmt: skip
    bits = {(name, "text"): [score("text", 1.0, "bits_per_byte")] for name in ("bf16", "int8")}
    table = build(measured({**rows, **bits}), "table2_change").set_index("task")
    mean = table.loc[f"{MEAN} (2)"]
    assert mean.change_pp == (table.change_pp["easy"] + table.change_pp["hard"]) / 2 == -18.75
    assert mean.low_pp < -18.75 < mean.high_pp and mean.n_items == 12
    assert pd.isna(mean.p_holm) and mean.significant is None and table.significant["easy"] is False


def test_where_nothing_flipped_the_mean_has_an_interval_of_its_tasks(measured):
    tasks = {"easy": [1, 0, 1, 0], "hard": [1, 1, 0]}
    rows = {(name, task): correct for name in ("bf16", "fp16") for task, correct in tasks.items()}
    table = build(measured(rows), "table2_change").set_index("task")
    mean = table.loc[f"{MEAN} (2)"]
    half = math.hypot(*table.high_pp[["easy", "hard"]]) / 2
    assert mean.change_pp == 0 < mean.high_pp == pytest.approx(half, abs=1e-5) == -mean.low_pp


def test_the_probability_of_the_right_choice_is_paired(measured):
    shares = {"bf16": [0.9, 0.8, 0.7, 0.9], "int8": [0.8, 0.8, 0.4, 0.85]}
    rows = {(name, "easy"): answers("easy", [1] * 4, p_correct=values) for name, values in shares.items()}
    row = build(measured(rows), "table2_change").iloc[0]
    assert row.p_correct_low_pp < row.p_correct_change_pp == -11.25 < row.p_correct_high_pp < 0 == row.change_pp


def test_a_sample_and_a_whole_task_share_no_cell(measured):
    """Also where both have as many items: of how many is part of the key."""
    rows = {("bf16", "easy"): [score("easy")], ("int8", "easy"): [score("easy", n_total=2376)]}
    table = build(measured(rows), "table1_accuracy").query("metric == 'acc'").set_index("n_total")
    assert pd.isna(table.int8_pct[4]) and pd.isna(table.bf16_pct[2376])


def test_gsm8ks_average_is_of_the_strict_readings(measured):
    correct = {("bf16", "gsm8k"): [1, 0], ("bf16", "gsm8k_cot"): [1, 1], ("int8", "gsm8k"): [0, 0],
               ("int8", "gsm8k_cot"): [1, 0]}  # fmt: skip
    rows = {key: answers(key[1], values, "strict-match") for key, values in correct.items()}
    for key, frame in rows.items():
        strict = score(key[1], frame.correct.mean(), "exact_match", filter="strict-match")
        results = measured({key: frame}, every={"scores": [strict, {**strict, "filter": "flexible", "value": 0.9}]})
    average = build(results, "table1_accuracy").query("metric == 'mean'").set_index("task").loc["gsm8k_average"]
    assert average.bf16_pct == 75 and average.published_bf16_pct == pytest.approx(5.84)
    change = build(results, "table2_change").set_index("task").loc["gsm8k_average"]
    assert change.change_pp == -50 and pd.isna(change.p_mcnemar) and "tested each" in change.note


def test_speeds_are_compared_under_the_same_conditions_only(tmp_path):
    """FP16 is twice as fast, INT8 had other prompts, NF4 was disturbed, and INT4 cannot run."""
    ledger = Ledger(tmp_path)
    row = {"stage": "perf", "setting": "bs1", "engine": "eager", "batch_size": 1, "requests": 4, "total_s": 0.5,
           "flags": [], "measured_at": "2026-01-02", "workload": "a"}  # fmt: skip
    for name, fields in {
        "bf16": {"total_s": 1.0},
        "fp16": {},
        "int8": {"workload": "b", "measured_at": "2026-01-01"},
        "nf4": {"flags": ["cpu_shared"]},
        "int4": {"total_s": None, "note": "cannot be captured"},
    }.items():
        ledger.append({**row, "precision": name, "fingerprint": name, **fields})
    table = build(Results.read(ledger), "table3_bs1").set_index("precision")
    assert table.speedup["fp16"] == 2 and table.speedup[["int8", "nf4", "int4"]].isna().all()
    assert table.note.tolist() == ["", "", tables.OTHER, "cannot be captured", ""]
    assert table["flags"]["nf4"] == "cpu_shared" and "other processes used the CPU" in tables.markdown(table)


def swept(*lines):
    """Return a frame of a sweep: format, batch size, throughput, latency, flags."""
    frame = pd.DataFrame(lines, columns=["precision", "batch_size", "throughput_rps", "batch_latency_s", "flags"])
    return frame.assign(engine="eager", total_s=1.0).reindex(columns=[*SPEED, *BESIDE])


def test_knees_are_named_with_what_they_give_and_a_line_that_did_not_bend_has_none():
    """Throughput per second of latency: 4, 8, 6 in BF16, whose knee is 2 rows; 1, 2, 4 in NF4, which had not bent."""
    steps = swept(
        ("bf16", 1, 4.0, 1.0, []), ("bf16", 2, 8.0, 1.0, []), ("bf16", 4, 12.0, 2.0, []),
        ("nf4", 1, 1.0, 1.0, []), ("nf4", 2, 2.0, 1.0, []), ("nf4", 4, 4.0, 1.0, ["gpu_shared"]),
    )  # fmt: skip
    bent, straight = tables.knees(steps).to_dict("records")
    assert (bent["knee"], bent["knee_throughput_rps"], bent["knee_batch_latency_s"]) == (2, 8, 1)
    assert (bent["swept_to"], bent["throughput_rps"], bent["batch_latency_s"], bent["note"]) == (4, 12, 2, "")
    assert pd.isna(straight["knee"]) and pd.isna(straight["knee_throughput_rps"])
    assert straight["note"] == "other processes disturbed batches of 4"
    table = build(Results("", "", "", sweep=steps), "sweep")
    assert table.knee.tolist() == [False, True, False, False, False, False] and table["flags"].iloc[-1] == "gpu_shared"


def test_every_table_of_an_empty_study_is_empty(tmp_path):
    results = Results.read(Ledger(tmp_path))
    assert all(build(results, name).empty for name in tables.TABLES) and tables.knees(results.sweep).empty


def test_tables_are_saved_as_csv_and_markdown(studied):
    results = studied.results()
    for name in tables.TABLES:
        table = tables.save(results, name)
        assert len(table), name
        kept = pd.read_csv(results.folder / "tables" / f"{name}.csv")
        lines = (results.folder / "tables" / f"{name}.md").read_text().splitlines()
        assert list(kept) == list(table) and len(kept) == len(table) == len(lines) - 2
        assert all(line.startswith("|") and line.endswith("|") for line in lines)


def test_kept_tables_are_shown_as_they_were_saved():
    kept = read_reference(ROOT / "outputs" / "reference")["h100-llama-3.2-1b-shape"]
    text = tables.as_text(build(kept, "table4_maxbatch"))
    assert len(text) == 17 and "nan" not in text.to_string()
    assert "the GPU's clocks were held down" in set(text["flags"])
    assert tables.markdown(kept.bs1.head(1)).count("\n") == 3


def test_a_cell_of_markdown_can_neither_end_itself_nor_carry_a_tag():
    (row,) = tables.markdown(pd.DataFrame({"task": ["a|b<script>\n| c"], "change_pp": [-1.0]})).splitlines()[2:]
    assert row.split() == ["|", "a\\|b&lt;script>", "\\|", "c", "|", "-1.00", "|"]


def test_every_format_shows_the_same_item_of_the_first_task_of_choices(studied):
    table = tables.choice_probabilities(studied.results(), 1)
    assert list(table.index) == ["bf16", "fp16", "int8", "int4", "nf4"]
    assert table.filter(like="p(choice").sum(axis=1).tolist() == pytest.approx([1.0] * 5)
