"""Ways to generate: greedy, a fixed number of new tokens for every row.

Fixed lengths make throughput comparable between precisions, whose texts differ: nothing stops at an end of sequence,
which is barred from being chosen. `eager` is transformers' ``generate`` with its defaults, one Python launch a kernel;
at batch size 1 that is what most of its time goes to. `cuda_graph` records one decode step as a CUDA graph and replays it
for every token, so that what is timed is the model. Continuous batching (transformers' ``generate_batch``) is left
out: what it gains is the places of requests that end before others of their batch, and here all ask for as many tokens
of prompts that are as long, so it could only cost; requests of mixed lengths are another study's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from inspect import signature
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from transformers import DynamicCache, StoppingCriteriaList

from qnb.errors import InputError
from qnb.precision import listed
from qnb.quantize.checkpoint import release
from qnb.speed.decode_step import Lean, layout, narrow, unknown

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Prompts = Sequence[Sequence[int]]

PREFILL_TOKENS = 16384  # read at once; more no longer helps, and takes memory that rows could have
RECORDED_TOKENS = 4096  # of prompts read by a recorded graph; more keep the GPU busy longer than launching takes
ALIGNMENT = 16  # the cache's length is a multiple of this, as the attention kernel wants its mask
# What torch.compile is given for a few rows: products of one row become reductions that it tunes, and kernels that do
# not depend on each other one launch.
COMPILE: dict[str, Any] | None = {"options": {"coordinate_descent_tuning": True, "combo_kernels": True}}
# settings by which a model shapes greedy texts, where they differ from these
PLAIN = {
    "num_beams": 1, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": None,
    "max_new_tokens": None, "max_time": None, "bad_words_ids": None, "sequence_bias": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "stop_strings": None,
    "exponential_decay_length_penalty": None, "penalty_alpha": None, "dola_layers": None, "watermarking_config": None,
}  # fmt: skip
SAMPLING = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
WARM_UPS = 2  # steps run before one is recorded; there is room for them


class Absent(InputError):
    """An engine cannot run here, or not with this model; see `absent`."""


class Clock:
    """Notes when each new token was there, without waiting for it.

    On a GPU a tick is an event in the stream, read after the last: the host runs ahead as it would untimed. On a CPU
    it is the time of day.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._ticks: list[Any] = []
        self.tick()  # the start

    def tick(self) -> None:
        """Note that one more token a row is there, once what was launched before is done."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._ticks.append(event)
        else:
            self._ticks.append(perf_counter())

    def seconds(self) -> list[float]:
        """Return seconds from the start to each tick."""
        first, *rest = self._ticks
        if self._cuda:
            self._ticks[-1].synchronize()
            return [first.elapsed_time(tick) / 1000 for tick in rest]
        return [tick - first for tick in rest]


class Engine(Protocol):
    """A loaded model made ready to generate for batches up to a size; kept for as long as batches come."""

    @property
    def note(self) -> str:
        """What is to be known of how it runs; "" where nothing is."""

    def generate(self, prompts: Prompts, new_tokens: int, clock: Clock | None = None) -> torch.Tensor:
        """Return new ids, (batch, new_tokens); `clock` ticks at each token."""


def pad(prompts: Prompts, pad_id: int, device: torch.device, width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad prompts on the left to the longest or to `width`; returns ids and attention mask, both (batch, tokens)."""
    width = max(width, *map(len, prompts))
    ids = np.full((len(prompts), width), pad_id)  # torch takes nested lists several times as slowly
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _ends(model: PreTrainedModel) -> list[int]:
    """Return the ids that end a text; ``min_new_tokens`` bars them."""
    eos = model.generation_config.eos_token_id
    return [] if eos is None else list(eos) if isinstance(eos, list) else [eos]


def _pad_id(model: PreTrainedModel) -> int:
    pad_id = model.generation_config.pad_token_id
    return pad_id if pad_id is not None else (*_ends(model), 0)[0]


def window(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model has positions for, prompt and new ones together; None where it has no end."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_window(config: PretrainedConfig, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse a request longer than a model's context window.

    Raises
    ------
    InputError
        Prompt and new tokens together are more than the model has positions for.
    """
    most = window(config)
    if most and prompt_tokens + new_tokens > most:
        raise InputError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens are more than the model's context window of {most} "
            "tokens; ask for shorter prompts or fewer new tokens"
        )


@contextmanager
def _greedy(model: PreTrainedModel) -> Iterator[None]:
    """Have ``generate`` take the likeliest token, whatever penalties, beams or samples a model asks for by itself."""
    own = model.generation_config
    greedy = deepcopy(own)
    greedy.update(**PLAIN, **SAMPLING, pad_token_id=_pad_id(model))
    model.generation_config = greedy
    try:
        yield
    finally:
        model.generation_config = own


class Eager:
    """Transformers' own ``generate`` as most people call it, always greedy."""

    note = ""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def generate(self, prompts: Prompts, new_tokens: int, clock: Clock | None = None) -> torch.Tensor:
        """Return new ids, (batch, new_tokens).

        `clock` ticks where ``generate`` asks whether to stop, once a token, just before it waits for the device
        itself: nothing is waited for that would not be.
        """
        model = self._model
        check_window(model.config, max(map(len, prompts)), new_tokens)
        ids, mask = pad(prompts, _pad_id(model), model.device)
        never = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)

        def tick(*_: Any, **__: Any) -> torch.Tensor:
            clock.tick()  # type: ignore[union-attr]  # called only where there is one
            return never

        with torch.inference_mode(), _greedy(model):
            out = model.generate(  # type: ignore[operator]  # transformers types the mixin loosely
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                stopping_criteria=StoppingCriteriaList([tick] if clock else []),
            )
        return out[:, ids.shape[1] :]  # (B, N)


class Decoder:
    """Prompts read into fixed memory, then steps over that memory, one token a row each.

    Every shape and address stays, so that a step can be recorded once and replayed; run without recording it is the
    same arithmetic on any device. Rows are padded on the left: all write to the same slot.

    Parameters
    ----------
    model
        A loaded model.
    rows
        The largest batch.
    width
        Tokens of the longest prompt.
    new_tokens
        The most new tokens a row.
    options
        For torch.compile; None runs the step uncompiled.

    Raises
    ------
    InputError
        The request is longer than the context window, or the model keeps something else than keys and values of
        every token.
    """

    def __init__(
        self, model: PreTrainedModel, rows: int, width: int, new_tokens: int, options: dict[str, Any] | None = None
    ) -> None:
        check_window(model.config, width, new_tokens)
        device, most = model.device, width + new_tokens + WARM_UPS
        self._model, self._rows, self.width, self._length = model, rows, width, -(-most // ALIGNMENT) * ALIGNMENT
        self._barred = torch.zeros(model.get_output_embeddings().weight.shape[0], dtype=model.dtype, device=device)
        self._barred[_ends(model)] = float("-inf")  # (V,)
        self._ids = torch.zeros(rows, width, dtype=torch.long, device=device)  # (B, T)
        self.token = torch.zeros(rows, dtype=torch.long, device=device)  # (B,)
        self._slot, self._place = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        self._start = torch.zeros(rows, dtype=torch.long, device=device)  # (B,)
        self._chosen = torch.zeros(rows, new_tokens + WARM_UPS, dtype=torch.long, device=device)  # (B, N)
        if why := narrow(model, width + new_tokens):
            raise Absent(f"keys and values of every token are not kept by this model: {why}; take engine 'eager'")
        self._unknown = unknown(model)
        self._lean = None if self._unknown else _lean(model, options)
        self._angles = self._lean.angles(self._length) if self._lean else None
        self._caches = self._empty_caches()

    @torch.no_grad()
    def _empty_caches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return each layer's empty keys and values, of the shapes that one token's have.

        Made while prompts are read, they would stand in memory that this had given back, between pieces too small for
        its next tensors: on an H100 held to 15 GiB up to a fifth of that was lost so.
        """
        caches = []

        def make(place: int, *new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = (one.new_zeros(self._rows, one.shape[1], self._length, one.shape[3]) for one in new)
            caches.append((keys, values))
            return new[0], new[1]

        _forward(self._model, make, input_ids=self._ids[:1, :1], attention_mask=None, position_ids=self._ids[:1, :1])
        return caches

    @property
    def note(self) -> str:
        """What is to be known of how it runs; "" where nothing is."""
        return self._lean.note if self._lean else f"the model's own forward: {self._unknown}"

    @torch.no_grad()
    def prefill(self, prompts: Prompts, logits: list[torch.Tensor] | None = None) -> None:
        """Read the prompts and choose their first new tokens.

        Rows are read in chunks that are enough to keep a device busy: what a chunk needs besides its keys and values
        is given back before the next. All chunks are of one size, so that memory fits again: the last one begins
        before its rows do, and reads some twice. Only where a list is given is it filled with logits, (b, V).
        """
        ids, mask = self._padded(prompts)
        rows = len(prompts)
        padded = min(map(len, prompts)) < self.width
        self._start[:rows] = self.width - mask.sum(1)
        chunks = -(-rows // max(1, PREFILL_TOKENS // self.width))
        size = -(-rows // chunks)
        for first in range(0, rows, size):
            last = min(first + size, rows)
            found, self.token[last - size : last] = self._read(ids[last - size : last], last - size, padded)
            if logits is not None:
                logits.append(found[first - last :])
        self.rewind()
        self._keep(rows, self.token[:rows])

    def load(self, prompts: Prompts) -> None:
        """Put prompts where `read` finds them."""
        ids, mask = self._padded(prompts)
        self._ids[: len(prompts)] = ids
        self._start[: len(prompts)] = self.width - mask.sum(1)

    def _padded(self, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad prompts to the longest there may be: what is compiled and recorded for that serves them all."""
        return pad(prompts, _pad_id(self._model), self._model.device, self.width)

    @torch.no_grad()
    def read(self, rows: int) -> torch.Tensor:
        """Do what `prefill` does with the first `rows` prompts given to `load`, in shapes that never change."""
        logits, chosen = self._read(self._ids[:rows], 0, padded=True)
        self.rewind()
        self._keep(rows, chosen)
        return logits

    def rewind(self) -> None:
        """Have new tokens follow the prompts."""
        self._slot.fill_(self.width)
        self._place.zero_()

    def _read(self, ids: torch.Tensor, first: int, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Run prompts, (b, T), as rows from `first` on; returns the next tokens' logits, (b, V), and choice, (b,)."""
        rows = slice(first, first + len(ids))
        caches, start = [(keys[rows], values[rows]) for keys, values in self._caches], self._start[rows]
        if self._lean and self._angles:
            return self._lean.read(ids, start if padded else None, caches, self._angles, self._barred)

        def keep(place: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            for held, new in zip(caches[place], (keys, values), strict=True):
                held[:, :, : ids.shape[1]] = new
            return keys, values

        places, mask = layout(ids.shape[1], start if padded else None, ids.device)
        positions = places.expand(len(ids), -1)
        logits = _forward(self._model, keep, input_ids=ids, attention_mask=mask, position_ids=positions)
        return logits, (logits + self._barred).argmax(-1)

    @torch.no_grad()
    def step(self, rows: int) -> torch.Tensor:
        """Read the last token of the first `rows` rows and choose the next; returns its logits, (B, V)."""
        caches = [(keys[:rows], values[:rows]) for keys, values in self._caches]
        token, start = self.token[:rows], self._start[:rows]
        if self._lean and self._angles:
            logits, chosen = self._lean.step(token, self._slot, start, caches, self._angles, self._barred)
        else:
            logits = self._own(token, start, caches)
            chosen = (logits + self._barred).argmax(-1)
        self._slot.add_(1)
        self._keep(rows, chosen)
        return logits

    def _own(self, token: torch.Tensor, start: torch.Tensor, caches: list[Any]) -> torch.Tensor:
        """Run the model's own forward for one token a row; returns logits, (B, V)."""

        def keep(place: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            for held, new in zip(caches[place], (keys, values), strict=True):
                held.index_copy_(2, self._slot, new)
            return caches[place]

        slots = torch.arange(self._length, device=token.device)
        seen = (slots <= self._slot) & (slots >= start[:, None])  # (B, L)
        positions = (self._slot - start)[:, None]  # (B, 1)
        ids, mask = token[:, None], seen[:, None, None]
        return _forward(self._model, keep, input_ids=ids, attention_mask=mask, position_ids=positions)

    def _keep(self, rows: int, chosen: torch.Tensor) -> None:
        self.token[:rows] = chosen
        self._chosen[:rows].index_copy_(1, self._place, chosen[:, None])
        self._place.add_(1)

    def tokens(self, rows: int, new_tokens: int) -> torch.Tensor:
        """Return what was chosen since the prompts were read, (B, N)."""
        return self._chosen[:rows, :new_tokens].clone()


Keep = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class _Keeping(DynamicCache):
    """A cache that gives each layer's new keys and values to a function and attends to what that returns.

    It has no layers of its own, so transformers takes it for an empty one.
    """

    def __init__(self, keep: Keep) -> None:
        super().__init__()
        self._keep = keep

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._keep(layer_idx, key_states, value_states)


def _forward(model: PreTrainedModel, keep: Keep, **given: Any) -> torch.Tensor:
    """Run the model, its keys and values given to `keep`; returns the last position's logits, (B, V)."""
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"  # renamed in 5.24
    return model(**given, **{name: _Keeping(keep)}, use_cache=True, logits_to_keep=1).logits[:, -1]


_leans: WeakKeyDictionary[PreTrainedModel, Lean] = WeakKeyDictionary()


def _lean(model: PreTrainedModel, options: dict[str, Any] | None) -> Lean:
    """Return a model's lean step, made once: it moves the weights."""
    if model not in _leans:
        if options is not None:
            torch.compiler.reset()  # another model's step is no use, and only so many may be kept
        _leans[model] = Lean(model, options)
    return _leans[model]


def forget(model: PreTrainedModel) -> None:
    """Drop a model's lean step, so that the next engine builds it anew; its weights stay joined."""
    _leans.pop(model, None)


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream that steps are recorded on: cuBLAS keeps a workspace for every stream that it ever saw."""
    return torch.cuda.Stream(device)


_recorded: WeakSet[CudaGraph] = WeakSet()


def give_back() -> None:
    """Give all memory back that no model needs, with what cuBLAS keeps for every stream, 32 MiB each on an H100.

    That would count for the engine after, and outlive the model: transformers takes the memory of a model's weights in
    one piece, and a workspace that stands in a gap of it keeps all of it from the device. It stays where a recorded
    step is to find it again.
    """
    release()
    if torch.cuda.is_initialized() and not _recorded:
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


class CudaGraph:
    """One decode step recorded as a CUDA graph and replayed for every token; short prompts are read so too.

    Both are recorded at the first batch of each size, in memory that all sizes share: run a batch of a size once
    before timing it.

    Raises
    ------
    Absent
        There is no GPU, or the step cannot be recorded.
    """

    def __init__(self, model: PreTrainedModel, rows: int, width: int, new_tokens: int) -> None:
        if why := absent("cuda_graph", model.device.type, model, width + new_tokens):
            raise Absent(f"engine 'cuda_graph' cannot run: {why}; take engine 'eager'")
        self._device = model.device
        self._decoder = Decoder(model, rows, width, new_tokens, COMPILE)
        self._prompts: dict[int, torch.cuda.CUDAGraph] = {}  # by rows
        self._steps: dict[int, torch.cuda.CUDAGraph] = {}
        self.logits: dict[int, torch.Tensor] = {}  # (B, V), where a step of the size last recorded leaves them
        self._pool = torch.cuda.graph_pool_handle()
        _recorded.add(self)

    @property
    def note(self) -> str:
        """What is to be known of how it runs."""
        return self._decoder.note

    def generate(self, prompts: Prompts, new_tokens: int, clock: Clock | None = None) -> torch.Tensor:
        """Return new ids, (batch, new_tokens); `clock` ticks at each token."""
        decoder, rows = self._decoder, len(prompts)
        few = rows * decoder.width <= RECORDED_TOKENS
        with torch.cuda.device(self._device):
            if few:
                decoder.load(prompts)
            if rows not in self._steps:
                if few:
                    self._prompts[rows], _ = self._record(decoder.read, rows)
                decoder.rewind()
                self._steps[rows], self.logits[rows] = self._record(decoder.step, rows)
            if few:
                self._prompts[rows].replay()
            else:
                decoder.prefill(prompts)
            if clock:
                clock.tick()
            for _ in range(new_tokens - 1):
                self._steps[rows].replay()
                if clock:
                    clock.tick()
            return decoder.tokens(rows, new_tokens)

    def _record(self, work: Callable[[int], torch.Tensor], rows: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Record `work`, run before so that kernels are compiled and libraries have their workspaces."""
        main, side = torch.cuda.current_stream(), _side(self._device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                work(rows)
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.logits.clear()  # another size's, which would stay in memory that this one can use
        with torch.cuda.stream(main), torch.cuda.graph(graph, pool=self._pool, stream=side):
            logits = work(rows)
        return graph, logits


def absent(engine: str, device: str, model: PreTrainedModel | None = None, length: int = 0) -> str:
    """Return why an engine cannot run on a kind of device, or not with this model and texts of `length` tokens.

    Nothing where it can, as far as it is told of them.
    """
    if engine != "cuda_graph":
        return ""
    if device != "cuda":
        return "it replays CUDA graphs, and there is no NVIDIA GPU here"
    if model is None:
        return ""
    states = (getattr(module, "state", None) for module in model.modules())
    if why := unrecordable(max((getattr(state, "threshold", 0.0) for state in states), default=0.0)):
        return why
    why = narrow(model, length) if length else ""
    return f"it keeps keys and values of every token, and this model does not: {why}" if why else ""


def unrecordable(threshold: float) -> str:
    """Return why no graph can record LLM.int8 products of an outlier threshold; nothing where one can."""
    if threshold <= 0:
        return ""
    return (
        "LLM.int8 with an outlier threshold reads the outlier columns back to the host in every product, "
        "which no graph can record (int8-no-outliers has no threshold)"
    )


Factory = Callable[["PreTrainedModel", int, int, int], Engine]
FACTORIES: dict[str, Factory] = {"eager": lambda model, *_: Eager(model), "cuda_graph": CudaGraph}


def parse(engines: str | Iterable[str], device: str) -> tuple[str, ...]:
    """Return the engines named, once each; ``"auto"`` is eager, and cuda_graph too where there is a GPU.

    Eager comes first, however they are given: cuda_graph moves a model's weights, and leaves other gaps in memory.

    Raises
    ------
    InputError
        A name is unknown, or that engine cannot run on this kind of device.
    """
    names = listed(engines)
    if names == ["auto"]:
        return tuple(name for name in FACTORIES if not absent(name, device))
    if not names or not set(names) <= set(FACTORIES):
        raise InputError(f"engines is {engines!r}; give 'auto' or names of {', '.join(FACTORIES)}")
    for name in names:
        if why := absent(name, device):
            raise InputError(f"engine {name!r} cannot run: {why}; take engines 'auto'")
    return tuple(name for name in FACTORIES if name in names)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two engines' tokens are the same, and how near a tie was where they first part.

    Each engine rounds in its own order, so where two tokens are as good as equal either may come; from there on the
    texts are different ones.
    """

    tokens: int  # compared, of each row
    first_difference: int | None  # place of the earliest new token that differs in any row; None if none does
    margin: float | None  # by how much the model's logits prefer the first engine's token there


def agreement(model: PreTrainedModel, prompts: Prompts, first: torch.Tensor, second: torch.Tensor) -> Agreement:
    """Compare two engines' new ids, (B, N) each, of the same prompts."""
    differ = (first != second).long()  # (B, N)
    if not differ.any():
        return Agreement(first.shape[1], None, None)
    places = torch.where(differ.any(1), differ.argmax(1), first.shape[1])  # (B,)
    row = int(places.argmin())
    place = int(places[row])
    ids = torch.tensor([[*prompts[row], *first[row, :place].tolist()]], device=model.device)  # (1, T)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()  # (V,)
    return Agreement(first.shape[1], place, float(logits[first[row, place]] - logits[second[row, place]]))
