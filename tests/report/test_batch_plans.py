"""Plans of batches against hand counts."""

from dataclasses import asdict
from types import SimpleNamespace

import pandas as pd
import pytest

from qnb.errors import InputError
from qnb.report.batch_plans import COLUMNS, MemoryLine, fit_line, plan_batches, plans
from qnb.speed.batch_search import Probe


def plan(lengths, counts, window=None, **readings):
    """Plan prompts of searches by format, whose rows had 8 + 2 tokens, in 220 MiB."""
    about = {"engine": "eager", "limit_mib": 220.0, "prompt_tokens": 8, "new_tokens": 2}
    searches = [
        {**about, "precision": name, "probes": [asdict(Probe(size, True, mib)) for size, mib in rows]}
        for name, rows in readings.items()
    ]
    prompts = {"prompt_source": "sample", "lengths": lengths, "counts": counts, "window": window}
    return plans(SimpleNamespace(batches=pd.DataFrame(searches), lengths=pd.DataFrame([prompts])))


def test_the_largest_batch_follows_the_longest_prompt_not_their_number():
    """A row of 8 + 2 tokens takes 10 MiB beside 100: 12 of them in 220 MiB, and 6 of 18 + 2."""
    table = plan([8, 2, 8, 2] * 6 + [18], [4, 24, 25], bf16=[(1, 110.0), (8, 180.0)]).set_index(["n_prompts", "order"])
    assert all(sizes.tolist() == [12, 12, 6] for _, sizes in table.largest_batch.groupby("order"))
    assert table.longest_tokens.groupby("n_prompts").first().tolist() == [8, 8, 18]
    assert table.batches[24].to_dict() == {"unsorted": 2, "bucketed": 2, "sorted": 2}
    assert (table.note == "").all() and table.estimate_error_pct.iloc[0] == pytest.approx(100 * (20 / 70) * (4 / 12))


def test_what_there_is_no_plan_for_says_why():
    clean = [(1, 110.0), (8, 180.0)]
    table = plan([8, 400], [1, 2, 9], 120, bf16=clean, int8=[(1, 110.0), (2, 120.0)], int4=[])
    notes = table.groupby(["precision", "n_prompts"]).note.first()
    assert notes["bf16", 1] == "" and "2 of 2 can be used" in notes["int8", 1] and "0 of 0" in notes["int4", 1]
    assert notes["bf16", 2] == "cut to the context window: 1; sample has no more prompts"
    assert table.longest_tokens[table.precision == "bf16"].unique().tolist() == [8, 118]
    assert "4000 tokens needs more memory" in plan([8, 4000], [1, 2], bf16=clean).note[3]
    assert plan([8], [1]).empty and list(plan([8], [1])) == COLUMNS


def test_the_line_goes_through_the_two_largest_readings_of_their_own():
    """10 MiB a row from 200 MiB on; at 800 MiB half of the 60 rows are beyond the readings, each 10 % more or less."""
    probes = [Probe(1, True, 500.0), Probe(10, True, 300.0), Probe(30, True, 500.0), Probe(50, False),
              Probe(40, True, 550.0, squeezed=True)]  # fmt: skip
    probes = [asdict(probe) for probe in probes]
    assert fit_line(probes, 10, 500) == MemoryLine(free_mib=300, token_mib=1, error_pct=0)  # read at the limit
    assert fit_line(probes, 10, 800).error_pct == pytest.approx(5)
    for too_few in (probes[:1], probes[3:]):
        with pytest.raises(InputError, match=r"no plan: .* \d of \d can be used"):
            fit_line(too_few, 10, 500)


def test_plans_by_hand(monkeypatch):
    monkeypatch.setattr("qnb.report.batch_plans.BUCKET_TOKENS", 4)
    # a token takes 1 MiB, 20 MiB are free: 2 rows of 8 + 2 tokens, 5 of 2 + 2, 4 of 3 + 2
    rows = plan_batches([2, 8, 2, 3, 2, 8, 3], 2, MemoryLine(free_mib=20, token_mib=1, error_pct=0))
    assert [row["batches"] for row in rows] == [4, 3, 3] and {row["largest_batch"] for row in rows} == {2}
    # 2 8 | 2 3 | 2 8 | 3: 41 tokens of 28; 2 2 3 2 | 3 | 8 8: 31; 8 8 | 3 3 2 2 | 2: 30
    assert [row["padding_pct"] for row in rows] == pytest.approx([100 * (1 - 28 / padded) for padded in (41, 31, 30)])
    assert rows[2]["mean_batch"] == pytest.approx(7 / 3)
