"""A decode step: fused where a model is Llama-like, so that reading the weights bounds it, or the model's own forward.

A model's own forward runs about 700 kernels a token, most of them tiny. The fused step joins the products of one
input, lets torch.compile make one kernel of the residual, norm, rotary and activation work between two products,
attends without repeating KV heads, and gives only the last position to the output head. Prompts are read by the same
layers.

Shapes: B rows, T prompt tokens, L slots of the cache, D hidden size, V vocabulary, H KV heads, G query heads that
share a KV head, S head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedModel

from qnb.capture import SlotCache, cache_name
from qnb.device import is_emulated
from qnb.memory import is_out_of_memory
from qnb.patches import steady_autotuning
from qnb.speed import layers
from qnb.speed.layers import KV, Angles, Attend, Layer, Position, Product, State, join, multiply_all, rms_norm, rotate

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # one block: RMS norm, rotary grouped attention, gated SiLU
ROTARIES = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on how long the text is
# of attention: all but cuDNN's, which would plan anew for every length; on a GPU the mask leaves the first out
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SMALL_BATCH = 8  # up to so many rows give SDPA's kernel too few thread blocks to keep a GPU busy
NO_BFLOAT16 = "its small kernels are not fused: torch.compile needs units for bfloat16, and this GPU has none"
RECOMPILE_LIMIT = 64  # of a function: each type, one row or many, the first size by itself and then any
ARGMAX_PART = 256  # scores that are compared at once

CompileOptions = dict[str, Any] | None  # for torch.compile; None compiles nothing
Next = tuple[Tensor, Tensor]  # the next token's logits, (B, V), and the token chosen by them, (B,)


# The functions that torch.compile fuses. Each adds the last product's output, `delta`, to the hidden states itself,
# so that the sum is one kernel with the norm after it.


def project_qkv(hidden: Tensor, layer: Layer, kv: KV, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (..., H*G, S), keys and values (..., H, S) of the hidden states (..., D), not yet rotated."""
    kv_heads, head_size = kv[0].shape[1], kv[0].shape[3]
    normed = rms_norm(hidden, layer.input_norm, epsilon).reshape(-1, hidden.shape[-1])
    heads = multiply_all(layer.qkv, normed).view(*hidden.shape[:-1], -1, head_size)
    query, key, value = heads.split((heads.shape[-2] - 2 * kv_heads, kv_heads, kv_heads), -2)
    if layer.qk_norms:
        query, key = (rms_norm(x, norm, epsilon) for x, norm in zip((query, key), layer.qk_norms, strict=True))
    return query, key, value


def project_output(hidden: Tensor, attended: Tensor, layer: Layer, epsilon: float) -> tuple[Tensor, Tensor]:
    """Add the projection of `attended` to the hidden states; return that and the MLP's output, (..., D) each."""
    rows = hidden.numel() // hidden.shape[-1]
    hidden = hidden + layer.output.multiply(attended.reshape(rows, -1)).view_as(hidden)
    normed = rms_norm(hidden, layer.post_attention_norm, epsilon).reshape(-1, hidden.shape[-1])
    gate, up = multiply_all(layer.gate_up, normed).chunk(2, -1)
    return hidden, layer.down.multiply(functional.silu(gate) * up).view_as(hidden)


def embed(
    embedding: Tensor, angles: Angles, ids: Tensor, slots: Tensor, padding: Tensor, length: int
) -> tuple[Tensor, Position]:
    """Return the hidden states, (B, D) or (B, T, D), and positions of tokens, (B,) or (B, T), written to `slots`."""
    places, visible = layers.layout(slots, padding, length)  # (B, T), (B, 1, T, L)
    mask = torch.zeros(visible.shape, dtype=embedding.dtype, device=ids.device).masked_fill(~visible, float("-inf"))
    cos, sin = (angle[places] for angle in angles)  # (B, T, S)
    return embedding[ids], Position(cos, sin, mask, (slots // layers.FLEX_BLOCK + 1).to(torch.int32))


def decode_layer(
    hidden: Tensor, delta: Tensor, layer: Layer, kv: KV, slot: Tensor, position: Position, epsilon: float,
    attend: Attend,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run one decoder layer for one token a row, (B, D); return the hidden states and what is to be added to it."""
    hidden = hidden + delta
    query, key, value = project_qkv(hidden, layer, kv, epsilon)
    for part, new in zip(kv, (rotate(key, position.cos, position.sin), value), strict=True):
        part.index_copy_(2, slot, new[:, :, None])
    query = query.unflatten(1, (key.shape[1], -1))
    query = rotate(query, position.cos[:, None], position.sin[:, None])  # (B, H, G, S)
    return project_output(hidden, attend(query, kv, position), layer, epsilon)


def prefill_layer(
    hidden: Tensor, delta: Tensor, layer: Layer, kv: KV, position: Position, epsilon: float, is_last: bool
) -> tuple[Tensor, Tensor]:
    """Run one decoder layer for whole prompts, (B, T, D); return the hidden states and what is to be added to it.

    Beyond keys and values, the last layer runs only for each prompt's last token, (B, D).
    """
    hidden, attend = hidden + delta, functional.scaled_dot_product_attention
    cos, sin, mask = position.cos[:, :, None], position.sin[:, :, None], position.mask
    query, key, value = project_qkv(hidden, layer, kv, epsilon)
    for part, new in zip(kv, (rotate(key, cos, sin), value), strict=True):
        part.copy_(new.transpose(1, 2))
    if is_last:
        query = rotate(query[:, -1:], cos[:, -1:], sin[:, -1:])[:, 0].unflatten(1, (key.shape[2], -1))  # (B, H, G, S)
        attended = attend(query, *kv, attn_mask=mask[:, :, -1:])
        return project_output(hidden[:, -1], attended, layer, epsilon)
    query = rotate(query, cos, sin).transpose(1, 2)  # (B, H*G, T, S)
    keys, values = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in kv)
    return project_output(hidden, attend(query, keys, values, attn_mask=mask).transpose(1, 2), layer, epsilon)


def predict(hidden: Tensor, delta: Tensor, norm: Tensor, head: Product, suppressed: Tensor, epsilon: float) -> Next:
    """Return the next token's logits, (B, V), and the likeliest token that is not suppressed, (B,)."""
    logits = head.multiply(rms_norm(hidden + delta, norm, epsilon))
    return logits, argmax_in_parts(logits + suppressed)


def argmax_in_parts(scores: Tensor) -> Tensor:
    """Return the first of the highest scores, (B, V) -> (B,): that of each part, then that of all parts.

    torch.compile gives a row's argmax one thread block: of 128,256 scores it takes an H100 23 us, and in parts 4.
    """
    if missing := -scores.shape[-1] % ARGMAX_PART:
        scores = functional.pad(scores, (0, missing), value=float("-inf"))
    best, place = scores.unflatten(-1, (-1, ARGMAX_PART)).max(-1)  # (B, V/256)
    part = best.argmax(-1, keepdim=True)  # (B, 1)
    return (part * ARGMAX_PART + place.gather(-1, part))[:, 0]


class Functions(NamedTuple):
    """The functions of a step and of a prefill, as written or compiled, and how a step attends."""

    embed: Callable[..., Any] = embed
    decode_layer: Callable[..., Any] = decode_layer
    prefill_layer: Callable[..., Any] = prefill_layer
    predict: Callable[..., Any] = predict
    attend: Attend = layers.attend_sdpa

    def compiled(self, options: dict[str, Any], attend: Attend) -> Functions:
        """Return the functions compiled, each once for all layers, with a way to attend that is compiled with them."""
        compiled = Functions(*(torch.compile(function, fullgraph=True, **options) for function in self[:-1]))
        return compiled._replace(attend=attend)


class FusedStep:
    """A Llama-like model's decode step and prefill, fused; the model itself goes on working on the same weights.

    Parameters
    ----------
    model
        A loaded model for which `why_not_fused` returns "".
    compile_options
        For a step of few rows. What is compiled for more rows or for a prefill serves any number of rows and is not
        tuned, as the first number might be a small one.

    Attributes
    ----------
    is_fused
        Whether torch.compile fuses the small kernels.
    note
        Why it does not though it should; "" where all is well.
    """

    def __init__(self, model: PreTrainedModel, compile_options: CompileOptions) -> None:
        inner: Any = model.base_model
        self.embedding = inner.embed_tokens.weight.detach()  # (V, D)
        self.norm, self.epsilon = inner.norm.weight.detach(), model.config.rms_norm_eps  # (D,)
        self.layers = [Layer.of(block) for block in inner.layers]
        self.head = join([model.get_output_embeddings()])[0]
        self.note = ""
        if compile_options is not None and is_emulated(model):
            self.note, compile_options = NO_BFLOAT16, None
        self.is_fused = compile_options is not None
        self._small = self._large = Functions()
        if compile_options is not None:
            head_bytes = inner.layers[0].self_attn.head_dim * self.embedding.element_size()
            self._small = Functions().compiled(compile_options, layers.attend_reductions)
            self._large = Functions().compiled({}, layers.attend_large_batch(head_bytes, self.embedding.device))

    def decode(self, token: Tensor, state: State) -> Next:
        """Read the last token of each row, (B,), and choose the next one; keys and values go to the state's slot."""
        return self._run(self._decode, token, state)

    def prefill(self, ids: Tensor, state: State) -> Next:
        """Read prompts padded on the left, (B, T), into the first T slots, and choose each row's next token."""
        return self._run(self._prefill, ids, state)

    def _run(self, work: Callable[..., Next], *inputs: Any) -> Next:
        """Return what `work` returns; where torch.compile fails, all runs uncompiled from then on.

        What was done before it failed is done again: it writes the same to the same places. Memory that runs out
        meanwhile is not the compiler's fault.
        """
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT), steady_autotuning(), sdpa_kernel(BACKENDS):
            try:
                return work(*inputs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                if is_out_of_memory(error):
                    raise
                reason = " ".join(str(error).split())[:200]
        self._small = self._large = Functions()
        self.is_fused = False
        self.note = f"its small kernels are not fused, as torch.compile failed: {reason}"
        return work(*inputs)

    def _decode(self, token: Tensor, state: State) -> Next:
        functions, slot = self._small if len(token) <= SMALL_BATCH else self._large, state.slot
        _allow_any_batch(token, state.padding)
        hidden, position = functions.embed(self.embedding, state.angles, token, slot, state.padding, state.length)
        delta = torch.zeros_like(hidden)
        _allow_any_batch(position.cos, position.sin, position.mask)
        for layer, kv in zip(self.layers, state.layers, strict=True):
            _allow_any_batch(hidden, delta, *kv)
            inputs = hidden, delta, layer, kv, slot, position, self.epsilon, functions.attend
            hidden, delta = functions.decode_layer(*inputs)
        _allow_any_batch(hidden, delta)
        return functions.predict(hidden, delta, self.norm, self.head, state.suppressed, self.epsilon)

    def _prefill(self, ids: Tensor, state: State) -> Next:
        slots = torch.arange(ids.shape[1], device=ids.device)  # (T,)
        hidden, position = embed(self.embedding, state.angles, ids, slots, state.padding, len(slots))  # (B, T, D)
        delta = torch.zeros_like(hidden)
        _allow_any_batch(position.cos, position.sin, position.mask)
        for layer, (keys, values) in zip(self.layers, state.layers, strict=True):
            kv = keys[:, :, : len(slots)], values[:, :, : len(slots)]  # (B, H, T, S) each
            _allow_any_batch(hidden, delta, *kv)
            inputs = hidden, delta, layer, kv, position, self.epsilon, layer is self.layers[-1]
            hidden, delta = self._large.prefill_layer(*inputs)
        _allow_any_batch(hidden, delta)  # (B, D)
        predict = self._small.predict if len(ids) <= SMALL_BATCH else self._large.predict
        return predict(hidden, delta, self.norm, self.head, state.suppressed, self.epsilon)


def _allow_any_batch(*tensors: Tensor) -> None:
    """Let what is compiled for more than a few rows serve any number of them."""
    for tensor in tensors:
        if len(tensor) > SMALL_BATCH:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def why_not_fused(model: PreTrainedModel) -> str:
    """Return why the fused step cannot stand for a model's own forward; "" where it can."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"the fused step knows {', '.join(FAMILIES)}, not {config.model_type}"
    rotary = getattr(getattr(model.base_model, "rotary_emb", None), "rope_type", "")
    if rotary not in ROTARIES:
        return f"rotary angles of type {rotary!r} depend on the text's length"
    return "" if config.hidden_act in ("silu", "swish") else f"the fused step computes silu, not {config.hidden_act}"


_fused_steps: WeakKeyDictionary[PreTrainedModel, FusedStep] = WeakKeyDictionary()


def decode_step_of(model: PreTrainedModel, compile_options: CompileOptions = None) -> FusedStep | ModelStep:
    """Return a model's decode step. A fused one is built once, as it joins the weights."""
    if why := why_not_fused(model):
        return ModelStep(model, f"the model's own forward: {why}")
    if model not in _fused_steps:
        if compile_options is not None:
            torch.compiler.reset()  # another model's step is no use, and only so many stay compiled
        _fused_steps[model] = FusedStep(model, compile_options)
    return _fused_steps[model]


class ModelStep:
    """The model's own forward over a `State`, with the methods of `FusedStep`, for models of other families."""

    is_fused = False

    def __init__(self, model: PreTrainedModel, note: str) -> None:
        self._model, self.note = model, note

    def decode(self, token: Tensor, state: State) -> Next:
        """Do what `FusedStep.decode` does."""
        return self._run(token[:, None], state, state.slot, state.length)

    def prefill(self, ids: Tensor, state: State) -> Next:
        """Do what `FusedStep.prefill` does."""
        return self._run(ids, state, torch.arange(ids.shape[1], device=ids.device), ids.shape[1])

    def _run(self, ids: Tensor, state: State, slots: Tensor, attended: int) -> Next:
        positions, mask = layers.layout(slots, state.padding, attended)
        cache, inputs = SlotCache(state.layers, slots, attended), {"attention_mask": mask, "position_ids": positions}
        logits = run_model(self._model, cache, input_ids=ids, **inputs)  # (B, V)
        return logits, (logits + state.suppressed).argmax(-1)


def rotary_angles(model: Any, length: int) -> Angles:
    """Return the rotary cosines and sines of positions up to `length`, (L, S) each; none for a `ModelStep`."""
    if why_not_fused(model):
        return ()
    positions = torch.arange(length, device=model.device)[None]  # (1, L)
    return tuple(angle[0] for angle in model.base_model.rotary_emb(model.get_input_embeddings().weight, positions))


def empty_layers(model: PreTrainedModel, batch_size: int, length: int) -> list[KV]:
    """Return each layer's empty keys and values, (B, H, L, S) each, of the shapes that one token's have.

    They are allocated before any prompt is read. Allocated meanwhile, they would stand between pieces too small for
    the next tensors: on an H100 held to 15 GiB that lost up to a fifth of the memory.
    """

    def empty(part: Tensor) -> Tensor:  # (1, H, 1, S) -> (B, H, L, S)
        return part.new_zeros(batch_size, part.shape[1], length, part.shape[3])

    cache, token = DynamicCache(), torch.zeros(1, 1, dtype=torch.long, device=model.device)
    run_model(model, cache, input_ids=token, attention_mask=None, position_ids=token)
    one_token: Any = cache.layers
    return [(empty(layer.keys), empty(layer.values)) for layer in one_token]


def run_model(model: PreTrainedModel, cache: DynamicCache, **inputs: Any) -> Tensor:
    """Run a model's own forward with a cache; return the last position's logits, (B, V)."""
    return model(**inputs, **{cache_name(model.forward): cache}, use_cache=True, logits_to_keep=1).logits[:, -1]
