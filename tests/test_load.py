"""A study that was measured again and again: a hundred thousand lines, and an answer before one grows impatient."""

import json
from time import process_time

import example

from qnb.ledger import Ledger
from qnb.report.results import Results

PATIENCE_S = 8  # of one core


def test_a_hundred_thousand_lines_are_opened_and_read_in_time(tmp_path):
    folder = example.write(tmp_path / "study")
    path = folder / "ledger.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    before = Results.read(Ledger(folder))
    again = [json.dumps(row) for row in rows if row["stage"] in ("perf", "sweep")]
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n".join(again) + "\n") * (100_000 // len(again) + 1))
    started = process_time()
    results = Results.read(Ledger(folder))
    assert process_time() - started < PATIENCE_S
    assert results.bs1.equals(before.bs1) and results.sweep.equals(before.sweep)
