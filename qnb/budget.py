"""Share one budget of minutes among the notebooks; `qnb.accuracy.evaluate` and `qnb.speed.plan` plan what fits.

The budget is for the whole sitting, by the clock: loading and compiling count. Each notebook gets its share of the
time that is left. What an earlier one did not need goes to the later ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from qnb.session import Session

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


def name_left_out(session: Session, what: str, is_left_out: Mapping[str, bool]) -> None:
    """Say and record what there is no time for; what an earlier run left out is taken back where this one did not."""
    names = [name for name, is_late in is_left_out.items() if is_late]
    none: dict[str, Any] = {"names": [], "note": ""}
    earlier = next((row for row in session.ledger.rows("left_out") if row["setting"] == what), none)
    why = earlier["note"].rpartition(": ")[2]
    if names:
        why = f"{session.minutes:g} minutes do not suffice; more add it"
        tqdm.write(f"{what}: none of {', '.join(names)}: {why}")
    names = [*(name for name in earlier["names"] if name not in is_left_out), *names]
    note = f"none of {', '.join(names)}: {why}" if names else ""
    if note != earlier["note"]:
        session.append(session.key("left_out", setting=what), {"names": names, "note": note})
