"""Engines: greedy whatever a model asks for, with a KV cache, refused where they cannot run, and captured on a GPU."""

import json
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import decode_oracle as oracle
import pytest
import t4
import torch
from bitsandbytes import nn
from decode_oracle import ONE, THREE, decode, decode_forced, decode_stock, tiny_model
from torch._inductor.utils import fresh_cache
from transformers import LlamaConfig, MambaConfig, MambaForCausalLM, MistralConfig

from qnb import device
from qnb.capture import WARM_UP_STEPS, capture
from qnb.errors import InputError
from qnb.finite import NotFiniteError
from qnb.flags import Flag
from qnb.memory import is_out_of_memory, release
from qnb.precision import PRECISIONS
from qnb.prompts import Workload
from qnb.quantize import checkpoint
from qnb.speed import engines
from qnb.speed.benchmark import run
from qnb.speed.engines import Clock, CudaGraph, Decoder, Eager, pad, why_unavailable

SETTINGS = {  # in generation_config.json; tests/quantize has those in config.json
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True},
    "sampling": {"do_sample": True, "temperature": 9.0, "top_k": 3, "typical_p": 0.5},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "suppress_tokens": list(range(99))},
    "lengths": {"max_time": 1e-9, "max_length": 7, "min_length": 60, "forced_eos_token_id": 9},
    "other ways": {"cache_implementation": "static", "prompt_lookup_num_tokens": 3, "guidance_scale": 2.0},
}

CAPTURED = [name for name, each in PRECISIONS.items() if not why_unavailable("cuda_graph", "cuda", each.threshold)]


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_in_a_models_files_do_not_change_what_is_timed(name, tmp_path):
    """The oracle is stock ``generate`` on the same weights, told nothing but to be greedy for 12 tokens."""
    model, read, outputs = tiny_model(LlamaConfig), [], []
    mask = torch.tensor([[0] * (5 - len(prompt)) + [1] * len(prompt) for prompt in THREE])
    stock = model.generate(pad(THREE, model.device)[0], attention_mask=mask, min_new_tokens=12, max_new_tokens=12,
                           do_sample=False)[:, 5:]  # fmt: skip
    model.save_pretrained(tmp_path)
    settings = tmp_path / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | SETTINGS[name]))
    loaded = checkpoint.load(tmp_path, PRECISIONS["fp32"], "cpu")
    own = loaded.generation_config
    loaded.model.layers[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    loaded.register_forward_hook(lambda _, __, output: outputs.append(len(output)))
    assert torch.equal(Eager(loaded).generate(THREE, 12), stock) and read == [5] + 11 * [1]
    assert set(outputs) == {2}  # logits and the cache
    assert torch.equal(decode(Decoder(loaded, 3, 5, 12), THREE, 12), stock) and loaded.generation_config is own
    assert len(set(stock[0].tolist())) < 12, "nothing is repeated that a penalty would stop"


@pytest.mark.parametrize(("dtype", "named"), [("float16", "FP16 overflows"), ("bfloat16", "bfloat16 fails")])
def test_a_model_whose_outputs_are_not_finite_is_not_timed(dtype, named):
    """In float16 the first new token's hidden states overflow; in bfloat16 a weight of the head is infinite."""
    model = tiny_model(LlamaConfig).to(getattr(torch, dtype))
    first = int(Eager(model).generate(ONE, 1))
    assert first not in ONE[0]
    if dtype == "float16":
        model.model.embed_tokens.weight.data[first] *= 1e7
        assert int(engines.generate_checked(model, ONE, 1)) == first
    else:
        model.lm_head.weight.data[3, 3] = torch.inf
    for measure in (lambda: engines.generate_checked(model, ONE, 3), lambda: run(model, Workload(ONE, 3, "ramp"))):
        with pytest.raises(NotFiniteError, match=f"{named} .* of 300 outputs"):
            measure()


def test_an_end_of_sequence_is_barred_as_generate_bars_it():
    model = tiny_model(LlamaConfig)
    model.lm_head.weight.data[7] = 40 * model.lm_head.weight.data[7].sign()  # often the likeliest token
    expected = Eager(model).generate(THREE, 6)
    assert torch.equal(decode(Decoder(model, 3, 5, 6), THREE, 6), expected) and not (expected == 7).any()


def test_cuda_graph_is_refused_without_a_gpu_not_faked():
    with pytest.raises(InputError, match="GPU"):
        CudaGraph(tiny_model(LlamaConfig), 1, 5, 4)
    assert engines.parse("auto", "cpu") == ("eager",) and engines.parse("auto", "cuda") == ("eager", "cuda_graph")
    assert engines.parse("cuda_graph, eager", "cuda") == ("eager", "cuda_graph")  # the one that moves no weights first
    for wrong in ("cuda_graph", "fast", ""):
        with pytest.raises(InputError, match="NVIDIA GPU"):
            engines.parse(wrong, "cpu")


def test_a_model_whose_step_no_graph_can_capture_is_refused():
    def why(model, tokens=0):
        return why_unavailable("cuda_graph", "cuda", model=model, tokens=tokens)

    llama, narrow = tiny_model(LlamaConfig), tiny_model(MistralConfig, sliding_window=8)
    assert why(llama, 64) == why(narrow, 8) == why_unavailable("eager", "cpu", 6.0) == ""
    assert "last 8 tokens" in why(narrow, 9) and "outlier" in why_unavailable("cuda_graph", "cuda", 6.0)
    assert why(MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2)))
    for threshold, reason in ((6.0, "outlier"), (0.0, "")):
        llama.product = nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=threshold)
        assert reason in why(llama) and bool(reason) == bool(why(llama))


def repeat(work, pool):
    """Do work again where a GPU replays what it captured."""
    for _ in range(WARM_UP_STEPS):
        work()
    return SimpleNamespace(replay=work)


@pytest.fixture
def captured_on_a_cpu(monkeypatch):
    """The engine `cuda_graph` with its order of loading, capturing and replaying."""
    monkeypatch.setattr(engines, "capture", repeat)
    monkeypatch.setattr(engines, "why_unavailable", lambda *_, **__: "")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_without_bfloat16_units_a_bfloat16_step_is_not_fused_and_says_so(dtype, captured_on_a_cpu, monkeypatch):
    """The compiler is not even tried. A format in float16 is fused."""
    compiled, model = [], tiny_model(LlamaConfig).to(getattr(torch, dtype))
    monkeypatch.setattr(device, "is_before_ampere", lambda place: True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    row, eager = (run(model, Workload(THREE, 4, "ramp"), 3, engine).run for engine in ("cuda_graph", "eager"))
    assert bool(compiled) == (Flag.UNFUSED not in row.flags) == ("bfloat16" not in row.note) == (dtype == "float16")
    assert Flag.UNFUSED not in eager.flags and eager.note == ""


@pytest.mark.parametrize("captured_tokens", [0, 4096], ids=["prefill launched", "prefill captured"])
def test_batches_of_any_size_follow_each_other_each_token_timed(captured_tokens, captured_on_a_cpu, monkeypatch):
    monkeypatch.setattr(engines, "CAPTURED_PREFILL_TOKENS", captured_tokens)
    monkeypatch.setattr(engines, "COMPILE_OPTIONS", None)
    model = tiny_model(LlamaConfig)
    for begin in (lambda: CudaGraph(model, 1, 5, 60), lambda: Eager(model).generate(ONE, 60)):
        with pytest.raises(InputError, match="context window of 64"):
            begin()
    engine = CudaGraph(model, 3, 6, 8)
    for prompts, new_tokens in ((THREE, 8), (ONE, 3), (THREE, 1), ([[3, 4], [9]], 8), (ONE, 8)):
        expected = Eager(model).generate(prompts, new_tokens)
        for each in (engine, Eager(model)):
            clock = Clock(model.device)
            assert torch.equal(each.generate(prompts, new_tokens, clock), expected)
            times_s = clock.elapsed_s()
            assert len(times_s) == new_tokens and sorted(times_s) == times_s and times_s[0] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("card", [nullcontext, t4.a_t4])
@pytest.mark.parametrize("rows", [3, 12], ids=["few rows", "many rows"])
@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_step_is_as_near_float32_as_eager(name, rows, card, source, monkeypatch):
    """Fed the same tokens, and where its own tokens differ, it was a near tie. On a T4 bf16 asks for no compiler."""
    pytest.importorskip(PRECISIONS[name].library)
    if card is t4.a_t4 and PRECISIONS[name].library == "torchao":
        pytest.skip("a T4 is refused, or captures no int8 in bfloat16")
    texts, results, compiled, compile_one = oracle.tokenized(source), [], [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **more: compiled.append(args) or compile_one(*args, **more))
    with checkpoint.quiet(), card():
        precision = PRECISIONS[name].in_half("float16" if card is t4.a_t4 else "bfloat16")
        model = checkpoint.load(source.path, precision, "cuda")
        exact = oracle.unrounded(model, source.path)
        engine = CudaGraph(model, rows, max(map(len, texts)), 16)
        decoder, step = engine._decoder, engine._decoder.step
        logits = torch.zeros(rows, model.config.vocab_size, dtype=model.dtype, device="cuda")
        decoder.step = lambda batch_size: logits.copy_(step(batch_size))  # captured with the step

        def replay(batch_size):
            engine._runs[batch_size][1]()
            return logits.clone()

        for batch in (texts[first : first + rows] for first in range(0, len(texts), rows)):
            own, tokens = engine.generate(batch, 16), Eager(model).generate(batch, 16)
            theirs, truth = (decode_stock(each, batch, tokens[:, :-1]) for each in (model, exact))
            # where inputs are quantized too, a last digit flips codes, and tokens differ without a tie
            own = tokens if name == "int8-dynamic" else own
            results.append((decode_forced(decoder, batch, tokens[:, :-1], replay), theirs, truth, tokens, own))
    is_fused = card is nullcontext or model.dtype != torch.bfloat16
    assert bool(compiled) == (engine.flags == ()) == (engine.note == "") == is_fused, engine.note
    oracle.assert_differs_by_rounding(*map(torch.cat, zip(*results, strict=True)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CAPTURED if PRECISIONS[name].library != "torchao"])
def test_every_kernel_of_a_step_compiles_for_a_t4_and_fits_its_64_kib_of_shared_memory(name, source):
    pytest.importorskip(PRECISIONS[name].library)
    with fresh_cache(), t4.a_t4(), checkpoint.quiet():
        model = checkpoint.load(source.path, PRECISIONS[name].in_half("float16"), "cuda")
        for rows in (1, 16):
            CudaGraph(model, rows, 16, 4).generate([range(5, 21)] * rows, 4)
        shared_bytes = t4.shared_bytes()
        assert bool(shared_bytes) == (model.dtype != torch.bfloat16)
        assert all(each <= t4.SHARED_BYTES for each in shared_bytes)


@pytest.mark.gpu
def test_captured_sizes_share_memory_which_comes_back_when_the_engine_goes(source, monkeypatch):
    monkeypatch.setattr(engines, "COMPILE_OPTIONS", None)  # the order of captures, not their kernels
    model, texts = checkpoint.load(source.path, PRECISIONS["fp32"], "cuda"), oracle.tokenized(source)
    width = max(map(len, texts))
    CudaGraph(model, 3, width, 4).generate(texts[:3], 4)  # the step is built, and libraries have their workspaces
    release()
    before = torch.cuda.memory_allocated()
    engine = CudaGraph(model, 12, width, 12)
    for rows in (3, 1, 12, 2, 3):
        clock = Clock(model.device)
        tokens, expected = engine.generate(texts[:rows], 12, clock), Eager(model).generate(texts[:rows], 12)
        assert oracle.widest_tie(decode_stock(model, texts[:rows], expected[:, :-1]), expected, tokens) < 1e-2
        assert len(clock.elapsed_s()) == 12 and sorted(clock.elapsed_s()) == clock.elapsed_s()
    del engine, tokens, expected
    release()
    assert torch.cuda.memory_allocated() - before < 2**20


@pytest.mark.gpu
def test_memory_that_runs_out_while_a_step_is_captured_costs_that_engine_alone(source):
    model, runs = checkpoint.load(source.path, PRECISIONS["bf16"], "cuda"), []
    release()
    before = torch.cuda.memory_reserved()

    def work(batch_size):
        runs.append(batch_size)  # the runs before the capture take little
        return torch.empty(2**30 if len(runs) <= WARM_UP_STEPS else 2**41, dtype=torch.uint8, device="cuda")

    engine = CudaGraph(model, 3, 5, 4)
    with pytest.raises(RuntimeError) as failed:
        capture(partial(work, 3), engine._pool)
    assert is_out_of_memory(failed.value) and torch.cuda.current_stream() == torch.cuda.default_stream()
    del engine, failed
    release()
    assert torch.cuda.memory_reserved() - before < 2**27  # nothing of what it had taken stays
    assert CudaGraph(model, 3, 5, 4).generate(THREE, 4).shape == (3, 4)
