"""Is a change in accuracy real, and is it small enough? Both formats answer the same items, so all tests are paired.

Only items that one format answers rightly and the other wrongly carry information (McNemar 1947). Two unpaired
binomial intervals, the usual comparison, ignore the pairing and see far less. Many comparisons in one table find
something by chance alone. Holm's correction (1979) keeps that chance at 5 % for the whole table.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

RESAMPLES = 2000
LUCKY = 0.01  # a share of right answers that proves nothing
Z95, Z80 = 1.959964, 0.841621  # standard errors: of an interval each way, and to a power of 80 %
CHUNK = 200_000  # resampled values held at once: as many as a cache has room for


@dataclass(frozen=True, slots=True)
class Change:
    """One format against the baseline on the same items."""

    n_items: int
    baseline: float  # accuracy, 0..1
    accuracy: float
    gained: int  # wrong in the baseline, right here
    lost: int  # right in the baseline, wrong here
    p_mcnemar: float  # exact two-sided test of gained against lost
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
    """Compare two formats' right and wrong answers, item by item.

    Parameters
    ----------
    baseline, other
        Whether each item is right, in the same order; at least one item.
    """
    from scipy.stats import binomtest  # takes a second to import

    before, now = np.asarray(baseline, bool), np.asarray(other, bool)  # (n,)
    gained, lost = int((now & ~before).sum()), int((before & ~now).sum())
    interval = mean_interval(100 * (now.astype(float) - before))
    low_pp, high_pp = interval or agresti_min(gained, lost, len(before))  # all differences may be equal
    return Change(
        n_items=len(before),
        baseline=float(before.mean()),
        accuracy=float(now.mean()),
        gained=gained,
        lost=lost,
        p_mcnemar=float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
        low_pp=low_pp,
        high_pp=high_pp,
    )


def pooled_change(gained: Any, lost: Any, n_items: Any) -> tuple[Any, Any, Any]:
    """Return the mean of the tasks' changes, each weighing the same, and its 95 % interval (low, high), in points.

    The variance is that of Bonett and Price (2012): one gained and one lost answer are added to each task, so that
    few items without a flip prove nothing. As in Wilson's interval (1927) it is the variance at the interval's end
    that counts. A change that grows by u through more losses, or by half through fewer gains, adds between nothing
    and u to it: half of u is taken. In simulation (tests/bench/verdicts.py) an end misses the truth in at most 3.3 %
    of studies, also with 40 items a task and few flips, where resampling misses it in up to 14 %.

    Parameters
    ----------
    gained, lost
        Items a task that are right here and wrong in the baseline, and the reverse, (..., tasks).
    n_items
        Items a task, (tasks).
    """
    gained, lost, n_items = np.asarray(gained), np.asarray(lost), np.asarray(n_items)
    tasks, smoothed = len(n_items), n_items + 2
    flips, shift = (gained + lost + 2) / smoothed, (gained - lost) / smoothed  # (..., tasks)
    variance = ((flips - shift**2) / smoothed).sum(-1) / tasks**2
    growth = (1 / smoothed).sum() / tasks**2 / 2  # of the variance, for each unit that the change moves
    half = (Z95**2 * growth + np.sqrt(Z95**4 * growth**2 + 4 * Z95**2 * variance)) / 2
    mean = ((gained - lost) / n_items).mean(-1)
    return 100 * mean, 100 * (mean - half), 100 * (mean + half)


def detectable_pp(n_items: Sequence[int], flip_rate: float) -> float | None:
    """Return the smallest mean change in points that a study tells from none with a power of about 80 %.

    The mean, 0.84 of its standard errors below, still has an interval of `pooled_change` that leaves out 0
    (arXiv 2605.28873).

    Parameters
    ----------
    n_items
        Items a task, (tasks).
    flip_rate
        The share of items that turn from right to wrong or back; raised to the change where that is more.

    Returns
    -------
        None where even a change of 100 points would be missed.
    """
    counts, change = np.asarray(n_items), 0.0
    for _ in range(60):  # each halves the distance to the change that is looked for
        flips = max(flip_rate, change)
        _, _, high_pp = pooled_change(counts * (flips - change) / 2, counts * (flips + change) / 2, counts)
        variance = ((flips - change**2) / counts).sum() / len(counts) ** 2
        change = min(1.0, change + (high_pp / 100 + Z80 * math.sqrt(max(variance, 0.0))) / 2)
    return 100 * change if change < 1 else None


def recovery(change: Change, chance: float) -> tuple[float, float, float]:
    """Return how much of the baseline's accuracy above chance is kept, in percent, and its 95 % interval.

    The uncertainties of the change and of the baseline are added in squares. The delta method's covariance is left
    out, which makes the interval a little wide. Ask `is_above_chance` first.
    """
    above = change.baseline - chance
    ratio = 1 + change.change_pp / 100 / above
    _, low_pp, high_pp = pooled_change([change.gained], [change.lost], [change.n_items])
    half_baseline = Z95 * math.sqrt(change.baseline * (1 - change.baseline) / change.n_items)
    half = math.hypot((high_pp - low_pp) / 200, (1 - ratio) * half_baseline) / above
    return 100 * ratio, 100 * (ratio - half), 100 * (ratio + half)


def is_above_chance(accuracy: float, n_items: int, chance: float) -> bool:
    """Return whether an accuracy (0..1) is more than guessing gives, by a one-sided exact binomial test at 5 %.

    Answers that are written, not chosen, have a chance of 0: there `LUCKY` stands for it.
    """
    from scipy.stats import binomtest

    n_correct = round(accuracy * n_items)
    return float(binomtest(n_correct, int(n_items), max(chance, LUCKY), alternative="greater").pvalue) < 0.05


def mean_of_independent(changes: Iterable[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Return the mean of independent changes and its interval, from (change, low, high) of each.

    Distances from a change to an end add in squares, as standard errors do, on each side by itself.
    """
    estimates = list(changes)
    mean = sum(change for change, _, _ in estimates) / len(estimates)
    below = math.hypot(*(change - low for change, low, _ in estimates)) / len(estimates)
    above = math.hypot(*(high - change for change, _, high in estimates)) / len(estimates)
    return mean, mean - below, mean + above


def mean_interval(*strata: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean, by the bias-corrected accelerated bootstrap (Efron 1987).

    None where it is not defined: there are no values, or none that differ. ``scipy.stats.bootstrap`` gives the same
    interval, but its jackknife takes seconds for the 14,042 items of MMLU; that of a mean has a closed form.

    Parameters
    ----------
    strata
        Values (n,). Of several lists each is resampled by itself, and the mean is that of their means.
    """
    from scipy.special import ndtr, ndtri

    data = [np.asarray(values, float) for values in strata]
    deviations = [(values - values.mean()) / len(data) for values in data if len(values)]
    variance = sum(float((values**2).sum()) / len(values) ** 2 for values in deviations)
    if len(deviations) < len(data) or not variance:
        return None
    estimate = sum(values.mean() for values in data) / len(data)
    means = _resampled_means(data)
    below = ((means < estimate).mean() + (means <= estimate).mean()) / 2
    if not 0 < below < 1:
        return None
    bias, z = ndtri(below), ndtri([0.025, 0.975])
    acceleration = sum(float((values**3).sum()) / len(values) ** 3 for values in deviations) / (6 * variance**1.5)
    low, high = np.quantile(means, ndtr(bias + (bias + z) / (1 - acceleration * (bias + z))))
    return float(low), float(high)


def _resampled_means(data: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean of the strata's means for each of `RESAMPLES` resamples, (RESAMPLES,)."""
    generator, means = np.random.default_rng(0), np.zeros(RESAMPLES)
    for values in data:
        size = max(1, CHUNK // len(values))
        for start in range(0, RESAMPLES, size):
            shape = (min(size, RESAMPLES - start), len(values))
            rows = generator.integers(0, len(values), shape)  # (r, n)
            means[start : start + size] += values[rows].mean(1) / len(data)
    return means


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for being several, in the order given (Holm 1979)."""
    order = np.argsort(p_values)
    scaled = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    corrected = np.minimum(1, np.maximum.accumulate(scaled))
    return [float(corrected[rank]) for rank in np.argsort(order)]


def agresti_coull(n_correct: int, n_items: int) -> float:
    """Return a standard error of a share that is not 0 when all items are right or all wrong.

    Two right and two wrong items are added before the binomial formula (Agresti and Coull 1998).
    """
    share = (n_correct + 2) / (n_items + 4)
    return math.sqrt(share * (1 - share) / (n_items + 4))


def agresti_min(gained: int, lost: int, n_items: int) -> tuple[float, float]:
    """Return the 95 % interval in points of a paired change, from how many items flipped each way.

    Half an item is added to each of the four cells before Wald's formula (Agresti and Min 2005), so the interval is
    not empty where nothing flipped. It takes 1.96, not `Z95`: Table 2's last digits, as they are kept, depend on it.
    """
    total, difference = n_items + 2, gained - lost
    error = math.sqrt(gained + lost + 1 - difference**2 / total) / total
    return 100 * (difference / total - 1.96 * error), 100 * (difference / total + 1.96 * error)


# Choices


def choice_probabilities(loglikelihoods: Sequence[float]) -> list[float]:
    """Return the probability of each choice among all of them: the paper's p(y_i)."""
    largest = max(loglikelihoods)
    weights = [math.exp(value - largest) for value in loglikelihoods]
    total = sum(weights)
    return [weight / total for weight in weights]


def pack(items: pd.DataFrame) -> pd.DataFrame:
    """Return items as their file has them: log-likelihoods in single precision, and nothing that follows from them."""
    if "loglikelihoods" not in items:
        return items
    singles = items.loglikelihoods.map(lambda values: np.asarray(values, np.float32), na_action="ignore")
    return items.assign(loglikelihoods=singles, has_gold=items.p_correct.notna()).drop(columns="p_correct")


def unpack(items: pd.DataFrame) -> pd.DataFrame:
    """Return a file's items with p_correct, the probability of the right choices; missing where none is known."""
    if "has_gold" not in items:
        return items
    right = [
        sum(map(choice_probabilities(row.loglikelihoods).__getitem__, map(int, row.gold.split(", "))))
        if row.has_gold else None
        for row in items.itertuples()
    ]  # fmt: skip
    return items.assign(p_correct=pd.Series(right, items.index, dtype=float))
