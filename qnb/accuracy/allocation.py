"""Share a time budget between tasks, so that their mean is known as exactly as it can be.

The variance of a mean over tasks is least where each task's items go with their standard deviation over the square
root of their cost: Neyman's allocation with costs (Cochran 1977, section 5.5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pace:
    """What a task's items cost, and how much one tells."""

    task: str
    n_total: int  # items that may be asked
    item_s: float  # of one item, all formats together
    deviation: float  # standard deviation of an item's score
    is_generated: bool = False


def allocate(paces: Sequence[Pace], seconds: float, generated_s: float) -> dict[str, int]:
    """Return how many items of each task to ask, at most all, and 0 where there is no time.

    Parameters
    ----------
    paces
        The tasks.
    seconds
        The time for all tasks together.
    generated_s
        The most of it for those whose answers are generated.
    """
    items = _fill(paces, seconds)
    generated = [pace for pace in paces if pace.is_generated]
    if sum(items[pace.task] * pace.item_s for pace in generated) > generated_s:
        choices = [pace for pace in paces if not pace.is_generated]
        items = _fill(generated, generated_s) | _fill(choices, seconds - max(generated_s, 0.0))
    return {task: int(count + 1e-9) for task, count in items.items()}


def _fill(paces: Iterable[Pace], seconds: float) -> dict[str, float]:
    """Return Neyman's items of each task; what a task with too few of them leaves over goes to the others."""
    items: dict[str, float] = {}
    sampled = list(paces)
    while sampled:
        scale = max(seconds, 0.0) / sum(pace.deviation * math.sqrt(pace.item_s) for pace in sampled)
        full = [pace for pace in sampled if scale * pace.deviation / math.sqrt(pace.item_s) >= pace.n_total]
        for pace in full or sampled:
            items[pace.task] = pace.n_total if full else scale * pace.deviation / math.sqrt(pace.item_s)
        seconds -= sum(pace.n_total * pace.item_s for pace in full)
        sampled = [pace for pace in sampled if pace.task not in items]
    return items
