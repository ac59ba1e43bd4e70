"""Engines: two ways to generate greedily, a fixed number of new tokens for every row.

Fixed lengths make throughput comparable between formats, whose texts differ: an end of sequence is never chosen, so no
row stops early. `eager` is transformers' ``generate``, with one Python launch a kernel; at batch size 1 most of its
time goes to launching. `cuda_graph` captures one decode step as a CUDA graph and replays it for every token, so that
the model is timed and not Python. Continuous batching is left out: it fills the places of requests that end early, and
here none does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, StoppingCriteriaList

from qnb.capture import WARM_UP_STEPS, capture
from qnb.device import is_emulated
from qnb.errors import InputError
from qnb.finite import check_finite
from qnb.flags import Flag
from qnb.memory import captures, places
from qnb.precision import listed
from qnb.speed.decode_step import (
    SMALL_BATCH,
    CompileOptions,
    decode_step_of,
    empty_layers,
    rotary_angles,
    why_not_fused,
)
from qnb.speed.layers import State

PREFILL_TOKENS = 16384  # read at once; more no longer helps, and takes memory that rows could have
ALIGNMENT = 16  # the cache's length is a multiple of this, as the attention kernel wants its mask
CAPTURED_PREFILL_TOKENS = 4096  # a prefill of more tokens keeps the GPU busy longer than launching it takes
UNFUSED_INT8 = "torchao reads inputs in int8 back to the host where torch.compile does not fuse the step"
# What torch.compile is given for a small batch: it tunes the reductions that products of one row become, and launches
# kernels that do not depend on each other together.
COMPILE_OPTIONS: CompileOptions = {"options": {"coordinate_descent_tuning": True, "combo_kernels": True}}

Prompts = Sequence[Sequence[int]]


class Clock:
    """Notes when each new token was there, without waiting for it. Its tick is a stopping criterion that never stops.

    On a GPU a tick is an event in the stream, read after the last one: the host runs ahead as it would untimed.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._ticks: list[Any] = []
        self.tick()  # the start

    def tick(self, *_: Any, **__: Any) -> bool:
        """Note that one more token a row is there, once what was launched before is done; return False."""
        if self._stream:
            self._ticks.append(self._stream.record_event(torch.cuda.Event(enable_timing=True)))
        else:
            self._ticks.append(perf_counter())
        return False

    def elapsed_s(self) -> list[float]:
        """Return the seconds from the start to each tick."""
        start, *ticks = self._ticks
        if not self._stream:
            return [tick - start for tick in ticks]
        self._stream.synchronize()
        return [start.elapsed_time(tick) / 1000 for tick in ticks]


def context_window(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model has positions for, prompt and new ones together; None where it has no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_context_window(config: PretrainedConfig, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse a request longer than a model's context window.

    Raises
    ------
    InputError
        Prompt and new tokens together are more than the model has positions for.
    """
    window = context_window(config)
    if window and prompt_tokens + new_tokens > window:
        tokens = f"{prompt_tokens} prompt and {new_tokens} new tokens"
        raise InputError(f"{tokens} are more than the model's context window of {window}; ask for fewer of them")


class Eager:
    """Transformers' own ``generate`` as most people call it, always greedy and with a KV cache."""

    note, flags = "", ()

    def __init__(self, model: PreTrainedModel) -> None:
        # a copy shares everything; its settings are defaults, greedy and with a cache, not the model's own
        self._model: Any = copy(model)
        eos_token_id = model.generation_config.eos_token_id
        self._model.generation_config = GenerationConfig(eos_token_id=eos_token_id, pad_token_id=0)

    def generate(self, prompts: Prompts, new_tokens: int, clock: Clock | None = None) -> Tensor:
        """Return new ids, (B, N).

        `clock` ticks where ``generate`` asks whether to stop, once a token, just before it waits for the device
        itself: the clock adds no waiting.
        """
        model = self._model
        check_context_window(model.config, max(map(len, prompts)), new_tokens)
        ids, padding = pad(prompts, model.device)  # (B, T), (B,)
        with torch.inference_mode():
            texts = model.generate(
                input_ids=ids,
                attention_mask=(torch.arange(ids.shape[1], device=ids.device) >= padding[:, None]).long(),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,  # bars the end of sequence
                stopping_criteria=StoppingCriteriaList([clock.tick] if clock else []),
            )
        return texts[:, ids.shape[1] :]  # (B, N)


def generate_checked(model: PreTrainedModel, prompts: Prompts, new_tokens: int) -> Tensor:
    """Return new ids, (B, N), as `Eager` does, once the logits of every step were found finite; not for timing.

    Raises
    ------
    NotFiniteError
        Some are not: the tokens chosen by them mean nothing.
    """

    def check(_: Any, __: Any, output: Any) -> None:
        check_finite(output.logits[:, -1], "logits of a new token", model)

    with model.register_forward_hook(check):
        return Eager(model).generate(prompts, new_tokens)


def pad(prompts: Prompts, device: torch.device, width: int = 0) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left to the longest or to `width`; return ids, (B, T), and the padding of each row, (B,).

    They are padded with id 0. Any would do, as no other token attends to it.
    """
    width = max(width, *map(len, prompts))
    ids = np.zeros((len(prompts), width), int)  # torch takes nested lists several times as slowly
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
    padding = torch.tensor([width - len(prompt) for prompt in prompts])
    return torch.from_numpy(ids).to(device), padding.to(device)


class Decoder:
    """Prompts read into fixed memory, then decode steps over that memory, one token a row each.

    Every shape and address stays, so that a step can be captured once and replayed. Run without capturing, it is the
    same arithmetic on any device. Shapes: B rows, T prompt tokens, N new tokens, V vocabulary.

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
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=model.device)

        self.prompt_tokens, eos = prompt_tokens, model.generation_config.eos_token_id
        tokens = prompt_tokens + new_tokens + WARM_UP_STEPS
        length = -(-tokens // ALIGNMENT) * ALIGNMENT
        suppressed = zeros(model.get_output_embeddings().weight.shape[0], dtype=model.dtype)  # (V,)
        suppressed[[] if eos is None else eos] = float("-inf")
        self._ids, self.token = zeros(batch_size, tokens), zeros(batch_size)  # (B, T + N), (B,)
        padding, slot = zeros(batch_size), zeros(1)
        self.network = decode_step_of(model, compile_options)
        angles, layers = rotary_angles(model, length), empty_layers(model, batch_size, length)
        self._state = State(layers, padding, slot, length, angles, suppressed)

    def load(self, prompts: Prompts) -> None:
        """Put prompts where `prefill` reads them."""
        ids, padding = pad(prompts, self.token.device, self.prompt_tokens)  # (B, T), (B,)
        self._ids[: len(prompts), : self.prompt_tokens] = ids
        self._state.padding[: len(prompts)] = padding

    @torch.no_grad()
    def prefill(self, batch_size: int) -> None:
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
            prompts, state = self._ids[first:last, : self.prompt_tokens], self._state.rows(first, last)
            _, chosen = self.network.prefill(prompts, state)
            self.token[first:last] = self._ids[first:last, self.prompt_tokens] = chosen
        self.restart()

    @torch.no_grad()
    def step(self, batch_size: int) -> Tensor:
        """Read the last token of the first `batch_size` rows and choose the next one; return its logits, (B, V)."""
        logits, chosen = self.network.decode(self.token[:batch_size], self._state.rows(0, batch_size))
        self._state.slot.add_(1)
        self.token[:batch_size] = chosen
        self._ids[:batch_size].index_copy_(1, self._state.slot, chosen[:, None])
        return logits

    def restart(self) -> None:
        """Let new tokens follow the prompts."""
        self._state.slot.fill_(self.prompt_tokens)

    def new_ids(self, batch_size: int, new_tokens: int) -> Tensor:
        """Return the tokens chosen since the prompts were read, (B, N)."""
        return self._ids[:batch_size, self.prompt_tokens : self.prompt_tokens + new_tokens].clone()


class CudaGraph:
    """One decode step captured as a CUDA graph and replayed for every token; short prefills are captured too.

    Both are captured at the first batch of each size, in memory that all sizes share: run a batch of a size once
    before timing it. Parameters are those of `Decoder`, with a model on a GPU.

    Raises
    ------
    InputError
        There is no GPU, the step cannot be captured, or the request is longer than the context window.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
        if why := why_unavailable("cuda_graph", model.device.type, model=model, tokens=prompt_tokens + new_tokens):
            raise InputError(f"engine 'cuda_graph' cannot run: {why}; take engine 'eager'")
        check_context_window(model.config, prompt_tokens, new_tokens)
        self._device = model.device
        self._decoder = Decoder(model, batch_size, prompt_tokens, new_tokens, COMPILE_OPTIONS)
        self._runs: dict[int, tuple[Callable[[], Any], Callable[[], Any]]] = {}  # prefill and step, by batch size
        self._pool = torch.cuda.graph_pool_handle()
        captures.add(self)

    @property
    def note(self) -> str:
        """What a reader of its rows should know; "" for nothing."""
        return self._decoder.network.note

    @property
    def flags(self) -> tuple[Flag, ...]:
        """What makes its rows unlike those of other captured steps."""
        return () if self._decoder.network.is_fused else (Flag.UNFUSED,)

    def generate(self, prompts: Prompts, new_tokens: int, clock: Clock | None = None) -> Tensor:
        """Return new ids, (B, N); `clock` ticks at each token."""
        decoder, batch_size, clock = self._decoder, len(prompts), clock or Clock(self._device)
        with torch.cuda.device(self._device):
            decoder.load(prompts)
            if batch_size not in self._runs:
                self._runs[batch_size] = self._capture_both(batch_size)
            prefill, step = self._runs[batch_size]
            prefill()
            clock.tick()
            for _ in range(new_tokens - 1):
                step()
                clock.tick()
            return decoder.new_ids(batch_size, new_tokens)

    def _capture_both(self, batch_size: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Return what does a prefill, captured where it is short, and what does a step."""
        prefill, step = partial(self._decoder.prefill, batch_size), partial(self._decoder.step, batch_size)
        is_short = batch_size * self._decoder.prompt_tokens <= CAPTURED_PREFILL_TOKENS
        run_prefill = capture(prefill, self._pool).replay if is_short else prefill
        self._decoder.restart()
        return run_prefill, capture(step, self._pool).replay


def why_unavailable(
    engine: str, device_kind: str, int8_threshold: float = 0.0, model: PreTrainedModel | None = None, tokens: int = 0,
    is_unfused_int8: bool = False,
) -> str:  # fmt: skip
    """Return why an engine cannot run; "" where it can, as far as the arguments tell.

    Parameters
    ----------
    engine
        A name in `FACTORIES`.
    device_kind
        "cuda" or "cpu".
    int8_threshold
        Of LLM.int8, where no model is loaded yet.
    model
        A loaded model; its own outlier threshold counts.
    tokens
        Prompt and new tokens together.
    is_unfused_int8
        Whether torchao multiplies in int8 on a GPU for which torch.compile cannot fuse the format's type.
    """
    if engine != "cuda_graph":
        return ""
    if device_kind != "cuda":
        return "it replays CUDA graphs, and there is no NVIDIA GPU here"
    if model is not None:
        states = (getattr(module, "state", None) for module in model.modules())
        int8_threshold = max((getattr(state, "threshold", 0.0) for state in states), default=0.0)
    if int8_threshold > 0:
        return "LLM.int8 reads outlier columns back to the host, which no graph captures (int8-no-outliers has none)"
    if is_unfused_int8:
        return UNFUSED_INT8
    if model is None:
        return ""
    if len(devices := places(model)) > 1:
        return f"the model is spread over {len(devices)} devices, and a graph is captured on one"
    codes = (getattr(getattr(module, "weight", None), "qdata", None) for module in model.modules())
    if any(getattr(each, "dtype", None) == torch.int8 for each in codes) and (
        why_not_fused(model) or is_emulated(model)
    ):
        return UNFUSED_INT8
    config, needs = model.config.get_text_config(), "it reads the keys and values of every token"
    window, layer_types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or ()
    if model._is_stateful or not {"full_attention", "sliding_attention"}.issuperset(layer_types):
        return f"{needs}, and not all layers of this model keep them"
    return f"{needs}, and this model attends to the last {window} tokens alone" if window and window < tokens else ""


Engine = Eager | CudaGraph
# of model, batch size, prompt tokens and new tokens
FACTORIES: dict[str, Callable[..., Engine]] = {"eager": lambda model, *_: Eager(model), "cuda_graph": CudaGraph}


def parse(engines: str | Iterable[str], device_kind: str) -> tuple[str, ...]:
    """Return the engines named, once each; ``"auto"`` is eager, and cuda_graph too where there is a GPU.

    Eager comes first in any case: cuda_graph moves a model's weights, and leaves other gaps in memory.

    Raises
    ------
    InputError
        A name is unknown, or that engine cannot run on this kind of device.
    """
    runnable = [name for name in FACTORIES if not why_unavailable(name, device_kind)]
    names = runnable if listed(engines) == ["auto"] else listed(engines)
    if not names or not set(names) <= set(runnable):
        raise InputError(f"engines is {engines!r}; give 'auto', 'eager', or with an NVIDIA GPU 'cuda_graph' or both")
    return tuple(name for name in runnable if name in names)


def warm_up_batch_sizes(engine: str, prompt_tokens: int) -> tuple[int, ...]:
    """Return batch sizes after which an engine has compiled and loaded all that any batch size needs.

    A captured step has kernels for a small batch and for any larger one; a prefill too long to be captured has its
    own.
    """
    return (1,) if engine == "eager" else (1, max(SMALL_BATCH, CAPTURED_PREFILL_TOKENS // prompt_tokens) + 1)
