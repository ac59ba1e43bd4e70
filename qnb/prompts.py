"""Texts and prompts: WikiText-2 raw, a folder laid out like the hub, or the built-in sample text.

A prompt is the beginning of a paragraph, cut to a number of tokens. Paragraphs that are too short are skipped while
there are enough others. Which paragraphs come, and in which order, depends on the seed alone, so every format gets the
same prompts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from qnb.errors import InputError, check_choice, refusing
from qnb.provenance import cache_folder, file_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATA = Path(__file__).parent / "data"
WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
SOURCES = ("auto", "sample", "wikitext")


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts as token ids, and the new tokens asked of each."""

    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    source: str

    @property
    def fingerprint(self) -> str:
        """Changes with any token of any prompt and with the number of new tokens."""
        return sha256(repr((self.prompts, self.new_tokens)).encode()).hexdigest()[:16]

    @property
    def longest(self) -> tuple[int, ...]:
        """The longest prompt: with all new tokens, what a batch must have room for."""
        return max(self.prompts, key=len)


def paragraphs(source: str, data_dir: str | Path | None = None, split: str | None = "test") -> list[str]:
    """Return the paragraphs of `source`, without headings and blank lines.

    Parameters
    ----------
    source
        ``"sample"``, the text that comes with the package, or ``"wikitext"``, WikiText-2 raw.
    data_dir
        A folder laid out like the hub's dataset repositories, read instead of the hub.
    split
        Which split of WikiText-2; None takes all.

    Raises
    ------
    InputError
        The source is unknown, or its data cannot be had or hold no text.
    """
    check_choice("prompt_source", source, SOURCES)
    text = DATA / "text.txt"
    lines = text.read_text(encoding="utf-8").splitlines() if source == "sample" else _wikitext(data_dir, split)
    stripped = [line.strip() for line in lines]
    if kept := [line for line in stripped if line and not line.startswith("=")]:
        return kept
    raise InputError(f"{WIKITEXT[0]} in {data_dir or 'the hub'} has no paragraph of text; take prompt_source='sample'")


@contextmanager
def reading_from(folder: str | Path | None) -> Iterator[None]:
    """Let `datasets` read from `folder` alone within the block; None leaves it the hub.

    `datasets` takes a name such as ``allenai/ai2_arc`` for a folder if there is one below the working directory. Its
    cache knows that folder by its name alone, so each state of the folder gets a cache of its own.
    """
    import datasets

    datasets.disable_progress_bars()
    if folder is None:
        yield
        return
    cached = cache_folder() / "datasets" / file_state(Path(folder))
    with chdir(folder), patch.multiple(datasets.config, HF_HUB_OFFLINE=True, HF_DATASETS_CACHE=cached):
        yield


def _wikitext(data_dir: str | Path | None, split: str | None) -> list[str]:
    import datasets

    place, advice = data_dir or "the hub", "check the network, give data_dir, or take prompt_source='sample'"
    with refusing(f"{' '.join(WIKITEXT)} could not be read from {place}; {advice}"), reading_from(data_dir):
        loaded = datasets.load_dataset(*WIKITEXT, split=split)
        return [text for part in ([loaded] if split else loaded.values()) for text in part["text"]]


def load(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    requests: int,
    prompt_tokens: int,
    new_tokens: int,
    data_dir: str | Path | None = None,
    seed: int = 0,
) -> Workload:
    """Make a workload of `requests` prompts of up to `prompt_tokens` tokens each; both are at least 1.

    All have that many tokens if any paragraph has: shorter ones would be padded, which is other work. If there are
    fewer such paragraphs than requests, they repeat: the same text makes the same work.

    Raises
    ------
    InputError
        The source cannot be had.
    """
    texts = paragraphs(source, data_dir)
    random.Random(seed).shuffle(texts)  # noqa: S311
    texts.sort(key=lambda text: len(text) < 2 * prompt_tokens)  # a token is rarely shorter than two characters
    ids = (tuple(tokenizer(text)["input_ids"][:prompt_tokens]) for text in texts)
    whole = list(islice((prompt for prompt in ids if len(prompt) == prompt_tokens), requests))
    prompts = whole or [tuple(tokenizer(text)["input_ids"]) for text in texts[: max(4 * requests, 64)]]
    return Workload(tuple(islice(cycle(prompts), requests)), new_tokens, source)


def lengths(
    tokenizer: PreTrainedTokenizerBase, source: str, most: int, data_dir: str | Path | None = None, seed: int = 0
) -> list[int]:
    """Return the tokens of each of `most` paragraphs, uncut, in an order that the seed decides.

    They are drawn from every split, each at most once, so there may be fewer than `most`.

    Raises
    ------
    InputError
        The source is unknown, or its data cannot be had.
    """
    texts = paragraphs(source, data_dir, split=None)
    random.Random(seed).shuffle(texts)  # noqa: S311
    return [len(ids) for ids in tokenizer(texts[:most], verbose=False)["input_ids"]]
