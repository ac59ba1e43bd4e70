"""The scorer gives stock lm-eval's answers, to every kind of request and with models of several families."""

import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from qnb.accuracy import backbone, scorer
from qnb.accuracy.backbone import Backbone
from qnb.accuracy.scorer import SharedContextLM
from qnb.quantize.checkpoint import load_tokenizer

MAX_LENGTH = 250
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "untied head": lambda words: transformers.LlamaConfig(vocab_size=words, **SIZES, tie_word_embeddings=False),
    "learned positions": lambda words: transformers.GPT2Config(
        vocab_size=words, n_positions=256, n_embd=64, n_layer=3, n_head=4
    ),
    "normed queries": lambda words: transformers.Qwen3Config(vocab_size=words, **SIZES, head_dim=16),
    "sliding window": lambda words: transformers.MistralConfig(vocab_size=words, **SIZES, sliding_window=32),
    "capped logits": lambda words: transformers.Gemma2Config(
        vocab_size=words, **SIZES, head_dim=16, sliding_window=32, final_logit_softcapping=3.0
    ),
}


def request(*args):
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def tokenizer(source):
    return load_tokenizer(source.path)


@pytest.fixture(scope="module")
def text(tokenizer):
    """Returns a function that draws a text of so many words, the same in every run."""
    drawn = torch.randint(100, 2000, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    words, draw = tokenizer.decode(drawn).split(" "), random.Random(0)
    return lambda count: " ".join(draw.choice(words) for _ in range(count))


@pytest.fixture(scope="module")
def pairs(text):
    """One and several tokens, one and several choices, a shared prefix, no context, too long, asked twice."""
    drawn = []
    for words in (3, 10, 40, 150, 3, 10, 40):
        context = text(words)
        drawn += [(context, " " + text(count)) for count in (1, 1, 6)]
    prefix = text(45)
    for _ in range(6):
        context = f"{prefix} {text(5)}"
        drawn += [(context, " " + text(4)) for _ in range(3)]
    return [*drawn, ("", text(5)), drawn[0]]


@pytest.fixture
def both(tokenizer):
    """Returns a function that makes a random model of one kind, in our scorer and in stock's."""

    def make(config):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        for weight in model.parameters():  # as drawn, logits are all but equal
            weight.data *= 4 if weight.dim() > 1 else 1
        options = {"pretrained": model, "tokenizer": tokenizer, "max_length": MAX_LENGTH}
        return SharedContextLM(batch_size=4, **options), HFLM(batch_size=1, **options)

    return make


def assert_same_scores(ours, stock, pairs):
    requests = [request(*pair) for pair in pairs]
    mine, theirs = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, stock))
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_request_is_answered_as_stock_does(family, both, tokenizer, text, pairs):
    ours, stock = both(FAMILIES[family](len(tokenizer)))
    assert ours.shared
    assert_same_scores(ours, stock, pairs)

    long = [request(text(300)), request(text(20))]
    mine, theirs = (lm.loglikelihood_rolling(long, disable_tqdm=True) for lm in (ours, stock))
    assert mine == pytest.approx(theirs, abs=1e-2)

    prompts = [*{context for context, _ in pairs[:21]}, *{context for context, _ in pairs[21:39]}]
    requests = [request(context, {"until": ["a", "\n\n"], "max_gen_toks": 20}) for context in sorted(prompts)]
    mine, theirs = (lm.generate_until(requests, disable_tqdm=True) for lm in (ours, stock))
    assert mine == theirs
    ours.backbone.max_tokens = 200  # contexts are read a few at a time, and their caches joined
    assert ours.generate_until(requests, disable_tqdm=True) == theirs


@pytest.mark.parametrize("settings", [{}, {"eos_token_id": "also"}, {"repetition_penalty": 1.3}])
def test_texts_end_and_are_shaped_as_the_models_own_settings_say(settings, both, tokenizer, text):
    ours, stock = both(FAMILIES["untied head"](len(tokenizer)))
    prompts = [request(text(count), {"until": ["\n\n"], "max_gen_toks": 24}) for count in (5, 9, 14, 30, 31)]
    plain = [tokenizer(answer)["input_ids"] for answer in stock.generate_until(prompts, disable_tqdm=True)]
    often = next(token for token in plain[0][2:] if token not in plain[0][:2])  # comes in the midst of a text
    own = {"eos_token_id": [ours.eot_token_id, often]} if "eos_token_id" in settings else settings
    for name, value in own.items():  # both have one model
        setattr(ours.model.generation_config, name, value)
    theirs = stock.generate_until(prompts, disable_tqdm=True)
    assert ours.generate_until(prompts, disable_tqdm=True) == theirs
    assert bool(own) == ([tokenizer(answer)["input_ids"] for answer in theirs] != plain)


@pytest.mark.parametrize(("min_saved_work", "reads"), [(0, 1), (10**12, 0)])
def test_a_shared_prefix_is_read_once_if_it_saves_enough(min_saved_work, reads, both, tokenizer, pairs, monkeypatch):
    ours, stock = both(FAMILIES["untied head"](len(tokenizer)))
    read, lengths = Backbone.read, []
    monkeypatch.setattr(Backbone, "read", lambda self, prefix: lengths.append(len(prefix)) or read(self, prefix))
    monkeypatch.setitem(scorer.MIN_SAVED_WORK, "cpu", min_saved_work)
    assert_same_scores(ours, stock, pairs)
    assert sum(length > 0 for length in lengths) == reads and all(length == 0 or length > 40 for length in lengths)


def test_compiled_layers_give_the_same_scores_and_are_given_back(both, tokenizer, pairs, monkeypatch):
    ours, stock = both(FAMILIES["untied head"](len(tokenizer)))
    monkeypatch.setitem(backbone.MIN_COMPILED_WORK, "cpu", 0)
    monkeypatch.setitem(backbone.COMPILE, "backend", "eager")
    compiled, score = [], Backbone.score

    def watched(self, *arguments):
        compiled.append(sum(bool(module._compiled_call_impl) for module in self.model.modules()))
        return score(self, *arguments)

    monkeypatch.setattr(Backbone, "score", watched)
    assert_same_scores(ours, stock, pairs)
    assert set(compiled) == {SIZES["num_hidden_layers"]}
    assert not any(module._compiled_call_impl for module in ours.model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compiled_layers_are_as_near_to_float32_as_the_models_own_kernels(dtype, both, tokenizer, pairs, monkeypatch):
    ours, stock = both(FAMILIES["untied head"](len(tokenizer)))
    requests = [request(*pair) for pair in pairs]
    expected = torch.tensor([value for value, _ in stock.loglikelihood(requests, disable_tqdm=True)])
    model = ours.model.to("cuda", dtype)
    errors = []
    for work in (float("inf"), 0):
        monkeypatch.setitem(backbone.MIN_COMPILED_WORK, "cuda", work)
        lm = SharedContextLM(pretrained=model, tokenizer=tokenizer, max_length=MAX_LENGTH)
        values = torch.tensor([value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)])
        errors.append(float((values - expected).abs().mean()))
    assert errors[1] < 1.5 * errors[0]


def test_a_model_that_takes_no_mask_is_left_to_stock(both, tokenizer, pairs, caplog):
    config = transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=64, n_layer=2, n_head=4)
    ours, stock = both(config)
    assert not ours.shared and "Bloom" in caplog.text
    assert_same_scores(ours, stock, pairs[:6])


def test_running_out_of_memory_halves_the_batch_and_loses_nothing(both, tokenizer, pairs, monkeypatch):
    ours, stock = both(FAMILIES["untied head"](len(tokenizer)))
    score, failed = Backbone.score, []

    def small(self, rows, *more):
        if len(rows) > 2:
            failed.append(len(rows))
            raise torch.cuda.OutOfMemoryError("simulated")
        return score(self, rows, *more)

    monkeypatch.setattr(Backbone, "score", small)
    assert_same_scores(ours, stock, pairs)
    assert failed
