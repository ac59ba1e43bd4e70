"""How far a format's predictions are from BF16's, token by token: perplexity, and KL divergence behind it.

Accuracy moves only when a pick does; the predicted distribution moves before. Both models read the same text in
windows that overlap. Each token is predicted once, with at least the overlap before it (but for the first window).
BF16 is computed again beside each format, but for what a GPU has room to remember: the disk holds four numbers a
token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qnb import prompts
from qnb.errors import InputError, check_choice
from qnb.finite import check_finite
from qnb.ledger import fingerprint, write_parquet
from qnb.memory import free_bytes, is_out_of_memory, release
from qnb.options import Count, check_count
from qnb.patches import wide_products
from qnb.precision import BASELINE, PRECISIONS, Precision
from qnb.quantize import checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qnb.session import Session

LOGITS_BYTES = 1 << 29  # of a batch of windows, in 16 bit
ROOM_BYTES = 6 * LOGITS_BYTES  # of a GPU's memory, which remembered logits leave
ROWS = 256  # tokens whose distributions are held in float32 at once
RESAMPLES = 500
Columns = Mapping[str, np.ndarray]
Remembered = dict[tuple[int, int], "list[torch.Tensor]"]
# What is said of a text's tokens, from the columns of `distances`. All but perplexity need a baseline.
QUANTITIES: dict[str, Callable[[Columns], float]] = {
    "perplexity": lambda tokens: math.exp(tokens["nll"].mean()),
    "perplexity_change_pct": lambda tokens: 100 * math.expm1((tokens["nll"] - tokens["nll_base"]).mean()),
    "kl_mean_nats": lambda tokens: float(tokens["kl"].mean()),
    "kl_median_nats": lambda tokens: float(np.median(tokens["kl"])),
    "kl_p99_nats": lambda tokens: float(np.quantile(tokens["kl"], 0.99)),
    "kl_p999_nats": lambda tokens: float(np.quantile(tokens["kl"], 0.999)),
    "same_top1_pct": lambda tokens: float(100 * tokens["same"].mean()),
}


@dataclass(frozen=True, slots=True)
class DivergenceOptions:
    """What `divergence` reads.

    Parameters
    ----------
    prompt_source
        ``"wikitext"`` (WikiText-2's test split), ``"sample"``, or ``"auto"``: the first on a GPU or with a data
        folder, else the second.
    ppl_tokens
        Tokens taken from the text's beginning; ``"all"`` takes all.
    ppl_context
        Tokens in a window; it moves on by half of them.

    Raises
    ------
    InputError
        A value is not one of these.
    """

    prompt_source: str = "auto"
    ppl_tokens: Count = "auto"
    ppl_context: Count = "auto"

    def __post_init__(self) -> None:
        check_count("ppl_tokens", self.ppl_tokens)
        check_count("ppl_context", self.ppl_context)
        check_choice("prompt_source", self.prompt_source, prompts.SOURCES)


def divergence(session: Session, options: DivergenceOptions) -> None:
    """Measure perplexity on running text, and each format's divergence from BF16; the ledger gets a row each.

    Raises
    ------
    InputError
        The text cannot be had, the weights are random, or a window is longer than the model's.
    RuntimeError
        Nothing could be measured.
    """
    session.check_weights()
    context = session.count("ppl_context", options.ppl_context)
    longest = getattr(session.config.get_text_config(), "max_position_embeddings", None) or context
    if context > longest and options.ppl_context != "auto":
        raise InputError(f"ppl_context is {context}, and the model's window {longest} tokens; give at most these")
    source = session.prompt_source(options.prompt_source)
    text = "\n\n".join(prompts.paragraphs(source, session.data_dir))
    most = None if options.ppl_tokens == "all" else session.count("ppl_tokens", options.ppl_tokens)
    ids = session.tokenizer(text, verbose=False)["input_ids"][:most]
    context = max(2, min(context, longest, len(ids)))
    asked = {"prompt_source": source, "text_sha256": fingerprint({"ids": ids}), "tokens": len(ids), "context": context,
             "stride": context // 2}  # fmt: skip
    remembered: Remembered | None = {} if len(session.precisions) > 1 else None
    with session.exclusive("02"):
        for precision in session.each_format("divergence"):
            key = session.key("divergence", precision, asked)
            if session.find(key):
                continue
            with session.failing(key, f"{precision.name}'s divergence"):
                tokens, noise_floor_nats = _read(session, precision, ids, context, remembered)
                stem = f"samples/divergence.{precision.name}.{key['fingerprint']}"
                file, sha256 = write_parquet(session.folder, stem, tokens)
                about = {"noise_floor_nats": noise_floor_nats, "samples_file": file, "samples_sha256": sha256}
                session.append(key, asked, summarize(tokens), about)
    session.require("divergence")


def _read(
    session: Session, precision: Precision, ids: Sequence[int], context: int, remembered: Remembered | None
) -> tuple[pd.DataFrame, float | None]:
    """Compare a format with BF16, loaded beside it; of BF16 return its own predictions, and its noise floor.

    The noise floor is the mean KL divergence in nats of BF16 in batches of windows from BF16 with one window at a
    time: what rounding alone makes of the batch size. It is 0 where the device computes a row alike in any batch, as
    some CPUs do, and None where no batch has two windows.
    """
    base = PRECISIONS[BASELINE]
    if precision != base:
        session.checkpoint(base)  # where it is missing, it is made before anything is loaded
    with session.loaded(precision) as model, ExitStack() as stack:
        baseline = model if precision == base else stack.enter_context(session.loaded(base))
        rows, tokens = rows_per_batch(model, context), None
        with checkpoint.quiet(), wide_products(session.device.kind):
            while tokens is None:
                try:
                    tokens = distances(model, baseline, ids, context, rows, remembered)
                except RuntimeError as error:
                    if rows == 1 or not is_out_of_memory(error):
                        raise
                    rows //= 2
                    if remembered:
                        remembered.clear()
                release()  # here, where no error holds what the batch made
        if precision != base:
            return tokens, None
        is_batched = min(rows, tokens.window.nunique()) > 1
        return tokens[["nll", "window"]], float(tokens.kl.mean()) if is_batched else None


def rows_per_batch(model: PreTrainedModel, context: int) -> int:
    """Return how many windows of `context` tokens are read at once."""
    return max(1, LOGITS_BYTES // (2 * context * model.config.get_text_config().vocab_size))


def windows(tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first scored, end) of each window over `tokens` tokens; every token but the first is scored once.

    Raises
    ------
    InputError
        The text is shorter than two tokens.
    """
    if tokens < 2:
        raise InputError(f"the text has {tokens} tokens; give ppl_tokens of 2 at least, so that one can be predicted")
    for start in range(0, max(tokens - context + stride, 1), stride):
        yield start, start + context - stride if start else 1, min(start + context, tokens)


def distances(
    model: PreTrainedModel, baseline: PreTrainedModel, ids: Sequence[int], context: int, size: int,
    remembered: Remembered | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Predict every token by a model and by a baseline.

    Parameters
    ----------
    model, baseline
        Two formats of one model, on one device. A baseline that is the model itself reads one window at a time.
    ids, context, size
        The text's token ids; the tokens in a window, which moves on by half of them; the windows read at once.
    remembered
        The baseline's logits by a batch's first window and size, for as many as a GPU has room for: it fills up, and
        serves the other formats of the same baseline and text.

    Returns
    -------
    pandas.DataFrame
        A row a token: ``window``; ``nll`` and ``nll_base``, in nats; ``kl``, of the baseline's distribution from the
        model's, in nats; and ``same``, whether both find the same token likeliest. `NotFiniteError` is raised where an
        output is infinite or undefined.
    """
    import torch

    parts: list[pd.DataFrame] = []
    for at, rows, scored in _batches(ids, context, context // 2, size):
        key, base_size = (at, size), 1 if baseline is model else size
        tokens = torch.tensor(rows, device=model.device)  # (B, C)
        with torch.inference_mode():
            own = _predict(model, tokens.split(size), scored)
            base = (remembered or {}).get(key) or _predict(baseline, tokens.split(base_size), scored)
            if remembered is not None and key not in remembered and _has_room(model.device):
                remembered[key] = [logits.clone() for logits in (own if baseline is model else base)]
            for place, (p, q) in enumerate(zip(own, base, strict=True)):
                parts += [part.assign(window=at + place) for part in _compare(p, q, tokens[place, scored[place]])]
    frame = pd.concat(parts, ignore_index=True)
    for name, source in (("nll", model), ("nll_base", baseline), ("kl", model)):
        check_finite(torch.tensor(frame[name].to_numpy()), "predictions of tokens", source)
    return frame


def _batches(
    ids: Sequence[int], context: int, stride: int, size: int
) -> Iterator[tuple[int, list[list[int]], list[slice]]]:
    """Yield batches of windows: the first one's number, the tokens of each, (B, C), and which of them are scored."""
    spans = list(windows(len(ids), context, stride))
    for at in range(0, len(spans), size):
        batch = spans[at : at + size]
        rows = [list(ids[start:end]) + [0] * (context - (end - start)) for start, _, end in batch]
        yield at, rows, [slice(first - start, end - start) for start, first, end in batch]


def _has_room(device: torch.device) -> bool:
    """Return whether there is room to remember logits: on a GPU, until too little is left to compute with."""
    return device.type == "cuda" and free_bytes(device) > ROOM_BYTES


def _predict(model: PreTrainedModel, batches: Sequence[torch.Tensor], scored: Sequence[slice]) -> list[torch.Tensor]:
    """Return the logits (n, V) that predict each window's scored tokens, of batches of windows (B, C)."""
    logits = [each for rows in batches for each in model(rows).logits]  # a window's are (C, V)
    return [each[tokens.start - 1 : tokens.stop - 1] for each, tokens in zip(logits, scored, strict=True)]


def _compare(own: torch.Tensor, base: torch.Tensor, targets: torch.Tensor) -> Iterator[pd.DataFrame]:
    """Yield a column a quantity from logits (n, V) and the tokens that came, (n,), some rows at a time."""
    import torch

    for p, q, expected in zip(own.split(ROWS), base.split(ROWS), targets[:, None].split(ROWS), strict=True):
        log_p, log_q = (torch.log_softmax(logits, 1, dtype=torch.float32) for logits in (p, q))  # (r, V)
        columns = {
            "nll": -log_p.gather(1, expected)[:, 0],
            "nll_base": -log_q.gather(1, expected)[:, 0],
            "kl": (log_q.exp() * (log_q - log_p)).sum(1).clamp(min=0),
            "same": p.argmax(1) == q.argmax(1),
        }
        yield pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})


def summarize(tokens: pd.DataFrame) -> dict[str, float | None]:
    """Return each of `QUANTITIES` with the ends of its 95 % interval, ``_low`` and ``_high``; None where unknown.

    Intervals resample whole windows, as neighbouring tokens are not independent. One window has none.
    """
    columns = {str(name): tokens[name].to_numpy() for name in tokens if name != "window"}
    quantities = QUANTITIES if "kl" in columns else {"perplexity": QUANTITIES["perplexity"]}
    windows = list(tokens.groupby("window").indices.values())

    def measure(rows: slice | np.ndarray) -> list[float]:
        sample = {name: values[rows] for name, values in columns.items()}
        return [quantity(sample) for quantity in quantities.values()]

    summary = dict.fromkeys(name + end for name in QUANTITIES for end in ("", "_low", "_high"))
    summary |= zip(quantities, measure(slice(None)), strict=True)
    if len(windows) > 1:
        draws = np.random.default_rng(0).integers(0, len(windows), (RESAMPLES, len(windows)))
        resampled = [measure(np.concatenate([windows[window] for window in draw])) for draw in draws]
        for end, ends in zip(("_low", "_high"), np.quantile(resampled, [0.025, 0.975], axis=0).tolist(), strict=True):
            summary |= zip((name + end for name in quantities), ends, strict=True)
    return summary
