"""Tables 1 and 2 from hand-made rows: the right items paired, and nothing compared that is not alike."""

import math

import pandas as pd
import pytest

from qnb.report import tables as table


def score(task, value, metric="acc", group=False, items=4, kind="none"):
    return {"task": task, "metric": metric, "filter": kind, "value": value, "stderr": 0.1, "items": items, "shots": 0,
            "group": group}  # fmt: skip


def row(precision, task, scores, limit=4):
    return {"precision": precision, "task": task, "limit": limit, "scores": scores, "fingerprint": precision + task}


def items(task, right, kind="none"):
    return [{"task": task, "doc_id": place, "filter": kind, "correct": was} for place, was in enumerate(right)]


def answered(**right):
    """Items by precision, looked up as a study does."""
    return lambda asked: pd.DataFrame(items(asked["task"], right[asked["precision"]]))


def test_frames_are_stacked_whatever_is_empty_in_one():
    """As a hand would write the rows below each other; no pandas warns (FutureWarnings are errors in these tests)."""
    parts = [
        pd.DataFrame({"name": ["a", "b"], "value": [0.5, None], "count": [1, 2], "sure": [True, False]}),
        pd.DataFrame({"name": ["c"], "value": [None], "count": [None], "sure": [True], "note": ["late"]}),
        pd.DataFrame({"other": []}),
    ]
    made = table.stacked(iter(parts))
    assert list(made) == ["name", "value", "count", "sure", "note", "other"]
    assert list(made.name) == ["a", "b", "c"] and list(made.sure) == [True, False, True]
    assert made.value.dtype == float and list(made.value.isna()) == [False, True, True]
    assert list(made["count"][:2]) == [1, 2] and made.note[2] == "late" and made.note.isna().sum() == 2
    assert table.stacked([]).empty


def test_tasks_without_a_headline_have_no_mean():
    frame = pd.DataFrame([row("bf16", "words", [score("words", 9.5, metric="word_perplexity")])])
    made = table.accuracy(table.scores(frame))
    assert list(made.metric) == ["word_perplexity"] and table.headline(table.scores(frame)).empty


def test_changes_are_paired_item_by_item():
    frame = pd.DataFrame([row("bf16", "easy", [score("easy", 0.75)]), row("int8", "easy", [score("easy", 0.5)])])
    made = table.change(frame, answered(bf16=[1, 1, 1, 0], int8=[1, 0, 0, 1])).iloc[0]
    assert (made["items"], made.gained, made.lost) == (4, 1, 2)
    assert made.change_pp == -25 and made.change_pct == pytest.approx(-100 / 3)
    assert made.low_pp < -25 < made.high_pp and made.p_mcnemar == made.p_holm == 1 and not made.significant


def test_another_limit_is_named_and_not_compared():
    frame = pd.DataFrame([row("bf16", "easy", [score("easy", 1)]), row("int8", "easy", [score("easy", 1)], limit=2)])
    made = table.change(frame, answered(bf16=[1, 1, 1, 1], int8=[1, 1]))
    assert "limit 2" in made.note[0] and "change_pp" not in made


def test_items_that_are_gone_are_named():
    frame = pd.DataFrame([row("bf16", "easy", [score("easy", 1)]), row("int8", "easy", [score("easy", 1)])])
    made = table.change(frame, lambda asked: None)
    assert "gone" in made.note[0]


def test_a_share_instead_of_right_or_wrong_is_left_out():
    frame = pd.DataFrame(
        [row("bf16", "shares", [score("shares", 0.4)]), row("int8", "shares", [score("shares", 0.4)])]
    )
    (made,) = table.change(frame, answered(bf16=[None, None], int8=[None, True])).to_dict("records")
    assert made["note"] == "not compared: its score is not a share of right answers"


def test_an_answer_is_read_one_way_whatever_that_is_called():
    """Strictly where there is such a filter, else plainly, else as the task's first filter reads it."""
    for kinds, chosen in (
        (("loose", "strict-match"), "strict-match"),
        (("trimmed", "none"), "none"),
        (("b", "a"), "b"),
    ):
        scores = [score("asked", 1.0 if kind == chosen else 0.0, "exact_match", kind=kind) for kind in kinds]
        frame = pd.DataFrame([row(name, "asked", scores) for name in ("bf16", "int8")])
        assert list(table.headline(table.scores(frame)).query("task == 'asked'").value) == [1, 1]

        def read(asked, kinds=kinds, chosen=chosen):
            right = {chosen: [asked["precision"] == "bf16", True]}
            return pd.DataFrame([one for kind in kinds for one in items("asked", right.get(kind, [False] * 2), kind)])

        made = table.change(frame, read).iloc[0]
        assert (made["items"], made.gained, made.lost) == (2, 0, 1)


def test_a_task_that_is_in_no_mean_of_table_1_is_in_none_of_table_2():
    tasks = {"easy": [1, 1, 0, 0], "hard": [1, 0, 0, 0], "text": [None] * 4}
    frame = pd.DataFrame([row(name, task, [score(task, 0.5, "acc" if task != "text" else "bits")])
                          for task in tasks for name in ("bf16", "int8")])  # fmt: skip
    made = table.change(frame, lambda asked: pd.DataFrame(items(asked["task"], tasks[asked["task"]])))
    (mean,) = (task for task in made.task if task.startswith(table.AGGREGATE))
    assert mean == f"{table.AGGREGATE} (2)" == table.headline(table.scores(frame)).task.iloc[-1]


def test_a_group_is_the_items_of_what_is_in_it():
    tree = [score("all", 0.5, group=True), score("left", 0.5, group=True), score("l1", 1), score("l2", 0),
            score("right", 0.5, group=True), score("r1", 0.5)]  # fmt: skip
    groups = {"all": ["l1", "l2", "r1"], "left": ["l1", "l2"], "right": ["r1"]}
    frame = pd.DataFrame([{**row(name, "all", tree), "groups": groups} for name in ("bf16", "int8")])
    parts = {"bf16": {"l1": [1, 1], "l2": [0, 0], "r1": [1, 0]}, "int8": {"l1": [1, 0], "l2": [0, 0], "r1": [1, 1]}}

    def found(asked):
        return pd.DataFrame([item for task, right in parts[asked["precision"]].items() for item in items(task, right)])

    made = table.change(frame, found).set_index("task")
    assert list(made.index) == ["all", "left", "right"]
    assert made["items"].to_dict() == {"all": 6, "left": 4, "right": 2}
    assert made.lost.to_dict() == {"all": 1, "left": 1, "right": 0} and made.gained["right"] == 1


def test_the_mean_is_over_tasks_that_all_answered():
    rows = [row("bf16", "easy", [score("easy", 0.5)]), row("int8", "easy", [score("easy", 0.3)]),
            row("bf16", "hard", [score("hard", 0.1)])]  # fmt: skip
    made = table.accuracy(table.scores(pd.DataFrame(rows))).set_index(["task", "metric"]).sort_index()
    mean = made.loc[f"{table.AGGREGATE} (1)"]
    assert (mean.bf16_pct["mean"], mean.int8_pct["mean"]) == (50, 30)
    # one task with a standard error of 10 points
    assert mean.bf16_pct["mean, 95 % low"] == pytest.approx(50 - 19.6)
    assert mean.int8_pct["mean, 95 % high"] == pytest.approx(30 + 19.6)


def test_the_change_of_the_mean_has_an_interval_and_each_task_counts_once():
    rows = [row(name, task, [score(task, 0.5)]) for name in ("bf16", "int8") for task in ("easy", "hard")]
    right = {("bf16", "easy"): [1, 1, 1, 1, 1, 0, 0, 1], ("int8", "easy"): [1, 0, 1, 0, 1, 0, 0, 0],
             ("bf16", "hard"): [0, 1, 1, 0], ("int8", "hard"): [0, 1, 0, 1]}  # fmt: skip

    def found(asked):
        return pd.DataFrame(items(asked["task"], right[asked["precision"], asked["task"]]))

    made = table.change(pd.DataFrame(rows), found).set_index("task")
    mean = made.loc[f"{table.AGGREGATE} (2)"]
    assert mean.change_pp == pytest.approx((made.change_pp["easy"] + made.change_pp["hard"]) / 2) == -18.75
    assert mean.low_pp < -18.75 < mean.high_pp and mean["items"] == 12
    assert pd.isna(mean.p_holm) and mean.significant is None and made.significant["easy"] is False


def test_where_nothing_flipped_the_mean_has_an_interval_of_its_tasks():
    rows = [row(name, task, [score(task, 0.5)]) for name in ("bf16", "fp16") for task in ("easy", "hard")]
    right = {"easy": [1, 0, 1, 0], "hard": [1, 1, 0]}
    made = table.change(pd.DataFrame(rows), lambda asked: pd.DataFrame(items(asked["task"], right[asked["task"]])))
    made = made.set_index("task")
    ends = made.high_pp[["easy", "hard"]]
    mean = made.loc[f"{table.AGGREGATE} (2)"]
    assert mean.change_pp == 0 and mean.high_pp == pytest.approx(math.hypot(*ends) / 2) == -mean.low_pp > 0


def test_the_probability_of_the_right_choice_is_paired():
    frame = pd.DataFrame([row("bf16", "easy", [score("easy", 1)]), row("int8", "easy", [score("easy", 1)])])
    shares = {"bf16": [0.9, 0.8, 0.7, 0.9], "int8": [0.8, 0.8, 0.4, 0.85]}

    def found(asked):
        return pd.DataFrame(items("easy", [1, 1, 1, 1])).assign(p_correct=shares[asked["precision"]])

    made = table.change(frame, found).iloc[0]
    assert made.p_correct_change_pp == pytest.approx(-11.25)
    assert made.p_correct_low_pp < -11.25 < made.p_correct_high_pp < 0 and made.change_pp == 0


def test_other_items_are_not_compared():
    frame = pd.DataFrame([row("bf16", "easy", [score("easy", 1)]), row("int8", "easy", [score("easy", 1)])])
    made = table.change(frame, answered(bf16=[1, 1, 1, 1], int8=[1, 1]))
    assert "others" in made.note[0] and "change_pp" not in made


def test_a_sample_and_a_whole_task_share_no_cell():
    """Also where both have as many items: of how many is part of the key."""
    rows = [row("bf16", "easy", [{**score("easy", 0.5), "of": 4}]),
            row("int8", "easy", [{**score("easy", 0.5), "of": 2376}])]  # fmt: skip
    made = table.accuracy(table.scores(pd.DataFrame(rows)))
    cells = made[made.metric == "acc"].set_index("of")
    assert pd.isna(cells.int8_pct[4]) and pd.isna(cells.bf16_pct[2376])


def test_gsm8ks_average_is_of_the_strict_readings():
    rows = []
    for precision, values in (("bf16", (0.2, 0.4)), ("int8", (0.1, 0.1))):
        for task, value in zip(("gsm8k", "gsm8k_cot"), values, strict=True):
            scores = [score(task, value, "exact_match", kind="strict-match"),
                      score(task, 0.9, "exact_match", kind="flexible-extract")]  # fmt: skip
            rows.append(row(precision, task, scores))
    frame = pd.DataFrame(rows)
    made = table.accuracy(table.scores(frame)).set_index(["task", "metric", "filter"]).sort_index()
    average = made.loc["gsm8k_average", "mean", "none"]
    assert average.bf16_pct == pytest.approx(30) and average.published_bf16_pct == pytest.approx(5.84)
    assert made.loc["gsm8k", "exact_match", "flexible-extract"].bf16_pct == 90
    right = {("bf16", "gsm8k"): [1, 0], ("bf16", "gsm8k_cot"): [1, 1], ("int8", "gsm8k"): [0, 0],
             ("int8", "gsm8k_cot"): [1, 0]}  # fmt: skip

    def found(asked):
        return pd.DataFrame(items(asked["task"], right[asked["precision"], asked["task"]], "strict-match"))

    change = table.change(frame, found).set_index("task").loc["gsm8k_average"]
    assert change.change_pp == -50 and pd.isna(change.p_mcnemar) and "tested each" in change.note


def test_speed_is_compared_on_one_workload():
    row = {"engine": "eager", "batch_size": 1, "requests": 4, "prompt_tokens": 8, "new_tokens": 2, "repeat": 0,
           "monitor_source": "nvml", "memory_mib": 1.0, "throughput_tps": 8.0, "total_s": 1.0, "device": "one",
           "seconds_per_request": 0.25, "batch_latency_s": 0.25}  # fmt: skip
    frame = pd.DataFrame([
        {**row, "precision": "bf16", "throughput_rps": 4.0, "workload": "a"},
        {**row, "precision": "fp16", "throughput_rps": 8.0, "workload": "a"},
        {**row, "precision": "int8", "throughput_rps": 8.0, "workload": "b"},
    ])  # fmt: skip
    made = table.performance(frame, 3).set_index("precision").speedup
    assert made["fp16"] == 2 and pd.isna(made["int8"])


def searched(probes, **more):
    kept = [{"batch_size": size, "fits": True, "memory_mib": mib} for size, mib in probes]
    return {"precision": "bf16", "engine": "eager", "limit_mib": 220.0, "probes": kept, "prompt_tokens": 8,
            "new_tokens": 2, **more}  # fmt: skip


def drawn(lengths, examples, window=None):
    return pd.DataFrame([{"prompts": "sample", "lengths": lengths, "examples": examples, "window": window}])


def test_a_sweep_says_which_rows_are_of_another_workload_and_how_far_batches_differed():
    """Hand-made: two sizes of bf16, and of int4 those of a day before with other prompts."""
    rows = [
        {"precision": precision, "engine": "eager", "batch_size": size, "throughput_rps": size / 2,
         "batch_latency_s": 2.0, "batch_s": [2.0, 2.5], "workload": workload, "measured_at": f"2026-01-0{day}",
         "note": "", "flags": []}
        for precision, workload, day in (("bf16", "new", 2), ("int4", "old", 1)) for size in (1, 2)
    ]  # fmt: skip
    made = table.sweep(pd.DataFrame(rows))
    assert made.note.tolist() == ["", "", table.OTHER, table.OTHER] and not made.knee.any()
    assert made.throughput_spread_pct.round(6).tolist() == [25.0] * 4
    without = table.sweep(pd.DataFrame(rows).drop(columns=["batch_s", "flags", "note", "measured_at"]))
    assert without.throughput_spread_pct.isna().all() and set(without.note) == {""} == set(without["flags"])


def test_the_largest_batch_follows_the_longest_prompt_not_their_number():
    """A row of 8 + 2 tokens takes 10 MiB beside 100: 12 of them in 220 MiB, and 6 of 18 + 2."""
    frame = pd.DataFrame([searched([(1, 110.0), (8, 180.0)])])
    made = table.examples(frame, drawn([8, 2, 8, 2] * 6 + [18], [4, 24, 25])).set_index(["examples", "order"])
    assert all(sizes.tolist() == [12, 12, 6] for _, sizes in made.largest_batch.groupby("order"))
    assert made.longest_tokens.groupby("examples").first().tolist() == [8, 8, 18]
    assert made.batches[24].to_dict() == {"unsorted": 2, "bucketed": 2, "sorted": 2}
    assert (made.note == "").all() and made.estimate_error_pct.iloc[0] == pytest.approx(100 * (20 / 70) * (4 / 12))


def test_what_there_is_no_plan_for_says_why():
    rows = [
        searched([(1, 110.0), (8, 180.0)]),
        searched([(1, 110.0), (2, 120.0)], precision="int8"),
        {**searched([(1, 110.0), (8, 180.0)], precision="nf4"), "prompt_tokens": None},
        searched([], precision="int4"),
    ]
    made = table.examples(pd.DataFrame(rows), drawn([8, 400], [2, 9, 20], 120))
    found = made.groupby("precision").note.first()
    few = "sample has no more prompts; 2 and 9 and 20 were asked for"
    assert found["bf16"] == f"{few}; cut to the context window: 1"
    assert made.longest_tokens[made.precision == "bf16"].unique().tolist() == [118]
    assert "no line: 2 of 2 probes" in found["int8"] and "0 of 0" in found["int4"]
    assert "search with overwrite" in found["nf4"]
    assert made.largest_batch.isna().sum() == 3
    wide = table.examples(pd.DataFrame(rows[:1]), drawn([8, 4000], [1, 2]))
    assert wide.largest_batch.tolist()[:3] == [12] * 3 and "4000 tokens needs more than 220 MiB" in wide.note[3]


def test_plans_need_a_search_and_prompts():
    assert table.examples(pd.DataFrame(), drawn([8], [1])).empty
    assert table.examples(pd.DataFrame([searched([(1, 110.0), (8, 180.0)])]), pd.DataFrame()).empty


def test_knees_are_named_with_what_they_give_and_a_line_that_did_not_bend_has_none():
    """Throughput a second of latency: 4, 8, 6 in BF16, whose knee is 2 rows; 1, 2, 4 in NF4, which had not bent."""
    lines = {
        "bf16": ((1, 4.0, 1.0), (2, 8.0, 1.0), (4, 12.0, 2.0)),
        "nf4": ((1, 1.0, 1.0), (2, 2.0, 1.0), (4, 4.0, 1.0)),
    }
    rows = [
        {"precision": name, "engine": "eager", "batch_size": size, "throughput_rps": rps, "batch_latency_s": latency_s,
         "flags": ["another process used the GPU"] if (name, size) == ("nf4", 4) else []}
        for name, line in lines.items() for size, rps, latency_s in line
    ]  # fmt: skip
    rows.append({"precision": "int8", "engine": "cuda_graph", "batch_size": 1, "note": "cannot be recorded"})
    for frame in (pd.DataFrame(rows), table.sweep(pd.DataFrame(rows))):
        made = table.knees(frame)
        assert made.precision.tolist() == ["bf16", "nf4"] and made.swept_to.tolist() == [4, 4]
        bent, straight = made.to_dict("records")
        assert (bent["knee"], bent["knee_throughput_rps"], bent["knee_batch_latency_s"]) == (2, 8, 1)
        assert (bent["throughput_rps"], bent["batch_latency_s"], bent["note"]) == (12, 2, "")
        assert pd.isna(straight["knee"]) and pd.isna(straight["knee_throughput_rps"])
        assert straight["note"] == "other processes disturbed batches of 4"
    assert table.knees(pd.DataFrame()).empty and table.knees(table.sweep(pd.DataFrame())).empty
