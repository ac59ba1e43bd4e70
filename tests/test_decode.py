"""Engines against the model's own forward: the same logits to rounding, the same tokens but after a near tie."""

import copy
import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from qnb.errors import InputError
from qnb.precision import PRECISIONS
from qnb.quantize import checkpoint as model
from qnb.speed import decode_step as lean
from qnb.speed import engines as decode
from qnb.speed.batch_search import is_out_of_memory
from qnb.speed.decode_step import PART, EightBit, FourBit, Lean, join, likeliest
from qnb.speed.engines import Clock, Decoder, Eager, agreement, pad

TINY = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
        "eos_token_id": 7, "pad_token_id": 0}  # fmt: skip
FAMILIES = [
    pytest.param(LlamaConfig, {"tie_word_embeddings": True}, id="llama, tied"),
    pytest.param(LlamaConfig, {"attention_bias": True}, id="llama, own head and biases"),
    pytest.param(MistralConfig, {}, id="mistral"),
    pytest.param(Qwen2Config, {}, id="qwen2"),
    pytest.param(Qwen3Config, {"head_dim": 32}, id="qwen3"),
]
ONE, THREE = [[5, 6, 8, 9, 10]], [[5, 6, 8, 9, 10], [4, 3], [11, 12, 13]]
ROUNDING = 1.25  # the step's error against float32 may be so many times that of the model's own forward
TIE = 3  # two tokens whose logits are nearer than so many times that forward's error are as good as equal


def tiny(config, more, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**TINY, **more)).to(device, dtype).eval()


def read(decoder, prompts):
    """Logits of the prompts' first new tokens, (B, V)."""
    parts = []
    decoder.prefill(prompts, parts)
    return torch.cat(parts).float()


def stepped(decoder, prompts, forced, step=None):
    """Logits of every new token, (B, N, V), reading the tokens of `forced` whatever the decoder chose."""
    logits = [read(decoder, prompts)]
    for tokens in forced.T:
        decoder.token[: len(prompts)] = tokens
        logits.append((step or decoder.step)(len(prompts)).float())
    return torch.stack(logits, 1)


@torch.no_grad()
def stock(network, prompts, forced):
    """The same from the model's own forward and growing cache."""
    ids, mask = pad(prompts, 0, network.device)
    cache, logits = None, []
    for step in range(forced.shape[1] + 1):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = network(
            input_ids=forced[:, step - 1 : step] if step else ids,
            position_ids=positions[:, -1:] if step else positions,
            attention_mask=mask, past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache = out.past_key_values
        logits.append(out.logits[:, -1].float())
        mask = torch.cat((mask, mask.new_ones(len(prompts), 1)), 1)
    return torch.stack(logits, 1)


@torch.no_grad()
def unrounded(network, path):
    """The float32 model whose weights are those that `network` has stored, dequantized: all else is rounding.

    To be made before the first product: there bitsandbytes moves INT8 weights, and on some CPUs rounds 4-bit maxima.
    """
    from bitsandbytes import functional, nn

    exact = model.load(path, PRECISIONS["fp32"], network.device.type)
    for name, weight in network.named_parameters():
        stored = weight.data
        if isinstance(weight, nn.Params4bit):
            state = copy.copy(weight.quant_state)
            state.dtype = torch.float32  # in its own, 16 bit, the weights would be rounded
            stored = functional.dequantize_4bit(stored, state)
        elif isinstance(weight, nn.Int8Params):
            stored = weight.CB * weight.SCB[:, None] / 127
        exact.get_parameter(name).copy_(stored)
    return exact


def rms(logits, axis=None):
    return logits.pow(2).mean(axis).sqrt()


def error_ratio(ours, theirs, truth):
    """How many times the error of `theirs` that of `ours` is: the geometric mean over rows and tokens, (B, N, V) each.

    A rounding grows by chance on its way through the layers, so at one token either may be off twice as far.
    """
    return torch.exp((rms(ours - truth, -1) / rms(theirs - truth, -1)).log().mean()).item()


def widest_tie(truth, first, second):
    """How far apart `truth`, (B, N, V), has the two tokens where a row of `first` and of `second`, (B, N), first part.

    Logits of `truth` are of texts that go on as in `first`. 0 where no row parts.
    """
    differ = first != second
    rows = differ.any(1)
    places = differ.long().argmax(1)[rows]
    pairs = torch.stack((first, second), -1)[rows, places]  # (b, 2)
    apart = truth[rows, places].gather(1, pairs).diff(dim=1)  # (b, 1)
    return max(apart.abs().flatten().tolist(), default=0.0)


def assert_differs_by_rounding(ours, theirs, truth, first, second):
    """Hold an engine to eager's own error: its logits, (B, N, V), on eager's tokens `first`, its free tokens `second`.

    `truth` multiplies the stored weights in float32, so that eager's error against it is of 16-bit rounding, and for
    LLM.int8 of the activations' 8 bits. Three bounds, in units of that error:

    - The engine's own error is at most `ROUNDING` of it. Errors that do not depend on each other add in squares: 0.75
      of it more on every token fails, and spread evenly 0.35 (bf16) to 0.6 (INT8) do, as most tokens' error is less
      than the mean. By chance twelve prompts gave 0.87 to 1.12, three 0.64 to 1.43: take twelve.
    - The two engines' logits are no further apart than two such errors that have nothing in common: this one sees
      what befalls few tokens. On an H100 BF16, NF4 and INT8 gave 1.00 to 1.03, INT8 in batches of three 1.13. So far
      apart are engines that are equally right: eager with transformers' other attention was 0.94 to 0.98 from eager.
    - Free tokens first part where `truth` has them within `TIE` of each other.
    """
    error = rms(theirs - truth)
    assert error_ratio(ours, theirs, truth) <= ROUNDING
    assert rms(ours - theirs) <= math.hypot(1, ROUNDING) * error
    assert widest_tie(truth, first, second) <= TIE * error


# The lean step


@pytest.mark.parametrize("prompts", [ONE, THREE], ids=["one", "three, padded"])
@pytest.mark.parametrize(("config", "more"), FAMILIES)
def test_the_lean_step_is_the_models_forward(config, more, prompts):
    network = tiny(config, more)
    forced = torch.randint(0, 300, (len(prompts), 9))
    decoder = Decoder(network, len(prompts) + 1, 6, 9)
    assert decoder.note == ""
    expected = stock(network, prompts, forced)
    assert (stepped(decoder, prompts, forced) - expected).abs().max() < 1e-4
    half = copy.deepcopy(network).bfloat16()
    truth = stock(copy.deepcopy(half).float(), prompts, forced)
    ours, theirs = stepped(Decoder(half, 3, 6, 9), prompts, forced), stock(half, prompts, forced)
    assert error_ratio(ours, theirs, truth) <= ROUNDING


@pytest.mark.parametrize("size", [1, PART - 1, PART, 3 * PART + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_likeliest_token_is_the_first_of_the_highest_scores(size, dtype):
    scores = torch.randint(-3, 3, (50, size)).to(dtype)  # ties are the rule
    scores[0] = float("-inf")
    first = torch.where(scores == scores.amax(-1, keepdim=True), torch.arange(size), size).amin(-1)
    assert torch.equal(likeliest(scores), first)


def test_buffers_serve_smaller_batches_and_shorter_prompts_one_after_the_other():
    network = tiny(LlamaConfig, {})
    decoder = Decoder(network, 3, 6, 9)
    for prompts in (THREE, ONE, [[3, 4], [9, 8]]):
        forced = torch.randint(0, 300, (len(prompts), 4))
        assert (stepped(decoder, prompts, forced) - stock(network, prompts, forced)).abs().max() < 1e-4


@pytest.mark.parametrize(("tokens", "parts"), [(5, [1, 1, 1]), (12, [2, 1]), (17, [2, 1]), (18, [3])])
def test_prompts_are_read_in_chunks_of_one_size(tokens, parts, monkeypatch):
    """The last begins before its rows do: their keys, values and logits are those of their own."""
    network = tiny(LlamaConfig, {})
    forced, sizes, read_chunk = torch.randint(0, 300, (3, 4)), set(), Decoder._read
    monkeypatch.setattr(decode, "PREFILL_TOKENS", tokens)
    monkeypatch.setattr(
        Decoder, "_read", lambda self, ids, *more: sizes.add(ids.shape) or read_chunk(self, ids, *more)
    )
    decoder, found = Decoder(network, 3, 6, 4), []
    decoder.prefill(THREE, found)
    expected = stock(network, THREE, forced)
    assert [len(part) for part in found] == parts and sizes == {(parts[0], 6)}
    assert torch.equal(decoder.tokens(3, 1), torch.cat(found).argmax(-1)[:, None])
    assert (stepped(decoder, THREE, forced) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("prompts", [ONE, THREE], ids=["one", "three, padded"])
def test_prompts_read_in_fixed_shapes_give_the_same(prompts):
    """What a GPU records: padded to the longest there may be, whatever this batch's longest is."""
    network = tiny(LlamaConfig, {})
    forced = torch.randint(0, 300, (len(prompts), 3))
    decoder, expected = Decoder(network, 4, 9, 6), stock(network, prompts, forced)
    decoder.load(prompts)
    logits = [decoder.read(len(prompts))]
    for tokens in forced.T:
        decoder.token[: len(prompts)] = tokens
        logits.append(decoder.step(len(prompts)))
    assert (torch.stack(logits, 1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("attend", [lean.by_kernel, lean.by_reductions])
@pytest.mark.parametrize("prompts", [ONE, THREE], ids=["one", "three, padded"])
def test_compiled_the_step_is_the_same_and_built_once_for_all_layers(prompts, attend, monkeypatch):
    monkeypatch.setattr(Lean, "_attention", lambda self, rows: attend)
    network = tiny(LlamaConfig, {})
    forced = torch.randint(0, 300, (len(prompts), 4))
    with torch._dynamo.config.patch(error_on_recompile=True):
        decoder = Decoder(network, len(prompts), 6, 9, decode.COMPILE)
        logits = stepped(decoder, prompts, forced)
    assert decoder.note == "" and torch.equal(decoder.token, logits[:, -1].argmax(-1))
    assert (logits - stock(network, prompts, forced)).abs().max() < 1e-4


@pytest.mark.parametrize("options", [decode.COMPILE, None])
def test_what_a_compiled_step_is_made_of_is_timed_steadily(options, monkeypatch):
    entered, forced = [], torch.randint(0, 300, (1, 2))

    @contextmanager
    def steadily():
        entered.append("in")
        yield
        entered.append("out")

    monkeypatch.setattr(lean, "steadily", steadily)
    stepped(Decoder(tiny(LlamaConfig, {}), 1, 6, 9, options), THREE[:1], forced)
    assert entered == (["in", "out"] * (1 + forced.shape[1]) if options else [])  # the prompts, and each step


@pytest.mark.parametrize("attend", [lean.by_kernel, lean.by_blocks])
def test_compiled_for_more_than_a_few_rows_the_step_serves_any_number(attend, monkeypatch):
    monkeypatch.setattr(lean, "FEW_ROWS", 1)
    monkeypatch.setattr(Lean, "_attention", lambda self, rows: attend)
    network = tiny(LlamaConfig, {})
    forced = torch.randint(0, 300, (3, 4))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (3, 2):
            decoder = Decoder(network, 3, 6, 9, decode.COMPILE)
            logits = stepped(decoder, THREE[:rows], forced[:rows])
            assert decoder.note == ""
            assert (logits - stock(network, THREE[:rows], forced[:rows])).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("dtype", "size", "generation", "chosen"),
    [
        (torch.float16, 64, 9, "by_blocks"),
        (torch.bfloat16, 128, 8, "by_blocks"),
        (torch.float16, 64, 7, "by_kernel"),
        (torch.float32, 128, 9, "by_kernel"),
        (torch.float16, 8, 9, "by_kernel"),
    ],
)
def test_many_rows_attend_by_blocks_where_a_kernel_of_them_fits(dtype, size, generation, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    made = object.__new__(Lean)
    made._few, made.shape = lean.Parts().compiled({}), lean.Shape(2, 4, size, 1.0, 1e-5)
    made.embedding = SimpleNamespace(device=torch.device("cuda"), element_size=lambda: dtype.itemsize)
    assert made._attention(lean.FEW_ROWS) is lean.by_reductions
    assert made._attention(lean.FEW_ROWS + 1) is getattr(lean, chosen)
    made._few = lean.Parts()
    assert made._attention(1) is made._attention(100) is lean.by_kernel


@pytest.mark.parametrize("broken", ["read", "read_last", "layer", "finish"])
def test_what_cannot_be_compiled_runs_uncompiled_and_says_so(broken, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    part = torch.compile(getattr(lean, broken), backend=backend)
    monkeypatch.setattr(lean.Parts, "compiled", lambda parts, options: parts._replace(**{broken: part}))
    network = tiny(LlamaConfig, {})
    decoder = Decoder(network, 1, 6, 9, decode.COMPILE)
    decoder.prefill(ONE)
    decoder.step(1)
    assert "no compiler here" in decoder.note and Decoder(network, 1, 6, 9, decode.COMPILE).note == decoder.note
    forced = torch.randint(0, 300, (1, 4))
    assert (stepped(decoder, ONE, forced) - stock(network, ONE, forced)).abs().max() < 1e-4


def test_memory_that_runs_out_while_compiling_is_no_fault_of_the_compiler(monkeypatch):
    def backend(graph, inputs):
        raise torch.cuda.OutOfMemoryError("no more")

    part = torch.compile(lean.layer, backend=backend)
    monkeypatch.setattr(lean.Parts, "compiled", lambda parts, options: parts._replace(layer=part))
    decoder = Decoder(tiny(LlamaConfig, {}), 1, 6, 9, decode.COMPILE)
    decoder.prefill(ONE)
    with pytest.raises(Exception, match="no more") as caught:
        decoder.step(1)
    assert is_out_of_memory(caught.value) and decoder.note == ""


def test_more_shapes_than_are_kept_compiled_run_uncompiled(monkeypatch):
    compiled = lean.Parts._replace
    monkeypatch.setattr(lean, "VARIANTS", 1)
    monkeypatch.setattr(
        lean.Parts, "compiled",
        lambda parts, options: compiled(parts, read=torch.compile(lean.read, fullgraph=True, backend="eager")),
    )  # fmt: skip
    network = tiny(LlamaConfig, {})
    for width in (6, 7, 8):
        decoder = Decoder(network, 1, width, 4, decode.COMPILE)
        decoder.prefill([[5] * width])
    assert "torch.compile failed" in decoder.note
    forced = torch.randint(0, 300, (1, 3))
    assert (stepped(decoder, ONE, forced) - stock(network, ONE, forced)).abs().max() < 1e-4


@pytest.mark.parametrize("prompts", [ONE, THREE], ids=["one", "three, padded"])
def test_a_family_the_step_does_not_know_runs_its_own_forward_and_says_so(prompts):
    network = tiny(StableLmConfig, {})
    decoder = Decoder(network, len(prompts), 6, 9)
    assert "stablelm" in decoder.note
    forced = torch.randint(0, 300, (len(prompts), 5))
    assert (stepped(decoder, prompts, forced) - stock(network, prompts, forced)).abs().max() < 1e-4


def test_a_text_wider_than_the_models_window_is_refused():
    network = tiny(MistralConfig, {"sliding_window": 8})
    assert Decoder(network, 1, 4, 4).note == ""
    with pytest.raises(InputError, match="last 8 tokens"):
        Decoder(network, 1, 8, 8)


# Joined products


def four_bit(rows, kind, nested):
    from bitsandbytes import nn

    made = nn.Linear4bit(
        128, rows, bias=True, compute_dtype=torch.float32, quant_type=kind, compress_statistics=nested
    )
    return made.to("cpu").requires_grad_(False).eval()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_joined_4_bit_layers_give_each_layers_bits(kind):
    layers, x = [four_bit(rows, kind, False) for rows in (64, 32, 96)], torch.randn(3, 128)
    alone = torch.cat([join([layer])[0].multiply(x) for layer in layers], 1)
    (joined,) = join(layers)
    assert isinstance(joined, FourBit) and torch.equal(joined.multiply(x), alone)
    assert all(torch.equal(join([layer])[0].multiply(x), part) for layer, part in
               zip(layers, alone.split([64, 32, 96], 1), strict=True))  # fmt: skip  # on the joined memory
    assert layers[1].weight.data_ptr() == joined.packed.data_ptr() + layers[0].weight.numel()


def test_doubly_quantized_layers_stay_apart():
    layers, x = [four_bit(rows, "nf4", True) for rows in (64, 32)], torch.randn(3, 128)
    expected = [layer(x) for layer in copy.deepcopy(layers)]
    products = join(layers)
    assert len(products) == 2 and all(product.nested for product in products)
    for product, want in zip(products, expected, strict=True):
        assert torch.allclose(product.multiply(x), want, atol=0.05)  # the CPU's own kernel keeps maxima in 16 bit


def test_joined_8_bit_layers_give_each_layers_bits():
    from bitsandbytes import nn

    layers = [nn.Linear8bitLt(128, rows, bias=False, has_fp16_weights=False).to("cpu").eval() for rows in (64, 32)]
    x = torch.randn(3, 128).bfloat16()
    with torch.no_grad():
        expected = torch.cat([layer(x) for layer in layers], 1)
        (joined,) = join(layers)
        assert isinstance(joined, EightBit) and torch.equal(joined.multiply(x), expected)
        assert torch.equal(torch.cat([layer(x) for layer in layers], 1), expected)
    assert layers[1].weight.data_ptr() == joined.rows.data_ptr() + layers[0].weight.numel()


# The embedded model


TEXTS = ("The capital of France is", "Once upon a time, by the sea,", "Oh", "A list of fruit: apples,", "2 + 2 =",
         "The president said that", "It was a dark", "Dear Sir or Madam,", "My favourite colour is",
         "In the year 1969", "Water boils at", "def main():")  # fmt: skip


@pytest.fixture(scope="module")
def texts(source):
    tokenizer = model.load_tokenizer(source.path)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("name", ["bf16", "nf4", "int8-no-outliers"])
def test_tokens_are_eagers_but_after_a_near_tie(name, source, texts):
    """Fed the same tokens the step is as far from float32 as eager is; where free tokens part, it was a near tie."""
    rows, precision = len(texts), PRECISIONS[name]
    with model.quiet():
        network = model.load(source.path, precision, "cpu")
        exact = unrounded(network, source.path)
        decoder = Decoder(network, rows, max(map(len, texts)), 8)
        assert decoder.note == ""
        tokens = Eager(network).generate(texts, 8)
        truth, theirs = (stock(each, texts, tokens[:, :-1]) for each in (exact, network))
        ours = stepped(decoder, texts, tokens[:, :-1])
        decoder.prefill(texts)
        for _ in range(7):
            decoder.step(rows)
    assert_differs_by_rounding(ours, theirs, truth, tokens, decoder.tokens(rows, 8))


# Engines


def test_eager_ticks_once_a_token_and_changes_none():
    network = tiny(LlamaConfig, {})
    clock = Clock(network.device)
    timed = Eager(network).generate(THREE, 6, clock)
    seconds = clock.seconds()
    assert len(seconds) == 6 and sorted(seconds) == seconds and seconds[0] > 0
    assert torch.equal(timed, Eager(network).generate(THREE, 6)) and timed.shape == (3, 6)


def test_a_models_own_penalties_and_beams_do_not_reach_eager():
    network = tiny(LlamaConfig, {})
    plain = Eager(network).generate(THREE, 12)
    own = network.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.num_beams, own.do_sample = 1.5, 2, 3, True
    assert len(set(plain[0].tolist())) < 12, "nothing is repeated that a penalty would stop"
    assert torch.equal(Eager(network).generate(THREE, 12), plain)
    assert network.generation_config is own and own.num_beams == 3


def test_an_end_of_sequence_is_barred_as_generate_bars_it():
    network = tiny(LlamaConfig, {})
    network.lm_head.weight.data[7] = 40 * network.lm_head.weight.data[7].sign()  # often the likeliest token
    expected = Eager(network).generate(THREE, 6)
    decoder = Decoder(network, 3, 5, 6)
    decoder.prefill(THREE)
    for _ in range(5):
        decoder.step(3)
    assert torch.equal(decoder.tokens(3, 6), expected) and not (expected == 7).any()


def test_where_tokens_part_is_found_with_its_margin():
    network = tiny(LlamaConfig, {})
    first = Eager(network).generate(THREE, 5)
    assert agreement(network, THREE, first, first.clone()) == decode.Agreement(5, None, None)
    second = first.clone()
    second[1, 3:] = (second[1, 3:] + 1) % 300
    found = agreement(network, THREE, first, second)
    ids = torch.tensor([THREE[1] + first[1, :3].tolist()])
    logits = network(ids).logits[0, -1].detach()
    assert found.first_difference == 3
    assert (
        found.margin == pytest.approx(float(logits[first[1, 3]] - logits[second[1, 3]]), abs=1e-5) and found.margin > 0
    )


def test_cuda_graph_is_absent_without_a_gpu_not_faked():
    with pytest.raises(InputError, match="GPU"):
        decode.CudaGraph(tiny(LlamaConfig, {}), 1, 5, 4)
    assert decode.parse("auto", "cpu") == ("eager",) and decode.parse("auto", "cuda") == ("eager", "cuda_graph")
    assert decode.parse("cuda_graph, eager", "cuda") == ("eager", "cuda_graph")  # the one that moves no weights first
    for wrong, said in (("cuda_graph", "NVIDIA GPU"), ("fast", "eager, cuda_graph"), ("", "eager, cuda_graph")):
        with pytest.raises(InputError, match=said):
            decode.parse(wrong, "cpu")


class Repeated(decode.CudaGraph):
    """CudaGraph with its work done again where a GPU replays it."""

    def _record(self, work, rows):
        for _ in range(decode.WARM_UPS):
            work(rows)
        return SimpleNamespace(replay=lambda: work(rows)), None


@pytest.mark.parametrize("recorded_tokens", [0, 4096], ids=["prompts launched", "prompts recorded"])
def test_batches_of_any_size_and_length_follow_each_other(recorded_tokens, monkeypatch):
    """The order of loading, recording and replaying, on a CPU; that a GPU replays what was recorded is its test's."""
    monkeypatch.setattr(decode, "RECORDED_TOKENS", recorded_tokens)
    monkeypatch.setattr(decode, "absent", lambda *_: "")
    monkeypatch.setattr(decode, "COMPILE", None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    network = tiny(LlamaConfig, {})
    made = Repeated(network, 3, 6, 8)
    for prompts, new_tokens in ((THREE, 8), (ONE, 3), (THREE, 1), ([[3, 4], [9]], 8), (ONE, 8)):
        clock = Clock(network.device)
        assert torch.equal(made.generate(prompts, new_tokens, clock), Eager(network).generate(prompts, new_tokens))
        assert len(clock.seconds()) == new_tokens


def test_llm_int8_with_outliers_cannot_be_recorded():
    from bitsandbytes import nn

    network = torch.nn.Sequential(nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0))
    assert "outlier" in decode.absent("cuda_graph", "cuda", network)
    network[0].state.threshold = 0.0
    assert decode.absent("cuda_graph", "cuda", network) == ""


def test_more_than_the_context_window_is_refused():
    network = tiny(LlamaConfig, {})
    with pytest.raises(InputError, match="context window of 64"):
        Eager(network).generate(ONE, 60)
    with pytest.raises(InputError, match="context window of 64"):
        Decoder(network, 1, 5, 60)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 12], ids=["few rows", "many rows"])
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "int8-no-outliers", "int4", "fp4", "nf4", "nf4-dq"])
def test_a_recorded_step_is_as_near_float32_as_eager(name, rows, source, texts):
    """Fed the same tokens, and where free tokens part, it was a near tie; the same prompts in batches of any size."""
    precision, batches = PRECISIONS[name], [texts[first : first + rows] for first in range(0, len(texts), rows)]
    with model.quiet():
        network = model.load(source.path, precision, "cuda")
        exact = unrounded(network, source.path)
        cuda_graph = decode.CudaGraph(network, rows, max(map(len, texts)), 16)

        def replay(rows):
            cuda_graph._steps[rows].replay()
            return cuda_graph.logits[rows].clone()

        found = []
        for batch in batches:
            free, tokens = cuda_graph.generate(batch, 16), Eager(network).generate(batch, 16)
            forced = tokens[:, :-1]
            ours = stepped(cuda_graph._decoder, batch, forced, replay)
            found.append((ours, stock(network, batch, forced), stock(exact, batch, forced), tokens, free))
    assert cuda_graph.note == ""
    ours, theirs, truth, tokens, free = map(torch.cat, zip(*found, strict=True))
    if name == "fp32":  # eager is the truth
        assert (ours - truth).abs().max() < 1e-2 and widest_tie(truth, tokens, free) < 2e-2
    else:
        assert_differs_by_rounding(ours, theirs, truth, tokens, free)


@pytest.mark.gpu
def test_recorded_sizes_share_memory_and_each_gives_its_tokens(source, texts, monkeypatch):
    monkeypatch.setattr(decode, "COMPILE", None)  # the order of recordings, not their kernels
    network = model.load(source.path, PRECISIONS["fp32"], "cuda")
    cuda_graph = decode.CudaGraph(network, 3, max(map(len, texts)), 12)
    for rows in (3, 1, 2, 3):
        expected = Eager(network).generate(texts[:rows], 12)
        clock = Clock(network.device)
        found = cuda_graph.generate(texts[:rows], 12, clock)
        parted = agreement(network, texts[:rows], expected, found)
        assert parted.margin is None or abs(parted.margin) < 1e-2
        assert len(clock.seconds()) == 12 and sorted(clock.seconds()) == clock.seconds()


@pytest.mark.gpu
def test_memory_comes_back_when_an_engine_goes(source, texts):
    network = model.load(source.path, PRECISIONS["bf16"], "cuda")
    width = max(map(len, texts))
    decode.CudaGraph(network, 3, width, 4).generate(texts[:3], 4)  # the step is built and libraries have what they keep
    model.release()
    before = torch.cuda.memory_allocated()
    decode.CudaGraph(network, 24, width, 64).generate(texts * 2, 64)
    model.release()
    assert torch.cuda.memory_allocated() - before < 2**20


@pytest.mark.gpu
def test_memory_that_runs_out_while_a_step_is_recorded_costs_that_engine_alone(source, texts):
    network = model.load(source.path, PRECISIONS["bf16"], "cuda")
    width, runs = max(map(len, texts)), []
    model.release()
    before = torch.cuda.memory_reserved()

    def work(rows):
        runs.append(rows)  # what is run before it is recorded takes little
        return torch.empty(2**30 if len(runs) <= decode.WARM_UPS else 2**41, dtype=torch.uint8, device="cuda")

    made = decode.CudaGraph(network, 3, width, 4)
    with pytest.raises(RuntimeError) as failed:
        made._record(work, 3)
    assert is_out_of_memory(failed.value) and torch.cuda.current_stream() == torch.cuda.default_stream()
    del made, failed
    model.release()
    assert torch.cuda.memory_reserved() - before < 2**27  # of what it had taken nothing stays
    tokens = decode.CudaGraph(network, 3, width, 4).generate(texts[:3], 4)
    assert tokens.shape == (3, 4)
