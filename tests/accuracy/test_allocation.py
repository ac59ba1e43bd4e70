"""Items by task: Neyman's allocation against a search over all of them."""

from itertools import product

import pytest

from qnb.accuracy.allocation import Pace, allocate

PACES = (
    Pace("quick", 30, 1.0, 0.5),
    Pace("slow", 30, 9.0, 0.4),
    Pace("sure", 30, 2.0, 0.1),
    Pace("small", 4, 1.0, 0.5),
)


@pytest.mark.parametrize("seconds", [90, 160, 250])
def test_no_other_allocation_makes_the_mean_over_tasks_more_exact(seconds):
    def variance(items):
        return sum(pace.deviation**2 / count for pace, count in zip(PACES, items, strict=True))

    sizes = (range(1, pace.n_total + 1) for pace in PACES)
    affordable = (
        items
        for items in product(*sizes)
        if sum(n * pace.item_s for n, pace in zip(items, PACES, strict=True)) <= seconds
    )
    best = min(map(variance, affordable))
    items = allocate(PACES, seconds, seconds)
    assert sum(items[pace.task] * pace.item_s for pace in PACES) <= seconds
    assert variance([max(1, items[pace.task]) for pace in PACES]) <= 1.1 * best  # it rounds down


def test_generated_answers_have_no_more_than_their_time():
    """Of 100 s they get 40, which buy 4 items; the choices get all that remain."""
    paces = [Pace("choices", 1000, 1.0, 0.5), Pace("texts", 100, 10.0, 0.5, is_generated=True)]
    assert allocate(paces, 100, 40) == {"choices": 60, "texts": 4}
    assert allocate(paces, 100, -5) == {"choices": 100, "texts": 0}
    assert allocate(paces[1:], 100, 100) == {"texts": 10}
    assert allocate(paces, -5, -5) == {"choices": 0, "texts": 0}
    assert allocate(paces, 1e6, 1e6) == {"choices": 1000, "texts": 100}


@pytest.mark.parametrize(
    ("seconds", "stretch_s", "cheap", "dear"),
    [(125, 0, 25, 25), (125, 125, 50, 50), (200, 40, 40, 40), (260, 0, 60, 50), (480, 0, 160, 80)],
)
def test_all_tasks_have_their_least_items_before_one_gets_more(seconds, stretch_s, cheap, dear):
    """The least ones, 50 of 1 s and 50 of 4 s, take 250 s. More time is taken only where it buys all of them."""
    paces = [Pace("cheap", 1000, 1.0, 0.5, n_least=50), Pace("dear", 1000, 4.0, 0.5, n_least=50)]
    assert allocate(paces, seconds, seconds, stretch_s) == {"cheap": cheap, "dear": dear}
