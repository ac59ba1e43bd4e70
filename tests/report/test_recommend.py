"""The chooser recommends only what the rows show, and says when they do not."""

import math
from dataclasses import replace

import example
import pandas as pd
import pytest

from qnb import InputError
from qnb.ledger import Ledger
from qnb.precision import PRECISIONS, title
from qnb.report import recommend
from qnb.report.accuracy import MEAN
from qnb.report.recommend import FITS, RULED_OUT, UNSURE, Demand
from qnb.report.results import Results
from qnb.report.tables import build
from qnb.report.verdicts import judge

COLUMNS = ["precision", "peak_memory_mib", "tpot_s", "n_items", "change_pp", "low_pp", "high_pp"]
ALL = pd.DataFrame(
    [("bf16", 2000, 0.003, 900, 0, 0, 0), ("int8", 1200, 0.004, 900, -0.2, -0.8, 0.4),
     ("nf4", 800, 0.002, 900, -0.6, -2.0, 0.8), ("int4", 800, 0.001, 900, -6, -8, -4)],
    columns=COLUMNS, index=["bf16", "int8", "nf4", "int4"],
).assign(engine="eager", passes=3, throughput_rps=1.0, throughput_spread_pct=0.0, flags=[[]] * 4, quantized_pct=80.0,
         why="accuracy was not measured", kl_mean_nats=[None, 0.01, 0.2, 0.4])  # fmt: skip


def advise(frame=ALL, **limits):
    return recommend.choose(frame, Demand(**{"rank_by": "tpot_s", **limits}))


def verdicts(advice):
    return tuple(list(advice.index[advice.fit == fit]) for fit in (FITS, UNSURE, RULED_OUT))


def test_without_limits_the_fastest_is_first_and_memory_and_speed_rule_out_with_their_numbers():
    assert verdicts(advise()) == (["int4", "nf4", "bf16", "int8"], [], [])
    advice = advise(memory_mib=1500, speed_limit=0.0035)
    assert verdicts(advice) == (["int4", "nf4"], [], ["bf16", "int8"])
    large, slow = advice.reasons[advice.fit == RULED_OUT]
    assert "2,000 MiB" in large and "1,500 MiB or less" in large and "4 ms" in slow and "3.5 ms or less" in slow


def test_a_loss_is_ruled_out_or_allowed_by_the_whole_interval_and_between_the_data_cannot_tell():
    """NF4's interval reaches 1.4 points, the limit is 0.4 away: (1.4 / 0.4)^2 times 900 items, rounded."""
    advice = advise(loss_pp=1)
    assert verdicts(advice) == (["bf16", "int8"], ["nf4"], ["int4"])
    assert "bf16" in advice.attrs["notes"][0]
    assert "-6.0 points (95 %: -8.0 to -4.0, 900 items)" in advice.reasons["int4"]
    assert "about 20,000 items" in advice.reasons["nf4"]
    assert any("Faster" in note and "nf4" in note for note in advice.attrs["notes"])


def test_nothing_is_recommended_when_nothing_is_shown_to_fit():
    for limits, why in (({"memory_mib": 900, "loss_pp": 1}, "cannot tell"), ({"memory_mib": 10}, "no row meets")):
        first = advise(**limits).attrs["notes"][0]
        assert "nothing" in first and why in first


@pytest.mark.parametrize(
    ("column", "limits", "word", "unsure"),
    [("peak_memory_mib", {"memory_mib": 9000}, "peak memory", 4), ("tpot_s", {}, "(TPOT)", 4),
     ("low_pp", {"loss_pp": 1}, "accuracy", 3)],
)  # fmt: skip
def test_what_was_not_measured_is_not_guessed(column, limits, word, unsure):
    """What may fit is ranked by KL divergence; the baseline has a change by definition."""
    found = advise(ALL.assign(**{column: float("nan")}), **limits).query("fit == @UNSURE")
    assert list(found.index)[:3] == ["int8", "nf4", "int4"] and len(found) == unsure
    assert f"{word} was not measured" in found.reasons.iloc[0]


def test_a_rate_must_be_at_least_its_limit():
    advice = advise(ALL.assign(throughput_rps=[10, 20, 30, 40]), rank_by="throughput_rps", speed_limit=15)
    assert verdicts(advice) == (["int4", "nf4", "int8"], [], ["bf16"])
    assert "15 requests/s or more" in advice.reasons["bf16"]


@pytest.mark.parametrize(
    ("fields", "note"),
    [({"flags": [["cpu_shared"]] * 4}, "Other processes"), ({"passes": 1}, "one pass"),
     ({"tpot_s": [1, 1.05, 2, 3], "throughput_spread_pct": 10}, "bf16 and int8 differ in speed by less")],
)  # fmt: skip
def test_what_qualifies_a_recommendation_is_noted(fields, note):
    assert any(note in sentence for sentence in advise(ALL.assign(**fields)).attrs["notes"])


def test_speed_is_joined_with_the_accuracy_of_the_mean_and_the_sentence_names_the_model(study):
    rows = study.bs1.set_index(["precision", "engine"])
    int4 = recommend.candidates(study, "bs1").loc["int4 (cuda_graph)"]
    change_pp = build(study, "table2_change").set_index(["task", "precision"]).change_pp[f"{MEAN} (3)", "int4"]
    assert (int4.tpot_s, int4.passes) == (rows.tpot_s["int4", "cuda_graph"], 3)
    assert int4.change_pp == pytest.approx(change_pp)
    table = recommend.summary(study).set_index("precision")
    assert list(table.index) == study.precisions and table.tpot_eager_s["nf4"] == rows.tpot_s["nf4", "eager"]
    assert table.tpot_captured_s["nf4"] == rows.tpot_s["nf4", "cuda_graph"]
    assert table.throughput_rps["nf4"] == study.maxbatch.query("precision == 'nf4'").throughput_rps.max()
    assert study.model in recommend.sentence(study) and recommend.sentence(Results("", "", "")).startswith("Nothing")


def test_the_sentence_names_the_undecided_format_that_needs_the_fewest_items(study):
    study = replace(study, margin_pp=0.3)
    words = judge(study).words[lambda words: words.str.startswith("cannot tell")]
    items = words.str.extract("about ([0-9,]+)")[0].str.replace(",", "").astype(int)
    assert items.to_dict() == {"fp16": 5000, "int8": 2000, "nf4": 30000}
    assert "INT8 is the closest to a decision: about 2,000" in recommend.sentence(study)


def test_what_other_processes_disturbed_is_noted_unless_another_row_is_shown(study):
    for setting, noted in (("bs1", ["int8"]), ("maxbatch", ["int8"]), ("sweep", [])):
        flags = study.timed(setting).precision.map({"int8": ["gpu_shared"]})
        table = recommend.summary(replace(study, **{setting: study.timed(setting).assign(flags=flags)}))
        assert list(table.precision[table.note.str.contains("disturbed").eq(True)]) == noted


def test_a_disturbed_format_is_not_called_the_fastest(study):
    said = recommend.sentence(study)
    fastest = PRECISIONS[study.bs1.sort_values("tpot_s").precision.iloc[0]]
    flags = study.bs1.precision.map({fastest.name: ["cpu_shared"]})
    disturbed = recommend.sentence(replace(study, bs1=study.bs1.assign(flags=flags)))
    name = title(fastest.name)
    assert f"{name} is fastest" in said and f"{name} is fastest" not in disturbed and "is fastest" in disturbed
    assert disturbed.endswith(f"left out of the fastest at batch size 1: {name}.")


def test_a_throughput_of_generate_beside_captured_ones_is_noted(study):
    """A budget may leave out a format's captured step. Where every throughput is of one engine, nothing is said."""
    is_left_out = study.maxbatch.precision.eq("nf4") & study.maxbatch.engine.eq("cuda_graph")
    for maxbatch, noted in ((study.maxbatch[~is_left_out], {"nf4"}),
                            (study.maxbatch[study.maxbatch.engine == "eager"], set())):  # fmt: skip
        table = recommend.summary(replace(study, maxbatch=maxbatch)).set_index("precision")
        assert {name for name, note in table.note.items() if "eager alone" in str(note)} == noted


@pytest.mark.parametrize("limits", [{"peak_memory_mib": "1500"}, {"tpot_ms": -1}, {"tpot_ms": math.nan}])
def test_a_limit_that_is_no_number_above_0_is_refused(limits, study):
    with pytest.raises(InputError, match="number above 0"):
        recommend.ranked(study, **limits)


def test_formats_are_ranked_also_without_accuracy_and_without_speed(study):
    blind = recommend.ranked(replace(study, scores=pd.DataFrame(), accuracy_rows=pd.DataFrame()), tpot_ms=1e6)
    assert blind.fit.tolist().count(UNSURE) == len(blind) - 2 and blind.words[blind.fit == UNSURE].nunique() == 1
    unsure = blind[blind.fit == UNSURE]
    assert unsure.kl_mean_nats.is_monotonic_increasing and set(blind.precision[blind.fit == FITS]) == {"bf16"}
    untimed = recommend.ranked(replace(study, bs1=study.bs1.iloc[:0]))
    assert len(untimed) == len(study.precisions) and untimed.weights_mib.notna().all()


def test_without_the_baseline_there_is_an_accuracy_and_no_change(tmp_path):
    frame = recommend.candidates(Results.read(Ledger(example.write(tmp_path / "study", precisions=("int8",)))), "bs1")
    assert (frame.accuracy_pct > 40).all() and frame.change_pp.isna().all()
    assert FITS not in set(recommend.choose(frame, Demand("tpot_s", loss_pp=1)).fit)
