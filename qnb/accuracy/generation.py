"""Continue prompts greedily, many at a time: a shared prefix is read once, and a row that is done leaves its batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import Cache, GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from qnb.accuracy.backbone import Backbone, Tokens, repeat
from qnb.accuracy.captured_step import CapturedStep, may_be_captured
from qnb.capture import SlotCache
from qnb.finite import check_finite
from qnb.memory import bytes_for_batches, kv_cache_bytes_per_token

MAX_ROWS = {"cuda": 512, "cpu": 16}
CHECK_EVERY = 8  # new tokens between two looks for stop sequences
# settings that leave greedy texts alone: the tokens at their ends, and how other texts are sampled
HARMLESS = {"bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p",
            "typical_p", "max_length", "use_cache", "cache_implementation", "transformers_version",
            "_from_model_config"}  # fmt: skip
# values by which the other numbers do; not set, any setting does
NEUTRAL = {"min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
           "epsilon_cutoff": 0, "eta_cutoff": 0, "diversity_penalty": 0, "penalty_alpha": 0, "num_beams": 1,
           "num_beam_groups": 1, "num_return_sequences": 1, "repetition_penalty": 1, "encoder_repetition_penalty": 1,
           "length_penalty": 1, "guidance_scale": 1}  # fmt: skip


def is_shaped(config: GenerationConfig) -> bool:
    """Return whether a model's own settings may make its greedy texts other than its likeliest tokens."""
    return any(
        name not in HARMLESS and value is not None and value is not False and value != NEUTRAL.get(name)
        for name, value in config.to_diff_dict().items()
    )


@dataclass(frozen=True, slots=True)
class Prompt:
    """A context to continue, for the request at `position`."""

    position: int
    tokens: Tokens
    stop_sequences: list[str]
    max_new_tokens: int


class GreedyGenerator:
    """Greedy generation by one model, up to any token by which the model or its tokenizer ends a text."""

    def __init__(self, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> None:
        self.backbone, self.decode = backbone, tokenizer.decode
        ends = backbone.model.generation_config.eos_token_id or []
        self.end_tokens = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    def fitting_rows(self, length: int) -> int:
        """Return how many rows of `length` tokens fit with their KV cache, beside a pass over contexts."""
        backbone, config = self.backbone, self.backbone.config
        token_bytes = kv_cache_bytes_per_token(config, backbone.model.dtype.itemsize)
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        # attention reads keys and values of one layer at a time, repeated for each of its queries' heads
        repeated = (1 + config.num_attention_heads / kv_heads) / config.num_hidden_layers
        free = bytes_for_batches(backbone.device) - backbone.max_tokens * backbone.activation_bytes
        rows = 0.9 * free // (token_bytes * length * (1 + repeated))
        return int(max(1, min(rows, MAX_ROWS[backbone.device.type])))

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], prefix_length: int, past: Cache | None) -> list[list[int]]:
        """Return each prompt's new tokens, up to the first end token; stop sequences are not cut off.

        All prompts ask for as many new tokens. `past` holds the first `prefix_length` tokens, which they share.

        Raises
        ------
        NotFiniteError
            A logit is infinite or undefined.
        """
        # 1) prefill
        batch = _Batch(self.backbone, prompts, prefix_length, past)
        # 2) decode, and look at the new tokens every few steps
        texts: list[list[int]] = [[] for _ in prompts]
        rows = going = list(range(len(prompts)))  # the batch's, and the places of those that are not done
        last_step = prompts[0].max_new_tokens
        for start in range(0, last_step, CHECK_EVERY):
            steps = [batch.step() for _ in range(min(CHECK_EVERY, last_step - start))]
            ids, logits = (torch.cat(parts, 1)[going] for parts in zip(*steps, strict=True))  # (going, steps) each
            check_finite(logits, "largest logits of new tokens", self.backbone.model)
            for place, tokens in zip(going, ids.tolist(), strict=True):
                texts[rows[place]] += tokens
            going = [place for place in going if not self._is_done(texts[rows[place]], prompts[rows[place]])]
            if not going:
                break
            # a captured step of fewer rows is another one, so half of them have to be done
            if len(going) < len(rows) and (2 * len(going) <= len(rows) or not batch.is_captured):
                batch.keep(going)
                rows = [rows[place] for place in going]
                going = list(range(len(rows)))
        # 3) cut
        return [self._cut(text) for text in texts]

    def _is_done(self, text: list[int], prompt: Prompt) -> bool:
        """Return whether a text needs no more tokens, looking only at what is new since the last look.

        A stop sequence found there is looked for in the whole text, which is cut at it later. One that is missed
        because words look different at the edge costs a few tokens, no answer.
        """
        tail = text[-(CHECK_EVERY + max(map(len, prompt.stop_sequences), default=0)) :]
        if len(text) >= prompt.max_new_tokens or not self.end_tokens.isdisjoint(tail):
            return True
        return all(any(stop in self.decode(part) for stop in prompt.stop_sequences) for part in (tail, text))

    def _cut(self, text: list[int]) -> list[int]:
        """Return a text without what was generated after its first end token."""
        return text[: next((place for place, token in enumerate(text, 1) if token in self.end_tokens), None)]


class _Batch:
    """Rows that are generated together: their KV cache, mask and positions, one token after another."""

    def __init__(self, backbone: Backbone, prompts: Sequence[Prompt], prefix_length: int, past: Cache | None) -> None:
        self.backbone = backbone
        width = max(len(prompt.tokens) for prompt in prompts)
        paddings = [width - len(prompt.tokens) for prompt in prompts]
        padded = [[0] * n + [*prompt.tokens[prefix_length:]] for n, prompt in zip(paddings, prompts, strict=True)]
        ids, start = backbone.integers(padded), backbone.integers(paddings)[:, None]  # (B, L), (B, 1)
        order = torch.arange(width - prefix_length, device=ids.device)
        positions = (prefix_length + order - start).clamp(min=0)  # (B, L)
        mask = pad(order >= start, (prefix_length, 0), value=True)  # (B, P+L)
        new_tokens = max(prompt.max_new_tokens for prompt in prompts)
        self.ids: Any = None  # chosen last, (B, 1)
        self.width, self.positions = width, positions[:, -1:]
        self.mask = pad(mask, (0, new_tokens), value=True)  # (B, P+L+new)
        # contexts take more memory than steps, so they are read some at a time, and their caches joined
        size = max(1, backbone.max_tokens // ids.shape[1])
        chunks = zip(ids.split(size), mask.long().split(size), positions.split(size), strict=True)
        parts = [self._read(*chunk, repeat(past, len(chunk[0]))) for chunk in chunks]
        self.last = torch.cat([last for last, _ in parts])  # (B, D)
        self.past: Any = _join([cache for _, cache in parts], width + new_tokens, backbone.window)
        self.is_captured = may_be_captured(backbone, self.past, new_tokens)
        self.captured: CapturedStep | None = None

    def _read(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, past: Cache | None) -> Any:
        """Read tokens (B, L); return the last one's hidden states (B, D), and the KV cache with all."""
        hidden, past = self.backbone.run(ids, past, attention_mask=mask, position_ids=positions, use_cache=True)
        return hidden[:, -1], past

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the tokens that were chosen last, if any were; return the likeliest next ones and their logits.

        Both are (B, 1). The logit is nan where any of the row's is.
        """
        if self.ids is not None:
            self.width, self.positions = self.width + 1, self.positions + 1
            if self.is_captured and (chosen := self._replay()):
                self.ids = chosen[0]
                return chosen
            if isinstance(self.past, SlotCache):
                self.past.slots, self.past.attended = self.backbone.integers([self.width - 1]), self.width
            seen = self.mask[:, : self.width]
            # where some layers see a window only, the model makes a mask for each kind of layer
            windowed = self.backbone.window < inf
            mask = seen.long() if windowed else self.backbone.attention_mask(seen[:, None, None])
            self.last, self.past = self._read(self.ids, mask, self.positions, self.past)
        logits = self.backbone.project(self.last)  # (B, V)
        self.ids = logits.argmax(-1, keepdim=True)
        return self.ids, logits.gather(-1, self.ids)

    def _replay(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Do the captured step, captured where it is not yet; None where it cannot be."""
        if self.captured is None:
            read = torch.arange(self.mask.shape[1], device=self.mask.device) < self.width
            self.captured = CapturedStep(self.backbone, self.past, self.mask & read)
        chosen = self.captured(self.ids, self.positions, self.width - 1)
        self.is_captured = chosen is not None
        return chosen

    def keep(self, places: list[int]) -> None:
        """Drop all other rows."""
        rows, self.captured = self.backbone.integers(places), None
        self.past.batch_select_indices(rows)
        self.ids, self.positions, self.mask = self.ids[rows], self.positions[rows], self.mask[rows]


def _join(caches: list[Cache], room: int, window: float) -> Cache:
    """Join the caches of some rows each into one; where no layer has a window, with room for `room` tokens a row."""
    is_fixed = window == inf and all(type(layer) is DynamicLayer for layer in caches[0].layers)
    buffers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layer = layers[0]
        layer.keys, layer.values = (torch.cat([getattr(part, name) for part in layers]) for name in ("keys", "values"))
        for part in layers[1:]:
            part.keys = part.values = None  # a large batch leaves no memory for both
        if is_fixed:
            keys, values = (pad(each, (0, 0, 0, room - each.shape[2])) for each in (layer.keys, layer.values))
            buffers.append((keys, values))
            layer.keys = layer.values = None
    return SlotCache(buffers) if is_fixed else caches[0]
