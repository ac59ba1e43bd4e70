"""Run a causal language model without its output head, and project only the positions that are scored.

What is run are rows: a context followed by its continuations, each of which is to see the context and itself alone.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from math import inf
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from qnb.capture import cache_name
from qnb.device import is_emulated
from qnb.memory import bytes_for_batches, places

log = logging.getLogger(__name__)
Tokens = tuple[int, ...]

MAX_TOKENS = {"cuda": 32768, "cpu": 2048}  # of a forward pass; more no longer helps
# of one chunk of logits: in the model's type, in float32, and the softmax's
LOGITS_BYTES = {"cuda": 2 << 30, "cpu": 128 << 20}
# tokens times parameters from which compiling pays: half a minute of an H100, a quarter of an hour of a T4
MIN_COMPILED_WORK = {"cuda": 1e16, "cpu": inf}
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")  # what configurations call it
COMPILE: dict[str, Any] = {"dynamic": True}  # a batch is as wide as its longest row


@dataclass(frozen=True, slots=True)
class Row:
    """A context and its continuations, one after another; each is to see the context and itself alone."""

    context: Tokens
    continuations: dict[Tokens, list[int]]  # with the positions of all requests that ask for one

    @property
    def width(self) -> int:
        """Tokens in the row. The last token of a continuation is predicted, never read."""
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations)

    @property
    def is_causal(self) -> bool:
        """Whether causal attention alone keeps the continuations apart."""
        return sum(len(tokens) > 1 for tokens in self.continuations) <= 1


def pack(rows: Sequence[Row], prefix_length: int) -> tuple[np.ndarray, list[int]]:
    """Lay out rows for one forward pass that goes on behind `prefix_length` cached tokens.

    Returns
    -------
    numpy.ndarray, (3, B, L)
        Tokens; their positions, which restart in each continuation; and their segments, 0 for a context, n for its
        n-th continuation, -1 for padding on the right.
    list of int
        For each token of each continuation, the place in B*L that predicts it.
    """
    width = max(row.width for row in rows) - prefix_length
    layout = np.zeros((3, len(rows), width), dtype=np.int64)
    layout[2] = -1
    predictors: list[int] = []
    for number, row in enumerate(rows):
        end = len(row.context)
        tokens, positions = [*row.context[prefix_length:]], [*range(prefix_length, end)]
        segments = [0] * len(tokens)
        for segment, continuation in enumerate(row.continuations, 1):
            read, first = len(continuation) - 1, number * width + len(tokens)
            predictors += [number * width + end - prefix_length - 1, *range(first, first + read)]
            tokens += continuation[:-1]
            positions += range(end, end + read)
            segments += [segment] * read
        layout[:, number, : len(tokens)] = tokens, positions, segments
    return layout, predictors


def likelihoods(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-likelihoods of targets in float32, and 1 where another token is likelier.

    (N, V), (N,) -> (N,), (N,).
    """
    wide = logits.float()
    chosen = wide.gather(1, targets[:, None])[:, 0]
    return chosen - torch.logsumexp(wide, 1), (logits.argmax(1) != targets).long()


class Backbone:
    """A causal language model whose output head is applied apart.

    Attributes
    ----------
    parameters
        How many there are; two 4-bit ones count as one.
    activation_bytes
        What the activations of one token take that are alive at once, in float32.
    window
        The longest row in which every token sees every earlier one.
    max_tokens
        Tokens that a forward pass may hold: what half of the free memory takes, and no more than helps.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device, self.config = model, model.device, model.config.get_text_config()
        self._cache_name = cache_name(model.base_model.forward)
        self.likelihoods = likelihoods
        windows = (getattr(self.config, name, None) for name in WINDOWS)
        self.window = min((window for window in windows if isinstance(window, int) and window > 0), default=inf)
        inner = getattr(self.config, "intermediate_size", None) or 4 * self.config.hidden_size
        self.parameters = sum(weight.numel() for weight in model.parameters())
        self.activation_bytes = 4 * (10 * self.config.hidden_size + 4 * inner)
        free = bytes_for_batches(self.device) // 2 - LOGITS_BYTES[self.device.type]
        self.max_tokens = int(max(256, min(MAX_TOKENS[self.device.type], free // self.activation_bytes)))

    def integers(self, values: Any) -> torch.Tensor:
        """Return integers as a tensor on the device, without waiting for the device to get to it."""
        tensor = torch.from_numpy(np.asarray(values, dtype=np.int64))  # torch.tensor takes seven times as long
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def run(self, ids: torch.Tensor, past: Cache | None = None, **options: Any) -> tuple[torch.Tensor, Any]:
        """Read tokens (B, L) behind a KV cache; return hidden states (B, L, D) and the cache with these tokens."""
        output = self.model.base_model(input_ids=ids, **{self._cache_name: past}, **options)
        return output.last_hidden_state.to(self.device), output.get(self._cache_name)  # of a model on several devices

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> Cache | None:
        """Return the KV cache of one row of tokens; None without tokens."""
        return self.run(self.integers([tokens]), use_cache=True)[1] if tokens else None

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits of hidden states, (N, D) -> (N, V), as the model scales and caps them."""
        logits = self.model.get_output_embeddings()(hidden).to(self.device)
        if scale := getattr(self.config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if divisor := getattr(self.config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if cap := getattr(self.config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits

    @torch.inference_mode()
    def score(self, rows: Sequence[Row], prefix_length: int, past: Cache | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-likelihood of each continuation of all rows, in order, and whether it is the likeliest.

        `past` holds the first `prefix_length` tokens, which all rows share. Both results are (C,) for C continuations,
        in float64 and bool, and on the device: nothing waits for them here.
        """
        # 1) read, without the output head
        layout, predictors = pack(rows, prefix_length)
        tokens, positions, segments = self.integers(layout)  # (B, L) each
        options: dict[str, Any] = {"use_cache": past is not None}
        if not all(row.is_causal for row in rows):
            options |= {"position_ids": positions, "attention_mask": self.segment_mask(segments, prefix_length)}
        states, _ = self.run(tokens, repeat(past, len(rows)), **options)  # (B, L, D)
        hidden = states.flatten(0, 1)[self.integers(predictors)]  # (N, D)
        # 2) project what predicts a scored token, some at a time
        continuations = [tokens for row in rows for tokens in row.continuations]
        targets = self.integers([*chain.from_iterable(continuations)])  # (N,)
        size = max(64, LOGITS_BYTES[self.device.type] // (10 * self.model.get_output_embeddings().weight.shape[0]))
        chunks = zip(hidden.split(size), targets.split(size), strict=True)
        scores = [self.likelihoods(self.project(some), wanted) for some, wanted in chunks]
        values, misses = (torch.cat(parts) for parts in zip(*scores, strict=True))  # (N,)
        # 3) add up each continuation's
        owners = self.integers(np.repeat(np.arange(len(continuations)), [len(tokens) for tokens in continuations]))
        sums = torch.zeros(len(continuations), dtype=torch.float64, device=self.device)
        is_likeliest = sums.long().index_add(0, owners, misses) == 0
        return sums.index_add(0, owners, values.double()), is_likeliest

    def segment_mask(self, segments: torch.Tensor, prefix_length: int) -> torch.Tensor:
        """Return a mask (B, 1, L, P+L) by which a token sees the prefix, the context, and its own segment so far."""
        order = torch.arange(segments.shape[1], device=segments.device)
        related = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # (B, L, L)
        visible = (order[:, None] >= order) & related
        return self.attention_mask(torch.nn.functional.pad(visible, (prefix_length, 0), value=True)[:, None])

    def attention_mask(self, visible: torch.Tensor) -> torch.Tensor:
        """Return the mask that is added to attention scores, (B, 1, L, P+L), from a mask of who sees whom.

        Its rows are of whole 16 bytes. PyTorch's kernels for a GPU would convert and copy any other mask again in
        every layer.
        """
        *shape, length = visible.shape
        aligned = torch.zeros(*shape, -(-length // 8) * 8, dtype=self.model.dtype, device=visible.device)
        return aligned[..., :length].masked_fill_(~visible, torch.finfo(self.model.dtype).min)


def repeat(past: Cache | None, rows: int) -> Cache | None:
    """Return a copy of a row's KV cache for so many rows."""
    past = deepcopy(past)
    if past is not None:
        past.batch_repeat_interleave(rows)
    return past


@contextmanager
def compiled(backbone: Backbone, tokens: int) -> Iterator[None]:
    """Compile decoder layers and likelihoods while the block runs, if it reads `tokens` enough on a GPU.

    Between two matrix products transformers runs a kernel for each operation, and each reads and writes every
    activation: an RMS norm takes eight. Compiled, scoring is 1.3 to 1.4 times as fast (H200, Llama-3.2-1B's shape,
    fp16). Compiling takes about 10 s there. A layer that cannot be compiled runs as it is.
    """
    if (
        is_emulated(backbone.model)
        or len(places(backbone.model)) > 1
        or tokens * backbone.parameters < MIN_COMPILED_WORK[backbone.device.type]
    ):
        yield
        return
    names = backbone.model._no_split_modules or ()
    layers = [module for module in backbone.model.modules() if type(module).__name__ in names]
    with torch._dynamo.config.patch(recompile_limit=64, suppress_errors=True):
        for layer in layers:
            layer.compile(**COMPILE)
        backbone.likelihoods = torch.compile(likelihoods, **COMPILE)
        try:
            yield
        finally:
            backbone.likelihoods = likelihoods
            for layer in layers:
                del layer._compiled_call_impl


_separates: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def separates(backbone: Backbone) -> bool:
    """Return whether the model keeps two continuations of one row apart; a model is asked once, by `separation_error`.

    A model that does not is named in a warning.
    """
    if backbone.model not in _separates:
        try:
            error, bound = separation_error(backbone)
            reason = "" if error <= bound else f"a difference of {error:.2g}"
        except Exception as failure:  # whatever a model raises when it is given a mask that it cannot take
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0][:120]
        if reason:
            name = type(backbone.model).__name__
            log.warning("%s cannot score continuations in one row (%s); stock scoring is used", name, reason)
        _separates[backbone.model] = not reason
    return _separates[backbone.model]


@torch.inference_mode()
def separation_error(backbone: Backbone) -> tuple[float, float]:
    """Return how far a shared row's second continuation is from the same one in its own row, and the bound.

    The unit is the standard deviation of logits. A shared row can have two faults: a continuation sees the one before
    it, or its positions do not restart. In float32 nothing but rounding may differ. Elsewhere rounding is large
    (LLM.int8's outlier columns depend on the batch), so the bound is half the difference that either fault causes.
    SmolLM2-135M: bfloat16 0.09 where the faults cause 0.53 and 0.86, LLM.int8 0.22 where they cause 0.64 and 0.91.
    """
    model = backbone.model
    words = min(1000, int(model.get_output_embeddings().weight.shape[0]))
    drawn = torch.randint(10, words, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    context, first, second = drawn[:8], drawn[8:16], drawn[16:]
    layers = getattr(backbone.read(context), "layers", ())
    if any(hasattr(layer, "recurrent_states") or not hasattr(layer, "keys") for layer in layers):
        raise TypeError("its cache holds a state of all tokens before")
    expected = model(backbone.integers([context + second[:-1]])).logits[0, 8:].float()  # (7, V)

    def error(positions: list[int], segments: list[int], cached: int = 0) -> float:
        ids = backbone.integers([context + first[:-1] + second[:-1]])[:, cached:]  # (1, 22) without the cached
        mask = backbone.segment_mask(backbone.integers([segments[cached:]]), cached)
        options = {"position_ids": backbone.integers([positions[cached:]]), "attention_mask": mask}
        hidden, _ = backbone.run(ids, backbone.read(context[:cached]), **options)
        logits = backbone.project(hidden[0, -7:]).float()  # (7, V)
        return float((logits - expected).abs().mean() / expected.std(-1).mean())

    restarted, apart = [*range(15), *range(8, 15)], [0] * 8 + [1] * 7 + [2] * 7
    worst = max(error(restarted, apart), error(restarted, apart, cached=4))
    if model.dtype == torch.float32 and not getattr(model, "is_quantized", False):
        return worst, 1e-3
    faults = error(restarted, [0] * 22), error([*range(22)], apart)
    return worst, min(faults) / 2
