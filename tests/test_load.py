"""A study that was measured again and again: a hundred thousand lines, and an answer before one grows impatient."""

from time import process_time

import example
import pytest

from qnb import Study, widget
from qnb.ledger import Line, seal

PATIENCE_S = 3  # of one core, to open it
BESIDE_S = 1  # what the lines may add to anything else


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


def test_a_hundred_thousand_lines_are_opened_in_time_and_cost_little_from_then_on(worn, tmp_path):
    """Each call is timed alone, on a study as it was and as it is now; what is loaded once, the first has loaded."""

    def takes_s(folder):
        took_s = {}

        def timed(name, work):
            started = process_time()
            made = work()
            took_s[name] = process_time() - started
            return made

        study = timed("open", lambda: Study(precisions="study", output=folder))
        timed("figures", lambda: study.figures(pictures=False))
        timed("report", study.report)
        timed("explorer", lambda: widget.explorer(study))
        timed("chooser", lambda: widget.chooser(study))
        return took_s

    fresh = example.write(tmp_path / "study")
    takes_s(fresh)
    before, after = takes_s(fresh), takes_s(worn)
    assert after.pop("open") < PATIENCE_S
    assert max(after[name] - before[name] for name in after) < BESIDE_S, (before, after)
