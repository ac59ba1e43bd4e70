"""Trials of a batch: what they leave behind, when a batch runs twice, and whether a GPU times what they found."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qnb.memory import MIB, limited, release
from qnb.precision import PRECISIONS
from qnb.prompts import Workload
from qnb.quantize.checkpoint import load
from qnb.speed import batch_trials
from qnb.speed.batch_search import OUT_OF_MEMORY, find_largest_batch
from qnb.speed.batch_trials import Trials
from qnb.speed.benchmark import run
from qnb.speed.engines import FACTORIES

WORK = Workload((tuple(range(10, 22)),), 4, "ramp")


def fake_trials(monkeypatch, device, limit_mib, generate):
    monkeypatch.setitem(FACTORIES, "fake", lambda *_: SimpleNamespace(generate=generate))
    monkeypatch.setattr(batch_trials, "weights_mib", lambda _: None)
    return Trials(SimpleNamespace(device=torch.device(device)), WORK, limit_mib, "fake")


def test_a_trial_that_runs_out_of_memory_keeps_nothing(monkeypatch):
    tensors = []

    def generate(prompts, new_tokens):
        scratch = torch.zeros(len(prompts), 1000)
        tensors.append(weakref.ref(scratch))
        if len(prompts) > 4:
            raise RuntimeError("CUDA error: out of memory")
        if len(prompts) == 3:
            raise RuntimeError("shape mismatch")

    try_batch = fake_trials(monkeypatch, "cpu", 1e6, generate)
    assert tensors  # the warm-up, before any probe
    failed = try_batch(8)
    assert (failed.batch_size, failed.fits, failed.ended) == (8, False, OUT_OF_MEMORY)
    assert try_batch(4).fits and all(tensor() is None for tensor in tensors)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        try_batch(3)


@pytest.mark.parametrize(
    ("reserved_mib", "room_mib", "retries", "times", "fits"),
    [
        (900, 1024, 0, 1, True),
        (900, 1024, 1, 2, False),
        (960, 1024, 0, 2, True),
        (490, 500, 0, 2, True),  # another process has the rest
    ],
)
def test_a_batch_near_the_limit_has_to_fit_twice(reserved_mib, room_mib, retries, times, fits, monkeypatch):
    """What the first run leaves is in pieces. The GPU's counters are simulated."""
    sizes = []

    def generate(prompts, new_tokens):
        sizes.append(len(prompts))
        if sizes.count(7) == 2 and not fits:
            raise torch.cuda.OutOfMemoryError

    for name, value in {
        "memory_allocated": 0, "memory_reserved": 0, "mem_get_info": (room_mib * MIB, 2**30),
        "reset_peak_memory_stats": None, "reset_accumulated_memory_stats": None,
        "memory_stats": {"num_alloc_retries": retries, "reserved_bytes.all.peak": reserved_mib * MIB,
                         "allocated_bytes.all.peak": 0},
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert fake_trials(monkeypatch, "cuda", 1000, generate)(7).fits == fits and sizes.count(7) == times


@pytest.fixture
def allowed_mib():
    """Hold the GPU's allocator to 2 GiB. Each test loads its own model, which is gone when this is over."""
    with limited(torch.cuda.get_device_properties(0).total_memory / MIB, 2048):
        yield 2048
    release()


@pytest.mark.gpu
def test_a_gpus_probes_leave_memory_as_it_was(allowed_mib, source):
    try_batch = Trials(load(source.path, PRECISIONS["fp16"], "cuda"), WORK, allowed_mib)
    release()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    probes = [try_batch(batch_size) for batch_size in (1, 64, 10**6, 1, 64)]
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert [probe.fits for probe in probes] == [True, True, False, True, True] and probes[2].ended == OUT_OF_MEMORY
    assert [probe.reserved_mib for probe in probes[:2]] == [probe.reserved_mib for probe in probes[3:]]
    for probe in probes[:2]:
        assert probe.idle_mib < probe.live_mib <= probe.reserved_mib <= allowed_mib and not probe.squeezed


@pytest.mark.gpu
def test_a_gpus_largest_batch_can_be_timed(allowed_mib, source):
    model = load(source.path, PRECISIONS["fp16"], "cuda")
    largest = find_largest_batch(Trials(model, WORK, allowed_mib), allowed_mib, 10**5)
    assert min(probe.batch_size for probe in largest.probes if not probe.fits) <= 1.02 * largest.batch_size, largest
    twice = replace(WORK, prompts=2 * largest.batch_size * WORK.prompts)
    requests = run(model, twice, largest.batch_size).run.requests
    assert requests and requests % (2 * largest.batch_size) == 0
