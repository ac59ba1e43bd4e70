"""Plan batches of prompts from a search's probes: how many batches, how large, and how much of them is padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pandas as pd

from qnb.errors import InputError

if TYPE_CHECKING:
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
        {"precision": search["precision"], "engine": search["engine"], "limit_mib": search["limit_mib"], **plan}
        for search in results.batches.to_dict("records")
        for prompts in results.lengths.to_dict("records")
        for plan in _plans_of(search, prompts)
    ]
    return pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(WHOLE, "Int64")).round(6)


def _plans_of(search: Mapping[str, Any], prompts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one search for each number of prompts."""
    new_tokens, limit_mib = int(search["new_tokens"]), search["limit_mib"]
    most = inf if pd.isna(prompts["window"]) else int(prompts["window"]) - new_tokens
    available = len(prompts["lengths"])
    for count in sorted({min(count, available) for count in prompts["counts"]}):
        missing = " and ".join(f"{wanted:,}" for wanted in prompts["counts"] if wanted > count == available)
        lengths = prompts["lengths"][:count]
        cut = sum(tokens > most for tokens in lengths)
        notes = [f"{prompts['prompt_source']} has no more prompts; {missing} were asked for"] if missing else []
        notes += [f"cut to the context window: {cut:,}"] if cut else []
        try:
            line = fit_line(search["probes"], int(search["prompt_tokens"]) + new_tokens)
            lengths, error_pct = [int(min(tokens, most)) for tokens in lengths], line.estimate_error_pct(limit_mib)
            for plan in plan_batches(lengths, new_tokens, line, limit_mib):
                yield {**plan, "estimate_error_pct": error_pct, "note": "; ".join(notes)}
        except InputError as error:
            yield {"n_prompts": count, "note": "; ".join([*notes, str(error)])}


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """Memory as a line in the batch size, for rows of one length."""

    fixed_mib: float
    row_mib: float
    row_tokens: int  # prompt and new tokens of the rows it was fitted to
    rows: int  # of the larger batch it was fitted to
    rise_mib: float  # between the two

    def largest_batch(self, tokens: int, limit_mib: float) -> int:
        """Return how many rows of `tokens` tokens fit, a row's memory being proportional to its tokens."""
        return int((limit_mib - self.fixed_mib) / (self.row_mib * tokens / self.row_tokens))

    def estimate_error_pct(self, limit_mib: float) -> float:
        """Return by how many percent the grain may make `largest_batch` wrong; 0 for a reading at the limit."""
        beyond = 1 - self.rows * self.row_mib / (limit_mib - self.fixed_mib)
        return 100 * abs(beyond) * GRAIN_MIB / self.rise_mib


def fit_line(probes: Sequence[Mapping[str, Any]], row_tokens: int) -> MemoryLine:
    """Return the line through the two largest of a search's probes whose reading is the run's own.

    Raises
    ------
    InputError
        There are not two such probes, or they differ by no more than a reading's grain.
    """
    own = [probe for probe in probes if probe["fits"] and not probe["squeezed"]]
    clean = [probe for probe in own if probe["reserved_mib"] is not None]
    if len(clean) > 1:
        low, high = sorted(clean, key=lambda probe: probe["batch_size"])[-2:]
        rise_mib = high["reserved_mib"] - low["reserved_mib"]
        if rise_mib > GRAIN_MIB:
            row_mib, rows = rise_mib / (high["batch_size"] - low["batch_size"]), high["batch_size"]
            return MemoryLine(high["reserved_mib"] - row_mib * rows, row_mib, row_tokens, rows, rise_mib)
    raise InputError(
        f"no line: {len(clean)} of {len(probes)} probes read their own memory, and two must be over {GRAIN_MIB} MiB "
        "apart; search with a higher cap"
    )


def plan_batches(
    prompt_tokens: Sequence[int], new_tokens: int, line: MemoryLine, limit_mib: float
) -> list[dict[str, Any]]:
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
    largest = line.largest_batch(longest + new_tokens, limit_mib)
    if largest < 1:
        raise InputError(f"a prompt of {longest} tokens needs more than {limit_mib:,.0f} MiB; shorten it")

    def cut(lengths: Sequence[int], widest: int | None = None) -> list[Sequence[int]]:
        batches = []
        while lengths:
            size = line.largest_batch((widest or lengths[0]) + new_tokens, limit_mib)
            batches.append(lengths[:size])
            lengths = lengths[size:]
        return batches

    buckets = pd.Series(prompt_tokens).groupby([(tokens - 1) // BUCKET_TOKENS for tokens in prompt_tokens])
    orders = {
        "unsorted": cut(prompt_tokens, longest),
        "bucketed": [batch for _, lengths in buckets for batch in cut(list(lengths), max(lengths))],
        "sorted": cut(sorted(prompt_tokens, reverse=True)),
    }
    about = {"n_prompts": len(prompt_tokens), "longest_tokens": longest, "largest_batch": largest}
    return [{**about, "order": order, **_count(batches)} for order, batches in orders.items()]


def _count(batches: Sequence[Sequence[int]]) -> dict[str, float]:
    """Count batches of prompt lengths, their mean size, and the padding's percent of the prompt tokens processed."""
    padded = sum(len(batch) * max(batch) for batch in batches)
    padding_pct = 100 * (1 - sum(map(sum, batches)) / padded)
    return {"batches": len(batches), "mean_batch": fmean(map(len, batches)), "padding_pct": padding_pct}
