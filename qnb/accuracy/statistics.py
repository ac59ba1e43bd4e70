"""Is a change in accuracy real? The same items were asked twice, so the test is paired.

Only items answered rightly by one precision and wrongly by the other carry information (McNemar 1947). Two unpaired
binomial intervals, the usual comparison, throw the pairing away and see far less. Many comparisons in one table find
something by chance alone: Holm's correction (1979) keeps that chance at 5 % for the whole table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 2000
CHUNK = 4_000_000  # resampled values held at once


@dataclass(frozen=True, slots=True)
class Change:
    """One precision against the baseline on the same items."""

    items: int
    baseline: float  # accuracy, 0..1
    accuracy: float
    gained: int  # wrong before, right now
    lost: int  # right before, wrong now
    p_value: float  # exact two-sided McNemar test of gained against lost
    low_pp: float  # 95 % interval of the change in points
    high_pp: float

    @property
    def change_pp(self) -> float:
        """Change in percentage points."""
        return (self.accuracy - self.baseline) * 100

    @property
    def change_pct(self) -> float | None:
        """Change relative to the baseline in percent, as in Table 2; None where the baseline is 0."""
        return (self.accuracy / self.baseline - 1) * 100 if self.baseline else None


def compare(baseline: Sequence[bool], other: Sequence[bool]) -> Change:
    """Compare two precisions' right and wrong answers, item by item.

    Parameters
    ----------
    baseline, other
        Whether each item was answered rightly, in the same order.

    Raises
    ------
    ValueError
        The two are of different lengths, or empty.
    """
    import numpy as np
    from scipy.stats import binomtest  # takes a second to import, and most notebooks compare nothing

    if len(baseline) != len(other) or not len(baseline):
        raise ValueError(f"{len(baseline)} and {len(other)} items; give the same ones twice, at least one")
    before, now = np.asarray(baseline, bool), np.asarray(other, bool)  # (n,)
    gained, lost = int((now & ~before).sum()), int((before & ~now).sum())
    interval = mean_interval(100 * (now.astype(float) - before))
    low_pp, high_pp = interval or agresti_min(gained, lost, len(before))  # where items flipped alike, or none did
    return Change(
        items=len(before),
        baseline=float(before.mean()),
        accuracy=float(now.mean()),
        gained=gained,
        lost=lost,
        p_value=float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
        low_pp=low_pp,
        high_pp=high_pp,
    )


def mean_of_independent(changes: Iterable[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Return the mean of independent changes and its interval, from each change with the ends of its own.

    Distances from a change to an end add as standard errors do, in squares, on either side by itself.
    """
    every = list(changes)
    mean = sum(change for change, _, _ in every) / len(every)
    below = math.hypot(*(change - low for change, low, _ in every)) / len(every)
    above = math.hypot(*(high - change for change, _, high in every)) / len(every)
    return mean, mean - below, mean + above


def mean_interval(*strata: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean, by the bias-corrected accelerated bootstrap (Efron 1987).

    None where it is not defined: no values, or none that differ. ``scipy.stats.bootstrap`` gives the same, but leaves
    every value out in turn, which for the 14,042 items of MMLU takes seconds; a mean's jackknife is known.

    Parameters
    ----------
    strata
        Values (n,), resampled; of several lists each is resampled by itself, and the mean is that of their means.
    """
    import numpy as np
    from scipy.special import ndtr, ndtri

    draw, data = np.random.default_rng(0), [np.asarray(values, float) for values in strata]
    off = [(values - values.mean()) / len(data) for values in data if len(values)]
    spread = sum(float((one**2).sum()) / len(one) ** 2 for one in off)
    if len(off) < len(data) or not spread:
        return None
    estimate = sum(values.mean() for values in data) / len(data)
    means = np.zeros(RESAMPLES)
    for values in data:
        at = max(1, CHUNK // len(values))
        for start in range(0, RESAMPLES, at):
            rows = draw.integers(0, len(values), (min(at, RESAMPLES - start), len(values)))  # (r, n)
            means[start : start + at] += values[rows].mean(1) / len(data)
    below = ((means < estimate).mean() + (means <= estimate).mean()) / 2
    if not 0 < below < 1:
        return None
    bias, z = ndtri(below), ndtri([0.025, 0.975])
    skew = sum(float((one**3).sum()) / len(one) ** 3 for one in off) / (6 * spread**1.5)
    low, high = np.quantile(means, ndtr(bias + (bias + z) / (1 - skew * (bias + z))))
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for being several, in the order given (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, most = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = most
    return corrected


def agresti_coull(right: int, items: int) -> float:
    """Return a standard error of a share that is not 0 when all are right or all wrong.

    Two right and two wrong answers are added before the binomial formula (Agresti and Coull 1998).
    """
    share = (right + 2) / (items + 4)
    return math.sqrt(share * (1 - share) / (items + 4))


def agresti_min(gained: int, lost: int, items: int) -> tuple[float, float]:
    """Return the 95 % interval in points of a paired change, from how many items flipped each way.

    Half an item is added to each of the four cells before Wald's formula (Agresti and Min 2005), so the interval is
    not empty where nothing flipped.
    """
    total, difference = items + 2, gained - lost
    error = math.sqrt(gained + lost + 1 - difference**2 / total) / total
    return 100 * (difference / total - 1.96 * error), 100 * (difference / total + 1.96 * error)
