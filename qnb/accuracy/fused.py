"""The work between a transformer's products in as few kernels as it takes, for as long as it reads many tokens.

A pass over many tokens is products, which keep a GPU busy, and the rest, which waits for its memory: transformers
writes an RMS norm as eight kernels, rotary angles as ten, a gated activation as two, and each reads and writes every
activation. torch.compile makes one of each. Attention under a mask of one's own repeats keys and values for all query
heads that share them, as PyTorch's kernels know shared heads only without a mask; here the queries of one key head
stand below each other, where a longer sequence's would, and nothing is repeated.

A part is replaced only where its own result is this one's: other models stay as they are.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qnb.accuracy.backbone import Backbone, separation_error
from qnb.memory import is_out_of_memory

Piece = TypeVar("Piece", bound=Callable[..., Any])
log = logging.getLogger(__name__)
_one_at_a_time = threading.RLock()  # what is replaced belongs to models and to the process

GROUPED = "qnb_grouped"  # the attention's name in transformers' register
AMPERE = 8  # the first compute capability with bfloat16 units
MASK_BYTES = 256 << 20  # a larger mask for grouped queries takes more than the keys that it saves from being repeated
VARIANTS = 64  # of a compiled piece: each type, one row or many, the first size by itself and then any


def norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return the RMS norm of hidden states, (N, D) -> (N, D)."""
    return weight * functional.rms_norm(hidden, hidden.shape[-1:], None, epsilon)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return what a SiLU gate lets through, (N, K) and (N, K) -> (N, K)."""
    return functional.silu(gate) * up


def rotated(
    query: torch.Tensor,  # (B, heads, L, size)
    key: torch.Tensor,  # (B, key heads, L, size)
    cos: torch.Tensor,  # (B or 1, L, size or less)
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys by the angles of their positions; in memory queries come head after head."""
    cos, sin = cos[:, None], sin[:, None]

    def turned(heads: torch.Tensor) -> torch.Tensor:
        some, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]  # of some models a part of each head
        low, high = some.chunk(2, -1)
        some = some * cos + torch.cat((-high, low), -1) * sin
        return torch.cat((some, rest), -1) if rest.shape[-1] else some

    return turned(query).contiguous(), turned(key)


def beside(seen: torch.Tensor, groups: int) -> torch.Tensor:
    """Lay heads beside each other again, (B, key heads, groups*L, size) -> (B, L, heads, size)."""
    return seen.unflatten(2, (groups, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


def likelihoods(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return targets' log-likelihoods in float32, and 1 where another token was likelier: (N, V), (N,) -> (N,)."""
    wide = logits.float()
    chosen = wide.gather(1, targets[:, None])[:, 0]
    return chosen - torch.logsumexp(wide, 1), (logits.argmax(1) != targets).long()


_broken: set[Callable[..., Any]] = set()


@cache
def _compiled(piece: Piece) -> Piece:
    """Return a piece as one kernel; from the first time on that it cannot be built, as its operations."""
    kernel = torch.compile(piece, fullgraph=True)

    def run(*given: Any) -> Any:
        if piece not in _broken:
            try:
                return kernel(*given)
            except Exception as error:  # the compiler's, of the one that it calls, of a driver
                if is_out_of_memory(error):
                    raise
                _broken.add(piece)
                log.warning("%s is not fused: %s", piece.__name__, f"{type(error).__name__}: {error}".splitlines()[0])
        return piece(*given)

    return cast("Piece", run)


class Pieces:
    """The pieces as they run: compiled into a kernel each, or operation by operation."""

    def __init__(self, compiled: bool = False) -> None:
        def made(piece: Piece) -> Piece:
            return _compiled(piece) if compiled else piece

        self.norm, self.gated, self.rotated = made(norm), made(gated), made(rotated)
        self.beside, self.likelihoods = made(beside), made(likelihoods)


PLAIN = Pieces()


def compiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch.compile builds kernels of a type here; GPUs before Ampere have no bfloat16 units."""
    return device.type == "cuda" and (dtype != torch.bfloat16 or torch.cuda.get_device_capability(device)[0] >= AMPERE)


def groups(model: Any) -> int:
    """Return how many query heads share a key head under the grouped attention; 1 where it is not used."""
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", GROUPED) or getattr(config, "attn_logit_softcapping", None):
        return 1
    return config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def grouped(mask: torch.Tensor, model: Any) -> torch.Tensor:
    """Return who sees whom, (B, 1, L, P+L), for grouped queries: (B, 1, groups*L, P+L), 0 or -inf.

    A mask that would be too large comes back as it is, and keys are repeated.
    """
    if mask.numel() * groups(model) * model.dtype.itemsize > MASK_BYTES:
        return mask
    added = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return added.repeat(1, 1, groups(model), 1)


@contextmanager
def fused(model: Any, compiled: bool = False) -> Iterator[Pieces]:
    """For a while, let a model run its norms, angles, gates and masked attention by `Pieces`, which are returned.

    Parameters
    ----------
    model
        A causal language model. A mask of one's own, given meanwhile, is to come from `grouped` if the model's
        attention is `GROUPED`.
    compiled
        Whether each piece is compiled into one kernel.
    """
    pieces = Pieces(compiled)
    with _one_at_a_time, ExitStack() as stack:
        if compiled:
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=VARIANTS))
        forwards = _forwards.setdefault(model, {})
        for module in model.modules():
            kind = type(module), type(getattr(module, "act_fn", None))
            if kind not in forwards:
                forwards[kind] = _forward(module, model)
            if (forward := forwards[kind]) and "forward" not in vars(module):
                module.forward = partial(forward, pieces, module)
                stack.callback(vars(module).pop, "forward")  # the class's own is there again
        for home in {sys.modules[kind.__module__] for kind, _ in forwards}:
            if _is_rotary(own := getattr(home, "apply_rotary_pos_emb", None)):
                home.apply_rotary_pos_emb = lambda query, key, cos, sin, *_, **__: pieces.rotated(query, key, cos, sin)  # type: ignore[attr-defined]
                stack.callback(setattr, home, "apply_rotary_pos_emb", own)
        if groups(model) > 1:
            AttentionInterface.register(GROUPED, partial(_attend, pieces))
            AttentionMaskInterface.register(GROUPED, sdpa_mask)
            config = model.config.get_text_config()  # what reads pictures keeps its own
            stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = GROUPED
        yield pieces


def _attend(
    pieces: Pieces,
    module: Any,
    query: torch.Tensor,  # (B, heads, L, size)
    key: torch.Tensor,  # (B, key heads, P+L, size)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # from `grouped`, or the model's own
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as `sdpa` does, (B, L, heads, size)."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    stacked = query.reshape(len(key), key.shape[1], -1, query.shape[-1])  # (B, key heads, groups*L, size)
    seen = functional.scaled_dot_product_attention(stacked, key, value, attn_mask=attention_mask, scale=scaling)
    return pieces.beside(seen, query.shape[1] // key.shape[1]), None


Forward = Callable[[Pieces, Any, torch.Tensor], torch.Tensor]
# by a module's type and its activation's: what was found once holds for as long as the model does
_forwards: WeakKeyDictionary[Any, dict[tuple[type, type], Forward | None]] = WeakKeyDictionary()


def _forward(module: Any, model: Any) -> Forward | None:
    """Return a forward for modules of this one's kind, made of pieces, where it gives what theirs gives."""
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return _norm if _agrees(module, _norm, len(module.weight), model) else None
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        width = getattr(module.gate_proj, "in_features", 0)  # some keep a weight an expert, and no layer
        return _mlp if width and _agrees(module, _mlp, width, model) else None
    return None


def _norm(pieces: Pieces, module: Any, hidden: torch.Tensor) -> torch.Tensor:
    return pieces.norm(hidden.reshape(-1, hidden.shape[-1]), module.weight, module.variance_epsilon).view(hidden.shape)


def _mlp(pieces: Pieces, module: Any, hidden: torch.Tensor) -> torch.Tensor:
    flat = hidden.reshape(-1, hidden.shape[-1])
    return module.down_proj(pieces.gated(module.gate_proj(flat), module.up_proj(flat))).view(*hidden.shape[:-1], -1)


@torch.inference_mode()
def _agrees(module: Any, forward: Forward, width: int, model: Any) -> bool:
    """Return whether a module's own result is this one's.

    Sums may be taken in another order: in float32 that moves last bits, in 16 bit it may move the last bit of few.
    """
    drawn = torch.randn(64, width, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
    try:
        own, ours = module(drawn), forward(PLAIN, module, drawn)
    except Exception as error:  # it wants something else
        if is_out_of_memory(error):
            raise
        return False
    eps = torch.finfo(own.dtype).eps
    if own.dtype == torch.float32:
        return torch.allclose(own, ours, rtol=8 * eps, atol=0)
    return torch.allclose(own, ours, rtol=eps, atol=0) and bool((own != ours).float().mean() < 0.01)


@torch.inference_mode()
def _is_rotary(own: Callable[..., Any] | None) -> bool:
    """Return whether a function turns heads as `rotated` does, and parts of heads if it turns those."""
    if own is None:
        return False
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 3, 8, generator=draw), torch.randn(2, 2, 3, 8, generator=draw)
    alike = []
    for size in (8, 4):
        cos, sin = torch.randn(2, 2, 3, size, generator=draw)
        try:
            theirs = own(query, key, cos, sin)
        except Exception:  # it wants something else
            alike.append(size < query.shape[-1])
            continue
        alike.append(all(map(torch.equal, theirs, rotated(query, key, cos, sin))))
    return all(alike)


COMPILED_FROM = 10**16  # tokens times weights: half a minute of an H100, a quarter of an hour of a T4
_fusable: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@contextmanager
def applied(backbone: Backbone, tokens: int = 0) -> Iterator[None]:
    """Fuse what a backbone runs between its products while the block runs, on a GPU and where its results agree.

    Kernels are compiled, which takes some fifteen seconds, where there are `tokens` enough to read.
    """
    if backbone.kind != "cuda":
        yield
        return
    if backbone.model not in _fusable:
        with _pieces(backbone, compiled=False):
            error, bound = separation_error(backbone)
        _fusable[backbone.model] = error <= bound
    if not _fusable[backbone.model]:
        yield
        return
    enough = tokens * backbone.parameters >= COMPILED_FROM
    with _pieces(backbone, compiled=enough and compiles(backbone.device, backbone.model.dtype)):
        yield


@contextmanager
def _pieces(backbone: Backbone, compiled: bool) -> Iterator[None]:
    with fused(backbone.model, compiled) as pieces:
        backbone.likelihoods = pieces.likelihoods
        if backbone.config._attn_implementation == GROUPED:
            backbone.attention_mask = lambda visible: grouped(visible, backbone.model)  # type: ignore[method-assign]
        try:
            yield
        finally:
            backbone.likelihoods = likelihoods
            vars(backbone).pop("attention_mask", None)
