"""How far a precision's predictions are from BF16's, token by token: perplexity, and the divergence behind it.

Accuracy moves only when a pick does; the predicted distribution moves before. Both models read the same text in
windows that overlap, and each token is predicted once, with at least the overlap before it (but for the first window).
BF16 is computed again beside each precision, so no logits are kept: the disk holds four numbers a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from qnb.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

LOGITS_BYTES = 1 << 29  # of a batch of windows, in 16 bit
ROWS = 256  # tokens whose distributions are held in float32 at once
RESAMPLES = 500


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number of a text's tokens and its 95 % interval, by the bootstrap over windows."""

    value: float
    low: float | None  # None for fewer than two windows
    high: float | None


def windows(tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first scored, end) of each window over `tokens` tokens; every token but the first is scored once.

    Raises
    ------
    InputError
        A window would score nothing, or the text is shorter than two tokens.
    """
    if tokens < 2 or context < 2 or not 0 < stride < context:
        raise InputError(f"{tokens} tokens, context {context} and stride {stride}; give 2 tokens at least, a stride "
                         "of at least 1 and a longer context")  # fmt: skip
    scored, start = 1, 0
    while scored < tokens:
        end = min(start + context, tokens)
        yield start, scored, end
        scored, start = end, end + stride - context


def distances(
    model: PreTrainedModel, baseline: PreTrainedModel | None, ids: Sequence[int], context: int, stride: int
) -> pd.DataFrame:
    """Predict every token by `model`, and by `baseline` where there is one.

    Parameters
    ----------
    model, baseline
        Two precisions of one model, on one device.
    ids
        The text's token ids.
    context, stride
        Tokens in a window, and tokens it moves on.

    Returns
    -------
    pandas.DataFrame
        A row a token: ``window``, ``nll`` in nats, and with a baseline ``nll_base``, ``kl`` (of the baseline's
        distribution from the model's, in nats) and ``same`` (whether both hold the same token for likeliest).
    """
    import torch

    spans = list(windows(len(ids), context, stride))
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    size = max(1, LOGITS_BYTES // (2 * context * vocabulary))
    parts = []
    for at in range(0, len(spans), size):
        batch = spans[at : at + size]
        rows = [list(ids[start:end]) for start, _, end in batch]
        rows = [row + [0] * (context - len(row)) for row in rows]  # after all that is scored, where nothing looks
        given = torch.tensor(rows, device=model.device)  # (B, C)
        with torch.inference_mode():
            own, base = model(given).logits, baseline(given).logits if baseline else None  # (B, C, V)
            for place, (start, first, end) in enumerate(batch):
                chosen = slice(first - start - 1, end - start - 1)
                targets = given[place, first - start : end - start]  # (n,)
                for low in range(0, len(targets), ROWS):
                    part = slice(chosen.start + low, min(chosen.start + low + ROWS, chosen.stop))
                    other = None if base is None else base[place, part]
                    values = _distances(own[place, part], other, targets[low : low + ROWS])
                    parts.append(pd.DataFrame({"window": at + place, **values}))
    return pd.concat(parts, ignore_index=True)


def _distances(own: torch.Tensor, base: torch.Tensor | None, targets: torch.Tensor) -> dict[str, Any]:
    """Return a column a quantity, of logits (n, V) and the tokens that came, (n,)."""
    import torch

    log_p = torch.log_softmax(own, 1, dtype=torch.float32)  # (n, V)
    found = {"nll": -log_p.gather(1, targets[:, None])[:, 0]}
    if base is not None:
        log_q = torch.log_softmax(base, 1, dtype=torch.float32)  # (n, V)
        found["nll_base"] = -log_q.gather(1, targets[:, None])[:, 0]
        found["kl"] = (log_q.exp() * (log_q - log_p)).sum(1).clamp(min=0)
        found["same"] = own.argmax(1) == base.argmax(1)
    return {name: value.cpu().numpy() for name, value in found.items()}


def summarize(tokens: pd.DataFrame) -> dict[str, Estimate]:
    """Return perplexity, and against a baseline its change, the mean and 99th percentile of the divergence, agreement.

    Intervals resample whole windows: neighbouring tokens are not independent.
    """
    import numpy as np

    wanted: dict[str, Callable[[dict[str, np.ndarray]], float]] = {
        "perplexity": lambda part: math.exp(part["nll"].mean()),
    }
    if "kl" in tokens:
        wanted |= {
            "perplexity_change_pct": lambda part: 100 * math.expm1((part["nll"] - part["nll_base"]).mean()),
            "kl_mean_nats": lambda part: float(part["kl"].mean()),
            "kl_p99_nats": lambda part: float(np.quantile(part["kl"], 0.99)),
            "same_top1_pct": lambda part: float(100 * part["same"].mean()),
        }
    columns = {str(name): tokens[name].to_numpy() for name in tokens if name != "window"}
    places = list(tokens.groupby("window").indices.values())
    draw = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {name: [] for name in wanted}
    for _ in range(RESAMPLES if len(places) > 1 else 0):
        rows = np.concatenate([places[place] for place in draw.integers(0, len(places), len(places))])
        part = {name: values[rows] for name, values in columns.items()}
        for name, statistic in wanted.items():
            drawn[name].append(statistic(part))
    found = {}
    for name, statistic in wanted.items():
        low, high = np.quantile(drawn[name], [0.025, 0.975]) if drawn[name] else (None, None)
        found[name] = Estimate(statistic(columns), None if low is None else float(low),
                               None if high is None else float(high))  # fmt: skip
    return found
