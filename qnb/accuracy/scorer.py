"""An lm-eval model that reads a context once, however many continuations are scored after it.

Stock scoring runs the context again for every choice, and projects every position to the vocabulary. Here a row is a
context followed by all its continuations, with restarted positions and a mask that keeps them apart. A prefix that
several rows share is read once and kept as a KV cache. Only positions that are scored reach the output head
(`backbone`). Work is bounded by matrix products over tokens, so batches are filled by tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain, compress, groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from transformers import PreTrainedTokenizerBase

from qnb import memory
from qnb.accuracy.answer_cache import AnswerCache
from qnb.accuracy.backbone import Backbone, Row, Tokens, compiled, separates
from qnb.accuracy.generation import GreedyGenerator, Prompt, is_shaped
from qnb.accuracy.tasks import UNANSWERED
from qnb.finite import check_finite
from qnb.memory import is_out_of_memory, release

Encoded = dict[tuple[Any, ...], list[int]]  # token ids by text and options
Request = tuple[Any, list[int], list[int]]  # lm-eval's: what it is cached under, context, continuation

ENCODED_TOGETHER = 1024  # texts: a tokenizer keeps a hundred bytes a token until all are encoded
MIN_PREFIX_TOKENS = 32  # a shorter shared prefix is not worth a cache
MIN_PREFIX_ROWS = 4  # rows that must share it
# Tokens times parameters that a shared prefix must save. It takes two passes more, and a GPU starts many kernels for
# each: the few MMLU questions about one passage are faster without.
MIN_SAVED_WORK = {"cuda": 10**12, "cpu": 0}


class StockLM(HFLM):
    """lm-eval's ``hf``, which checks that the model's outputs are finite.

    A request with an empty text, or with a continuation that is longer than the window, is left `UNANSWERED`. Stock
    lm-eval fails there, and all the other requests with it.

    Raises
    ------
    NotFiniteError
        An output is infinite or undefined.
    """

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        fits = [bool(context) and 0 < len(text) <= self.max_length for _, context, text in requests]
        answers = iter(self._score_tokens([*compress(requests, fits)], disable_tqdm, override_bs))
        return [next(answers) if fit else UNANSWERED for fit in fits]

    def _score_tokens(self, requests: list[Request], *options: Any) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy) of each request, in order."""
        answers = super()._loglikelihood_tokens(requests, *options) if requests else []
        check_finite(torch.tensor([value for value, _ in answers]), "log-likelihoods", self.model)
        return answers

    def _model_generate(self, *arguments: Any, **options: Any) -> torch.Tensor:
        def check(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            check_finite(logits.amax(-1), "largest logits of new tokens", self.model)
            return logits

        return super()._model_generate(*arguments, logits_processor=[check], **options)


class SharedContextLM(StockLM):
    """lm-eval's ``hf`` with shared contexts: the same arguments, the same answers, less work.

    A batch holds as many tokens as the free memory allows, and half as many after it ran out. `batch_size` applies
    only where stock scoring is used: to models that cannot keep continuations apart.

    In float32 log-likelihoods equal stock's but for rounding. In 16 bit stock takes the softmax in the model's own
    type, which is the larger error of the two. With LLM.int8 outlier columns depend on the batch, as in stock.

    Parameters
    ----------
    encoded
        Token ids by text, filled and reused. Models with one tokenizer can share them.
    answers_path
        A file in which answers are kept while they are given, so that a killed task goes on; one a model and task.
    in_rounds
        Whether batches hold only what the file does not answer.
    alone
        Whether every row is a batch of its own: slow, and free of what LLM.int8 owes to a batch.
    """

    def __init__(
        self, encoded: Encoded | None = None, answers_path: Path | None = None, in_rounds: bool = False,
        alone: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(**options)
        self.encoded = {} if encoded is None else encoded
        self._answers_path, self._in_rounds = answers_path, in_rounds
        self.backbone = Backbone(self.model)
        if alone:
            self.backbone.max_tokens = 1
        self.shared = separates(self.backbone)

    def tok_encode(self, string: str, *arguments: Any, **options: Any) -> list[int]:
        """Encode a text, once for all models that share `encoded`."""
        key = (string, arguments, *options.items())
        if key not in self.encoded:
            self.encoded[key] = super().tok_encode(string, *arguments, **options)
        return self.encoded[key]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy) of each request (context, continuation), in order.

        `encode` has the texts in `encoded` before they are asked for one by one.
        """
        if self.add_bos_token is None:
            encode(self.tokenizer, [request.args for request in requests], self.encoded)
        return super().loglikelihood(requests, disable_tqdm)

    def _score_tokens(self, requests: list[Request], *options: Any) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy) of each request, in order."""
        if not self.shared:
            return super()._score_tokens(requests, *options)
        keys = [key for key, *_ in requests]
        path = None if None in keys else self._answers_path  # windows of a long text have no key
        answers = AnswerCache(path, keys, self._in_rounds)
        window = min(self.max_length, self.backbone.window)
        rows = build_rows({place: requests[place] for place in answers.asked}, self.max_length, window)
        min_saved_tokens = MIN_SAVED_WORK[self.backbone.device.type] / self.backbone.parameters
        with compiled(self.backbone, sum(row.width for row in rows)):
            for prefix, group in prefix_groups(rows, window, min_saved_tokens):
                past = cache(partial(self.backbone.read, prefix))
                for is_causal in (False, True):  # faster kernels know causal attention
                    self._score([row for row in group if row.is_causal is is_causal], len(prefix), past, answers)
        answers.write()
        return [tuple(answers.answers[position]) for position in range(len(requests))]

    def _score(self, rows: list[Row], prefix_length: int, past: Callable[[], Any], answers: AnswerCache) -> None:
        """Score rows whose first `prefix_length` tokens `past` returns, the longest first.

        A batch's scores are read after the next batch has started, so that a GPU does not wait between them.
        """
        started: list[tuple[list[list[int]], tuple[Any, Any]]] = []  # tensors on the device

        def cost(row: Row) -> int:
            return row.width - prefix_length + prefix_length // 4  # a cached token weighs less than one that is read

        def score(batch: Sequence[Row]) -> None:
            askers = [positions for row in batch for positions in row.continuations.values()]
            if not answers.has(chain.from_iterable(askers)):
                started.append((askers, self.backbone.score(batch, prefix_length, past())))
                if len(started) > 1:
                    read_first()

        def read_first() -> None:
            askers, scores = started.pop(0)
            values, is_likeliest = (each.cpu() for each in scores)
            check_finite(values, "log-likelihoods", self.model)
            pairs = zip(values.tolist(), is_likeliest.tolist(), strict=True)
            answers.keep({place: pair for places, pair in zip(askers, pairs, strict=True) for place in places})

        rows = sorted(rows, key=lambda row: -row.width)
        try:
            self.backbone.max_tokens = _in_batches(rows, cost, self.backbone.max_tokens, score)
        finally:  # also where a batch failed, those before it are kept
            if started:
                read_first()

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context greedily up to a stop sequence.

        Stock generation gets requests to sample, and all of a model whose own settings shape its texts.
        """
        prompts = self._prompts(requests)
        if not prompts:
            return super().generate_until(requests, disable_tqdm)
        answers = AnswerCache(self._answers_path, [request.args for request in requests], self._in_rounds)
        asked = {*answers.asked}
        prompts = [prompt for prompt in prompts if prompt.position in asked]
        prefix = shared_prefix([prompt.tokens for prompt in prompts])
        if any(len(prompt.tokens) + prompt.max_new_tokens > self.backbone.window for prompt in prompts):
            prefix = ()  # the padding behind it would count towards a window
        past = cache(partial(self.backbone.read, prefix))
        generator = GreedyGenerator(self.backbone, self.tokenizer)

        def generate(batch: Sequence[Prompt]) -> None:
            if not answers.has(prompt.position for prompt in batch):
                texts = map(self.tok_decode, generator.generate(batch, len(prefix), past()))
                answers.keep({prompt.position: postprocess_generated_text(text, prompt.stop_sequences, None)
                              for prompt, text in zip(batch, texts, strict=True)})  # fmt: skip

        # a row that shared its batch with longer texts would go on behind its window
        for _, group in groupby(prompts, lambda prompt: prompt.max_new_tokens):
            alike = [*group]
            longest = len(alike[0].tokens) + alike[0].max_new_tokens
            _in_batches(alike, lambda _: 1, generator.fitting_rows(longest), generate)
        answers.write()
        return [answers.answers[position] for position in range(len(requests))]

    def _prompts(self, requests: list[Instance]) -> list[Prompt]:
        """Return what is generated here, that of most new tokens and of long contexts first: all requests, or none."""
        if not self.shared or self.think_end_token or is_shaped(self.model.generation_config):
            return []
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        prompts = []
        for position, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            stops = handle_stop_sequences(options.pop("until", None), eos=eos)
            new_tokens = options.pop("max_gen_toks")
            if options.pop("do_sample", False) or options.pop("temperature", 0.0) or options:
                return []
            ids = self.tok_encode(request.args[0])[-max(1, self.max_length - new_tokens) :]
            if new_tokens >= self.max_length or not ids:  # which stock refuses, or fills with padding
                return []
            prompts.append(Prompt(position, tuple(ids), stops, new_tokens))
        return sorted(prompts, key=lambda prompt: (-prompt.max_new_tokens, -len(prompt.tokens)))


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], encoded: Encoded) -> None:
    """Encode what lm-eval encodes of pairs (context, continuation), unless `encoded` has it.

    Many texts are encoded at once, which fast tokenizers spread over the cores.
    """
    texts = dict.fromkeys(chain((context.rstrip() for context, _ in pairs), map("".join, pairs)))
    bos = tokenizer.bos_token or tokenizer.eos_token or ""  # lm-eval gives a text that begins with it no second one
    new = [text for text in texts if text and (text, ()) not in encoded and not (bos and text.startswith(bos))]
    for first in range(0, len(new), ENCODED_TOGETHER):
        some = new[first : first + ENCODED_TOGETHER]
        encoded.update(zip(((text, ()) for text in some), tokenizer(some, verbose=False)["input_ids"], strict=True))


def _in_batches(items: Sequence[Any], cost: Callable[[Any], int], limit: int, work: Callable[[Any], None]) -> int:
    """Do work on batches of items that cost `limit` at most, the costliest items first.

    A batch that runs out of memory is halved and tried again, unless all workers of a study have the same batches.
    Returns the limit that was left.
    """
    done = 0
    while done < len(items):
        item_cost = cost(items[done])
        batch = items[done : done + max(1, limit // item_cost)]
        try:
            work(batch)
            done += len(batch)
            continue
        except Exception as error:
            if len(batch) == 1 or not is_out_of_memory(error) or memory.planned_bytes:
                raise
        limit = len(batch) * item_cost // 2
        release()  # here, where no error holds what the batch made
    return limit


# Requests with one context share a row, rows with one prefix share its KV cache


def build_rows(requests: Mapping[int, Request], max_length: int, window: float) -> list[Row]:
    """Group requests by context, in order.

    Parameters
    ----------
    requests
        What is asked, by position, with continuations that fit. A request that is too long loses tokens from its
        left, as in stock lm-eval.
    max_length
        Tokens that the model reads.
    window
        The longest row in which every token sees every earlier one. A window is measured along the row, so the
        continuations of a longer row get a row each.
    """
    contexts: dict[Tokens, dict[Tokens, list[int]]] = {}
    for position, (_, context, continuation) in requests.items():
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


def prefix_groups(rows: Sequence[Row], window: float, min_saved_tokens: float) -> Iterator[tuple[Tokens, list[Row]]]:
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
    yield (), without
