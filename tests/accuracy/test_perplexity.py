"""Every token is scored once; perplexity and divergence against hand counts and a pass over each window."""

import json
import math

import pandas as pd
import pytest
import torch
from conftest import random_model
from tiny_models import TINY
from transformers import LlamaConfig

from qnb import InputError
from qnb.accuracy import perplexity
from qnb.accuracy.perplexity import DivergenceOptions, distances, divergence, summarize, windows
from qnb.finite import NotFiniteError


@pytest.mark.parametrize(("tokens", "context", "stride"), [(10, 4, 2), (11, 4, 3), (5, 8, 4), (8, 4, 2), (2, 4, 1)])
def test_every_token_but_the_first_is_scored_once(tokens, context, stride):
    scored = []
    for number, (start, first, end) in enumerate(windows(tokens, context, stride)):
        assert start < first < end <= tokens and end - start <= context
        assert number == 0 or first - start >= context - stride
        scored += range(first, end)
    assert scored == list(range(1, tokens))
    with pytest.raises(InputError, match="ppl_tokens"):
        list(windows(1, context, stride))


@pytest.fixture
def models():
    """Two random models of one shape."""
    return [random_model(LlamaConfig(**TINY), seed) for seed in (0, 1)]


def test_against_a_pass_over_each_window_by_hand(models):
    ids = torch.randint(0, 50, (37,), generator=torch.Generator().manual_seed(0)).tolist()
    found = distances(*models, ids, 12, 6)
    assert len(found) == 36
    row = 0
    for start, first, end in windows(37, 12, 6):
        with torch.inference_mode():
            own, other = (each(torch.tensor([ids[start:end]])).logits[0].double() for each in models)
        for place in range(first, end):
            p, q = (torch.log_softmax(each[place - start - 1], 0) for each in (own, other))
            assert found.nll[row] == pytest.approx(-float(p[ids[place]]), abs=1e-4)
            assert found.nll_base[row] == pytest.approx(-float(q[ids[place]]), abs=1e-4)
            assert found.kl[row] == pytest.approx(float((q.exp() * (q - p)).sum()), abs=1e-4)
            assert found.same[row] == (p.argmax() == q.argmax())
            row += 1


def test_a_model_is_compared_with_itself_one_window_at_a_time(models):
    (model, other), batches, ids = models, [], list(range(37))
    model.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    own = distances(model, model, ids, 12, 6)
    assert batches == [6, 1, 1, 1, 1, 1, 1] and own.kl.max() < 1e-5 and own.same.all()
    assert own[["nll", "window"]].equals(distances(model, other, ids, 12, 6)[["nll", "window"]])


def test_what_is_remembered_of_a_baseline_is_not_computed_again(models, monkeypatch):
    (base, other), batches, ids, remembered = models, [], list(range(37)), {}
    expected = distances(other, base, ids, 12, 6)
    monkeypatch.setattr(perplexity, "_has_room", lambda _: True)
    distances(base, base, ids, 12, 6, remembered)
    base.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    assert distances(other, base, ids, 12, 6, remembered).equals(expected) and not batches


@pytest.mark.parametrize(("place", "count"), [(36, 1), (35, 6 + 1), (20, 6 + 6)])
@pytest.mark.parametrize("which", [0, 1])
def test_outputs_that_are_not_finite_are_counted_and_refused(place, count, which, models):
    """A word is undefined, and with it all outputs of the one or two windows that hold it."""
    models[which].model.embed_tokens.weight.data[49] = math.nan
    ids = [place % 49 for place in range(37)]
    ids[place] = 49
    with pytest.raises(NotFiniteError, match=f"{count} of 36 outputs"):
        distances(*models, ids, 12, 6)


def test_summary_by_hand():
    tokens = pd.DataFrame(
        {"window": [0, 0, 1, 1], "nll": [1.0, 2.0, 3.0, 2.0], "nll_base": [1.0, 1.0, 2.0, 2.0],
         "kl": [0.0, 0.2, 0.4, 0.2], "same": [True, False, True, True]}
    )  # fmt: skip
    summary = summarize(tokens)
    assert summary["perplexity"] == pytest.approx(math.e**2)
    assert summary["perplexity_change_pct"] == pytest.approx(100 * (math.e**0.5 - 1))
    assert summary["kl_mean_nats"] == pytest.approx(0.2) and summary["same_top1_pct"] == 75
    assert summary["kl_median_nats"] == 0.2 and summary["kl_p999_nats"] == pytest.approx(0.2 + 0.997 * 0.2)
    # two windows: each resample is one of them twice, or both
    assert (summary["perplexity_low"], summary["perplexity_high"]) == pytest.approx((math.e**1.5, math.e**2.5))
    assert summarize(tokens[tokens.window == 0])["perplexity_low"] is None
    alone = summarize(tokens[["window", "nll"]])
    assert alone["perplexity"] == summary["perplexity"] and alone["kl_mean_nats"] is None
    assert set(alone) == set(summary)


def test_a_window_is_no_longer_than_the_models_or_the_text(answering, monkeypatch):
    with pytest.raises(InputError, match="ppl_context is 999999"):
        divergence(answering, DivergenceOptions("sample", 96, 999999))
    assert not answering.ledger.path.exists()
    divergence(answering, DivergenceOptions("sample", 20, 64))
    monkeypatch.setattr(answering.config, "max_position_embeddings", 64)
    divergence(answering, DivergenceOptions("sample", 200))  # on a CPU auto is 128
    lines = [json.loads(line) for line in answering.ledger.path.read_text().splitlines()]
    assert [(row["context"], row["stride"], row["tokens"]) for row in lines] == [(20, 10, 20), (64, 32, 200)]
    assert lines[0]["noise_floor_nats"] is None and 0 <= lines[1]["noise_floor_nats"] < 1e-9  # one window has none


def test_fewer_windows_are_read_at_once_where_memory_runs_out(answering, monkeypatch):
    sizes = []

    def short(*arguments):
        sizes.append(arguments[4])
        if sizes[-1] > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return distances(*arguments)

    monkeypatch.setattr(perplexity, "rows_per_batch", lambda *_: 8)
    monkeypatch.setattr(perplexity, "distances", short)
    divergence(answering, DivergenceOptions("sample", 64, 16))
    assert sizes == [8, 4, 2] and len(answering.ledger.rows("divergence")) == 1
