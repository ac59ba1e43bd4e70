"""The search against simulated memories whose true maximum is known."""

import pytest

from qnb.batch import is_out_of_memory, largest
from qnb.error import InputError


def memory(fixed, row, limit, reads=True):
    def try_batch(batch_size):
        used = fixed + row * batch_size
        return None if used > limit and not reads else used

    return try_batch


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize(
    ("fixed", "row", "limit"), [(2500, 27.3, 15000), (0, 1, 7), (100, 900, 1000), (4900, 3.1, 15360)]
)
def test_finds_the_true_maximum_within_two_percent(fixed, row, limit, reads):
    true = int((limit - fixed) / row)
    found = largest(memory(fixed, row, limit, reads), limit, cap=10**5)
    assert true * 0.98 - 1 <= found.batch_size <= true
    assert len(found.probes) <= 8 and not found.capped
    assert all(probe.fits == (fixed + row * probe.batch_size <= limit) for probe in found.probes)


def test_a_reading_coarser_than_a_row_still_converges():
    stepped = lambda b: 1000 + 256 * (b // 40)  # noqa: E731
    found = largest(stepped, 4000, cap=4096)
    true = max(b for b in range(1, 4097) if stepped(b) <= 4000)
    assert true * 0.98 - 1 <= found.batch_size <= true


def test_the_cap_ends_the_search_and_is_said():
    found = largest(memory(0, 1, 10**6), 10**6, cap=48)
    assert (found.batch_size, found.capped) == (48, True)


def test_one_row_too_many_is_an_error_that_says_what_to_do():
    with pytest.raises(InputError, match="shorten the prompts"):
        largest(memory(500, 100, 550), 550, cap=8)
    with pytest.raises(InputError, match="at least 1"):
        largest(memory(0, 1, 5), 5, cap=0)


def test_three_names_of_out_of_memory_are_recognised():
    import torch

    errors = [
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ]
    assert all(map(is_out_of_memory, errors))
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(KeyError("out of memory"))
