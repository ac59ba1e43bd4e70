"""The search against simulated memories and a GPU's kept readings, whose true maximum is known."""

from bisect import bisect_right
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, Phi3Config

from qnb.speed import batch_search
from qnb.speed.batch_search import OUT_OF_MEMORY, LargestBatch, Probe, find_largest_batch


def simulated(limit_mib, takes_mib, idle_mib=0.0):
    """A `TryBatch` on memory that takes `takes_mib(batch)`."""

    def try_batch(batch_size):
        if takes_mib(batch_size) > limit_mib:
            return Probe(batch_size, False, idle_mib=idle_mib, ended=OUT_OF_MEMORY)
        return Probe(batch_size, True, takes_mib(batch_size), idle_mib=idle_mib)

    return try_batch


MIB = st.floats(100, 50_000)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(MIB, MIB, st.floats(0.3, 500), st.sampled_from([1e-6, 2, 20]), st.integers(1, 50_000))
def test_any_memory_that_grows_with_the_batch(weights_mib, room_mib, row_mib, segment_mib, cap):
    """Rows take whole segments, as the allocator takes them from the device."""
    limit_mib = weights_mib + room_mib + 200 * segment_mib

    def takes_mib(batch_size):
        return weights_mib + segment_mib * ceil(row_mib * batch_size / segment_mib)

    try_batch = simulated(limit_mib, takes_mib, weights_mib)
    true = bisect_right(range(1, cap + 1), limit_mib, key=takes_mib)
    if not true:
        with pytest.raises(MemoryError, match="shorten the prompts"):
            find_largest_batch(try_batch, limit_mib, cap)
        return
    largest = find_largest_batch(try_batch, limit_mib, cap)
    assert len(largest.probes) <= batch_search.MAX_PROBES and largest.capped == (largest.batch_size == cap)
    assert largest.batch_size == max(probe.batch_size for probe in largest.probes if probe.fits)
    assert min(0.99 * true, true - 1) <= largest.batch_size <= true


def test_live_tensors_lead_past_where_reserved_memory_meets_the_limit():
    """Short prompts and a cache that grows: reserved says 350 rows, live tensors 1,170, and 754 run."""

    def try_batch(batch_size):
        if batch_size > 754:
            return Probe(batch_size, False, ended=OUT_OF_MEMORY)
        reserved_mib, live_mib = 2400 + 37 * batch_size, 2400 + 11.07 * batch_size
        return Probe(batch_size, True, min(reserved_mib, 15_360), live_mib, reserved_mib > 15_360, 2390)

    assert 0.97 * 754 <= find_largest_batch(try_batch, 15_360, 100_000).batch_size <= 754


def test_a_row_that_nearly_fills_the_memory_is_followed_by_two():
    """The allocator gave memory back for one row, so its reading tells nothing."""
    largest = find_largest_batch(lambda b: Probe(b, b < 2, 900, squeezed=True), 1000, 512)
    assert [probe.batch_size for probe in largest.probes] == [1, 2]


SEARCH = ["memory_gib", "precision", "engine"]
SEARCHES = pd.read_csv(Path(__file__).with_name("searches.csv")).query("took_s.notna()")
# a process that died was not ended by memory
SEARCHES = SEARCHES.groupby(SEARCH).filter(lambda probes: "its process died" not in set(probes.ended))


def replay(ran, limit_mib, most):
    """Search over a GPU's readings, interpolated between the batches that `ran`; more than `most` rows fail."""

    def read(name, batch_size):
        clean = ran[~ran.squeezed.astype(bool)] if name == "reserved_mib" else ran
        sizes, mib = clean.batch_size.to_numpy(), clean[name].to_numpy()
        beyond_mib = max(0, batch_size - sizes[-1]) * (mib[-1] - mib[-2]) / (sizes[-1] - sizes[-2])
        return float(np.interp(batch_size, sizes, mib) + beyond_mib)

    idle_mib = ran.idle_mib.iloc[0]

    def try_batch(batch_size):
        if batch_size > most:
            return Probe(batch_size, False, idle_mib=idle_mib, ended=OUT_OF_MEMORY)
        reserved_mib, live_mib = read("reserved_mib", batch_size), read("live_mib", batch_size)
        squeezed = reserved_mib > limit_mib  # then a GPU read 97 to 100 % of it
        return Probe(batch_size, True, 0.97 * limit_mib if squeezed else reserved_mib, live_mib, squeezed, idle_mib)

    return find_largest_batch(try_batch, limit_mib, 16_384)


@pytest.mark.parametrize("engine", ["eager", "cuda_graph"])
def test_a_gpus_readings_lead_near_the_true_maximum_wherever_it_was(engine):
    """It lies between the last batch to run and the first to fail, or earlier: other readings end there as well."""
    shares, probes = [], []
    for (memory_gib, *_), rows in SEARCHES[SEARCHES.engine == engine].groupby(SEARCH):
        ran = rows[rows.fits].sort_values("batch_size")
        limit_mib = 15 * 1024 if memory_gib == "15" else rows.room_mib.min()
        last = ran.batch_size.max()
        first_to_fail = min(rows[~rows.fits].batch_size, default=last + last // 50)
        for most in (last, (last + first_to_fail - 1) // 2, first_to_fail - 1, int(0.97 * last), int(0.92 * last)):
            largest = replay(ran, limit_mib, most)
            shares.append(largest.batch_size / most)
            probes.append(len(largest.probes))
    assert len(shares) == 5 * 16
    assert np.mean(shares) >= 0.993 and min(shares) >= 0.975 and max(probes) <= batch_search.MAX_PROBES


def test_less_room_than_allowed_is_the_limit():
    try_batch = simulated(5000, lambda b: 1000 + 10 * b, 900)
    largest = find_largest_batch(lambda b: replace(try_batch(b), room_mib=5000), 80_000, 10**5)
    assert largest.limit_mib == 5000 and 396 <= largest.batch_size <= 400


NARROW = {"vocab_size": 9999, "hidden_size": 64, "num_attention_heads": 4, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("config", "widest"),
    [
        (LlamaConfig(**NARROW, intermediate_size=192), 192),
        (Phi3Config(**NARROW, intermediate_size=192), 384),
        (GPT2Config(vocab_size=9999, n_embd=64, n_head=4), 256),
    ],
)
def test_rows_that_32_bits_count_follow_from_the_widest_layer(config, widest):
    """Phi-3 multiplies gate and up in one layer; GPT-2 names no width and multiplies in Conv1D."""
    assert batch_search.int32_rows(config, 256) == (2**31 - 1) // (256 * widest)


def test_a_batch_that_runs_out_of_memory_when_timed_shrinks_by_twice_as_much_each_time():
    largest, sizes = LargestBatch(1000, 1000.0, True, (Probe(1000, True, 990.0),)), []
    for _ in range(6):
        largest = LargestBatch.from_row({**asdict(largest), "stage": "batch"}).smaller()  # by way of the ledger
        sizes.append(largest.batch_size)
    assert sizes == [984, 960, 920, 840, 704, 476]  # 1, 2, 4, 8, 16, 32 % less, rounded down
    assert not largest.capped and [probe.batch_size for probe in largest.probes] == [1000, 1000, *sizes[:-1]]
    assert LargestBatch(2, 1000.0, True, ()).smaller().batch_size == 1
