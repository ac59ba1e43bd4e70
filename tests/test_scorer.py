"""Shared contexts give stock lm-eval's answers, on every kind of request and on models of several families."""

import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from qnb.accuracy import scorer
from qnb.accuracy.scorer import SharedContextLM
from qnb.quantize.checkpoint import load_tokenizer

LIMIT = 250  # tokens a model here takes
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


def asked(*args):
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
    """One and several tokens, one and several choices, a shared beginning, no context, too long, asked twice."""
    made = []
    for words in (3, 10, 40, 150, 3, 10, 40):
        context = text(words)
        made += [(context, " " + text(count)) for count in (1, 1, 6)]
    beginning = text(45)
    for _ in range(6):
        context = f"{beginning} {text(5)}"
        made += [(context, " " + text(4)) for _ in range(3)]
    return [*made, ("", text(5)), made[0]]


def both(config, tokenizer):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for weight in model.parameters():  # as drawn, logits are all but equal
        weight.data *= 4 if weight.dim() > 1 else 1
    options = {"pretrained": model, "tokenizer": tokenizer, "max_length": LIMIT}
    return SharedContextLM(batch_size=4, **options), HFLM(batch_size=1, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_request_is_answered_as_stock_does(family, tokenizer, text, pairs):
    ours, stock = both(FAMILIES[family](len(tokenizer)), tokenizer)
    assert ours.shared
    requests = [asked(*pair) for pair in pairs]
    mine, theirs = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, stock))
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]

    long = [asked(text(300)), asked(text(20))]
    mine, theirs = (lm.loglikelihood_rolling(long, disable_tqdm=True) for lm in (ours, stock))
    assert mine == pytest.approx(theirs, abs=1e-2)

    prompts = [*{context for context, _ in pairs[:21]}, *{context for context, _ in pairs[21:39]}]
    generated = [asked(context, {"until": ["a", "\n\n"], "max_gen_toks": 20}) for context in sorted(prompts)]
    mine, theirs = (lm.generate_until(generated, disable_tqdm=True) for lm in (ours, stock))
    assert mine == theirs
    ours._budget = 200  # contexts are read a few at a time, and joined
    assert ours.generate_until(generated, disable_tqdm=True) == theirs


@pytest.mark.parametrize("own", [{}, {"eos_token_id": "also"}, {"repetition_penalty": 1.3}])
def test_texts_end_and_are_shaped_as_the_models_own_settings_say(own, tokenizer, text):
    ours, stock = both(FAMILIES["untied head"](len(tokenizer)), tokenizer)
    prompts = [asked(text(count), {"until": ["\n\n"], "max_gen_toks": 24}) for count in (5, 9, 14, 30, 31)]
    said = [tokenizer(answer)["input_ids"] for answer in stock.generate_until(prompts, disable_tqdm=True)]
    often = next(token for token in said[0][2:] if token not in said[0][:2])  # comes in the midst of a text
    settings = {"eos_token_id": [ours.eot_token_id, often]} if "eos_token_id" in own else own
    for name, value in settings.items():  # both have one model
        setattr(ours.model.generation_config, name, value)
    theirs = stock.generate_until(prompts, disable_tqdm=True)
    assert ours.generate_until(prompts, disable_tqdm=True) == theirs
    assert bool(settings) == ([tokenizer(answer)["input_ids"] for answer in theirs] != said)


@pytest.mark.parametrize(("least", "reads"), [(0, 1), (10**12, 0)])
def test_a_beginning_is_read_by_itself_only_where_it_saves_enough(least, reads, tokenizer, pairs, monkeypatch):
    ours, stock = both(FAMILIES["untied head"](len(tokenizer)), tokenizer)
    read, seen = ours._read, []
    monkeypatch.setattr(ours, "_read", lambda prefix: seen.append(prefix) or read(prefix))
    monkeypatch.setitem(scorer.SAVED, "cpu", least)
    requests = [asked(*pair) for pair in pairs]
    mine, theirs = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, stock))
    assert len(seen) == reads
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in theirs], abs=1e-3)


def test_a_model_that_takes_no_mask_is_scored_as_stock_does(tokenizer, pairs):
    config = transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=64, n_layer=2, n_head=4)
    ours, stock = both(config, tokenizer)
    assert not ours.shared
    requests = [asked(*pair) for pair in pairs[:6]]
    mine, theirs = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, stock))
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in theirs], abs=1e-3)


def test_running_out_of_memory_halves_the_batch_and_loses_nothing(tokenizer, pairs, monkeypatch):
    ours, stock = both(FAMILIES["untied head"](len(tokenizer)), tokenizer)
    forward, failed = ours._forward, []

    def small(batch, *rest):
        if len(batch) > 2:
            failed.append(len(batch))
            raise torch.cuda.OutOfMemoryError("simulated")
        return forward(batch, *rest)

    monkeypatch.setattr(ours, "_forward", small)
    requests = [asked(*pair) for pair in pairs]
    mine, theirs = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, stock))
    assert failed
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in theirs], abs=1e-3)
