"""Ways to generate: greedy, a fixed number of new tokens for every row.

Fixed lengths make throughput comparable between precisions, whose texts differ: nothing stops at an end of sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad prompts on the left to the longest; returns ids and attention mask, both (batch, tokens)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)  # (B, T)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # (B, T)
    return ids, mask


def eager(model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> torch.Tensor:
    """Generate with transformers' own ``generate`` as most people call it; returns new ids, (batch, new_tokens)."""
    pad_id = model.generation_config.pad_token_id
    if pad_id is None:
        eos = model.generation_config.eos_token_id
        pad_id = eos[0] if isinstance(eos, list) else eos or 0
    ids, mask = pad(prompts, pad_id, model.device)
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]  # transformers types the mixin loosely
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad_id,
        )
    return out[:, ids.shape[1] :]  # (B, N)


Engine = Callable[["PreTrainedModel", Sequence[Sequence[int]], int], torch.Tensor]
ENGINES: dict[str, Engine] = {"eager": eager}
