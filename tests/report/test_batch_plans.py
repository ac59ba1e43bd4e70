"""Plans of batches against hand counts, and against the plans that were kept with a GPU's searches."""

from dataclasses import asdict
from types import SimpleNamespace

import pandas as pd
import pytest

from qnb.errors import InputError
from qnb.prompts import lengths
from qnb.provenance import ROOT
from qnb.quantize.checkpoint import load_tokenizer
from qnb.quantize.sources import save_byte_tokenizer, shape_config
from qnb.report.batch_plans import COLUMNS, MemoryLine, fit_line, plan_batches, plans
from qnb.speed.batch_search import Probe

KEPT = ROOT / "outputs/reference/h100-llama-3.2-1b-shape"


def search(readings, precision="bf16"):
    """Return a row of stage batch: prompts of 8 tokens, 2 new ones, 220 MiB."""
    probes = [asdict(Probe(size, True, reserved_mib)) for size, reserved_mib in readings]
    return {"precision": precision, "engine": "eager", "probes": probes, "limit_mib": 220.0, "prompt_tokens": 8,
            "new_tokens": 2}  # fmt: skip


def plan(searches, prompt_lengths, counts, window=None):
    drawn = {"prompt_source": "sample", "lengths": prompt_lengths, "counts": counts, "window": window}
    return plans(SimpleNamespace(batches=pd.DataFrame(searches), lengths=pd.DataFrame([drawn])))


def test_the_largest_batch_follows_the_longest_prompt_not_their_number():
    """A row of 8 + 2 tokens takes 10 MiB beside 100: 12 of them in 220 MiB, and 6 of 18 + 2."""
    table = plan([search([(1, 110.0), (8, 180.0)])], [8, 2, 8, 2] * 6 + [18], [4, 24, 25])
    table = table.set_index(["n_prompts", "order"])
    assert all(sizes.tolist() == [12, 12, 6] for _, sizes in table.largest_batch.groupby("order"))
    assert table.longest_tokens.groupby("n_prompts").first().tolist() == [8, 8, 18]
    assert table.batches[24].to_dict() == {"unsorted": 2, "bucketed": 2, "sorted": 2}
    assert (table.note == "").all() and table.estimate_error_pct.iloc[0] == pytest.approx(100 * (20 / 70) * (4 / 12))


def test_what_there_is_no_plan_for_says_why():
    searches = [
        search([(1, 110.0), (8, 180.0)]),
        search([(1, 110.0), (2, 120.0)], precision="int8"),
        search([], precision="int4"),
    ]
    table = plan(searches, [8, 400], [1, 2, 9, 20], 120)
    notes = table.groupby(["precision", "n_prompts"]).note.first()
    assert notes["bf16", 1] == "" and "no line: 2 of 2 probes" in notes["int8", 1] and "0 of 0" in notes["int4", 1]
    assert notes["bf16", 2] == "sample has no more prompts; 9 and 20 were asked for; cut to the context window: 1"
    assert table.longest_tokens[table.precision == "bf16"].unique().tolist() == [8, 118]
    wide = plan(searches[:1], [8, 4000], [1, 2])
    assert wide.largest_batch.tolist()[:3] == [12] * 3 and "4000 tokens needs more than 220 MiB" in wide.note[3]


def test_plans_need_a_search_and_prompts():
    no_prompts = SimpleNamespace(batches=pd.DataFrame([search([])]), lengths=pd.DataFrame())
    for table in (plan([], [8], [1]), plans(no_prompts)):
        assert table.empty and list(table) == COLUMNS


def test_the_line_goes_through_the_two_largest_readings_of_their_own():
    squeezed = Probe(40, True, 550.0, squeezed=True)
    probes = [Probe(1, True, 500.0), Probe(10, True, 300.0), Probe(30, True, 500.0), squeezed, Probe(50, False)]
    probes = [asdict(probe) for probe in probes]
    line = fit_line(probes, 12)
    assert line == MemoryLine(200.0, 10.0, 12, rows=30, rise_mib=200.0)
    assert line.estimate_error_pct(500) == 0  # read there
    assert line.estimate_error_pct(800) == pytest.approx(5)  # half of the 60 rows are beyond, each 10 % more or less
    for too_few in (probes[:1], probes[3:]):
        with pytest.raises(InputError, match=r"no line: \d of \d probes"):
            fit_line(too_few, 12)


def test_plans_by_hand(monkeypatch):
    monkeypatch.setattr("qnb.report.batch_plans.BUCKET_TOKENS", 4)
    # a row takes 1 MiB a token, 20 MiB are free: 2 rows of 8 + 2 tokens, 5 of 2 + 2, 4 of 3 + 2
    line = MemoryLine(fixed_mib=100, row_mib=10, row_tokens=10, rows=1, rise_mib=100)
    unsorted, bucketed, by_length = plan_batches([2, 8, 2, 3, 2, 8, 3], 2, line, 120)
    assert {row["largest_batch"] for row in (unsorted, bucketed, by_length)} == {2}
    assert (unsorted["batches"], bucketed["batches"], by_length["batches"]) == (4, 3, 3)
    # 2 8 | 2 3 | 2 8 | 3: 41 tokens of 28; 2 2 3 2 | 3 | 8 8: 31; 8 8 | 3 3 2 2 | 2: 30
    padding = [100 * (1 - 28 / padded) for padded in (41, 31, 30)]
    assert [row["padding_pct"] for row in (unsorted, bucketed, by_length)] == pytest.approx(padding)
    assert by_length["mean_batch"] == pytest.approx(7 / 3)


def test_the_kept_plans_are_those_of_the_kept_searches_and_prompts(hub, tmp_path):
    """`batch_plans.csv`, computed anew from `searches.csv` and WikiText-2's lengths."""
    save_byte_tokenizer(tmp_path)
    tokens = lengths(load_tokenizer(tmp_path), "wikitext", 5000, hub, 0)
    window = shape_config().max_position_embeddings
    drawn = {"prompt_source": "wikitext", "counts": [2000, 5000], "lengths": tokens, "window": window}
    ran = pd.read_csv(KEPT / "searches.csv").query("memory_gib == '15' and fits")
    ran["squeezed"] = ran.squeezed.astype(bool)
    searches = [
        {"precision": precision, "engine": engine, "limit_mib": 15 * 1024.0, "prompt_tokens": 128, "new_tokens": 100,
         "probes": rows[["batch_size", "fits", "reserved_mib", "squeezed"]].to_dict("records")}
        for (precision, engine), rows in ran.groupby(["precision", "engine"], sort=False)
    ]  # fmt: skip
    table = plans(SimpleNamespace(batches=pd.DataFrame(searches), lengths=pd.DataFrame([drawn]))).replace("", None)
    kept = pd.read_csv(KEPT / "batch_plans.csv").rename(columns={"examples": "n_prompts"})
    pd.testing.assert_frame_equal(table.convert_dtypes(), kept.convert_dtypes(), rtol=1e-4, check_dtype=False)
