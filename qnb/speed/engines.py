"""Engines: two ways to generate greedily, a fixed number of new tokens for every row.

Fixed lengths make throughput comparable between formats, whose texts differ: an end of sequence is never chosen, so no
row stops early. `eager` is transformers' ``generate``, with one Python launch a kernel; at batch size 1 most of its
time goes to launching. `cuda_graph` captures one decode step as a CUDA graph and replays it for every token, so that
the model is timed and not Python. Continuous batching is left out: it fills the places of requests that end early, and
here none does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from qnb.errors import InputError
from qnb.memory import register_capture
from qnb.precision import listed
from qnb.speed.decode_step import SMALL_BATCH, CompileOptions
from qnb.speed.decoder import WARM_UP_STEPS, Decoder, Prompts, cache_argument, pad, pad_id

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CAPTURED_PREFILL_TOKENS = 4096  # a prefill of more tokens keeps the GPU busy longer than launching it takes
# What torch.compile is given for a small batch: it tunes the reductions that products of one row become, and launches
# kernels that do not depend on each other together.
COMPILE_OPTIONS: CompileOptions = {"options": {"coordinate_descent_tuning": True, "combo_kernels": True}}


class EngineUnavailable(InputError):
    """An engine cannot run here, or not with this model; see `why_unavailable`."""


class Clock:
    """Notes when each new token was there, without waiting for it.

    On a GPU a tick is an event in the stream, read after the last one: the host runs ahead as it would untimed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_cuda = device, device.type == "cuda"
        self._ticks: list[Any] = []
        self.tick()  # the start

    def tick(self) -> None:
        """Note that one more token a row is there, once what was launched before is done."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._ticks.append(event)
        else:
            self._ticks.append(perf_counter())

    def elapsed_s(self) -> list[float]:
        """Return the seconds from the start to each tick."""
        start, *ticks = self._ticks
        if self._is_cuda:
            self._ticks[-1].synchronize()
            return [start.elapsed_time(tick) / 1000 for tick in ticks]
        return [tick - start for tick in ticks]


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
        raise InputError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens are more than the model's context window of {window} "
            "tokens; ask for shorter prompts or fewer new tokens"
        )


class Eager:
    """Transformers' own ``generate`` as most people call it, always greedy and with a KV cache."""

    note = ""

    def __init__(self, model: PreTrainedModel) -> None:
        own = model.generation_config
        # a copy shares everything; its settings leave out the model's own sampling, penalties, beams and caches
        self._model: Any = copy(model)
        self._model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=pad_id(model))

    def generate(self, prompts: Prompts, new_tokens: int, clock: Clock | None = None) -> Tensor:
        """Return new ids, (B, N).

        `clock` ticks where ``generate`` asks whether to stop, once a token, just before it waits for the device
        itself: the clock adds no waiting.
        """
        model = self._model
        check_context_window(model.config, max(map(len, prompts)), new_tokens)
        ids, padding = pad(prompts, pad_id(model), model.device)  # (B, T), (B,)
        never = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)  # (B,)

        def tick(*_: Any, **__: Any) -> Tensor:
            clock.tick()  # type: ignore[union-attr]  # called only where there is one
            return never

        with torch.inference_mode():
            texts = model.generate(
                input_ids=ids,
                attention_mask=(torch.arange(ids.shape[1], device=ids.device) >= padding[:, None]).long(),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,  # bars the end of sequence
                do_sample=False,
                use_cache=True,
                stopping_criteria=StoppingCriteriaList([tick] if clock else []),
            )
        return texts[:, ids.shape[1] :]  # (B, N)


class CudaGraph:
    """One decode step captured as a CUDA graph and replayed for every token; short prefills are captured too.

    Both are captured at the first batch of each size, in memory that all sizes share: run a batch of a size once
    before timing it.

    Parameters
    ----------
    model
        A loaded model on a GPU.
    batch_size
        The largest batch.
    prompt_tokens
        Tokens of the longest prompt.
    new_tokens
        The most new tokens a row.

    Raises
    ------
    EngineUnavailable
        There is no GPU, or the step cannot be captured.
    InputError
        The request is longer than the context window.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
        if why := why_unavailable("cuda_graph", model.device.type, model=model, tokens=prompt_tokens + new_tokens):
            raise EngineUnavailable(f"engine 'cuda_graph' cannot run: {why}; take engine 'eager'")
        check_context_window(model.config, prompt_tokens, new_tokens)
        self._device = model.device
        self._decoder = Decoder(model, batch_size, prompt_tokens, new_tokens, COMPILE_OPTIONS)
        self._prefills: dict[int, torch.cuda.CUDAGraph] = {}  # by batch size
        self._steps: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        register_capture(self)

    @property
    def note(self) -> str:
        """What a reader of its rows should know; "" for nothing."""
        return self._decoder.network.note

    def generate(self, prompts: Prompts, new_tokens: int, clock: Clock | None = None) -> Tensor:
        """Return new ids, (B, N); `clock` ticks at each token."""
        decoder, batch_size = self._decoder, len(prompts)
        with torch.cuda.device(self._device):
            padded = decoder.load(prompts)
            if batch_size not in self._steps:
                self._capture_both(batch_size)
            if batch_size in self._prefills:
                self._prefills[batch_size].replay()
            else:
                decoder.prefill(batch_size, padded)
            if clock:
                clock.tick()
            step = self._steps[batch_size]
            for _ in range(new_tokens - 1):
                step.replay()
                if clock:
                    clock.tick()
            return decoder.new_ids(batch_size, new_tokens)

    def _capture_both(self, batch_size: int) -> None:
        """Capture the decode step of a batch size, and before it the prefill where that is short."""
        if batch_size * self._decoder.prompt_tokens <= CAPTURED_PREFILL_TOKENS:
            self._prefills[batch_size] = self._capture(self._decoder.prefill, batch_size)
        self._decoder.restart()
        self._steps[batch_size] = self._capture(self._decoder.step, batch_size)

    def _capture(self, work: Callable[[int], Any], batch_size: int) -> torch.cuda.CUDAGraph:
        """Capture `work`, after runs in which kernels are compiled and libraries allocate their workspaces."""
        main, side = torch.cuda.current_stream(), _capture_stream(self._device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                work(batch_size)
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(main), torch.cuda.graph(graph, pool=self._pool, stream=side):
            work(batch_size)
        return graph


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream to capture on: cuBLAS keeps a workspace for every stream that it ever saw."""
    return torch.cuda.Stream(device)


def why_unavailable(
    engine: str, device_kind: str, int8_threshold: float = 0.0, model: PreTrainedModel | None = None, tokens: int = 0
) -> str:
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
    """
    if engine != "cuda_graph":
        return ""
    if device_kind != "cuda":
        return "it replays CUDA graphs, and there is no NVIDIA GPU here"
    if model is not None:
        states = (getattr(module, "state", None) for module in model.modules())
        int8_threshold = max((getattr(state, "threshold", 0.0) for state in states), default=0.0)
    if int8_threshold > 0:
        return (
            "LLM.int8 with an outlier threshold reads the outlier columns back to the host in every product, "
            "which no graph can capture (int8-no-outliers has no threshold)"
        )
    if model is None:
        return ""
    why, config = "", model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if not cache_argument(model):
        why = "it has no KV cache"
    elif other_layers := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        why = f"it has layers of {', '.join(sorted(other_layers))}"
    elif window and getattr(config, "use_sliding_window", True) and window < tokens:
        why = f"attention is limited to the last {window} tokens"
    return f"it needs the keys and values of every token, and this model does not keep them: {why}" if why else ""


Engine = Eager | CudaGraph
Factory = Callable[["PreTrainedModel", int, int, int], Engine]  # of model, batch size, prompt tokens, new tokens
FACTORIES: dict[str, Factory] = {"eager": lambda model, *_: Eager(model), "cuda_graph": CudaGraph}


def parse(engines: str | Iterable[str], device_kind: str) -> tuple[str, ...]:
    """Return the engines named, once each; ``"auto"`` is eager, and cuda_graph too where there is a GPU.

    Eager comes first in any case: cuda_graph moves a model's weights, and leaves other gaps in memory.

    Raises
    ------
    InputError
        A name is unknown, or that engine cannot run on this kind of device.
    """
    names = listed(engines)
    if names == ["auto"]:
        return tuple(name for name in FACTORIES if not why_unavailable(name, device_kind))
    if not names or not set(names) <= set(FACTORIES):
        raise InputError(f"engines is {engines!r}; give 'auto' or names of {', '.join(FACTORIES)}")
    for name in names:
        if why := why_unavailable(name, device_kind):
            raise InputError(f"engine {name!r} cannot run: {why}; take engines 'auto'")
    return tuple(name for name in FACTORIES if name in names)


def warm_up_batch_sizes(engine: str, prompt_tokens: int) -> tuple[int, ...]:
    """Return batch sizes after which an engine has compiled and loaded all that any batch size needs.

    A captured step has kernels for a small batch and for any larger one; a prefill too long to be captured has its
    own.
    """
    return (1,) if engine == "eager" else (1, max(SMALL_BATCH, CAPTURED_PREFILL_TOKENS // prompt_tokens) + 1)


@dataclass(frozen=True, slots=True)
class TokenComparison:
    """How far two engines' tokens are the same, and how near a tie was where they first differ.

    Each engine rounds in its own order, so where two tokens are as good as equal either may come. From there on the
    texts are different ones.
    """

    compared_tokens: int  # of each row
    first_difference: int | None  # place of the earliest new token that differs in any row; None if none does
    difference_margin: float | None  # by how much the model's logits prefer the first engine's token there


def compare_tokens(model: PreTrainedModel, prompts: Prompts, first: Tensor, second: Tensor) -> TokenComparison:
    """Compare two engines' new ids, (B, N) each, of the same prompts."""
    differs, new_tokens = (first != second).long(), first.shape[1]  # (B, N)
    if not differs.any():
        return TokenComparison(new_tokens, None, None)
    place = int(differs.amax(0).argmax())
    row = int(differs[:, place].argmax())
    ids = torch.tensor([[*prompts[row], *first[row, :place].tolist()]], device=model.device)  # (1, T)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()  # (V,)
    margin = float(logits[first[row, place]] - logits[second[row, place]])
    return TokenComparison(new_tokens, place, margin)
