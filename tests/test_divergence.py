"""Windows score every token once; perplexity and divergence against hand counts and against one long pass."""

import math

import pandas as pd
import pytest
import torch
import transformers

from qnb import InputError, Study
from qnb.accuracy import perplexity as divergence
from qnb.speed import engines as decode


@pytest.mark.parametrize(("tokens", "context", "stride"), [(10, 4, 2), (11, 4, 3), (5, 8, 4), (8, 4, 2), (2, 4, 1)])
def test_every_token_but_the_first_is_scored_once(tokens, context, stride):
    scored = []
    for number, (start, first, end) in enumerate(divergence.windows(tokens, context, stride)):
        assert start < first < end <= tokens and end - start <= context
        assert number == 0 or first - start >= context - stride
        scored += range(first, end)
    assert scored == list(range(1, tokens))


@pytest.mark.parametrize("given", [(1, 4, 2), (10, 4, 4), (10, 4, 0), (10, 1, 1)])
def test_windows_that_score_nothing_are_refused(given):
    with pytest.raises(InputError):
        list(divergence.windows(*given))


def tiny(seed):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for weight in model.parameters():
        weight.data *= 4 if weight.dim() > 1 else 1
    return model


def test_against_a_pass_over_each_window_by_hand():
    model, base = tiny(0), tiny(1)
    ids = torch.randint(0, 50, (37,), generator=torch.Generator().manual_seed(0)).tolist()
    found = divergence.distances(model, base, ids, 12, 6)
    assert len(found) == 36
    row = 0
    for start, first, end in divergence.windows(37, 12, 6):
        with torch.inference_mode():
            own, other = (each(torch.tensor([ids[start:end]])).logits[0].double() for each in (model, base))
        for place in range(first, end):
            p, q = (torch.log_softmax(each[place - start - 1], 0) for each in (own, other))
            assert found.nll[row] == pytest.approx(-float(p[ids[place]]), abs=1e-4)
            assert found.nll_base[row] == pytest.approx(-float(q[ids[place]]), abs=1e-4)
            assert found.kl[row] == pytest.approx(float((q.exp() * (q - p)).sum()), abs=1e-4)
            assert found.same[row] == (p.argmax() == q.argmax())
            row += 1


def test_a_model_does_not_differ_from_itself():
    model = tiny(0)
    found = divergence.summarize(divergence.distances(model, model, list(range(40)), 16, 8))
    assert found["kl_mean_nats"].value == pytest.approx(0, abs=1e-6) and found["same_top1_pct"].value == 100
    assert found["perplexity_change_pct"].value == pytest.approx(0, abs=1e-6)


def test_summary_by_hand():
    tokens = pd.DataFrame(
        {"window": [0, 0, 1, 1], "nll": [1.0, 2.0, 3.0, 2.0], "nll_base": [1.0, 1.0, 2.0, 2.0],
         "kl": [0.0, 0.2, 0.4, 0.2], "same": [True, False, True, True]}
    )  # fmt: skip
    found = divergence.summarize(tokens)
    assert found["perplexity"].value == pytest.approx(math.e**2)
    assert found["perplexity_change_pct"].value == pytest.approx(100 * (math.e**0.5 - 1))
    assert found["kl_mean_nats"].value == pytest.approx(0.2) and found["same_top1_pct"].value == 75
    assert found["perplexity"].low < math.e**2 < found["perplexity"].high
    assert divergence.summarize(tokens[tokens.window == 0])["perplexity"].low is None


def test_a_window_is_no_longer_than_the_models_or_the_text(source, tmp_path, monkeypatch):
    study = Study("smollm2-135m", "bf16", tmp_path)
    with pytest.raises(InputError, match="context is 999999, and the model's window"):
        study.divergence("sample", 96, 999999)
    assert not (tmp_path / "ledger.jsonl").exists()
    monkeypatch.setattr(decode, "window", lambda config: 64)
    made = Study("smollm2-135m", "bf16", tmp_path / "short").divergence("sample", 200)  # on a CPU auto is 128
    assert made.context.tolist() == [64]
    study.divergence("sample", 20, 64)
    assert [row["context"] for row in study.ledger if row["stage"] == "divergence"] == [20]


@pytest.mark.slow
def test_a_study_measures_each_precision_once(source, tmp_path):
    study = Study("smollm2-135m", "bf16, nf4", tmp_path)
    made = study.divergence("sample", 96, 32).set_index("precision")
    assert pd.isna(made.kl_mean_nats["bf16"]) and made.kl_mean_nats["nf4"] > 0
    change = 100 * (made.perplexity["nf4"] / made.perplexity["bf16"] - 1)
    assert made.perplexity_change_pct["nf4"] == pytest.approx(change, rel=0.02)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    assert study.divergence("sample", 96, 32).equals(made.reset_index())
    assert (tmp_path / "ledger.jsonl").read_bytes() == before and (tmp_path / "tables" / "divergence.csv").exists()
