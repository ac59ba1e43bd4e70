"""Paired comparison against hand counts and statsmodels' definition of the exact McNemar test."""

import math

import pytest

from qnb.stats import compare


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
    with pytest.raises(ValueError, match="at least one item"):
        compare([], [])
