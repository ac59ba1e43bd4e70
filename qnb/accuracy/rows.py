"""Plan what the scorer reads: requests with one context share a row, rows with one prefix share its KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Request = tuple[Any, list[int], list[int]]  # lm-eval's: what it is cached under, context, continuation
Tokens = tuple[int, ...]

MIN_PREFIX_TOKENS = 32  # a shorter shared prefix is not worth a cache
MIN_PREFIX_ROWS = 4  # rows that must share it


@dataclass(frozen=True, slots=True)
class Row:
    """A context and its continuations, one after another; each is to see the context and itself alone."""

    context: Tokens
    continuations: dict[Tokens, list[int]]  # with the positions of all requests that ask for one

    @property
    def width(self) -> int:
        """Tokens in the row. The last token of a continuation is predicted, never read."""
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations)

    @property
    def is_causal(self) -> bool:
        """Whether causal attention alone keeps the continuations apart."""
        return sum(len(tokens) > 1 for tokens in self.continuations) <= 1


def build_rows(requests: Sequence[Request], max_length: int, window: int) -> list[Row]:
    """Group requests by context, in order.

    Parameters
    ----------
    requests
        What is asked. A request that is too long loses tokens from its left, as in stock lm-eval.
    max_length
        Tokens that the model reads.
    window
        The longest row in which every token sees every earlier one. A window is measured along the row, so the
        continuations of a longer row get a row each.
    """
    contexts: dict[Tokens, dict[Tokens, list[int]]] = {}
    for position, (_, context, continuation) in enumerate(requests):
        assert context and 0 < len(continuation) <= max_length
        start = max(0, len(context) + len(continuation) - max_length - 1)
        contexts.setdefault(tuple(context[start:]), {}).setdefault(tuple(continuation), []).append(position)
    rows: list[Row] = []
    for ids, continuations in contexts.items():
        row = Row(ids, continuations)
        rows += [row] if row.width <= window else [Row(ids, {each: row.continuations[each]}) for each in continuations]
    return rows


def shared_prefix(lists: Sequence[Tokens]) -> Tokens:
    """Return the tokens that all lists begin with, at most all but one of the shortest; none where that cannot pay."""
    if len(lists) < MIN_PREFIX_ROWS:
        return ()
    low, high = min(lists), max(lists)
    longest = min(map(len, lists)) - 1
    length = next((place for place in range(longest) if low[place] != high[place]), longest)
    return low[:length] if length >= MIN_PREFIX_TOKENS else ()


def prefix_groups(rows: Sequence[Row], window: int, min_saved_tokens: float) -> Iterator[tuple[Tokens, list[Row]]]:
    """Yield (prefix, rows that begin with it); the rows for which a prefix does not pay come last, with an empty one.

    A prefix pays if reading it once saves `min_saved_tokens` and a fifth of the group's tokens.
    """
    groups: dict[Tokens, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.context[:MIN_PREFIX_TOKENS] if row.width <= window else (), []).append(row)
    without = groups.pop((), [])
    for group in groups.values():
        prefix = shared_prefix([row.context for row in group])
        enough = max(min_saved_tokens, sum(row.width for row in group) / 5)
        if prefix and len(prefix) * (len(group) - 1) >= enough:
            yield prefix, group
        else:
            without += group
    if without:
        yield (), without


def pack(rows: Sequence[Row], prefix_length: int) -> tuple[np.ndarray, list[int]]:
    """Lay out rows for one forward pass that goes on behind `prefix_length` cached tokens.

    Returns
    -------
    numpy.ndarray, (3, B, L)
        Tokens; their positions, which restart in each continuation; and their segments, 0 for a context, n for its
        n-th continuation, -1 for padding on the right.
    list of int
        For each token of each continuation, the place in B*L that predicts it.
    """
    width = max(row.width for row in rows) - prefix_length
    layout = np.zeros((3, len(rows), width), dtype=np.int64)
    layout[2] = -1
    predictors: list[int] = []
    for number, row in enumerate(rows):
        end = len(row.context)
        tokens, positions = [*row.context[prefix_length:]], [*range(prefix_length, end)]
        segments = [0] * len(tokens)
        for segment, continuation in enumerate(row.continuations, 1):
            read, first = len(continuation) - 1, number * width + len(tokens)
            predictors += [number * width + end - prefix_length - 1, *range(first, first + read)]
            tokens += continuation[:-1]
            positions += range(end, end + read)
            segments += [segment] * read
        layout[:, number, : len(tokens)] = tokens, positions, segments
    return layout, predictors
