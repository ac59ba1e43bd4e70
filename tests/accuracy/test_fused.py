"""Fused pieces give what the model's own parts give, and are put in where they do and nowhere else."""

import pytest
import torch
import transformers
from test_scorer import FAMILIES, SIZES, assert_same_scores, both, pairs, request, text, tokenizer  # noqa: F401
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from qnb.accuracy import fused


class OffsetRMSNorm(LlamaRMSNorm):
    """Gemma's kind."""

    def forward(self, hidden):
        return super().forward(hidden) * (1 + self.weight) / self.weight


def replaced(model):
    """Return the kinds of modules whose forward is not their own."""
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_are_replaced_where_they_are_the_models_own_arithmetic(dtype):
    config = transformers.LlamaConfig(vocab_size=64, **SIZES)
    network = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    network.norms = torch.nn.ModuleList([LlamaRMSNorm(64), OffsetRMSNorm(64), Qwen3RMSNorm(64)]).to(dtype)
    for norm in network.norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    hidden = torch.randn(2, 7, 64).to(dtype)
    expected = [norm(hidden) for norm in network.norms]
    with fused.fused(network):
        assert ["forward" in vars(norm) for norm in network.norms] == [True, False, True]
        for norm, own in zip(network.norms, expected, strict=True):
            assert torch.allclose(norm(hidden), own, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert not replaced(network)


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("untied head", {"LlamaRMSNorm", "LlamaMLP"}),
        ("learned positions", set()),
        ("normed queries", {"Qwen3RMSNorm", "Qwen3MLP"}),
        ("sliding window", {"MistralRMSNorm", "MistralMLP"}),
        ("capped logits", set()),
    ],
)
def test_a_fused_model_scores_as_stock_does(family, kinds, both, tokenizer, pairs):  # noqa: F811
    ours, stock = both(FAMILIES[family](len(tokenizer)))
    with fused._pieces(ours.backbone, compiled=False):  # as on a GPU
        assert replaced(ours.model) == kinds
        assert (ours.model.config._attn_implementation == fused.GROUPED) is bool(kinds)
        contexts = sorted({context for context, _ in pairs[:21]})
        prompts = [request(context, {"until": ["a"], "max_gen_toks": 20}) for context in contexts]
        scores = ours.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
        texts = ours.generate_until(prompts, disable_tqdm=True)
    assert not replaced(ours.model)
    assert ours.model.config._attn_implementation == stock.model.config._attn_implementation != fused.GROUPED
    ours.loglikelihood = lambda *_, **__: scores
    assert_same_scores(ours, stock, pairs)
    assert texts == stock.generate_until(prompts, disable_tqdm=True)


def partial_heads():
    config = transformers.Phi3Config(vocab_size=64, **SIZES, partial_rotary_factor=0.5, pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(config)


def test_angles_of_a_part_of_each_head_turn_that_part():
    network, ids = partial_heads(), torch.arange(20)[None] + 3
    expected = network(ids).logits
    with fused.fused(network):
        assert torch.allclose(network(ids).logits, expected, atol=1e-5)


def test_a_gate_of_another_kind_keeps_its_own(tokenizer):  # noqa: F811
    network = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=64, **SIZES))
    network.model.layers[1].mlp.act_fn = torch.nn.GELU()
    with fused.fused(network):
        assert ["forward" in vars(layer.mlp) for layer in network.model.layers] == [True, False, True]


def test_a_mask_too_large_for_groups_comes_back_as_it_is(monkeypatch):
    network = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=64, **SIZES))
    seen, ids = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril(), torch.arange(20)[None] + 3
    expected = network(ids, attention_mask=seen).logits
    with fused.fused(network):
        assert fused.grouped(seen, network).shape == (1, 1, 40, 20)
        monkeypatch.setattr(fused, "MASK_BYTES", 100)
        assert fused.grouped(seen, network) is seen
        assert torch.allclose(network(ids, attention_mask=seen).logits, expected, atol=1e-5)


def test_a_kernel_that_cannot_be_built_runs_as_its_operations_and_is_said_once(monkeypatch, caplog):
    def broken(piece, **_):
        def run(*_):
            raise RuntimeError("no compiler here")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    fused._compiled.cache_clear()
    try:
        pieces, ones = fused.Pieces(compiled=True), torch.ones(2, 4)
        for _ in range(2):
            assert torch.equal(pieces.gated(ones, ones), fused.gated(ones, ones))
        assert [record.getMessage() for record in caplog.records] == [
            "gated is not fused: RuntimeError: no compiler here"
        ]
    finally:
        fused._compiled.cache_clear()
        fused._broken.clear()


def test_rotary_angles_are_replaced_while_it_lasts_and_given_back_after_an_error():
    network = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=64, **SIZES))
    home = transformers.models.llama.modeling_llama
    own = home.apply_rotary_pos_emb
    ids = torch.arange(20)[None] + 3
    expected = network(ids).logits
    with pytest.raises(ZeroDivisionError), fused.fused(network):
        assert home.apply_rotary_pos_emb is not own
        assert torch.allclose(network(ids).logits, expected, atol=1e-5)
        raise ZeroDivisionError
    assert home.apply_rotary_pos_emb is own and not replaced(network)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compiled_pieces_are_as_near_to_float32_as_the_models_own_kernels(dtype):
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=512, **SIZES)).cuda()
    ids = torch.randint(3, 512, (6, 40), device="cuda")
    seen = torch.ones(6, 1, 40, 40, dtype=torch.bool, device="cuda").tril()
    with torch.inference_mode():
        truth = network(ids).logits
        network.to(dtype)
        own = (network(ids, attention_mask=seen).logits.float() - truth).abs().mean()
        assert fused.compiles(network.device, dtype)
        with fused.fused(network, compiled=True) as pieces:
            logits = network(ids, attention_mask=fused.grouped(seen, network)).logits
            mine, wrong = pieces.likelihoods(logits[0], ids[0])
        assert (logits.float() - truth).abs().mean() < 1.5 * own
    assert torch.allclose(mine, logits[0].float().log_softmax(1).gather(1, ids[0][:, None])[:, 0], atol=1e-4)
    assert wrong.tolist() == (logits[0].argmax(1) != ids[0]).long().tolist()
