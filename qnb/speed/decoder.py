"""Decoding in fixed memory: every shape and address stays, so that a step can be captured once and replayed.

Shapes: B rows, T prompt tokens, N new tokens, L slots of the cache, H KV heads, S head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from qnb.speed.attention import KV, KVCache, layout
from qnb.speed.decode_step import Angles, CompileOptions, FusedStep, Next, why_not_fused

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Prompts = Sequence[Sequence[int]]

PREFILL_TOKENS = 16384  # read at once; more no longer helps, and takes memory that rows could have
ALIGNMENT = 16  # the cache's length is a multiple of this, as the attention kernel wants its mask
WARM_UP_STEPS = 2  # steps run before one is captured; the cache has room for them


def pad(prompts: Prompts, pad_id: int, device: torch.device, width: int = 0) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left to the longest or to `width`; return ids, (B, T), and the padding of each row, (B,)."""
    width = max(width, *map(len, prompts))
    ids = np.full((len(prompts), width), pad_id)  # torch takes nested lists several times as slowly
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
    padding = torch.tensor([width - len(prompt) for prompt in prompts])
    return torch.from_numpy(ids).to(device), padding.to(device)


def eos_ids(model: PreTrainedModel) -> list[int]:
    """Return the ids that end a text."""
    eos = model.generation_config.eos_token_id
    return [] if eos is None else list(eos) if isinstance(eos, list) else [eos]


def pad_id(model: PreTrainedModel) -> int:
    """Return the id to pad prompts with: the model's own, or else an end of sequence."""
    own = model.generation_config.pad_token_id
    return own if own is not None else (*eos_ids(model), 0)[0]


class Decoder:
    """Prompts read into fixed memory, then decode steps over that memory, one token a row each.

    Run without capturing, a step is the same arithmetic on any device.

    Parameters
    ----------
    model
        A loaded model that keeps keys and values of every token.
    batch_size
        The largest batch.
    prompt_tokens
        Tokens of the longest prompt; all prompts are padded to it on the left.
    new_tokens
        The most new tokens a row.
    compile_options
        For torch.compile; None runs the step uncompiled.
    """

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, batch_size: int, prompt_tokens: int, new_tokens: int,
        compile_options: CompileOptions = None,
    ) -> None:  # fmt: skip
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.long, device=model.device)

        tokens = prompt_tokens + new_tokens + WARM_UP_STEPS
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self._model, self.prompt_tokens = model, prompt_tokens
        self._suppressed = torch.zeros(vocabulary, dtype=model.dtype, device=model.device)
        self._suppressed[eos_ids(model)] = float("-inf")  # (V,)
        self._ids, self.token = zeros(batch_size, tokens), zeros(batch_size)  # (B, T + N), (B,)
        padding, slot, length = zeros(batch_size), zeros(1), -(-tokens // ALIGNMENT) * ALIGNMENT
        self.network = ModelStep(model) if why_not_fused(model) else fused_step(model, compile_options)
        self._angles = self.network.rotary_angles(length)
        self._cache = KVCache(empty_layers(model, batch_size, length), padding, slot, length)

    def load(self, prompts: Prompts) -> bool:
        """Put prompts where `prefill` reads them; return whether any of them is padded."""
        ids, padding = pad(prompts, pad_id(self._model), self._model.device, self.prompt_tokens)  # (B, T), (B,)
        self._ids[: len(prompts), : self.prompt_tokens] = ids
        self._cache.padding[: len(prompts)] = padding
        return min(map(len, prompts)) < self.prompt_tokens

    @torch.no_grad()
    def prefill(self, batch_size: int, padded: bool = True) -> None:
        """Read the first `batch_size` prompts of `load` and choose their first new tokens.

        Rows are read in chunks that are enough to keep a device busy: what a chunk needs besides its keys and values
        is given back before the next. All chunks are of one size, so that memory fits again: the last one begins
        before its rows do, and reads some twice.
        """
        chunks = -(-batch_size // max(1, PREFILL_TOKENS // self.prompt_tokens))
        chunk_rows = -(-batch_size // chunks)
        for row in range(0, batch_size, chunk_rows):
            last = min(row + chunk_rows, batch_size)
            first = last - chunk_rows
            ids, cache = self._ids[first:last, : self.prompt_tokens], self._cache.rows(first, last)
            _, chosen = self.network.prefill(ids, cache, padded, self._angles, self._suppressed)
            self.token[first:last] = self._ids[first:last, self.prompt_tokens] = chosen
        self.restart()

    @torch.no_grad()
    def step(self, batch_size: int) -> Tensor:
        """Read the last token of the first `batch_size` rows and choose the next one; return its logits, (B, V)."""
        token, cache = self.token[:batch_size], self._cache.rows(0, batch_size)
        logits, chosen = self.network.decode(token, cache, self._angles, self._suppressed)
        cache.slot.add_(1)
        self.token[:batch_size] = chosen
        self._ids[:batch_size].index_copy_(1, cache.slot, chosen[:, None])
        return logits

    def restart(self) -> None:
        """Let new tokens follow the prompts."""
        self._cache.slot.fill_(self.prompt_tokens)

    def new_ids(self, batch_size: int, new_tokens: int) -> Tensor:
        """Return the tokens chosen since the prompts were read, (B, N)."""
        return self._ids[:batch_size, self.prompt_tokens : self.prompt_tokens + new_tokens].clone()


_fused_steps: WeakKeyDictionary[PreTrainedModel, FusedStep] = WeakKeyDictionary()


def fused_step(model: PreTrainedModel, compile_options: CompileOptions) -> FusedStep:
    """Return a model's fused step, built once: it joins the weights."""
    if model not in _fused_steps:
        if compile_options is not None:
            torch.compiler.reset()  # another model's step is no use, and only so many stay compiled
        _fused_steps[model] = FusedStep(model, compile_options)
    return _fused_steps[model]


def empty_layers(model: PreTrainedModel, batch_size: int, length: int) -> list[KV]:
    """Return each layer's empty keys and values, (B, H, L, S) each, of the shapes that one token's have.

    They are allocated before any prompt is read. Allocated meanwhile, they would stand between pieces too small for
    the next tensors: on an H100 held to 15 GiB that lost up to a fifth of the memory.
    """
    cache, token = DynamicCache(), torch.zeros(1, 1, dtype=torch.long, device=model.device)
    run_model(model, cache, input_ids=token, attention_mask=None, position_ids=token)
    one_token = [(layer.keys, layer.values) for layer in cache.layers]  # (1, H, 1, S) each
    return [tuple(part.new_zeros(batch_size, part.shape[1], length, part.shape[3]) for part in kv) for kv in one_token]


class ModelStep:
    """The model's own forward over a `KVCache`, with the methods of `FusedStep`, for models of other families."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.note = f"the model's own forward: {why_not_fused(model)}"

    def rotary_angles(self, length: int) -> Angles:
        """Return none: the model has its own."""
        return ()

    def decode(self, token: Tensor, cache: KVCache, angles: Angles, suppressed: Tensor) -> Next:
        """Do what `FusedStep.decode` does."""
        return self._run(token[:, None], cache, cache.slot, cache.length, cache.padding, suppressed)

    def prefill(self, ids: Tensor, cache: KVCache, padded: bool, angles: Angles, suppressed: Tensor) -> Next:
        """Do what `FusedStep.prefill` does."""
        slots = torch.arange(ids.shape[1], device=ids.device)  # (T,)
        return self._run(ids, cache, slots, len(slots), cache.padding if padded else None, suppressed)

    def _run(
        self, ids: Tensor, cache: KVCache, slots: Tensor, attended: int, padding: Tensor | None, suppressed: Tensor
    ) -> Next:
        """Read ids, (B, T), into `slots`, (T,), and attend to the first `attended` slots."""
        positions, visible = layout(slots, padding, attended)
        inputs = {"input_ids": ids, "attention_mask": visible, "position_ids": positions.expand(len(ids), -1)}
        logits = run_model(self._model, _CacheWriter(cache, slots, attended), **inputs)  # (B, V)
        return logits, (logits + suppressed).argmax(-1)


class _CacheWriter(DynamicCache):
    """A transformers cache that writes to some slots of a `KVCache` and attends to the first `attended` slots.

    It has no layers of its own, so transformers takes it for an empty one.
    """

    def __init__(self, cache: KVCache, slots: Tensor, attended: int) -> None:
        super().__init__()
        self._cache, self._slots, self._attended = cache, slots, attended

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> KV:
        kv = self._cache.layers[layer_idx]
        for part, new in zip(kv, (key_states, value_states), strict=True):
            part.index_copy_(2, self._slots, new)
        return tuple(part[:, :, : self._attended] for part in kv)


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name under which a model's forward takes a KV cache, renamed in transformers 5.24; "" for none."""
    arguments = signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in arguments), "")


def run_model(model: PreTrainedModel, cache: DynamicCache, **inputs: Any) -> Tensor:
    """Run a model's own forward with a cache; return the last position's logits, (B, V)."""
    return model(**inputs, **{cache_argument(model): cache}, use_cache=True, logits_to_keep=1).logits[:, -1]
