"""Paired comparison against hand counts; intervals against scipy's bootstrap."""

import math

import numpy as np
import pytest
from bench.verdicts import simulate

from qnb.accuracy import statistics
from qnb.accuracy.statistics import compare, detectable_pp, mean_interval


def test_hand_count():
    change = compare([1, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0])
    assert (change.n_items, change.gained, change.lost) == (6, 1, 3)
    assert change.change_pp == pytest.approx(-100 / 3) and change.change_pct == pytest.approx(-50)
    # exact two-sided: twice the binomial tail of min(1, 3) in 4 fair tosses
    assert change.p_mcnemar == pytest.approx(2 * (math.comb(4, 0) + math.comb(4, 1)) / 2**4)
    assert compare([False, False], [True, False]).change_pct is None  # of a baseline of 0


def test_no_flip_leaves_room_for_one():
    """The bootstrap of equal values has no interval; half an item in each of the four cells has."""
    change = compare([True, False] * 50, [True, False] * 50)
    assert (change.p_mcnemar, change.change_pp) == (1, 0)
    assert (change.low_pp, change.high_pp) == pytest.approx((-196 / 102, 196 / 102))
    assert mean_interval([1.0]) is None


def test_holm_means_and_errors_by_hand():
    """Sorted 0.01, 0.02, 0.04 times 3, 2, 1, and never smaller than the one before.

    Half-widths of 3 and 4 below, of 6 and 8 above, add to 5 and 10; the mean halves them. 0 of 10 are 2 of 14 with two
    right and two wrong added.
    """
    assert statistics.holm([0.02, 0.01, 0.04]) == pytest.approx([0.04, 0.03, 0.04])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0] and statistics.holm([]) == []
    assert statistics.mean_of_independent([(1, -2, 7), (3, -1, 11)]) == pytest.approx((2, -0.5, 7))
    assert statistics.agresti_coull(0, 10) == pytest.approx(math.sqrt(2 / 14 * 12 / 14 / 14))


@pytest.mark.parametrize("sizes", [(60,), (40, 15), (30, 80, 20)])
def test_the_bootstrap_is_scipys(sizes, monkeypatch):
    """The same method over the same strata; the draws differ, so the ends may by a fraction of a standard error."""
    from scipy.stats import bootstrap

    monkeypatch.setattr(statistics, "RESAMPLES", 20_000)
    draw = np.random.default_rng(1)
    strata = [draw.exponential(size=size) + place for place, size in enumerate(sizes)]

    def mean_of_means(*parts, axis):
        return sum(part.mean(axis) for part in parts) / len(parts)

    theirs = bootstrap(strata, mean_of_means, n_resamples=20_000, method="BCa", vectorized=True, rng=draw)
    low, high = mean_interval(*strata)
    ends = theirs.confidence_interval
    assert (low, high) == pytest.approx((ends.low, ends.high), abs=0.15 * theirs.standard_error)


@pytest.mark.parametrize(
    ("n_items", "gained", "margin_pp"),
    [([40] * 5, 0.0, 1), ([40] * 5, 0.03, 5), ([200], 0.0, 1), ([200], 0.005, 5), ([1000] * 3, 0.0, 2),
     ([1172, 2376, 1000, 5000, 40], 0.0, 5)],
)  # fmt: skip
def test_a_loss_of_exactly_the_margin_is_rarely_called_within_it_or_more(n_items, gained, margin_pp):
    """4 % of 600 studies, whose own error is 0.8 points; tests/bench/verdicts.py takes more of both."""
    low, high = simulate(n_items, gained, gained + margin_pp / 100, 600)
    assert (low > -margin_pp).mean() <= 0.04 and (high < -margin_pp).mean() <= 0.04


@pytest.mark.parametrize(("n_items", "flips"), [([40] * 5, 0.2), ([12] * 5, 0.1), ([1000, 40, 400], 0.05)])
def test_the_predicted_power_is_had(n_items, flips):
    change = detectable_pp(n_items, flips) / 100
    rate = max(flips, change)
    _, high = simulate(n_items, (rate - change) / 2, (rate + change) / 2, 1000)
    assert 0.78 <= (high < 0).mean() <= 0.93  # more where there are few items


def test_what_few_items_detect_falls_with_their_root_and_nothing_detects_nothing():
    """For large samples it is (1.96 + 0.84) sqrt(flips / n), as arXiv 2605.28873 has it."""
    assert detectable_pp([10_000], 0.1) == pytest.approx(100 * 2.8 * math.sqrt(0.1 / 10_000), abs=0.1)
    assert detectable_pp([1], 0.1) is None


def test_recovery_is_of_what_is_above_chance():
    """From 75 to 65 % right of four choices: 40 of 50 points are kept."""
    change = compare([1] * 75 + [0] * 25, [1] * 65 + [0] * 35)
    share, low, high = statistics.recovery(change, 0.25)
    assert share == pytest.approx(80) and low < 80 < high
    assert statistics.recovery(compare([1, 0] * 50, [1, 0] * 50), 0.25)[1] < 100  # no flip is no proof


def test_guessing_is_not_above_chance():
    assert not statistics.is_above_chance(11 / 40, 40, 0.25) and statistics.is_above_chance(30 / 40, 40, 0.25)
    assert not statistics.is_above_chance(0, 40, 0.01)
