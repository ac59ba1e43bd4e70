"""The chooser recommends only what the rows show, and says when they do not."""

from dataclasses import replace

import example
import pytest

from qnb.ledger import Ledger
from qnb.provenance import ROOT
from qnb.report import recommend
from qnb.report.recommend import Advice, Candidate, Demand, explain
from qnb.report.results import Results
from qnb.report.tables import build

BASE = Candidate("bf16", "cuda_graph", peak_memory_mib=2000, tpot_s=0.003, passes=3, change_pp=0, low_pp=0, high_pp=0)
SAFE = Candidate("int8", "cuda_graph", peak_memory_mib=1200, tpot_s=0.004, passes=3, n_items=900,
                 change_pp=-0.2, low_pp=-0.8, high_pp=0.4)  # fmt: skip
UNSURE = Candidate("nf4", "cuda_graph", peak_memory_mib=800, tpot_s=0.002, passes=3, n_items=900,
                   change_pp=-0.6, low_pp=-2.0, high_pp=0.8)  # fmt: skip
LOSSY = Candidate("int4", "cuda_graph", peak_memory_mib=800, tpot_s=0.001, passes=3, n_items=900,
                  change_pp=-6, low_pp=-8, high_pp=-4)  # fmt: skip
ALL = (BASE, SAFE, UNSURE, LOSSY)


def names(judgements) -> list[str]:
    return [each.candidate.precision for each in judgements]


def advise(candidates=ALL, **limits) -> Advice:
    return recommend.choose(candidates, Demand(**{"rank_by": "tpot_s", **limits}))


def test_without_limits_the_fastest_is_first():
    advice = advise()
    assert names(advice.fitting) == ["int4", "nf4", "bf16", "int8"] and advice.second is UNSURE


def test_memory_and_speed_rule_out_with_their_numbers():
    advice = advise(memory_mib=1500, speed_limit=0.0035)
    assert names(advice.fitting) == ["int4", "nf4"] and names(advice.ruled_out) == ["bf16", "int8"]
    large, slow = explain(advice)["Ruled out"]
    assert "2,000 MiB" in large and "1,500 MiB or less" in large and "4 ms" in slow and "3.5 ms or less" in slow


def test_an_interval_within_the_tolerated_loss_fits_and_one_beyond_does_not():
    advice = advise(loss_pp=1)
    assert advice.best is BASE and advice.second is SAFE and names(advice.ruled_out) == ["int4"]
    assert "loses 6.0 points (95 %: 4.0 to 8.0)" in explain(advice)["Ruled out"][0]


def test_an_interval_that_straddles_it_cannot_tell_and_how_many_items_might():
    """The interval reaches 1.4 points, the limit is 0.4 away: (1.4 / 0.4)^2 times as many items."""
    advice = advise(loss_pp=1)
    assert names(advice.unsure) == ["nf4"] and "nf4 (cuda_graph)" in advice.notes[0]  # faster, if it fits
    (sentence,) = explain(advice)["The data cannot tell"]
    assert "900 items cannot tell" in sentence and "about 13 times as many might" in sentence
    edge = Candidate("nf4", "", peak_memory_mib=1, tpot_s=0.001, change_pp=-1, low_pp=-2, high_pp=0, n_items=10)
    assert "nor could any practical number" in explain(advise([edge], loss_pp=1))["The data cannot tell"][0]


def test_what_other_processes_slowed_is_named_beside_the_recommendation():
    slowed = replace(BASE, disturbed=True)
    assert "bf16 (cuda_graph)" in advise([slowed, SAFE]).notes[0]
    assert "bf16 (cuda_graph)" in advise([slowed], speed_limit=0.001).notes[0]  # and where nothing fits


def test_nothing_is_recommended_when_nothing_is_shown_to_fit():
    advice = advise(memory_mib=900, loss_pp=1)
    assert advice.best is None
    assert names(advice.unsure) == ["nf4"] and names(advice.ruled_out) == ["int4", "bf16", "int8"]
    assert "cannot tell" in explain(advice)["Recommended: nothing"][0]
    assert "No row meets" in explain(advise(memory_mib=10))["Recommended: nothing"][0]


@pytest.mark.parametrize(
    ("missing", "limits", "word"),
    [
        ({"peak_memory_mib": None}, {"memory_mib": 9000}, "its peak memory was not measured"),
        ({"tpot_s": None}, {}, "(TPOT) was not measured"),
        ({"low_pp": None}, {"loss_pp": 1}, "change in accuracy against bf16 was not measured"),
    ],
)
def test_what_was_not_measured_is_not_guessed(missing, limits, word):
    (judgement,) = advise([replace(SAFE, **missing)], **limits).unsure
    assert any(word in reason for reason in judgement.unknown)


def test_a_rate_must_be_at_least_its_limit():
    slow, fast = (Candidate(name, "", throughput_rps=rate) for name, rate in (("bf16", 10.0), ("nf4", 20.0)))
    advice = recommend.choose([slow, fast], Demand("throughput_rps", speed_limit=15))
    assert advice.best is fast and "15 requests/s or more" in explain(advice)["Ruled out"][0]


def test_speeds_closer_than_their_passes_are_called_that():
    near = [Candidate(name, "", tpot_s=value, throughput_spread_pct=10, passes=3)
            for name, value in (("bf16", 1.0), ("nf4", 1.05))]  # fmt: skip
    assert "by less than their passes do" in advise(near).notes[0]
    assert "one pass" in advise([Candidate("bf16", "", tpot_s=1.0)]).notes[0]


def test_an_unknown_speed_is_refused():
    with pytest.raises(ValueError, match="tpot_s"):
        recommend.choose([], Demand("speed"))


def test_candidates_join_speed_with_the_accuracy_of_a_task_or_of_the_mean(studied):
    study = studied.results()
    changes = build(study, "table2_change").set_index(["task", "precision"])
    for task, name in ((recommend.MEAN, f"{recommend.MEAN} (3)"), ("arc_easy", "arc_easy")):
        (int4,) = (each for each in recommend.candidates(study, "bs1", task) if each.name == "int4 (cuda_graph)")
        row = study.bs1.query("precision == 'int4' and engine == 'cuda_graph'").iloc[0]
        assert (int4.tpot_s, int4.peak_memory_mib, int4.passes) == (row.tpot_s, row.peak_memory_mib, 3)
        assert (int4.change_pp, int4.low_pp) == tuple(changes.loc[(name, "int4"), ["change_pp", "low_pp"]])
    assert recommend.tasks(study) == [recommend.MEAN, "arc_easy", "arc_challenge", "hellaswag"]


def test_without_the_baseline_there_is_an_accuracy_and_no_change(tmp_path):
    study = Results.read(Ledger(example.write(tmp_path / "study", precisions=("int8",))))
    assert {(each.accuracy_pct > 40, each.change_pp) for each in recommend.candidates(study, "bs1")} == {(True, None)}


def test_kept_runs_without_accuracy_are_still_ranked_by_speed():
    kept = Results.of_tables(ROOT / "outputs" / "reference" / "h100-llama-3.2-1b-shape")
    candidates = recommend.candidates(kept, "maxbatch")
    best = recommend.choose(candidates, Demand("throughput_rps")).best
    assert recommend.tasks(kept) == [] and best.throughput_rps == kept.maxbatch.throughput_rps.max()
    assert not recommend.choose(candidates, Demand("throughput_rps", loss_pp=1)).fitting
