"""The budget of a sitting: what each notebook may take of what is left."""

import pytest

from qnb.budget import PLANNED_PART, SHARES, Clock, allowed_s, describe
from qnb.provenance import NOTEBOOKS

PLANNED_S = 60 * 25 * PLANNED_PART


def test_a_notebook_that_is_opened_alone_has_its_share():
    assert PLANNED_PART < 1 and allowed_s(25, "03", {}) == pytest.approx(60 * 25 * SHARES["03"])
    assert Clock().left_s == float("inf")
    for number, share in SHARES.items():  # as its header says
        (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
        assert f"{25 * share + 0.01:.0f} of the 25 minutes" in path.read_text(encoding="utf-8")


def test_what_one_leaves_goes_to_those_after_it_and_what_it_takes_too_much_they_lack():
    for taken_s in (10.0, 400.0):
        taken = {"01": taken_s}
        rest = [allowed_s(25, number, taken) for number in ("02", "03", "04")]
        assert sum(rest) == pytest.approx(PLANNED_S - taken_s)
        taken["02"] = 60.0  # it may go on with the rest of its own
        assert allowed_s(25, "02", taken) == pytest.approx(rest[0] - 60)
    assert allowed_s(25, "04", {number: PLANNED_S / 3 for number in ("01", "02", "03")}) == pytest.approx(0, abs=1e-6)


def test_the_card_says_what_was_taken_and_what_may_be():
    assert describe(25, {"01": 90.0}).startswith("25 minutes in all: 01 took 1.5, 02 may take ")
