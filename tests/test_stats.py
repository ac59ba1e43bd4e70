"""Paired comparison against hand counts and statsmodels' definition of the exact McNemar test."""

import math

import pytest

from qnb.stats import agresti_coull, compare, holm, mean_interval


def test_hand_count():
    change = compare([1, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0])
    assert (change.items, change.gained, change.lost) == (6, 1, 3)
    assert change.change_pp == pytest.approx(-100 / 3) and change.change_pct == pytest.approx(-50)
    # exact two-sided: twice the binomial tail of min(1, 3) in 4 fair tosses
    assert change.p_value == pytest.approx(2 * (math.comb(4, 0) + math.comb(4, 1)) / 2**4)


def test_no_discordant_item_is_no_evidence():
    change = compare([True, False], [True, False])
    assert change.p_value == 1 and change.change_pp == 0


def test_a_baseline_of_zero_has_no_relative_change():
    assert compare([False, False], [True, False]).change_pct is None


def test_unequal_or_empty_samples_are_refused():
    with pytest.raises(ValueError):
        compare([True], [True, False])
    with pytest.raises(ValueError, match="at least one"):
        compare([], [])


def test_the_interval_holds_the_change_and_narrows_with_items():
    baseline, other = [True, True, False, True, False, True, True, True] * 10, [True, False, True, True] * 20
    few, many = compare(baseline, other), compare(baseline * 16, other * 16)
    assert few.low_pp < few.change_pp < few.high_pp
    # the normal approximation is close for so many items: 1.96 standard errors each way
    flips = (few.gained + few.lost) / few.items
    error = 100 * math.sqrt((flips - (few.change_pp / 100) ** 2) / many.items)
    assert (many.low_pp, many.high_pp) == pytest.approx(
        (many.change_pp - 1.96 * error, many.change_pp + 1.96 * error), abs=0.15 * error
    )


def test_no_flip_has_no_interval():
    change = compare([True, False], [True, False])
    assert change.low_pp is None and change.high_pp is None
    assert mean_interval([1.0]) is None


def test_holm_by_hand():
    """Sorted 0.01, 0.02, 0.04 times 3, 2, 1, and never smaller than the one before."""
    assert holm([0.02, 0.01, 0.04]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_all_wrong_still_has_an_error():
    """0 of 10: 2 of 14 with two right and two wrong added."""
    assert agresti_coull(0, 10) == pytest.approx(math.sqrt(2 / 14 * 12 / 14 / 14))
