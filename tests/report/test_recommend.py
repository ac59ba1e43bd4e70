"""The chooser recommends only what the rows show, and says when they do not."""

import example
import pandas as pd
import pytest

from qnb.ledger import Ledger
from qnb.report import recommend
from qnb.report.recommend import FITS, RULED_OUT, UNSURE, Demand, explain
from qnb.report.results import Results
from qnb.report.tables import build

COLUMNS = ["precision", "peak_memory_mib", "tpot_s", "n_items", "change_pp", "low_pp", "high_pp"]
ALL = pd.DataFrame(
    [("bf16", 2000, 0.003, 900, 0, 0, 0), ("int8", 1200, 0.004, 900, -0.2, -0.8, 0.4),
     ("nf4", 800, 0.002, 900, -0.6, -2.0, 0.8), ("int4", 800, 0.001, 900, -6, -8, -4)],
    columns=COLUMNS, index=["bf16", "int8", "nf4", "int4"],
).assign(engine="eager", passes=3, throughput_spread_pct=0.0, flags=[[]] * 4)  # fmt: skip


def advise(frame=ALL, **limits):
    return recommend.choose(frame, Demand(**{"rank_by": "tpot_s", **limits}))


def verdicts(advice):
    return tuple(list(advice.of(verdict).index) for verdict in (FITS, UNSURE, RULED_OUT))


def test_without_limits_the_fastest_is_first_and_memory_and_speed_rule_out_with_their_numbers():
    assert verdicts(advise()) == (["int4", "nf4", "bf16", "int8"], [], [])
    advice = advise(memory_mib=1500, speed_limit=0.0035)
    assert verdicts(advice) == (["int4", "nf4"], [], ["bf16", "int8"])
    large, slow = explain(advice)["Ruled out"]
    assert "2,000 MiB" in large and "1,500 MiB or less" in large and "4 ms" in slow and "3.5 ms or less" in slow


def test_a_loss_is_ruled_out_or_allowed_by_the_whole_interval_and_between_the_data_cannot_tell():
    """NF4's interval reaches 1.4 points, the limit is 0.4 away: (1.4 / 0.4)^2 times as many items."""
    advice = advise(loss_pp=1)
    assert verdicts(advice) == (["bf16", "int8"], ["nf4"], ["int4"]) and advice.best.name == "bf16"
    sections = explain(advice)
    assert "-6.0 points (95 %: -8.0 to -4.0, 900 items)" in sections["Ruled out"][0]
    assert "about 13 times the items" in sections["The data cannot tell"][0]
    assert "Second: int8" in sections and "nf4" in advice.notes[0]  # faster, if it fits


def test_nothing_is_recommended_when_nothing_is_shown_to_fit():
    advice = advise(memory_mib=900, loss_pp=1)
    assert advice.best is None and "cannot tell" in explain(advice)["Recommended: nothing"][0]
    assert "No row meets" in explain(advise(memory_mib=10))["Recommended: nothing"][0]


@pytest.mark.parametrize(
    ("column", "limits", "word"),
    [("peak_memory_mib", {"memory_mib": 9000}, "peak memory"), ("tpot_s", {}, "(TPOT)"),
     ("low_pp", {"loss_pp": 1}, "change in accuracy against bf16")],
)  # fmt: skip
def test_what_was_not_measured_is_not_guessed(column, limits, word):
    advice = advise(ALL.assign(**{column: float("nan")}), **limits)
    assert len(advice.of(UNSURE)) == 4 and f"{word} was not measured" in advice.candidates.reasons.iloc[0]


def test_a_rate_must_be_at_least_its_limit():
    advice = advise(ALL.assign(throughput_rps=[10, 20, 30, 40]), rank_by="throughput_rps", speed_limit=15)
    assert verdicts(advice) == (["int4", "nf4", "int8"], [], ["bf16"])
    assert "15 requests/s or more" in explain(advice)["Ruled out"][0]


@pytest.mark.parametrize(
    ("fields", "note"),
    [({"flags": [["cpu_shared"]] * 4}, "Other processes"), ({"passes": 1}, "one pass"),
     ({"tpot_s": [1, 1.05, 2, 3], "throughput_spread_pct": 10}, "bf16 and int8 differ in speed by less")],
)  # fmt: skip
def test_what_qualifies_a_recommendation_is_noted(fields, note):
    assert any(note in sentence for sentence in advise(ALL.assign(**fields)).notes)


def test_candidates_join_speed_with_the_accuracy_of_a_task_or_of_the_mean(studied):
    study = studied.results()
    changes = build(study, "table2_change").set_index(["task", "precision"])
    for task, name in ((recommend.MEAN, f"{recommend.MEAN} (3)"), ("arc_easy", "arc_easy")):
        int4 = recommend.candidates(study, "bs1", task).loc["int4 (cuda_graph)"]
        row = study.bs1.query("precision == 'int4' and engine == 'cuda_graph'").iloc[0]
        assert (int4.tpot_s, int4.passes, int4.low_pp) == (row.tpot_s, 3, changes.low_pp[name, "int4"])
    assert recommend.tasks(study) == [recommend.MEAN, "arc_easy", "arc_challenge", "hellaswag"]


def test_without_the_baseline_there_is_an_accuracy_and_no_change(tmp_path):
    frame = recommend.candidates(Results.read(Ledger(example.write(tmp_path / "study", precisions=("int8",)))), "bs1")
    assert (frame.accuracy_pct > 40).all() and frame.change_pp.isna().all()
    assert recommend.choose(frame, Demand("tpot_s", loss_pp=1)).of(FITS).empty
