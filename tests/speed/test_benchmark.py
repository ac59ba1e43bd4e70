"""Timed generation: times that add up, work counted by hand, and bookkeeping that costs only itself."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from transformers import AutoModelForCausalLM as Auto
from transformers import GPT2Config, LlamaConfig, MambaConfig, MistralConfig, MixtralConfig, Qwen3MoeConfig

from qnb.flags import Flag
from qnb.precision import PRECISIONS
from qnb.prompts import Workload, load
from qnb.quantize import checkpoint as checkpoints
from qnb.speed import benchmark, decode_work, device_peaks, monitor
from qnb.speed.benchmark import latency, run
from qnb.speed.decode_work import Work, count_work, trace_kernels
from qnb.speed.device_peaks import DevicePeaks, measure_peaks
from qnb.speed.engines import Decoder
from qnb.speed.monitor import Usage


@pytest.fixture(scope="module")
def model(tiny):
    return tiny[0]


@pytest.fixture(scope="module")
def five(tiny):
    """Two full batches of two, and one prompt more."""
    return load(tiny[1], "sample", 5, 12, 4)


def test_a_run_counts_full_batches_and_its_times_add_up(model, five):
    timed = run(model, five, 2, peaks=DevicePeaks(1e9, {}, flags=(Flag.CPU_SHARED,)))
    row, times_s = timed.run, timed.token_times_s
    assert (row.batch_size, row.requests, row.new_tokens, row.prompt_tokens, row.monitor) == (2, 4, 4, 12, "process")
    assert [len(times) for times in times_s] == [4, 4] and all(0 < times[0] < times[-1] for times in times_s)
    assert row.batch_s == tuple(times[-1] for times in times_s) and sum(row.batch_s) == pytest.approx(row.total_s)
    assert row.duration_s >= row.total_s and len(timed.readings) > 1
    assert row.kernels_per_token is row.peak_allocated_mib is None and row.note == ""
    assert Flag.PEAKS_DISTURBED in row.flags and set(row.flags) <= {Flag.PEAKS_DISTURBED, Flag.CPU_SHARED}


def test_a_gpus_short_workload_is_timed_again_until_its_power_can_be_read(model, five, monkeypatch):
    once = run(model, five, 2).run
    monkeypatch.setattr(
        monitor.Sensor, "monitor", property(lambda self: "nvml", lambda self, value: None), raising=False
    )
    monkeypatch.setattr(benchmark, "WATCHED_S", 20 * once.total_s)
    row = run(model, five, 2).run
    assert row.requests > once.requests and row.requests % once.requests == 0
    assert len(row.batch_s) == row.requests / 2 and row.total_s >= 20 * once.total_s


def test_times_of_tokens_are_reduced_as_by_hand():
    """Two batches of three tokens; the gaps are 1, 3, 2 and 2 s."""
    values = latency([[1, 2, 5], [2, 4, 6]])
    assert values.pop("batch_s") == (5, 6) and values == pytest.approx(
        {"total_s": 11, "ttft_s": 1.5, "tpot_s": 2, "itl_p50_s": 2, "itl_p95_s": 2.85, "itl_p99_s": 2.97}
    )


def test_fewer_prompts_than_a_batch_are_one_batch_and_one_token_has_no_rate(model, five):
    row = run(model, replace(five, new_tokens=1), batch_size=9).run
    assert (row.batch_size, row.requests, len(row.batch_s)) == (5, 5, 1) and row.tpot_s is row.itl_p50_s is None


SHAPE = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


ATTENTION, NORMS, MLP = 32 * (32 + 16 + 16) + 32 * 32, 2 * 32, 3 * 32 * 48  # of a layer; head size 8
EXPERTS = {"num_experts_per_tok": 2, "sliding_window": None, "head_dim": 8}


# a model; numbers of its layers' weights that every token reads; its experts, those of a token, the numbers of one
WEIGHTS = {
    "llama, tied": (LlamaConfig(**SHAPE, tie_word_embeddings=True), ATTENTION + MLP, 1, 1, 0),
    "llama": (LlamaConfig(**SHAPE, tie_word_embeddings=False), ATTENTION + MLP, 1, 1, 0),
    "mixtral": (MixtralConfig(**SHAPE, **EXPERTS, num_local_experts=4), ATTENTION + 4 * 32, 4, 2, MLP),
    "qwen3-moe": (Qwen3MoeConfig(**SHAPE, **EXPERTS, num_experts=8, moe_intermediate_size=16),
                  ATTENTION + 8 * 32, 8, 2, MLP // 3),
}  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_work_is_counted_as_by_hand(kind, batch_size):
    config, layer, n_experts, of_a_token, expert = WEIGHTS[kind]
    model = Auto.from_config(config)
    work, seen = count_work(model, batch_size, 10, 6), 10 + 6 / 2
    head, cache = 100 * 32, 2 * 2 * 8  # numbers
    distinct = n_experts * (1 - (1 - of_a_token / n_experts) ** batch_size)
    rows = 0 if kind == "llama, tied" else 32 * 100 * (1 - 0.99**batch_size)  # of the embedding
    qk_norms = 2 * 8 if "qwen3" in kind else 0
    read = 3 * (layer + distinct * expert + NORMS + qk_norms + batch_size * seen * cache) + head + 32 + rows
    assert work.bytes_per_step == pytest.approx(4 * read)
    products = 3 * (layer + of_a_token * expert) + head
    assert work.flops_by_type == {"float32": pytest.approx(2 * batch_size * (products + 3 * 2 * 32 * seen))}
    assert work.kv_cache_mib == 3 * 4 * batch_size * 16 * cache / 2**20
    assert work.weights_mib == sum(weight.nbytes for weight in model.parameters()) / 2**20
    if kind.startswith("llama"):
        Decoder(model, 1, 4, 4)  # joins weights
        assert count_work(model, batch_size, 10, 6) == work


def test_a_model_that_is_named_after_its_linear_attention_is_counted_like_any_other():
    model = Auto.from_config(LlamaConfig(**SHAPE))
    expected = count_work(model, 1, 8, 2)
    model.__class__ = type("LinearAttentionForCausalLM", (type(model),), {})
    assert count_work(model, 1, 8, 2) == expected


def test_a_window_and_layers_of_other_classes_are_counted():
    """GPT-2 multiplies in Conv1D: 12 hidden^2 a block, the tied head, and attention over 8 + 1 tokens."""
    gpt2 = Auto.from_config(GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    assert count_work(gpt2, 1, 8, 2).flops_by_type == {"float32": 2 * (2 * 12 * 32**2 + 100 * 32) + 4 * 2 * 32 * 9}
    narrow, wide = (Auto.from_config(MistralConfig(**SHAPE, sliding_window=window)) for window in (8, None))
    assert count_work(narrow, 3, 20, 4).bytes_per_step == count_work(wide, 3, 7, 2).bytes_per_step  # 7 + 1 tokens
    assert count_work(narrow, 3, 20, 4).kv_cache_mib == count_work(wide, 3, 6, 2).kv_cache_mib


def test_a_model_without_attention_reads_its_weights_and_reads_and_writes_its_states():
    mamba = Auto.from_config(MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    row = run(mamba, Workload(((1, 2, 3), (4, 5, 6)), 3, "sample"), 2, peaks=DevicePeaks(1e9, {"float32": 1e9})).run
    channels, states = 32, 2 * 32 * (4 + 4)  # of convolution and recurrence, two layers
    products = 2 * (16 * 2 * channels + 4 * channels + channels * (1 + 2 * 4) + channels + channels * 16) + 99 * 16
    assert row.tpot_s > 0 and row.kv_cache_mib is None and row.flops_by_type == {"float32": 2 * 2 * products}
    assert row.bytes_per_step == pytest.approx(row.weights_mib * 2**20 + 4 * 2 * 2 * states)


@pytest.mark.parametrize(("name", "type_name"), [("int4", "float32"), ("nf4", "bfloat16"), ("int8", "int8")])
def test_products_and_bytes_are_those_of_the_layers_own_type(name, type_name, source):
    """int4 multiplies in 32 bit, as load_in_4bit=True alone means it; the head and attention in the model's 16."""
    with checkpoints.quiet():
        model = checkpoints.load(source.path, PRECISIONS[name], "cuda" if torch.cuda.is_available() else "cpu")
        loaded_mib = checkpoints.count_weights(model).total_mib  # some CPUs pack weights closer at the first product
        work, head = count_work(model, 1, 8, 2), model.get_output_embeddings()
    head_flops = 2 * head.in_features * head.out_features
    attention = 4.0 * model.config.num_hidden_layers * model.config.hidden_size * (8 + 2 / 2)
    layers = [one for one in model.modules() if isinstance(one, torch.nn.Linear) and one is not head]
    flops = sum(2 * one.in_features * one.out_features for one in layers)
    expected = Counter({"bfloat16": head_flops + attention}) + Counter({type_name: flops})
    assert work.flops_by_type == expected and work.weights_mib == loaded_mib
    if name == "int8":
        stored = flops / 2 + 4 * sum(one.out_features for one in layers)
    else:  # a block of 64 has a maximum, which some CPUs round to 16 bit
        stored = flops / 2 * (1 / 2 + layers[0].weight.quant_state.absmax.itemsize / 64)
    cache_bytes = 9 * work.kv_cache_mib * 2**20 / 10
    assert work.bytes_per_step == pytest.approx(stored + head_flops + cache_bytes, rel=0.002)


def test_types_are_multiplied_one_after_the_other():
    peaks = DevicePeaks(1e9, {"float32": 1e12, "bfloat16": 4e12})
    mixes = ({"float32": 1e12, "bfloat16": 4e12}, {"float32": 1e12, "int8": 1.0}, None)
    assert [peaks.columns(mix)["peak_flop_per_s"] for mix in mixes] == [5e12 / 2, None, None]  # a second each


def test_what_fails_beside_the_timing_costs_only_itself(model, five, monkeypatch):
    """The process cannot be read, and a layer of another library packs its weight in a way of its own."""
    monkeypatch.setattr(decode_work, "linear_layers", lambda _: [torch.nn.Identity()])
    monkeypatch.setattr(monitor.psutil, "cpu_percent", lambda *_: 1 // 0)
    row = run(model, five, 1, peaks=DevicePeaks()).run
    assert row.total_s > 0 and row.tpot_s > 0 and row.peak_bytes_per_s is row.peak_flop_per_s is None
    assert row.weights_mib is row.bytes_per_step is row.flops_by_type is row.utilization_pct is None


def test_steps_in_the_middle_are_traced_by_their_own_kernels(monkeypatch):
    """Step n has n operations; of 30 new tokens those of steps 11 to 18 are traced. A failure leaves no trace running.

    The trace is of operations on a CPU in place of kernels on a GPU.
    """
    monkeypatch.setattr(decode_work, "ProfilerActivity", SimpleNamespace(CUDA=ProfilerActivity.CPU))
    monkeypatch.setattr(torch.autograd, "DeviceType", SimpleNamespace(CUDA=DeviceType.CPU))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    number, fails_at = torch.ones(1), None

    def generate(prompts, new_tokens, clock):
        for token in range(new_tokens):
            if token == fails_at:
                raise torch.cuda.OutOfMemoryError
            for _ in range(token):
                number.neg_()
            clock.tick()

    trace = partial(trace_kernels, Work(), SimpleNamespace(generate=generate), [], 30, torch.device("cpu"))
    traced = trace()
    assert traced.kernels_per_token == sum(range(11, 19)) / 8 and 0 < traced.kernel_s_per_token < 1
    fails_at = 14
    with pytest.raises(torch.cuda.OutOfMemoryError):
        trace()
    assert not torch.autograd._profiler_enabled()
    monkeypatch.setattr(torch.autograd, "DeviceType", DeviceType)
    fails_at = None
    with pytest.raises(RuntimeError, match="no kernel"):
        trace()


def test_peaks_measured_on_a_busy_machine_say_so(monkeypatch):
    usage = Usage(monitor="process", duration_s=2.0, others_cpu_pct=60.0)
    monkeypatch.setattr(device_peaks, "_fastest_s", lambda work: 1.0)
    monkeypatch.setattr(device_peaks, "Window", lambda sensor: nullcontext(SimpleNamespace(usage=usage)))
    peaks = measure_peaks("cpu")
    assert (peaks.copy_bytes_per_s, peaks.flags) == (2 * 64 * 2**20, (Flag.CPU_SHARED,))
    assert peaks.matmul_flop_per_s["float32"] == 2 * 512**3


def test_a_devices_peaks_are_above_what_a_model_reaches(model, five):
    peaks = measure_peaks("cpu")
    assert peaks.copy_bytes_per_s > 1e8 and peaks.matmul_flop_per_s["float32"] > 1e8 and peaks.idle_power_w is None
    row = run(model, five, 5, peaks=peaks).run
    assert row.bytes_per_step / row.tpot_s < row.peak_bytes_per_s == peaks.copy_bytes_per_s
    assert row.peak_flop_per_s == pytest.approx(peaks.matmul_flop_per_s["float32"])


@pytest.mark.gpu
def test_a_traced_run_on_a_gpu_tells_what_bounds_it(source):
    from qnb.speed.roofline import derived

    network = checkpoints.load(source.path, PRECISIONS["bf16"], "cuda")
    work = load(checkpoints.load_tokenizer(source.path), "sample", 20, 32, 32)
    peaks = measure_peaks("cuda")
    eager, captured = (run(network, work, 1, engine, peaks=peaks).run for engine in ("eager", "cuda_graph"))
    assert derived(asdict(eager))["bound"] == "launch"
    assert eager.kernels_per_token > 2 * captured.kernels_per_token > 100
    assert captured.kernel_s_per_token < 1.2 * captured.tpot_s and captured.tpot_s < eager.tpot_s / 4
    assert eager.peak_allocated_mib > eager.weights_mib
    assert eager.others_cpu_pct is not None and 0 < derived(asdict(captured))["mbu_pct"] < 100
    assert peaks.copy_bytes_per_s > 1e11 and SimpleNamespace(**asdict(captured)).monitor == "nvml"
