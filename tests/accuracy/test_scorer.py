"""The scorer gives stock lm-eval's answers, to every kind of request and with models of several families."""

import random
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import t4
import torch
import transformers
from conftest import random_model
from lm_eval.models.huggingface import HFLM
from torch._inductor.utils import fresh_cache

from qnb import device
from qnb.accuracy import backbone, captured_step, scorer
from qnb.accuracy.backbone import Backbone
from qnb.accuracy.generation import is_shaped
from qnb.accuracy.scorer import SharedContextLM, StockLM
from qnb.accuracy.tasks import UNANSWERED
from qnb.capture import SlotCache
from qnb.finite import NotFiniteError
from qnb.precision import PRECISIONS
from qnb.quantize import checkpoint

WINDOW = 256
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": WINDOW, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SLIDING = {"head_dim": 16, "sliding_window": 32}
FAMILIES = {
    "Llama": {"tie_word_embeddings": False},
    "Qwen3": {"head_dim": 16},
    "Mistral": SLIDING,
    "Gemma2": {**SLIDING, "final_logit_softcapping": 3.0},
    "Gemma3Text": {**SLIDING, "query_pre_attn_scalar": 16},
    "GPT2": {},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 0},
    "Phi": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
UNSHARED = {  # a mask is not taken, or a state of all tokens before goes on from row to row
    "Bloom": {},
    "FalconH1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1,
                 "mamba_chunk_size": 16},
}  # fmt: skip


def request(*args):
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def text(tokenizer):
    """Returns a function that draws a text of so many words, the same in every run."""
    drawn = torch.randint(100, 2000, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    words, draw = tokenizer.decode(drawn).split(" "), random.Random(0)
    return lambda count: " ".join(draw.choice(words) for _ in range(count))


@pytest.fixture(scope="module")
def pairs(text):
    """One and several tokens, one and several choices, a shared prefix, no context, too long, long, asked twice."""
    drawn = []
    for words in (3, 10, 40, 150, 3, 10, 40):
        context = text(words)
        drawn += [(context, " " + text(count)) for count in (1, 1, 6)]
    prefix = text(45)
    for _ in range(6):
        context = f"{prefix} {text(5)}"
        drawn += [(context, " " + text(4)) for _ in range(3)]
    return [*drawn, ("", text(5)), (text(90), " " + text(90)), drawn[0]]


@pytest.fixture
def both(tokenizer):
    """Returns a function that makes a random model of one family, in our scorer and in stock's."""

    def make(family="Llama"):
        more = {**FAMILIES, **UNSHARED}[family]
        config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **SIZES, **more)
        options = {"pretrained": random_model(config), "tokenizer": tokenizer}
        return SharedContextLM(batch_size=4, **options), HFLM(batch_size=1, **options)

    return make


def assert_same_scores(ours, stock, pairs):
    requests = [request(*pair) for pair in pairs]
    mine, theirs = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, stock))
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_kind_of_request_is_answered_as_stock_does(family, both, tokenizer, text, pairs):
    ours, stock = both(family)
    assert ours.shared
    assert_same_scores(ours, stock, pairs)

    long = [request(text(300)), request(text(20))]
    mine, theirs = (lm.loglikelihood_rolling(long, disable_tqdm=True) for lm in (ours, stock))
    assert mine == pytest.approx(theirs, abs=1e-2)

    # up to the window, and of two lengths, so that one row's text would end behind its window in the other's batch
    contexts = sorted({context for context, _ in pairs if context})
    requests = [request(context, {"until": ["a", "\n\n"], "max_gen_toks": new_tokens})
                for context in contexts for new_tokens in (20, 60)[: 1 + len(context) % 2]]  # fmt: skip
    mine, theirs = (lm.generate_until(requests, disable_tqdm=True) for lm in (ours, stock))
    assert mine == theirs
    ours.backbone.max_tokens = 200  # contexts are read a few at a time, and their caches joined
    assert ours.generate_until(requests, disable_tqdm=True) == theirs

    greedy = []  # the model's own tokens, and the same with another one at their end
    for context in contexts[:4]:
        ids = tokenizer(context)["input_ids"][: WINDOW - 4]
        own = stock.model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :].tolist()
        greedy += [((context, str(tokens)), ids, tokens) for tokens in (own, own[:1], [*own[:-1], 5])]
    mine, theirs = (lm._loglikelihood_tokens(greedy, disable_tqdm=True) for lm in (ours, stock))
    assert [flag for _, flag in mine] == [flag for _, flag in theirs] == [True, True, False] * 4


@pytest.mark.parametrize(
    "settings", [{}, {"eos_token_id": "also"}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 1}]
)
def test_texts_end_and_are_shaped_as_the_models_own_settings_say(settings, both, tokenizer, text):
    ours, stock = both()
    prompts = [request(text(count), {"until": ["\n\n"], "max_gen_toks": 24}) for count in (5, 9, 14, 30, 31)]
    plain = [tokenizer(answer)["input_ids"] for answer in stock.generate_until(prompts, disable_tqdm=True)]
    often = next(token for token in plain[0][2:] if token not in plain[0][:2])  # comes in the midst of a text
    own = {"eos_token_id": [ours.eot_token_id, often]} if "eos_token_id" in settings else settings
    for name, value in own.items():  # both have one model
        setattr(ours.model.generation_config, name, value)
    theirs = stock.generate_until(prompts, disable_tqdm=True)
    assert ours.generate_until(prompts, disable_tqdm=True) == theirs
    assert bool(own) == ([tokenizer(answer)["input_ids"] for answer in theirs] != plain)


def test_a_setting_shapes_texts_unless_its_value_is_neutral():
    neutral = {"temperature": 0.6, "top_k": 1, "max_length": 1, "min_length": 0, "num_beams": 1,
               "repetition_penalty": 1.0, "remove_invalid_values": False}  # fmt: skip
    assert not is_shaped(transformers.GenerationConfig(**neutral))
    for name in ("min_length", "min_new_tokens", "no_repeat_ngram_size", "forced_bos_token_id", "forced_eos_token_id"):
        assert is_shaped(transformers.GenerationConfig(**{name: 1}))


@pytest.mark.parametrize(("min_saved_work", "reads"), [(0, 1), (10**12, 0)])
def test_a_shared_prefix_is_read_once_if_it_saves_enough(min_saved_work, reads, both, tokenizer, pairs, monkeypatch):
    ours, stock = both()
    read, lengths = Backbone.read, []
    monkeypatch.setattr(Backbone, "read", lambda self, prefix: lengths.append(len(prefix)) or read(self, prefix))
    monkeypatch.setitem(scorer.MIN_SAVED_WORK, "cpu", min_saved_work)
    assert_same_scores(ours, stock, pairs)
    assert sum(length > 0 for length in lengths) == reads and all(length == 0 or length > 40 for length in lengths)


def test_compiled_layers_give_the_same_scores_and_are_given_back(both, tokenizer, pairs, monkeypatch):
    """A GPU before Ampere compiles none in bfloat16."""
    ours, stock = both()
    monkeypatch.setattr(device, "is_before_ampere", lambda place: True)
    monkeypatch.setitem(backbone.MIN_COMPILED_WORK, "cpu", 0)
    monkeypatch.setitem(backbone.COMPILE, "backend", "eager")
    compiled, score = [], Backbone.score

    def watched(self, *arguments):
        compiled.append(sum(bool(module._compiled_call_impl) for module in self.model.modules()))
        return score(self, *arguments)

    monkeypatch.setattr(Backbone, "score", watched)
    assert_same_scores(ours, stock, pairs)
    assert set(compiled) == {SIZES["num_hidden_layers"]}
    assert is_compiled(ours.model) and not is_compiled(ours.model.bfloat16())


def is_compiled(model):
    with backbone.compiled(Backbone(model), 1):
        return any(module._compiled_call_impl for module in model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("card", [nullcontext, t4.a_t4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compiled_layers_are_as_near_to_float32_as_the_models_own_kernels(
    dtype, card, both, tokenizer, pairs, monkeypatch
):
    """On a T4 none are compiled in bfloat16."""
    ours, stock = both()
    requests = [request(*pair) for pair in pairs]
    expected = torch.tensor([value for value, _ in stock.loglikelihood(requests, disable_tqdm=True)])
    model = ours.model.to("cuda", dtype)
    errors = []
    torch._dynamo.reset()
    with card():
        for work in (float("inf"), 0):
            monkeypatch.setitem(backbone.MIN_COMPILED_WORK, "cuda", work)
            lm = SharedContextLM(pretrained=model, tokenizer=tokenizer)
            values = torch.tensor([value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)])
            errors.append(float((values - expected).abs().mean()))
        assert is_compiled(model) == (card is nullcontext or dtype == torch.float16)
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, each in PRECISIONS.items() if not each.capability])
def test_every_kernel_of_compiled_layers_compiles_for_a_t4_and_fits_its_shared_memory(
    name, source, tokenizer, pairs, monkeypatch
):
    pytest.importorskip(PRECISIONS[name].library)
    monkeypatch.setitem(backbone.MIN_COMPILED_WORK, "cuda", 0)
    torch._dynamo.reset()  # what another test compiled would leave no kernels here
    with fresh_cache(), t4.a_t4(), checkpoint.quiet():
        model = checkpoint.load(source.path, PRECISIONS[name].in_half("float16"), "cuda")
        lm = SharedContextLM(pretrained=model, tokenizer=tokenizer)
        lm.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
        shared_bytes = t4.shared_bytes()
        assert bool(shared_bytes) == is_compiled(model) == (model.dtype != torch.bfloat16)
        assert all(each <= t4.SHARED_BYTES for each in shared_bytes)


@pytest.mark.parametrize("family", sorted(UNSHARED))
def test_a_model_that_cannot_keep_rows_apart_is_left_to_stock(family, both, tokenizer, pairs, caplog):
    ours, stock = both(family)
    assert not ours.shared and family in caplog.text
    assert_same_scores(ours, stock, pairs[:6])
    assert not backbone.separates(Backbone(random_model(ours.model.config).bfloat16()))  # rounding hides no fault


def test_running_out_of_memory_halves_the_batch_and_loses_nothing(both, tokenizer, pairs, monkeypatch):
    ours, stock = both()
    score, failed = Backbone.score, []

    def small(self, rows, *more):
        if len(rows) > 2:
            failed.append(len(rows))
            raise torch.cuda.OutOfMemoryError("simulated")
        return score(self, rows, *more)

    monkeypatch.setattr(Backbone, "score", small)
    assert_same_scores(ours, stock, pairs)
    assert failed


@pytest.mark.parametrize("make", [SharedContextLM, StockLM])
@pytest.mark.parametrize(("dtype", "cause"), [("float16", "FP16 overflows"), ("float32", "float32 fails")])
def test_outputs_that_are_not_finite_are_counted_and_refused(dtype, cause, make, both, tokenizer):
    """One word overflows in float16, or is undefined; two of three requests have it."""
    model = both()[0].model
    (word,) = tokenizer(" ship")["input_ids"]
    model.model.embed_tokens.weight.data[word] *= 1e7 if dtype == "float16" else float("nan")
    lm = make(pretrained=model.to(getattr(torch, dtype)), tokenizer=tokenizer, batch_size=4)
    contexts = ["the ship was", "the lamp was", "was the ship"]
    assert len(lm.loglikelihood([request(contexts[1], " old")], disable_tqdm=True)) == 1
    with pytest.raises(NotFiniteError, match=f"^{cause} in this model: 2 of 3 outputs are not finite"):
        lm.loglikelihood([request(context, " old") for context in contexts], disable_tqdm=True)
    with pytest.raises(NotFiniteError, match=cause):
        lm.loglikelihood_rolling([request(context) for context in contexts], disable_tqdm=True)
    for options in ({}, {"do_sample": True, "temperature": 1.0}):
        requests = [request(context, {"until": ["."], "max_gen_toks": 3, **options}) for context in contexts]
        with pytest.raises(NotFiniteError, match=cause):
            lm.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize("new_tokens", [WINDOW - 1, WINDOW, WINDOW + 44])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_what_does_not_fit_the_window_is_left_out_where_stock_fails(family, new_tokens, both, tokenizer, text):
    """Texts as long as the window, and continuations that are longer."""
    texts = [request(text(count), {"until": ["\n\n"], "max_gen_toks": new_tokens}) for count in (2, 300)]
    ids = tokenizer(text(600))["input_ids"]
    continuation = [(("a", "b"), ids[:5], ids[: new_tokens + 1])]
    ours, stock = both(family)
    if new_tokens < WINDOW:
        assert ours.generate_until(texts, disable_tqdm=True) == stock.generate_until(texts, disable_tqdm=True)
        (mine,), (theirs,) = (lm._loglikelihood_tokens(continuation, disable_tqdm=True) for lm in (ours, stock))
        assert mine == pytest.approx(theirs, abs=1e-2)
        return
    for ask, requests in ((ours.generate_until, texts), (stock.generate_until, texts),
                          (stock._loglikelihood_tokens, continuation)):  # fmt: skip
        with pytest.raises(AssertionError):
            ask(requests, disable_tqdm=True)
    assert ours._loglikelihood_tokens(continuation, disable_tqdm=True) == [UNANSWERED]


@pytest.fixture
def generations(text):
    """Requests whose texts end early, late or not at all."""
    stops = (["a"], ["\n\n"], ["e", " the"])
    return [request(text(3 + 5 * place), {"until": stops[place % 3], "max_gen_toks": 40}) for place in range(12)]


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_a_prefix_beyond_a_window_is_read_with_each_text(family, both, text, monkeypatch):
    """Padding behind a prefix that is read once would count towards the window."""
    ours, stock = both(family)
    prefix, reads, read = text(45), [], ours.backbone.read
    monkeypatch.setattr(ours.backbone, "read", lambda tokens: reads.append(tokens) or read(tokens))
    prompts = [request(f"{prefix} {text(words)}", {"until": ["\n\n"], "max_gen_toks": 24}) for words in (2, 40, 8, 30)]
    assert ours.generate_until(prompts, True) == stock.generate_until(prompts, True)
    assert any(reads) == (family == "Llama")


def test_rows_of_a_cache_are_dropped_a_layer_at_a_time():
    """Of the old layers all but one are given back before the last is copied."""
    cache = SlotCache([(torch.zeros(4, 1, 2, 1), torch.zeros(4, 1, 2, 1)) for _ in range(3)])
    first, copies = weakref.ref(cache.buffers[0][0]), []

    class Rows(torch.Tensor):
        def to(self, *device):
            copies.append(first() is None)
            return super().to(*device)

    cache.batch_select_indices(torch.tensor([1, 3]).as_subclass(Rows))
    assert copies == [False, False, True, True, True, True]
    assert {buffer.shape[0] for layer in cache.buffers for buffer in layer} == {2}


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPT2", "OPT", "Mistral", "Mixtral"])
def test_steps_at_fixed_addresses_give_the_same_texts(family, both, generations, monkeypatch):
    """What a GPU captures and replays is done again here.

    Layers with a window are not captured. No step is captured that reads from the device, as if experts did.
    """
    ours, stock = both(family)
    captures, modes = [], [0]

    def read_from_device(*_):
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def capture(work):
        captures.append(work)
        return SimpleNamespace(replay=work)

    if family == "Mixtral":
        ours.model.base_model.norm.register_forward_hook(read_from_device)
    for name, value in {"device": lambda _: nullcontext(), "get_sync_debug_mode": int,
                        "set_sync_debug_mode": modes.append}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(captured_step, "CAPTURING", {"cpu"})
    monkeypatch.setattr(captured_step, "capture", capture)
    assert ours.generate_until(generations, True) == stock.generate_until(generations, True)
    assert (len(captures) > 1) == (not family.startswith("Mi"))  # again when half of the rows are done
    assert ("error" in modes) == (family != "Mistral") and modes[-1] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("captures", [True, False])
def test_a_captured_step_gives_the_same_texts(captures, both, generations, monkeypatch):
    """A step in which the host reads from the device is not captured, and its texts are the same."""
    ours, _ = both()
    model = ours.model.to("cuda")
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    if not captures:
        model.base_model.norm.register_forward_hook(lambda _, __, output: [output.isnan().any().item()].clear())
    texts = []
    for kinds in (set(), {"cuda"}):
        monkeypatch.setattr(captured_step, "CAPTURING", kinds)
        lm = SharedContextLM(pretrained=model, tokenizer=ours.tokenizer)
        texts.append(lm.generate_until(generations, True))
        assert bool(replays) == bool(kinds and captures)
    assert texts[0] == texts[1]
