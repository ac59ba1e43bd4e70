"""Timed generation: the tokens of stock generate, times that add up, and a batch search that runs real batches."""

import pytest
import torch

from qnb import model
from qnb.benchmark import largest_batch, run
from qnb.decode import ENGINES
from qnb.error import InputError
from qnb.precision import PRECISIONS
from qnb.workload import load


@pytest.fixture(scope="module")
def network(checkpoint):
    folder, _ = checkpoint("int4")
    return model.load(folder, PRECISIONS["int4"], "cpu")


@pytest.fixture(scope="module")
def prompts(source):
    return load(model.load_tokenizer(source.path), "sample", 3, 12, 4)


def test_eager_gives_the_tokens_of_stock_generate(network, prompts):
    ids = torch.tensor([prompts.prompts[0]])
    stock = network.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
    )
    ours = ENGINES["eager"](network, [prompts.prompts[0]], 4)
    assert ours[0, -4:].tolist() == stock[0, -4:].tolist()


def test_a_run_counts_every_request_and_its_times_add_up(network, prompts):
    timed = run(network, prompts, batch_size=2)
    assert (timed.requests, timed.new_tokens, timed.prompt_tokens) == (3, 4, 12)
    assert len(timed.batch_s) == 2 and sum(timed.batch_s) == pytest.approx(timed.total_s)
    assert timed.throughput_rps == pytest.approx(3 / timed.total_s)
    assert timed.throughput_tps == pytest.approx(12 / timed.total_s)
    assert timed.seconds_per_request == pytest.approx(timed.total_s / 3)
    assert timed.usage.source == "process" and timed.memory_mib > 100


def test_the_search_runs_batches_until_the_cap(network, prompts):
    found = largest_batch(network, prompts, 1e6, 3)
    assert found.batch_size == 3 and found.capped and [probe.batch_size for probe in found.probes][-1] == 3


def test_no_room_for_one_request_is_an_error(network, prompts):
    with pytest.raises(InputError, match="one request takes"):
        largest_batch(network, prompts, 1.0, 3)
