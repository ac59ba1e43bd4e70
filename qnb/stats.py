"""Is a change in accuracy real? The same items were asked twice, so the test is paired.

Only items answered rightly by one precision and wrongly by the other carry information (McNemar 1947). Two unpaired
binomial intervals, the usual comparison, throw the pairing away and see far less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Change:
    """One precision against the baseline on the same items."""

    items: int
    baseline: float  # accuracy, 0..1
    accuracy: float
    gained: int  # wrong before, right now
    lost: int  # right before, wrong now
    p_value: float  # exact two-sided McNemar test of gained against lost

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
    from scipy.stats import binomtest  # takes a second to import, and most notebooks compare nothing

    pairs = list(zip(map(bool, baseline), map(bool, other), strict=True))
    if not pairs:
        raise ValueError("nothing to compare: give at least one item")
    gained = sum(now and not before for before, now in pairs)
    lost = sum(before and not now for before, now in pairs)
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Change(
        items=len(pairs),
        baseline=sum(before for before, _ in pairs) / len(pairs),
        accuracy=sum(now for _, now in pairs) / len(pairs),
        gained=gained,
        lost=lost,
        p_value=p_value,
    )
