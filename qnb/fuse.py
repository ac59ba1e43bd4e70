"""The work between a transformer's products in as few kernels as it takes, for as long as it scores.

A pass over many tokens is products, which keep a GPU busy, and the rest, which waits for its memory: transformers
writes an RMS norm as seven kernels, rotary angles as ten, a gated activation as two, and each reads and writes every
activation. torch.compile makes one of each. Attention under a mask of one's own repeats keys and values for all query
heads that share them, as PyTorch's kernels know shared heads only without a mask; here the queries of one key head
stand below each other, where a longer sequence's would, and nothing is repeated.

A part is replaced only where its own result is this one's: other models stay as they are.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, TypeVar, cast

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

Piece = TypeVar("Piece", bound=Callable[..., Any])
log = logging.getLogger(__name__)

GROUPED = "qnb_grouped"  # the attention's name in transformers' register
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
    cos: torch.Tensor,  # (B or 1, L, size)
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys by the angles of their positions; in memory queries come head after head."""
    cos, sin = cos[:, None], sin[:, None]
    (low, high), (key_low, key_high) = query.chunk(2, -1), key.chunk(2, -1)
    turned = query * cos + torch.cat((-high, low), -1) * sin
    return turned.contiguous(), key * cos + torch.cat((-key_high, key_low), -1) * sin


def beside(seen: torch.Tensor, groups: int) -> torch.Tensor:
    """Lay heads beside each other again, (B, key heads, groups*L, size) -> (B, L, heads, size)."""
    return seen.unflatten(2, (groups, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


def likelihoods(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return targets' log-likelihoods in float32, and 1 where another token was likelier: (N, V), (N,) -> (N,)."""
    wide = logits.float()
    chosen = wide.gather(1, targets[:, None])[:, 0]
    return chosen - torch.logsumexp(wide, 1), (logits.argmax(1) != targets).long()


@cache
def _compiled(piece: Piece) -> Piece:
    return cast("Piece", torch.compile(piece, fullgraph=True))


class Pieces:
    """The pieces as they run: compiled into a kernel each, or operation by operation."""

    def __init__(self, compiled: bool = False) -> None:
        def made(piece: Piece) -> Piece:
            return _compiled(piece) if compiled else piece

        self.norm, self.gated, self.rotated = made(norm), made(gated), made(rotated)
        self.beside, self.likelihoods = made(beside), made(likelihoods)


PLAIN = Pieces()


@cache
def compiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch.compile can build kernels for a type here; where it should and cannot, say so once.

    GPUs before Ampere have no bfloat16 units, and get no such kernels.
    """
    if device.type != "cuda" or (dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] < 8):
        return False
    try:
        with torch.inference_mode():
            _compiled(gated)(*torch.ones(2, 16, 64, device=device, dtype=dtype))
    except Exception as error:  # the compiler's, of the one that it calls, of a driver
        log.warning("kernels are not fused: %s", f"{type(error).__name__}: {error}".splitlines()[0][:200])
        return False
    return True


def groups(model: Any) -> int:
    """Return how many query heads share a key head under the grouped attention; 1 where it is not used."""
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", GROUPED) or getattr(config, "attn_logit_softcapping", None):
        return 1
    return config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def grouped(mask: torch.Tensor, model: Any) -> torch.Tensor:
    """Return who sees whom, (B, 1, L, P+L), for grouped queries: (B, 1, groups*L, P+L), 0 or -inf."""
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
    with ExitStack() as stack:
        if compiled:
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=VARIANTS))
        forwards: dict[type, Callable[..., Any] | None] = {}
        for module in model.modules():
            if type(module) not in forwards:
                forwards[type(module)] = _forward(module, pieces, model)
            if (forward := forwards[type(module)]) and "forward" not in vars(module):
                module.forward = partial(forward, module)
                stack.callback(vars(module).pop, "forward")  # the class's own is there again
        for home in {sys.modules[kind.__module__] for kind in forwards}:
            if _is_rotary(own := getattr(home, "apply_rotary_pos_emb", None)):
                home.apply_rotary_pos_emb = lambda query, key, cos, sin, *_, **__: pieces.rotated(query, key, cos, sin)  # type: ignore[attr-defined]
                stack.callback(setattr, home, "apply_rotary_pos_emb", own)
        if groups(model) > 1:
            AttentionInterface.register(GROUPED, partial(_attend, pieces))
            AttentionMaskInterface.register(GROUPED, sdpa_mask)
            stack.callback(setattr, model.config, "_attn_implementation", model.config._attn_implementation)
            model.config._attn_implementation = GROUPED
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


def _forward(module: Any, pieces: Pieces, model: Any) -> Callable[..., torch.Tensor] | None:
    """Return a forward for modules of this one's kind, made of `pieces`, where it gives what theirs gives."""
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return partial(_norm, pieces) if _agrees(module, _norm, len(module.weight), model) else None
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        width = getattr(module.gate_proj, "in_features", 0)  # some keep a weight an expert, and no layer
        return partial(_mlp, pieces) if width and _agrees(module, _mlp, width, model) else None
    return None


def _norm(pieces: Pieces, module: Any, hidden: torch.Tensor) -> torch.Tensor:
    return pieces.norm(hidden.reshape(-1, hidden.shape[-1]), module.weight, module.variance_epsilon).view(hidden.shape)


def _mlp(pieces: Pieces, module: Any, hidden: torch.Tensor) -> torch.Tensor:
    flat = hidden.reshape(-1, hidden.shape[-1])
    return module.down_proj(pieces.gated(module.gate_proj(flat), module.up_proj(flat))).view(hidden.shape)


@torch.inference_mode()
def _agrees(module: Any, forward: Callable[..., torch.Tensor], width: int, model: Any) -> bool:
    """Return whether a module's own result is this one's.

    Sums may be taken in another order: in float32 that moves last bits, in 16 bit it may move the last bit of few.
    """
    drawn = torch.randn(64, width, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
    own, ours = module(drawn), forward(PLAIN, module, drawn)
    eps = torch.finfo(own.dtype).eps
    if own.dtype == torch.float32:
        return torch.allclose(own, ours, rtol=8 * eps, atol=0)
    return torch.allclose(own, ours, rtol=eps, atol=0) and bool((own != ours).float().mean() < 0.01)


@torch.inference_mode()
def _is_rotary(own: Callable[..., Any] | None) -> bool:
    """Return whether a function turns heads as `rotated` does."""
    if own is None:
        return False
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 3, 8, generator=draw), torch.randn(2, 2, 3, 8, generator=draw)
    cos, sin = torch.randn(2, 2, 3, 8, generator=draw)
    try:
        return all(map(torch.equal, own(query, key, cos, sin), rotated(query, key, cos, sin)))
    except Exception:  # it wants something else
        return False
