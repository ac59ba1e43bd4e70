"""Plan batches of prompts from a search's probes: how many batches, how large, and how much of them is padding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import pandas as pd

from qnb.errors import InputError
from qnb.report.results import Results

GRAIN_MIB = 20  # of a reading of reserved memory: the segment torch takes for a tensor of 1 to 10 MiB
BUCKET_TOKENS = 64
COLUMNS = ["precision", "engine", "n_prompts", "order", "longest_tokens", "largest_batch", "estimate_error_pct",
           "batches", "mean_batch", "padding_pct", "limit_mib", "note"]  # fmt: skip
WHOLE = ["n_prompts", "longest_tokens", "largest_batch", "batches"]


def plans(results: Results) -> pd.DataFrame:
    """Plan the batches of each search's format and engine for each number of prompts, in three orders.

    ``largest_batch`` is that of the longest prompt. ``estimate_error_pct`` is by how much it may be off for the grain
    of memory readings alone. Where there is no plan, ``note`` says why.
    """
    rows = [
        {**search, "n_prompts": count, **plan}
        for search in results.batches.to_dict("records")
        for prompts in results.lengths.to_dict("records")
        for count in sorted({min(count, len(prompts["lengths"])) for count in prompts["counts"]})
        for plan in _plan(search, prompts, count)
    ]
    return pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(WHOLE, "Int64")).round(6)


def _plan(search: Mapping[str, Any], prompts: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Plan the first `count` prompts, each cut to the context window."""
    new_tokens, lengths = int(search["new_tokens"]), prompts["lengths"][:count]
    most = inf if pd.isna(prompts["window"]) else int(prompts["window"]) - new_tokens
    n_cut = sum(tokens > most for tokens in lengths)
    notes = [f"cut to the context window: {n_cut:,}"] if n_cut else []
    if count == len(prompts["lengths"]) < max(prompts["counts"]):
        notes.append(f"{prompts['prompt_source']} has no more prompts")
    try:
        line = fit_line(search["probes"], int(search["prompt_tokens"]) + new_tokens, search["limit_mib"])
        rows = plan_batches([int(min(tokens, most)) for tokens in lengths], new_tokens, line)
    except InputError as error:
        return [{"note": "; ".join([*notes, str(error)])}]
    return [{"estimate_error_pct": line.error_pct, **row, "note": "; ".join(notes)} for row in rows]


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """Memory as a line in the number of tokens in a batch."""

    free_mib: float  # of the limit, for the batch
    token_mib: float
    error_pct: float  # what the grain of readings may change in `largest_batch`; 0 for a reading at the limit

    def largest_batch(self, tokens: int) -> int:
        """Return how many rows of `tokens` tokens fit."""
        return int(self.free_mib / (self.token_mib * tokens))


def fit_line(probes: Sequence[Mapping[str, Any]], row_tokens: int, limit_mib: float) -> MemoryLine:
    """Return the line through the two largest of a search's probes whose reading is the run's own.

    Raises
    ------
    InputError
        There are not two such probes, or they differ by no more than a reading's grain.
    """
    own = (probe for probe in probes if probe["fits"] and not probe["squeezed"] and probe["reserved_mib"] is not None)
    readings = sorted((probe["batch_size"], probe["reserved_mib"]) for probe in own)
    rise_mib = readings[-1][1] - readings[-2][1] if len(readings) > 1 else 0
    if rise_mib <= GRAIN_MIB:
        raise InputError(
            f"no plan: the two largest probes have to differ by over {GRAIN_MIB} MiB, and differ by {rise_mib:.0f}; "
            f"{len(readings)} of {len(probes)} can be used; raise maxbatch_requests"
        )
    (low, _), (high, reserved_mib) = readings[-2:]
    row_mib = rise_mib / (high - low)
    free_mib = limit_mib - reserved_mib + row_mib * high
    return MemoryLine(free_mib, row_mib / row_tokens, 100 * abs(1 - high * row_mib / free_mib) * GRAIN_MIB / rise_mib)


def plan_batches(prompt_tokens: Sequence[int], new_tokens: int, line: MemoryLine) -> list[dict[str, Any]]:
    """Cut prompts into batches in three orders, each batch as large as its longest prompt admits; return a row each.

    The number of prompts does not enter the largest batch, which follows from the longest prompt. The order changes
    what the other batches can be. *unsorted* takes prompts as they arrive, in the order of `prompt_tokens`. A batch's
    longest prompt is not known before, so all batches have the size that the longest of all admits. *bucketed* puts
    prompts of up to `BUCKET_TOKENS`, 2 `BUCKET_TOKENS` ... tokens together. *sorted* goes from the longest down.

    Raises
    ------
    InputError
        The longest prompt does not fit.
    """
    longest = max(prompt_tokens)
    largest = line.largest_batch(longest + new_tokens)
    if largest < 1:
        raise InputError(f"a prompt of {longest} tokens needs more memory than there is; shorten it")

    def cut(lengths: Sequence[int], widest: int = 0) -> list[Sequence[int]]:
        batches = []
        while lengths:
            size = line.largest_batch((widest or lengths[0]) + new_tokens)
            batches.append(lengths[:size])
            lengths = lengths[size:]
        return batches

    buckets = pd.Series(prompt_tokens).groupby([(tokens - 1) // BUCKET_TOKENS for tokens in prompt_tokens])
    orders = {
        "unsorted": cut(prompt_tokens, longest),
        "bucketed": [batch for _, lengths in buckets for batch in cut(list(lengths), max(lengths))],
        "sorted": cut(sorted(prompt_tokens, reverse=True)),
    }
    return [
        {"order": order, "longest_tokens": longest, "largest_batch": largest, "batches": len(batches),
         "mean_batch": len(prompt_tokens) / len(batches),
         "padding_pct": 100 * (1 - sum(prompt_tokens) / sum(len(batch) * max(batch) for batch in batches))}
        for order, batches in orders.items()
    ]  # fmt: skip
