"""Oracles of the decode step: the model's own forward, and float32 on the stored weights."""

import copy
import math

import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from qnb.precision import PRECISIONS
from qnb.quantize import checkpoint
from qnb.speed.engines import pad

TINY = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
        "eos_token_id": 7, "pad_token_id": 0}  # fmt: skip
ONE, THREE = [[5, 6, 8, 9, 10]], [[5, 6, 8, 9, 10], [4, 3], [11, 12, 13]]
TEXTS = ("The capital of France is", "Once upon a time, by the sea,", "Oh", "A list of fruit: apples,", "2 + 2 =",
         "The president said that", "It was a dark", "Dear Sir or Madam,", "My favourite colour is",
         "In the year 1969", "Water boils at", "def main():")  # fmt: skip
ROUNDING = 1.25  # the step's error against float32 may be so many times that of the model's own forward
FLOAT32 = 1e-4  # of the logits, eager's error at least: in float32 it is the truth
TIE = 3  # two tokens whose logits are nearer than so many times that forward's error are as good as equal


def tiny_model(config, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**TINY, **more)).float().eval()


def tokenized(source):
    tokenizer = checkpoint.load_tokenizer(source.path)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def decode(decoder, prompts, new_tokens):
    """The decoder's own tokens, (B, N)."""
    decoder.load(prompts)
    decoder.prefill(len(prompts))
    for _ in range(new_tokens - 1):
        decoder.step(len(prompts))
    return decoder.new_ids(len(prompts), new_tokens)


def decode_forced(decoder, prompts, forced, step=None):
    """Logits after each token of `forced`, (B, N) -> (B, N, V), which are read whatever was chosen."""
    decode(decoder, prompts, 1)
    logits = []
    for tokens in forced.T:
        decoder.token[: len(prompts)] = tokens
        logits.append((step or decoder.step)(len(prompts)).float())
    return torch.stack(logits, 1)


@torch.no_grad()
def decode_stock(model, prompts, forced):
    """The same and before it those of the prompts, (B, 1 + N, V), from the model's own forward and growing cache."""
    ids, padding = pad(prompts, model.device)
    mask = (torch.arange(ids.shape[1], device=ids.device) >= padding[:, None]).long()
    cache, logits = None, []
    for step in range(forced.shape[1] + 1):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(
            input_ids=forced[:, step - 1 : step] if step else ids,
            position_ids=positions[:, -1:] if step else positions,
            attention_mask=mask, past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache = out.past_key_values
        logits.append(out.logits[:, -1].float())
        mask = torch.cat((mask, mask.new_ones(len(prompts), 1)), 1)
    return torch.stack(logits, 1)


@torch.no_grad()
def unrounded(model, folder):
    """The float32 model whose weights are those that `model` stores, dequantized: all else is rounding.

    Make it before the first product, in which bitsandbytes moves INT8 weights and, on some CPUs, rounds 4-bit maxima.
    """
    from bitsandbytes import functional, nn

    exact = checkpoint.load(folder, PRECISIONS["fp32"], model.device.type)
    for name, weight in model.named_parameters():
        stored = weight.data
        if isinstance(weight, nn.Params4bit):
            state = copy.copy(weight.quant_state)
            state.dtype = torch.float32  # in its own, 16 bit, the weights would be rounded
            stored = functional.dequantize_4bit(stored, state)
        elif isinstance(weight, nn.Int8Params):
            stored = weight.CB * weight.SCB[:, None] / 127
        elif hasattr(weight, "act_quant_kwargs"):
            stored = weight.dequantize(torch.float32)
        elif hasattr(weight, "scale_and_zero"):  # torchao only multiplies by it, in bfloat16
            stored = linear(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), weight).T
        exact.get_parameter(name).copy_(stored)
    return exact


def rms(logits, axis=None):
    return logits.pow(2).mean(axis).sqrt()


def widest_tie(truth, first, second):
    """How far apart `truth`, (B, N, V), has two tokens where a row of `first` and of `second`, (B, N), first differ.

    Logits of `truth` are of texts that go on as in `first`. 0 where no row differs.
    """
    differs = first != second
    rows = differs.any(1)
    places = differs.long().argmax(1)[rows]
    pairs = torch.stack((first, second), -1)[rows, places]  # (b, 2)
    apart = truth[rows, places].gather(1, pairs).diff(dim=1)  # (b, 1)
    return max(apart.abs().flatten().tolist(), default=0.0)


def assert_differs_by_rounding(ours, theirs, truth, first, second):
    """Hold an engine to eager's own error: its logits on eager's tokens `first`, (B, N), and its own tokens `second`.

    `ours` is from `decode_forced`, the others from `decode_stock`. `truth` multiplies the stored weights in float32.
    Three bounds, in units of eager's error against it:

    - The engine's error is at most `ROUNDING` of it, in the geometric mean over rows and tokens: a rounding grows by
      chance on its way through the layers, so at one token either may be off twice as far. Twelve prompts gave 0.87
      to 1.12, three 0.64 to 1.43: take twelve. An error more that is 0.75 of it on every token fails.
    - The two engines are no further apart than two such errors that have nothing in common. That sees what befalls few
      tokens.
    - Their own tokens first differ where `truth` has them within `TIE` of each other.
    """
    tie = widest_tie(truth, first, second)
    theirs, truth = theirs[:, 1:], truth[:, 1:]
    least = FLOAT32 * float(rms(truth))
    error = max(least, float(rms(theirs - truth)))
    assert (rms(ours - truth, -1) / rms(theirs - truth, -1).clamp(min=least)).log().mean().exp() <= ROUNDING
    assert rms(ours - theirs) <= math.hypot(1, ROUNDING) * error
    assert tie <= TIE * error
