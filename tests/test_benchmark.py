"""Timed generation: the tokens of stock generate, times that add up, and a batch search that runs real batches."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench.monitor import median_interval

from qnb.errors import InputError
from qnb.precision import PRECISIONS
from qnb.prompts import load
from qnb.quantize import checkpoint as model
from qnb.speed import benchmark
from qnb.speed.benchmark import (
    Limits,
    Run,
    Trace,
    Work,
    count_work,
    largest_batch,
    last_steps,
    measure_limits,
    noting,
    run,
    settled,
    twice,
)
from qnb.speed.engines import Eager
from qnb.speed.monitor import Usage


@pytest.fixture(scope="module")
def network(checkpoint):
    folder, _ = checkpoint("int4")
    return model.load(folder, PRECISIONS["int4"], "cpu")


@pytest.fixture(scope="module")
def prompts(source):
    return load(model.load_tokenizer(source.path), "sample", 3, 12, 4)


@pytest.fixture(scope="module")
def five(source):
    """Two full batches of two, and one prompt more."""
    return load(model.load_tokenizer(source.path), "sample", 5, 12, 4)


def test_eager_gives_the_tokens_of_stock_generate(network, prompts):
    ids = torch.tensor([prompts.prompts[0]])
    stock = network.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
    )
    ours = Eager(network).generate([prompts.prompts[0]], 4)
    assert ours[0, -4:].tolist() == stock[0, -4:].tolist()


def test_a_run_counts_the_requests_of_full_batches_and_its_times_add_up(network, five):
    timed = run(network, five, batch_size=2)
    assert (timed.requests, timed.new_tokens, timed.prompt_tokens) == (4, 4, 12)
    assert len(timed.batch_s) == 2 and sum(timed.batch_s) == pytest.approx(timed.total_s)
    assert timed.throughput_rps == pytest.approx(4 / timed.total_s)
    assert timed.throughput_tps == pytest.approx(16 / timed.total_s)
    assert timed.seconds_per_request == pytest.approx(timed.total_s / 4)
    assert timed.usage.source == "process" and timed.memory_mib > 100


def test_fewer_prompts_than_a_batch_are_one_batch(network, prompts):
    timed = run(network, prompts, batch_size=4)
    assert timed.requests == 3 and len(timed.batch_s) == 1


def test_the_search_runs_batches_until_the_cap(network, prompts):
    found = largest_batch(network, prompts, 1e6, 3)
    assert found.batch_size == 3 and found.capped and [probe.batch_size for probe in found.probes][-1] == 3


def test_no_room_for_one_request_is_an_error(network, prompts):
    with pytest.raises(MemoryError, match="one request takes"):
        largest_batch(network, prompts, 1.0, 3)


def test_each_tokens_time_adds_up_to_the_batch(network, five):
    timed = run(network, five, batch_size=2)
    row = timed.row()
    assert [len(times) for times in timed.token_s] == [4, 4]
    for times, batch_s in zip(timed.token_s, timed.batch_s, strict=True):
        assert 0 < times[0] < times[-1] <= batch_s
    assert row["ttft_s"] == pytest.approx(sum(times[0] for times in timed.token_s) / 2)
    steps = [(times[-1] - times[0]) / 3 for times in timed.token_s]
    assert row["tpot_s"] == pytest.approx(sum(steps) / 2) and row["itl_p50_s"] <= row["itl_p95_s"] <= row["itl_p99_s"]
    assert row["latency_p50_s"] == pytest.approx(sum(timed.batch_s) / 2)
    assert len(timed.tokens()) == 8 and {token["requests"] for token in timed.tokens()} == {2}
    assert row["kernels_per_token"] is None and row["note"] == ""
    assert all("other processes" in flag for flag in row["flags"])  # tests run beside each other


def test_work_is_counted_as_by_hand():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    layer = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48  # head size 8
    norms, cache = 3 * 2 * 32 + 32, 3 * 2 * 2 * 8  # numbers
    seen = 10 + 6 / 2
    tied = count_work(LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)), 10, 6, 5)
    assert tied.bytes_per_step == 4 * (3 * layer + norms + 100 * 32 + 5 * seen * cache)
    assert tied.flops_per_step == 2 * 5 * (3 * layer + 100 * 32 + 2 * 3 * 32 * seen)
    assert tied.cache_mib == 4 * 5 * 16 * cache / 2**20 and set(tied.flops) == {"float32"}
    apart = count_work(LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)), 10, 6, 5)
    assert apart.bytes_per_step == tied.bytes_per_step + 4 * 5 * 32  # the rows looked up
    assert apart.weights_mib - tied.weights_mib == pytest.approx(4 * 100 * 32 / 2**20)


def test_products_are_held_against_the_roof_of_their_own_type(network):
    """int4, as load_in_4bit=True alone means it, multiplies in 32 bit; the head and attention do in the model's 16."""
    flops = count_work(network, 8, 2, 1).flops
    head = network.get_output_embeddings()
    config = network.config
    attention = 4.0 * config.num_hidden_layers * config.hidden_size * (8 + 2 / 2)
    assert flops["bfloat16"] == 2 * head.in_features * head.out_features + attention
    assert (
        flops["float32"]
        == 2 * sum(one.in_features * one.out_features for one in network.modules() if isinstance(one, torch.nn.Linear))
        - 2 * head.in_features * head.out_features
    )
    limits = Limits(1e9, {"float32": 1e12, "bfloat16": 4e12}, None)
    assert limits.flop_per_s({"float32": 1e12, "bfloat16": 4e12}) == 5e12 / 2  # a second each
    assert limits.flop_per_s({"float32": 1e12, "int8": 1.0}) is None


def made(step_s, kernel_s=None, read=1e9, computed=1e9, energy_j=None):
    """A run of ten batches of one request, four tokens each."""
    times = tuple(step_s * token for token in range(1, 5))
    return Run(
        engine="eager", batch_size=1, requests=10, prompt_tokens=8, new_tokens=4, total_s=40 * step_s,
        batch_s=(4 * step_s,) * 10, peak_allocated_mib=None, peak_reserved_mib=None,
        usage=Usage("nvml", 9, 2.0, energy_j=energy_j, energy_s=2.0), token_s=(times,) * 10,
        work=Work(1.0, 1.0, read, {"float16": computed}), trace=kernel_s and Trace(kernel_s, 100),
        limits=Limits(1e12, {"float16": 1e14}, 10.0),
    )  # fmt: skip


def test_what_memory_ran_out_of_is_done_once_more():
    asked = []

    def work(fails):
        asked.append(fails)
        if len(asked) <= fails:
            raise torch.cuda.OutOfMemoryError("simulated")
        return len(asked)

    assert twice(lambda: work(1)) == 2
    asked.clear()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        twice(lambda: work(2))
    with pytest.raises(ZeroDivisionError):
        twice(lambda: 1 // 0)


def test_a_further_pass_that_tells_nothing_is_noted_and_ends_nothing():
    def fails(error):
        raise error

    lost = []
    assert noting(lost, "kernels not traced", lambda: 7) == 7 and not lost
    assert noting(lost, "kernels not traced", lambda: None) is None
    assert noting(lost, "kernels not traced", lambda: fails(torch.cuda.OutOfMemoryError("simulated"))) is None
    assert noting(lost, "not compared", lambda: fails(RuntimeError("simulated"))) is None
    assert lost == [
        "kernels not traced: nothing was seen", "kernels not traced: out of memory", "not compared: RuntimeError"
    ]  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        noting(lost, "kernels not traced", lambda: 1 // 0)


def test_what_bounds_a_step_is_named():
    assert made(0.010, kernel_s=0.002).bound == "launch"
    assert made(0.002, kernel_s=0.0018).bound == "bandwidth"
    assert made(0.002, kernel_s=0.0018, computed=1e11).bound == "bandwidth"  # half the bandwidth, half the compute
    assert made(0.002, kernel_s=0.0018, computed=1.5e11).bound == "compute"
    assert made(0.010, kernel_s=0.009).bound == "kernels"  # neither launches nor a roof
    assert made(0.0015).bound == "bandwidth" and made(0.010).bound is None  # far from every roof, and nothing traced


def test_memory_of_a_gpu_is_the_allocators_or_unknown():
    """The device's own reading counts other things: it never stands in for a pass that was not made."""
    device = replace(made(0.01), usage=Usage("nvml", 9, 2.0, peak_memory_mib=900.0), on_gpu=True)
    assert device.memory_mib is None and replace(device, peak_allocated_mib=700.0).memory_mib == 700
    process = Usage("process", 9, 2.0, peak_memory_mib=300.0)
    assert replace(device, usage=process).memory_mib is None  # as where NVML does not know the card
    assert replace(device, usage=process, on_gpu=False).memory_mib == 300


def test_limits_are_the_best_of_what_a_busy_machine_reached(monkeypatch):
    """They are measured again while others are at work, and say so where these never rested."""
    busy = iter([60.0, 60.0, 0.0, 60.0, 60.0, 60.0])
    seen = iter(
        [Limits(2e9, {"int8": 1e9}, None), Limits(3e9, {"int8": 1e8}, None), Limits(1e9, {"int8": 5e8}, None)] * 2
    )
    monkeypatch.setattr(benchmark, "measure_limits", lambda device: next(seen))
    monkeypatch.setattr(benchmark, "Window", lambda *_: nullcontext(SimpleNamespace(
        usage=Usage("process", 9, 2.0, others_pct=next(busy)))))  # fmt: skip
    best = Limits(3e9, {"int8": 1e9}, None, [])
    assert benchmark.undisturbed_limits("cpu") == best
    flagged = benchmark.undisturbed_limits("cpu")
    assert flagged == replace(best, flags=["other processes used 60 % of the CPU"])
    (told,) = replace(made(0.05, energy_j=1.0), limits=flagged).flags
    assert told == "the device's limits were measured on a busy machine"


def test_energy_is_given_whole_and_above_idle():
    row = made(0.05, energy_j=120.0).row()
    assert (row["energy_j_per_request"], row["energy_j_per_token"]) == (12, 3)
    assert (row["energy_above_idle_j_per_request"], row["energy_above_idle_j_per_token"]) == (10, 2.5)
    assert made(0.05).flags == ["too short for the energy counter"]
    assert made(0.05).energy() == {} and made(0.05, energy_j=1.0).flags == []
    short = replace(made(0.05), usage=Usage("nvml", 9, 0.6, energy_s=0.6)).flags
    assert short == ["too short for utilization, power and energy"]
    for usage in (Usage("nvml", 9, 2.0), Usage("nvml", 9, 2.0, energy_s=1.0, missing={"energy_j": 4})):
        flags = replace(made(0.05), usage=usage).flags  # of a device without the counter, and of one that lost it
        assert not any("short" in flag for flag in flags) and ("energy_j" in str(flags)) == bool(usage.missing)


def test_what_fails_beside_the_timing_costs_only_itself(network, prompts, monkeypatch):
    from qnb.speed import benchmark

    def fail(*_):
        raise torch.cuda.OutOfMemoryError("no room for the comparison")

    monkeypatch.setattr(benchmark, "agreement", fail)
    monkeypatch.setitem(benchmark.FACTORIES, "second", lambda model, *_: Eager(model))
    row = run(network, prompts, 1, "second").row()
    assert row["throughput_rps"] > 0 and row["compared_tokens"] is None
    assert "tokens not compared with eager's: out of memory" in row["flags"]


def test_the_medians_interval_is_the_order_statistics_one():
    """Ranks from Conover 1999, table A3: 1 and 6 of 6, 6 and 15 of 20, 40 and 61 of 100."""
    assert median_interval(range(1, 6)) is None
    assert [median_interval(range(1, n + 1)) for n in (6, 20, 100)] == [(1, 6), (6, 15), (40, 61)]


def test_passes_have_settled_when_students_interval_is_narrow():
    """Of 1, 1.01 and 1.02 the standard error is 0.01 / sqrt(3), and t is 4.303: a width of 0.0497."""
    assert settled([1.0, 1.01, 1.02]) and not settled([1.0, 1.0105, 1.021]) and not settled([1.0, 1.0])


def test_the_last_steps_are_timed_by_their_own_kernels():
    """Two steps of two kernels, 1 s each with 0.5 s between, after five of 9 s each."""
    prompt = [(10.0 * n, 10.0 * n + 9) for n in range(5)]
    steps = [(50.0, 51), (51.5, 52.5), (53.0, 54), (54.5, 55.5)]
    assert last_steps(prompt + steps, 4, 2) == Trace(kernel_s=2.0, kernels=2.0)
    assert last_steps(prompt, 0, 8) is None


def test_a_devices_limits_are_above_what_a_model_does(network, prompts):
    found = measure_limits("cpu")
    assert found.copy_bytes_per_s > 1e8 and found.matmul_flop_per_s["float32"] > 1e8 and found.idle_power_w is None
    row = run(network, prompts, batch_size=3, limits=found).row()
    assert row["achieved_bytes_per_s"] < row["limit_bytes_per_s"]
    rates = [found.matmul_flop_per_s[name] for name in ("float32", "bfloat16")]
    assert min(rates) < row["limit_flop_per_s"] < max(rates)  # int4's layers in one, the head in the other


def test_longer_than_the_context_window_is_refused(network, prompts):
    with pytest.raises(InputError, match="context window"):
        run(network, replace(prompts, new_tokens=10**6))


@pytest.mark.gpu
def test_a_traced_run_on_a_gpu_says_what_bounds_it(source):
    network = model.load(source.path, PRECISIONS["bf16"], "cuda")
    work, found = load(model.load_tokenizer(source.path), "sample", 20, 32, 32), measure_limits("cuda")
    eager, cuda_graph = (run(network, work, 1, engine, limits=found) for engine in ("eager", "cuda_graph"))
    assert eager.bound == "launch" and eager.trace.kernels > 2 * cuda_graph.trace.kernels > 100
    assert cuda_graph.trace.kernel_s < 1.2 * cuda_graph.tpot_s and cuda_graph.tpot_s < eager.tpot_s / 4
    assert eager.peak_allocated_mib > eager.work.weights_mib and cuda_graph.agreement.tokens == 32
    assert found.copy_bytes_per_s > 1e11 and 0 < cuda_graph.work.bytes_per_step / cuda_graph.tpot_s < found.copy_bytes_per_s
