"""The fused step and its decoder against the model's own forward: the same logits to rounding, on any batch."""

import decode_oracle as oracle
import pytest
import torch
from decode_oracle import ONE, THREE, decode, decode_forced, decode_stock, tiny_model
from torch._dynamo.utils import counters
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, StableLmConfig

from qnb.memory import is_out_of_memory
from qnb.precision import PRECISIONS
from qnb.quantize import checkpoint
from qnb.speed import decode_step, engines, layers
from qnb.speed.decode_step import ARGMAX_PART, Functions, argmax_in_parts
from qnb.speed.engines import COMPILE_OPTIONS, Decoder, Eager

FAMILIES = [
    pytest.param(LlamaConfig, {"tie_word_embeddings": True}, id="llama, tied"),
    pytest.param(LlamaConfig, {"attention_bias": True}, id="llama, own head and biases"),
    pytest.param(MistralConfig, {}, id="mistral"),
    pytest.param(Qwen2Config, {}, id="qwen2"),
    pytest.param(Qwen3Config, {"head_dim": 32}, id="qwen3"),
    pytest.param(StableLmConfig, {}, id="another family"),
]


def assert_same_logits(model, decoder, prompts, new_tokens=4):
    forced = torch.randint(0, 300, (len(prompts), new_tokens))
    logits, expected = decode_forced(decoder, prompts, forced), decode_stock(model, prompts, forced)
    assert (logits - expected[:, 1:]).abs().max() < 1e-4
    assert torch.equal(decoder.new_ids(len(prompts), 1 + new_tokens), expected.argmax(-1))


@pytest.mark.parametrize("prompts", [ONE, THREE], ids=["one", "three, padded"])
@pytest.mark.parametrize(("config", "more"), FAMILIES)
def test_the_step_is_the_models_forward_and_says_where_it_is_not_fused(config, more, prompts):
    model = tiny_model(config, **more)
    decoder = Decoder(model, len(prompts) + 1, 6, 9)
    assert ("stablelm" in decoder.network.note) == bool(decoder.network.note) == (config is StableLmConfig)
    assert_same_logits(model, decoder, prompts, 9)


@pytest.mark.parametrize(("tokens", "rows"), [(5, [1, 1, 1]), (12, [2, 2]), (17, [2, 2]), (18, [3])])
def test_prompts_are_read_in_chunks_of_one_size(tokens, rows, monkeypatch):
    """The last chunk begins before its rows do: their keys and values are those of their own prompts."""
    monkeypatch.setattr(engines, "PREFILL_TOKENS", tokens)
    model, chunks = tiny_model(LlamaConfig), []
    decoder = Decoder(model, 3, 6, 4)
    prefill = decoder.network.prefill
    monkeypatch.setattr(decoder.network, "prefill", lambda ids, state: chunks.append(len(ids)) or prefill(ids, state))
    assert_same_logits(model, decoder, THREE)
    assert chunks == rows


@pytest.mark.parametrize("size", [1, ARGMAX_PART - 1, ARGMAX_PART, 3 * ARGMAX_PART + 5])
def test_the_argmax_is_the_first_of_the_highest_scores(size):
    scores = torch.randint(-3, 3, (50, size)).half()  # ties are the rule
    scores[0] = float("-inf")
    first = torch.where(scores == scores.amax(-1, keepdim=True), torch.arange(size), size).amin(-1)
    assert torch.equal(argmax_in_parts(scores), first)


@pytest.mark.parametrize(("attend", "prompts"), [(layers.attend_sdpa, ONE), (layers.attend_reductions, THREE)])
def test_a_compiled_step_is_the_same_and_compiled_once_for_all_layers(attend, prompts, monkeypatch):
    monkeypatch.setattr(layers, "attend_reductions", attend)
    model = tiny_model(LlamaConfig)
    counters.clear()
    decoder = Decoder(model, len(prompts), 6, 9, COMPILE_OPTIONS)
    assert_same_logits(model, decoder, prompts)
    # embed, layer, prefill of the first and of the last layer, predict
    assert decoder.network.is_fused and counters["stats"]["unique_graphs"] == 5


@pytest.mark.parametrize("attend", [layers.attend_sdpa, layers.attend_flex])
def test_compiled_for_more_than_a_few_rows_the_step_serves_any_number(attend, monkeypatch):
    monkeypatch.setattr(decode_step, "SMALL_BATCH", 1)
    monkeypatch.setattr(layers, "attend_large_batch", lambda *_: attend)
    model, compiled = tiny_model(LlamaConfig), []
    for rows in (3, 2):
        decoder = Decoder(model, 3, 6, 9, COMPILE_OPTIONS)
        assert_same_logits(model, decoder, THREE[:rows])
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[0] == compiled[1] and decoder.network.note == ""


def break_compiler(monkeypatch, name, error=None):
    """Let the compiler fail with `error`, or keep only one shape compiled."""

    def backend(graph, inputs):
        raise error

    function = torch.compile(getattr(decode_step, name), backend=backend if error else "eager", fullgraph=True)
    monkeypatch.setattr(Functions, "compiled", lambda functions, *_: functions._replace(**{name: function}))
    monkeypatch.setattr(decode_step, "RECOMPILE_LIMIT", 1)


@pytest.mark.parametrize("name", ["prefill_layer", "decode_layer", "predict"])
@pytest.mark.parametrize("error", [RuntimeError("no compiler here"), None], ids=["broken", "too many shapes"])
def test_what_cannot_be_compiled_runs_uncompiled_and_says_so(name, error, monkeypatch):
    break_compiler(monkeypatch, name, error)
    model = tiny_model(LlamaConfig)
    for width, rows in ((6, 1), (7, 2), (40, 3)):  # each decoder finds the same fused step
        decoder = Decoder(model, rows, width, 9, COMPILE_OPTIONS)
        assert_same_logits(model, decoder, THREE[:rows])
    assert str(error or "torch.compile failed") in decoder.network.note and not decoder.network.is_fused


def test_memory_that_runs_out_while_compiling_is_not_the_compilers_fault(monkeypatch):
    break_compiler(monkeypatch, "decode_layer", torch.cuda.OutOfMemoryError("no more"))
    decoder = Decoder(tiny_model(LlamaConfig), 1, 6, 9, COMPILE_OPTIONS)
    with pytest.raises(Exception, match="no more") as caught:
        decoder.step(1)
    assert is_out_of_memory(caught.value) and decoder.network.note == ""


@pytest.mark.parametrize("name", ["bf16", "nf4", "int8-no-outliers"])
def test_tokens_are_eagers_but_after_a_near_tie(name, source):
    """Fed the same tokens the step is as far from float32 as eager is; its own tokens differ after a near tie."""
    texts = oracle.tokenized(source)
    with checkpoint.quiet():
        model = checkpoint.load(source.path, PRECISIONS[name], "cpu")
        exact = oracle.unrounded(model, source.path)
        decoder = Decoder(model, len(texts), max(map(len, texts)), 8)
        tokens = Eager(model).generate(texts, 8)
        truth, theirs = (decode_stock(each, texts, tokens[:, :-1]) for each in (exact, model))
        ours = decode_forced(decoder, texts, tokens[:, :-1])
        own = decode(decoder, texts, 8)
    assert decoder.network.note == ""
    oracle.assert_differs_by_rounding(ours, theirs, truth, tokens, own)


def test_layers_of_another_library_multiply_themselves_in_a_captured_step():
    """As on a GPU, without capturing: their products are not joined, and the tokens stay."""

    class Packed(torch.nn.Linear):
        pass

    model = tiny_model(LlamaConfig)
    expected = Eager(model).generate(ONE, 8)
    for name, layer in model.named_modules():
        if "self_attn." in name and isinstance(layer, torch.nn.Linear):
            layer.__class__ = Packed
    decoder = Decoder(model, 1, len(ONE[0]), 8)
    assert torch.equal(decode(decoder, ONE, 8), expected) and len(decoder.network.layers[0].qkv) == 3
