"""Share a time budget between tasks, so that their mean is known as exactly as it can be.

The variance of a mean over tasks is least where each task's items go with their standard deviation over the square
root of their cost: Neyman's allocation with costs (Cochran 1977, section 5.5).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pace:
    """What a task's items cost, and how much one tells."""

    task: str
    n_total: int  # items that may be asked
    item_s: float  # of one item, all formats together
    deviation: float  # standard deviation of an item's score
    is_generated: bool = False
    n_least: int = 0  # items that come before any task gets more
    saved_s: float = 0.0  # of its items' time, what answers took that are kept


def allocate(paces: Sequence[Pace], seconds: float, generated_s: float, stretch_s: float = 0.0) -> dict[str, int]:
    """Return how many items of each task to ask, at most all, and 0 where there is no time.

    Parameters
    ----------
    paces
        The tasks.
    seconds
        The time for all tasks together.
    generated_s
        The most of it for those whose answers are generated.
    stretch_s
        More time for all, if it buys every task its least items.
    """
    generated = [pace for pace in paces if pace.is_generated]
    seconds += sum(pace.saved_s for pace in paces)
    generated_s += sum(pace.saved_s for pace in generated)
    least_s = sum(pace.n_least * pace.item_s for pace in paces)
    if seconds < least_s <= seconds + stretch_s:
        seconds = least_s
    items = _fill(paces, seconds)
    if sum(items[pace.task] * pace.item_s for pace in generated) > generated_s:
        choices = [pace for pace in paces if not pace.is_generated]
        items = _fill(generated, generated_s) | _fill(choices, seconds - max(generated_s, 0.0))
    return {task: int(count + 1e-9) for task, count in items.items()}


def _fill(paces: Sequence[Pace], seconds: float) -> dict[str, float]:
    """Return Neyman's items of each task, from its least ones to all; parts of the least where there is no time."""

    def items(scale: float) -> dict[str, float]:
        neyman = {pace: scale * pace.deviation / math.sqrt(pace.item_s) for pace in paces}
        return {pace.task: min(pace.n_total, max(pace.n_least, count)) for pace, count in neyman.items()}

    def cost_s(scale: float) -> float:
        return sum(count * pace.item_s for pace, count in zip(paces, items(scale).values(), strict=True))

    if (least_s := cost_s(0.0)) > seconds:
        return {task: count * max(seconds, 0.0) / least_s if least_s else 0.0 for task, count in items(0.0).items()}
    low, high = 0.0, max((pace.n_total * math.sqrt(pace.item_s) / pace.deviation for pace in paces), default=0.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_s(middle) <= seconds else (low, middle)
    return items(high if cost_s(high) <= seconds else low)
