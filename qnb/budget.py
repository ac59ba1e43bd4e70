"""Share one budget of minutes among the notebooks; `qnb.accuracy.evaluate` and `qnb.speed.plan` plan what fits.

The budget is for the whole sitting, by the clock: loading and compiling count. Each notebook gets its share of the
time that is left. What an earlier one did not need goes to the later ones.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

# of the minutes, by notebook; the rest is for setting up, fetching and drawing
SHARES = {"01": 0.06, "02": 0.43, "03": 0.15, "04": 0.21}
PLANNED_PART = sum(SHARES.values())


def now_s() -> float:
    """Return the clock that budgets go by, in seconds."""
    return time.perf_counter()


@dataclass(frozen=True)
class Clock:
    """The time that a notebook may still take; without a budget it never runs out."""

    allowed_s: float = math.inf
    started_s: float = field(default_factory=now_s)
    taken_s: float = 0.0  # that it took before

    @property
    def elapsed_s(self) -> float:
        """Seconds since it was started."""
        return now_s() - self.started_s

    @property
    def left_s(self) -> float:
        """Seconds that are left; below 0 where more was taken."""
        return self.allowed_s - self.elapsed_s


def allowed_s(minutes: float, notebook: str, taken_s: Mapping[str, float]) -> float:
    """Return the seconds that a notebook may still take, of a budget of `minutes`.

    Parameters
    ----------
    minutes
        The whole budget.
    notebook
        Its number, such as ``"02"``.
    taken_s
        What the notebooks that have begun took so far, by number.
    """
    others = {number: seconds for number, seconds in taken_s.items() if number != notebook}
    to_come = sum(share for number, share in SHARES.items() if number not in others)
    left_s = 60 * minutes * PLANNED_PART - sum(others.values())
    return left_s * SHARES[notebook] / to_come - taken_s.get(notebook, 0.0)


def describe(minutes: float, taken_s: Mapping[str, float]) -> str:
    """Say in one line what each notebook took, and what those to come may take, in minutes."""
    parts = [
        f"{number} took {taken_s[number] / 60:.1f}" if number in taken_s
        else f"{number} may take {max(0.0, allowed_s(minutes, number, taken_s)) / 60:.1f}"
        for number in SHARES
    ]  # fmt: skip
    return f"{minutes:g} minutes in all: {', '.join(parts)}"
