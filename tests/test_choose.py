"""The chooser recommends only what the rows show, and says when they do not."""

from dataclasses import replace

import pytest

from qnb.accuracy.statistics import agresti_min
from qnb.provenance import ROOT
from qnb.report import explore, results
from qnb.report import recommend as choose
from qnb.report.recommend import Advice, Candidate, Demand, explain

BASE = Candidate("bf16", "cuda_graph", memory_mib=2000, tpot_s=0.003, repeats=3, change_pp=0, low_pp=0, high_pp=0)
SAFE = Candidate("int8", "cuda_graph", memory_mib=1200, tpot_s=0.004, repeats=3, items=900,
                 change_pp=-0.2, low_pp=-0.8, high_pp=0.4)  # fmt: skip
UNSURE = Candidate("nf4", "cuda_graph", memory_mib=800, tpot_s=0.002, repeats=3, items=900,
                   change_pp=-0.6, low_pp=-2.0, high_pp=0.8)  # fmt: skip
LOSSY = Candidate("int4", "cuda_graph", memory_mib=800, tpot_s=0.001, repeats=3, items=900,
                  change_pp=-6, low_pp=-8, high_pp=-4)  # fmt: skip
ALL = (BASE, SAFE, UNSURE, LOSSY)


def names(judged) -> list[str]:
    return [one.candidate.precision for one in judged]


def advise(found=ALL, **asked) -> Advice:
    return choose.choose(found, Demand(**{"speed": "tpot_s", **asked}))


def test_without_limits_the_fastest_is_first():
    advice = advise()
    assert names(advice.fitting) == ["int4", "nf4", "bf16", "int8"] and advice.second is UNSURE


def test_memory_and_speed_rule_out_with_their_numbers():
    advice = advise(memory_mib=1500, speed_limit=0.0035)
    assert names(advice.fitting) == ["int4", "nf4"] and names(advice.out) == ["bf16", "int8"]
    said = explain(advice)
    assert said["Ruled out"] == [
        "bf16 (cuda_graph): takes 2,000 MiB, 1,500 are allowed.",
        "int8 (cuda_graph): time per output token (TPOT) is 4 ms, 3.5 are allowed.",
    ]


def test_an_interval_within_the_tolerated_loss_fits_and_one_beyond_does_not():
    advice = advise(loss_pp=1)
    assert advice.best is BASE and advice.second is SAFE and names(advice.out) == ["int4"]
    assert "loses 6.0 points (95 %: 4.0 to 8.0), 1 allowed" in explain(advice)["Ruled out"][0]


def test_an_interval_that_straddles_it_cannot_tell_and_how_many_items_might():
    advice = advise(loss_pp=1)
    assert names(advice.unsure) == ["nf4"]
    (told,) = explain(advice)["The data cannot tell"]
    assert "900 items cannot tell" in told
    assert (
        "about 13 times as many might" in told
    )  # the interval reaches 1.4 points, the limit is 0.4 away: (1.4/0.4)^2
    assert advice.notes == ("Faster, if it were known to fit: nf4 (cuda_graph).",)


def test_a_change_on_the_limit_itself_is_not_promised_an_answer():
    edge = Candidate("nf4", "", memory_mib=1, tpot_s=0.001, change_pp=-1, low_pp=-2, high_pp=0, items=10)
    assert "nor would any practical number" in explain(advise([edge], loss_pp=1))["The data cannot tell"][0]


def test_what_other_processes_slowed_is_said_beside_the_recommendation():
    advice = advise([replace(BASE, disturbed=True), SAFE])
    assert advice.notes == ("Other processes were at work while bf16 (cuda_graph) was timed.",)
    assert advise([replace(BASE, disturbed=True)], speed_limit=0.001).notes == advice.notes  # and where nothing fits


def test_nothing_is_recommended_when_nothing_is_shown_to_fit():
    advice = advise(memory_mib=900, loss_pp=1)
    assert advice.best is None and names(advice.unsure) == ["nf4"] and names(advice.out) == ["int4", "bf16", "int8"]
    assert explain(advice)["Recommended: nothing"] == ["The data cannot tell whether anything fits."]
    assert explain(advise(memory_mib=10))["Recommended: nothing"] == ["No row meets everything asked."]


@pytest.mark.parametrize(
    ("missing", "asked", "word"),
    [
        ({"memory_mib": None}, {"memory_mib": 9000}, "its memory was not measured"),
        ({"tpot_s": None}, {}, "TPOT) was not measured"),
        ({"low_pp": None}, {"loss_pp": 1}, "change in accuracy against bf16 was not measured"),
    ],
)
def test_what_was_not_measured_is_not_guessed(missing, asked, word):
    (one,) = advise([replace(SAFE, **missing)], **asked).unsure
    assert any(word in reason for reason in one.unknown)


def test_a_rate_is_asked_for_at_least():
    slow, fast = (Candidate(name, "", throughput_rps=rate) for name, rate in (("bf16", 10.0), ("nf4", 20.0)))
    advice = choose.choose([slow, fast], Demand("throughput_rps", speed_limit=15))
    assert advice.best is fast and "15 are asked" in explain(advice)["Ruled out"][0]


def test_speeds_closer_than_their_repeats_are_called_that():
    near = [Candidate(name, "", tpot_s=value, spread=0.1, repeats=3) for name, value in (("bf16", 1.0), ("nf4", 1.05))]
    assert "differ in speed by less than their repeats do" in advise(near).notes[0]
    once = [Candidate("bf16", "", tpot_s=1.0)]
    assert "one pass" in advise(once).notes[0]


def test_an_unknown_speed_is_refused():
    with pytest.raises(ValueError, match="tpot_s"):
        choose.choose([], Demand("speed"))


def test_a_task_on_which_nothing_flipped_still_has_an_interval(studied):
    """Agresti and Min: half an item in each cell, so 0 of n is not certainty."""
    low, high = agresti_min(0, 0, 100)
    assert low == -high == pytest.approx(-100 * 1.96 / 102)
    changes = studied.results().tables[2]
    same = changes[(changes.task == "arc_challenge") & (changes.precision == "fp16")].iloc[0]
    assert same.gained == same.lost == 0
    found = choose.accuracies(studied.results(), "arc_challenge")["fp16"]
    assert found["low_pp"] < 0 < found["high_pp"]


def test_agresti_min_is_walds_formula_with_half_an_item_a_cell():
    gained, lost, items = 20, 34, 400
    shares = [(count + 0.5) / (items + 2) for count in (gained, lost)]
    error = ((sum(shares) - (shares[0] - shares[1]) ** 2) / (items + 2)) ** 0.5
    low, high = agresti_min(gained, lost, items)
    assert (low + high) / 2 == pytest.approx(100 * (shares[0] - shares[1]))
    assert (high - low) / 2 == pytest.approx(196 * error)


def test_kept_runs_without_accuracy_are_still_ranked_by_speed():
    kept = results.reference(ROOT / "outputs" / "reference")["h100-llama-3.2-1b-shape"]
    assert choose.tasks(kept) == []
    found = choose.candidates(kept, "maxbatch")
    rates = {one.precision: one.throughput_rps for one in found}
    assert choose.choose(found, Demand("throughput_rps")).best.precision == max(rates, key=rates.get)
    assert not choose.choose(found, Demand("throughput_rps", loss_pp=1)).fitting


def test_a_kept_rows_range_is_as_wide_as_was_measured():
    kept = results.reference(ROOT / "outputs" / "reference")["h100-llama-3.2-1b-shape"].bs1
    ranges_pct = 100 * (kept.high_rps / kept.low_rps - 1)
    assert list(ranges_pct) == pytest.approx(list(kept.throughput_spread_pct)) and ranges_pct.max() > 100
    assert ((kept.low_rps <= kept.throughput_rps) & (kept.throughput_rps <= kept.high_rps)).all()


def test_relative_values_are_shares_of_the_baseline_with_the_same_engine(studied):
    found = studied.results()
    frame, title, unit = explore.values(found, "memory_mib", baseline="bf16")
    assert unit == "% of bf16" and "relative" in title
    assert set(frame[frame.precision == "bf16"].value) == {100.0}
    plain, _, _ = explore.values(found, "memory_mib", precisions=("bf16", "int4"), engine="eager")
    share = 100 * plain.value[1] / plain.value[0]
    assert frame[(frame.precision == "int4") & (frame.engine == "eager")].value.item() == pytest.approx(share)


def test_accuracy_is_explored_with_its_interval_and_items(studied):
    frame, title, unit = explore.values(studied.results(), "accuracy_pct", task="arc_easy")
    row = frame[frame.precision == "bf16"].iloc[0]
    assert (title, unit, row.n) == ("Accuracy, ARC Easy", "%", "400 items")
    assert row.high - row.value == pytest.approx(1.96 * 100 * (row.value / 100 * (1 - row.value / 100) / 400) ** 0.5)


def test_relative_accuracy_has_the_interval_of_the_paired_change(studied):
    """Each precision's own error would not tell how large a difference must be; the baseline has none to itself."""
    found = studied.results()
    frame, _, unit = explore.values(found, "accuracy_pct", task="arc_easy", baseline="bf16")
    rows = frame.set_index("precision")
    changes = found.tables[2].query("task == 'arc_easy'").set_index("precision")
    assert unit == "% of bf16" and list(rows.loc["bf16", ["low", "value", "high"]]) == [100, 100, 100]
    share = 100 + 100 * changes.low_pp["int4"] / changes.baseline_pct["int4"]
    assert rows.low["int4"] == pytest.approx(share, abs=1e-3) and rows.low["int4"] < rows.value["int4"]
    other, _, _ = explore.values(found, "accuracy_pct", task="arc_easy", baseline="fp16")
    assert other.low.isna().all()  # pairs are with BF16
    certain = found.scores.assign(value=1.0, stderr=0.2)
    assert explore.values(replace(found, scores=certain), "accuracy_pct", task="arc_easy")[0].high.max() == 100


def test_a_quantity_that_was_not_measured_gives_an_empty_frame():
    kept = results.reference(ROOT / "outputs" / "reference")["h100-llama-3.2-1b-shape"]
    assert "tpot_s" in explore.measured(kept)
    kept = replace(kept, bs1=kept.bs1.drop(columns="tpot_s"), maxbatch=kept.maxbatch.drop(columns="tpot_s"))
    assert explore.values(kept, "tpot_s")[0].empty and "tpot_s" not in explore.measured(kept)
