"""An lm-eval model that reads a context once, however many continuations are scored after it.

Stock scoring runs the context again for every choice, and projects every position to the vocabulary. Here a row is a
context followed by all its continuations, with restarted positions and a mask that keeps them apart (`rows`). A prefix
that several rows share is read once and kept as a KV cache. Only positions that are scored reach the output head
(`backbone`). Work is bounded by matrix products over tokens, so batches are filled by tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from qnb.accuracy.answer_cache import AnswerCache
from qnb.accuracy.backbone import Backbone, compiled, separates
from qnb.accuracy.generation import GreedyGenerator, Prompt, is_shaped
from qnb.accuracy.rows import Request, Row, Tokens, build_rows, prefix_groups, shared_prefix
from qnb.memory import is_out_of_memory, release

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Encoded = dict[tuple[str, ...], tuple[list[int], ...]]  # by (context, continuation), or (context,) to be continued

# Tokens times parameters that a shared prefix must save. It takes two passes more, and a GPU starts many kernels for
# each: the few MMLU questions about one passage are faster without.
MIN_SAVED_WORK = {"cuda": 10**12, "cpu": 0}
STOCK_BLOCK = 256  # requests that stock scoring gets at once, so that their answers can be written


@register_model("qnb")
class SharedContextLM(HFLM):
    """lm-eval's ``hf`` with shared contexts: the same arguments, the same answers, less work.

    `batch_size` sizes only what is left to stock scoring. A batch here holds as many tokens as the free memory allows,
    and half as many after it ran out.

    In float32 log-likelihoods equal stock's but for rounding. In 16 bit stock takes the softmax in the model's own
    type, which is the larger error of the two. With LLM.int8 outlier columns depend on the batch, as in stock.

    Parameters
    ----------
    encoded
        Token ids by text, filled and reused. Models with one tokenizer can share them.
    answers_path
        A file in which answers are kept while they are given, so that a killed task goes on; one a model and task.
    alone
        Whether every row is a batch of its own: slow, and free of what LLM.int8 owes to a batch.
    """

    def __init__(
        self,
        *args: Any,
        encoded: Encoded | None = None,
        answers_path: str | Path | None = None,
        alone: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.encoded = {} if encoded is None else encoded
        self._answers_path = Path(answers_path) if answers_path else None
        self.backbone = Backbone(self.model)
        self._alone, self._max_tokens = alone, 1 if alone else self.backbone.fitting_tokens()
        self.shared = self.backend == "causal" and self.world_size == 1 and separates(self.backbone)

    # Token ids

    def encode_pairs(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Encode (context, continuation) in one call, which fast tokenizers spread over the cores.

        As in lm-eval's ``_encode_pair``, a context's trailing spaces belong to the continuation.
        """
        if self.backend != "causal":
            return
        new = [pair for pair in dict.fromkeys(pairs) if pair[0] and pair not in self.encoded]
        ids = self._encode_texts({text for pair in new for text in (pair[0].rstrip(), "".join(pair))})
        for pair in new:
            context = ids[pair[0].rstrip()]
            self.encoded[pair] = (context, ids["".join(pair)][len(context) :])

    def encode_contexts(self, contexts: Iterable[str]) -> None:
        """Encode what is to be continued, in one call."""
        ids = self._encode_texts({text for text in contexts if (text,) not in self.encoded})
        self.encoded |= {(text,): (tokens,) for text, tokens in ids.items()}

    def _encode_texts(self, texts: set[str]) -> dict[str, list[int]]:
        bos = self.tokenizer.decode(self.prefix_token_id)
        with_bos = {text for text in texts if not text or text.startswith(bos)}  # lm-eval gives them no second one
        others = sorted(texts - with_bos)
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        ids = self.tokenizer(others, **special)["input_ids"] if others else []
        return dict(zip(others, ids, strict=True)) | {text: self.tok_encode(text) for text in with_bos}

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if (context, continuation) not in self.encoded:
            return super()._encode_pair(context, continuation)
        context_ids, continuation_ids = self.encoded[context, continuation]
        return context_ids, continuation_ids

    # Log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy) of each request (context, continuation), in order."""
        self.encode_pairs(request.args for request in requests)
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy) of each request, in order.

        Batches are those of all requests, also where some are answered already. So a killed task ends with the same
        numbers as one that ran through.
        """
        keys = [key for key, *_ in requests]
        answers = AnswerCache(None if None in keys else self._answers_path, keys)  # windows of a long text have no key
        if self.shared:
            self._score(requests, answers)
        else:
            stock = super()._loglikelihood_tokens
            positions = range(len(requests))
            _in_blocks(positions, answers, lambda block: stock([requests[i] for i in block], True, override_bs))
        return [tuple(answers.answers[position]) for position in range(len(requests))]

    def _score(self, requests: list[Request], answers: AnswerCache) -> None:
        rows = build_rows(requests, self.max_length, self._window)
        scores = _Scores(answers)
        min_saved_tokens = MIN_SAVED_WORK[self.backbone.kind] / self.backbone.parameters
        with compiled(self.backbone, sum(row.width for row in rows)):
            for prefix, group in prefix_groups(rows, self._window, min_saved_tokens):
                for is_causal in (False, True):  # faster kernels know causal attention
                    self._score_group(prefix, [row for row in group if row.is_causal is is_causal], scores)
        scores.keep()

    def _score_group(self, prefix: Tokens, rows: list[Row], scores: _Scores) -> None:
        """Score rows that begin with `prefix`, the longest first."""
        past = cache(lambda: self.backbone.read(prefix) if prefix else None)

        def cost(row: Row) -> int:
            return row.width - len(prefix) + len(prefix) // 4  # a cached token weighs less than one that is read

        def score(batch: Sequence[Row]) -> None:
            if not scores.has(batch):
                scores.add(batch, *self.backbone.score(batch, len(prefix), past()))

        self._max_tokens = _in_batches(sorted(rows, key=lambda row: -row.width), cost, self._max_tokens, score)

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context greedily up to a stop sequence.

        Stock generation gets requests to sample, and all of a model whose own settings shape its texts.
        """
        answers = AnswerCache(self._answers_path, [request.args for request in requests])
        prompts = self._prompts(requests)
        others = sorted({*range(len(requests))} - {prompt.position for prompt in prompts})
        stock = super().generate_until
        _in_blocks(others, answers, lambda block: stock([requests[i] for i in block], disable_tqdm))
        if prompts:
            self._generate(prompts, answers)
        return [answers.answers[position] for position in range(len(requests))]

    def _prompts(self, requests: list[Instance]) -> list[Prompt]:
        """Return what is generated here, the longest first."""
        if not self.shared or self.think_end_token or is_shaped(self.model.generation_config):
            return []
        self.encode_contexts(request.args[0] for request in requests)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        prompts = []
        for position, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            stops = handle_stop_sequences(options.pop("until", None), eos=eos)
            new_tokens = options.pop("max_gen_toks")
            if not (options.pop("do_sample", False) or options.pop("temperature", 0.0) or options):
                ids = self.encoded[(request.args[0],)][0][-(self.max_length - new_tokens) :]
                prompts.append(Prompt(position, tuple(ids), stops, new_tokens))
        return sorted(prompts, key=lambda prompt: -prompt.length)

    def _generate(self, prompts: list[Prompt], answers: AnswerCache) -> None:
        prefix = shared_prefix([prompt.tokens for prompt in prompts])
        past = cache(lambda: self.backbone.read(prefix) if prefix else None)
        end_tokens = self.model.generation_config.eos_token_id or []
        generator = GreedyGenerator(
            self.backbone,
            decode=lambda tokens: self.tok_decode(tokens, skip_special_tokens=False),
            end_tokens={self.eot_token_id, *(end_tokens if isinstance(end_tokens, list) else [end_tokens])},
            prefill_tokens=self._max_tokens,
            windowed=self._window < self.max_length,
        )

        def generate(batch: Sequence[Prompt]) -> None:
            if not answers.has(prompt.position for prompt in batch):
                texts = map(self.tok_decode, generator.generate(batch, len(prefix), past()))
                answers.keep({prompt.position: postprocess_generated_text(text, prompt.stop_sequences, None)
                              for prompt, text in zip(batch, texts, strict=True)})  # fmt: skip

        rows = 1 if self._alone else generator.fitting_rows(prompts[0].length)
        _in_batches(prompts, lambda _: 1, rows, generate)

    @property
    def _window(self) -> int:
        """The longest row in which every token sees every earlier one."""
        config = self.backbone.config
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
        return min([self.max_length, *(window for window in windows if isinstance(window, int) and window > 0)])


class _Scores:
    """Scores of batches, which stay on the device until answers are due: no batch waits for the one before."""

    def __init__(self, answers: AnswerCache) -> None:
        self.answers = answers
        self.unread: list[tuple[list[list[int]], torch.Tensor, torch.Tensor]] = []

    def has(self, batch: Sequence[Row]) -> bool:
        """Return whether all requests of a batch are answered."""
        return self.answers.has(chain.from_iterable(_asking(batch)))

    def add(self, batch: Sequence[Row], sums: torch.Tensor, misses: torch.Tensor) -> None:
        """Take the log-likelihood of each continuation of a batch, and how many of its tokens are not greedy, (C,)."""
        self.unread.append((_asking(batch), sums, misses))
        if self.answers.due:
            self.keep()

    def keep(self) -> None:
        """Read what is new, and keep it: (log-likelihood, whether greedy) of each request."""
        self.answers.keep({
            position: (value, missed == 0)
            for asking, sums, misses in self.unread
            for positions, value, missed in zip(asking, sums.tolist(), misses.tolist(), strict=True)
            for position in positions
        })  # fmt: skip
        self.unread = []


def _asking(batch: Sequence[Row]) -> list[list[int]]:
    """Return the positions of the requests that ask for each continuation."""
    return [positions for row in batch for positions in row.continuations.values()]


def _in_blocks(positions: Sequence[int], answers: AnswerCache, work: Callable[[Sequence[int]], list[Any]]) -> None:
    """Answer the requests at `positions` a block at a time, but for blocks that are answered already."""
    for start in range(0, len(positions), STOCK_BLOCK):
        block = positions[start : start + STOCK_BLOCK]
        if not answers.has(block):
            answers.keep(dict(zip(block, work(block), strict=True)))


def _in_batches(items: Sequence[Any], cost: Callable[[Any], int], limit: int, work: Callable[[Any], None]) -> int:
    """Do work on batches of items that cost `limit` at most, the costliest items first.

    A batch that runs out of memory is halved and tried again. Returns the limit that was left.
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
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        limit = max(1, min(limit, len(batch) * item_cost) // 2)
        release()  # here, where no error holds what the batch made
    return limit
