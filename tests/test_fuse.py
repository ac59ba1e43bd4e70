"""Fused pieces give what the model's own parts give, and are put in where they do and nowhere else."""

import pytest
import torch
import transformers
from test_scorer import FAMILIES, SIZES, asked, both, pairs, text, tokenizer  # noqa: F401  # fixtures among them
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from qnb import fuse


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
    with fuse.fused(network):
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
def test_a_fused_model_scores_as_stock_does(family, kinds, tokenizer, pairs):  # noqa: F811
    ours, stock = both(FAMILIES[family](len(tokenizer)), tokenizer)
    ours._fusable = True  # as on a GPU
    seen, forward = set(), ours._forward

    def watched(*given):
        seen.update(replaced(ours.model))
        return forward(*given)

    ours._forward = watched
    requests = [asked(*pair) for pair in pairs]
    mine, theirs = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, stock))
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
    assert seen == kinds and not replaced(ours.model)
    assert ours.model.config._attn_implementation == stock.model.config._attn_implementation != fuse.GROUPED

    prompts = [asked(context, {"until": ["a"], "max_gen_toks": 20}) for context in sorted({c for c, _ in pairs[:21]})]
    mine, theirs = (lm.generate_until(prompts, disable_tqdm=True) for lm in (ours, stock))
    assert mine == theirs


def test_rotary_angles_are_replaced_while_it_lasts_and_given_back_after_an_error():
    network = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=64, **SIZES))
    home = transformers.models.llama.modeling_llama
    own = home.apply_rotary_pos_emb
    ids = torch.arange(20)[None] + 3
    expected = network(ids).logits
    with pytest.raises(ZeroDivisionError), fuse.fused(network):
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
        assert fuse.compiles(network.device, dtype)
        with fuse.fused(network, compiled=True) as pieces:
            logits = network(ids, attention_mask=fuse.grouped(seen, network)).logits
            mine, wrong = pieces.likelihoods(logits[0], ids[0])
        assert (logits.float() - truth).abs().mean() < 1.5 * own
    assert torch.allclose(mine, logits[0].float().log_softmax(1).gather(1, ids[0][:, None])[:, 0], atol=1e-4)
    assert wrong.tolist() == (logits[0].argmax(1) != ids[0]).long().tolist()
