"""A study that was measured again and again: a hundred thousand lines, and an answer before one grows impatient."""

from time import process_time

import example
import pytest

from qnb import Study, widget
from qnb.ledger import Line, seal

PATIENCE_S = 3  # of one core


@pytest.fixture(scope="module")
def worn(tmp_path_factory):
    """The example study, each pass repeated 100 times and all of them measured anew until the ledger is that long."""
    folder = example.write(tmp_path_factory.mktemp("load") / "study")
    path = folder / "ledger.jsonl"
    rows = [Line(line).row for line in path.read_bytes().splitlines(keepends=True)]
    again = [{**row, "repeat": repeat} for row in rows if row["stage"] == "perf" for repeat in range(100)]
    once = b"".join(map(seal, again))
    path.write_bytes(path.read_bytes() + once * (100_000 // len(again) + 1))
    assert path.read_bytes().count(b"\n") > 100_000
    return folder


def test_a_hundred_thousand_lines_are_opened_drawn_and_reported_in_time(worn, studied):
    """Plotly is loaded before, by the example study; each call is timed alone."""
    studied.figures(pictures=False)
    took_s = {}

    def timed(name, work):
        started = process_time()
        made = work()
        took_s[name] = process_time() - started
        return made

    study = timed("open", lambda: Study(precisions="study", output=worn))
    timed("figures", lambda: study.figures(pictures=False))
    timed("report", study.report)
    timed("explorer", lambda: widget.explorer(study))
    timed("chooser", lambda: widget.chooser(study))
    assert max(took_s.values()) < PATIENCE_S, took_s
