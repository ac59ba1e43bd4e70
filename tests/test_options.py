"""Counts, "auto" and budgets: taken as a number, or refused with what is accepted."""

import pytest

from qnb.errors import InputError
from qnb.options import AUTO, check_count, check_minutes, resolve_count


def test_auto_follows_the_device_and_numbers_are_taken_as_texts_too():
    assert resolve_count("limit", "auto", "cpu") == AUTO["cpu"]["limit"] != AUTO["cuda"]["limit"]
    assert resolve_count("limit", "7", "cpu") == resolve_count("limit", 7, "cuda") == 7
    assert set(AUTO["cpu"]) == set(AUTO["cuda"])


@pytest.mark.parametrize("wrong", [0, -1, "many", 1.5, True, None, "9" * 5000, "١٢", "4 minutes"])
def test_what_is_no_count_is_refused_with_what_is_accepted(wrong):
    with pytest.raises(InputError, match=r"limit is .*; give a whole number of at least 1, or 'all', or 'auto'$"):
        check_count("limit", wrong)


def test_words_stand_for_their_own_parameter_only():
    check_count("limit", "all"), check_count("sweep_batch", 0)
    for name, value in (("sweep_batch", "all"), ("memory_mib", 0), ("bs1_repeats", "auto")):
        with pytest.raises(InputError, match=name):
            check_count(name, value)


@pytest.mark.parametrize("wrong", [-1, float("inf"), float("nan"), "5", True])
def test_a_budget_is_a_number_of_minutes(wrong):
    check_minutes(0), check_minutes(2.5), check_minutes("auto")
    with pytest.raises(InputError, match="minutes is"):
        check_minutes(wrong)
