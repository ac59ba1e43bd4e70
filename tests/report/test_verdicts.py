"""A verdict says no more than the answers show."""

import pandas as pd
import pytest
from example import answers, score

from qnb.report import verdicts
from qnb.report.findings import about
from qnb.report.results import Results
from qnb.report.tables import build, compact
from qnb.report.verdicts import Verdict, decide, judge

NAN = float("nan")


@pytest.mark.parametrize(
    ("precision", "low_pp", "high_pp", "fields", "verdict", "words"),
    [("nf4", -0.9, -0.2, {}, Verdict.WITHIN, "within 1 point"),  # a loss that is real, and surely below the margin
     ("nf4", -3, -1.1, {}, Verdict.LOSES, "loses more than 1 point"),
     ("nf4", -1.5, 0.5, {}, Verdict.UNCLEAR, "400 items"),  # it reaches 1 point, the margin is half a point away
     ("nf4", NAN, NAN, {}, Verdict.UNMEASURED, "not measured"),
     ("nf4", NAN, NAN, {"accuracy_pct": 25.0}, Verdict.UNCLEAR, "not measured"),  # no task can show a loss
     ("nf4", -0.1, 0.1, {"quantized_pct": 10.0}, Verdict.BARELY_QUANTIZED, "10 %"),
     ("fp16", -0.1, 0.1, {"quantized_pct": 0.0}, Verdict.WITHIN, ""),  # it quantizes nothing
     ("bf16", -3, -1.1, {}, Verdict.BASELINE, "")],
)  # fmt: skip
def test_the_interval_and_the_margin_decide(precision, low_pp, high_pp, fields, verdict, words):
    row = {"change_pp": (low_pp + high_pp) / 2, "low_pp": low_pp, "high_pp": high_pp, "n_items": 100,
           "quantized_pct": 80.0, "why": "accuracy was not measured", **fields}  # fmt: skip
    decided, said = decide(precision, row, 1.0)
    assert decided is verdict and words in said


def choices(task, correct, n_choices=4):
    """Return items of so many choices each, of which the first is picked when the item is right."""
    picked = [0 if each else 1 for each in correct]
    return answers(task, correct, picked=picked, loglikelihoods=[[-1.0] * n_choices] * len(correct))


def test_tasks_at_chance_are_left_out_and_named(measured):
    """Of four choices, guessing is right in 25 %: 11 of 40 may be luck, 30 of 40 are not. A written answer is not."""
    right = {"easy": 30, "hard": 11, "written": 20}
    rows = {}
    for name, lost in (("bf16", 0), ("int8", 4)):
        for task, n in right.items():
            correct = [place < n - lost for place in range(40)]
            rows[name, task] = choices(task, correct) if task != "written" else answers(task, correct, picked=correct)
    results = measured(rows, **{task: {"scores": [score(task, n_total=40)]} for task in right})
    assert verdicts.at_chance(results) == ["hard"]
    frame = judge(results)
    assert frame.change_pp["int8"] == pytest.approx(-10) and frame.n_items["int8"] == 80
    assert frame.accuracy_pct["bf16"] == pytest.approx((75 + 50) / 2)
    margin, chance, detected, more = verdicts.notes(results)
    assert "1 point" in margin and "hard" in chance and "points" in detected
    assert verdicts.items_needed(frame.loc["int8"], 1.0) > 80 and "80 items" in more
    table = build(results, "table2_change").set_index("task")
    assert table.recovery_pct["easy"] == pytest.approx(100 * (65 - 25) / (75 - 25))
    assert pd.isna(table.recovery_pct["hard"]) and table.answers_changed["easy"] == 4
    assert table.recovery_low_pct["easy"] < table.recovery_pct["easy"] < table.recovery_high_pct["easy"]
    shown = compact(results, "table2_change")
    assert shown.iloc[-1, -1].startswith("-10.0 [") and len(shown) == 4


def test_a_task_that_is_not_compared_costs_the_others_nothing(measured):
    """Its empty cells make the whole column of items one of floats."""
    rows = {("bf16", "easy"): choices("easy", [1] * 40), ("int8", "easy"): choices("easy", [1] * 39 + [0]),
            ("bf16", "other"): [1, 1], ("int8", "other"): [None, True]}  # fmt: skip
    assert judge(measured(rows)).change_pp["int8"] == pytest.approx(-2.5)


def test_tasks_weigh_the_same_whatever_their_items(measured):
    rows = {("bf16", "large"): choices("large", [1] * 100), ("bf16", "small"): choices("small", [1] * 20),
            ("nf4", "large"): choices("large", [1] * 100), ("nf4", "small"): choices("small", [1] * 18 + [0] * 2),
            ("int8", "large"): choices("large", [0] * 50 + [1] * 50)}  # fmt: skip
    results = measured(rows)
    frame = verdicts.accuracies(results)  # INT8 was not asked `small`, which costs no other format its loss there
    assert frame.change_pp["nf4"] == pytest.approx(-5) and frame.change_pp["int8"] == -50
    assert any("INT8" in note and "small" in note for note in verdicts.notes(results))
    assert verdicts.accuracies(results, "small").change_pp["nf4"] == pytest.approx(-10)


def test_a_divergence_that_another_batch_size_causes_as_well_is_called_noise():
    change = dict.fromkeys([f"perplexity_change_pct{end}" for end in ("", "_low", "_high")])
    rows = [{"precision": "bf16", "noise_floor_nats": 0.002, **change}, {"precision": "fp16", "kl_mean_nats": 0.001},
            {"precision": "nf4", "kl_mean_nats": 0.2}]  # fmt: skip
    results = Results("", "", "", divergence=pd.DataFrame(rows))
    shown = compact(results, "divergence")["mean KL divergence, nats"]
    assert ["noise" in cell for cell in shown] == [False, True, False]
    assert any("noise" in line for line in about(results, "fp16")) and not about(results, "nf4")


def test_another_16_bit_type_and_an_emulated_one_are_told():
    types = [("bf16", "bfloat16"), ("fp16", "float16"), ("int8", "float16"), ("nf4", "float16"), ("nf4", "bfloat16")]
    rows = [{"precision": name, "dtype": dtype, "bf16": "emulated"} for name, dtype in types]
    lines = [verdicts.notes(Results("", "", "", rows=tuple(rows[:end]))) for end in (2, 4, 5)]
    assert [len(each) for each in lines] == [1, 2, 3] and "FP16" not in str(lines)
    assert "float16 in INT8, NF4." in lines[1][0] and lines[2][1].startswith("NF4 overflowed")
