"""An lm-eval model that reads a context once, however many continuations are scored after it.

Stock scoring runs the context again for every choice and projects every position to the vocabulary. Here a row is a
context followed by all its continuations, with restarted positions and a mask that keeps them apart; what several rows
begin with is computed once and kept as keys and values; and only positions that are scored reach the output head, in
chunks, with the softmax in float32. Work is bounded by matrix products over tokens, so batches are filled by tokens.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm
from transformers.cache_utils import DynamicLayer

from qnb.accuracy.answer_cache import Answers
from qnb.quantize.checkpoint import release
from qnb.speed import fused as fuse
from qnb.speed.batch_search import is_out_of_memory
from qnb.speed.engines import PLAIN

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

log = logging.getLogger(__name__)

Request = tuple[Any, list[int], list[int]]  # what it is cached under, context, continuation
Encoded = dict[tuple[str, ...], tuple[list[int], ...]]  # by (context, continuation), or (context,) to be continued
_Asked = tuple[list[int], int, list[str], int]  # context, place, stop sequences, most new tokens
TOKENS = {"cuda": 32768, "cpu": 2048}  # a forward pass; more no longer helps
LOGITS_BYTES = {"cuda": 2 << 30, "cpu": 128 << 20}  # of a chunk: in the model's type, in float32, and the softmax's
PREFIX = 32  # a shared beginning of fewer tokens is not worth a cache
COMPILED_FROM = 10**16  # tokens times weights: half a minute of an H100, a quarter of an hour of a T4
STOCK_BLOCK = 256  # requests that stock scoring gets at once, so that their answers can be kept
CHECK_STEPS = 8  # new tokens between two looks for stop sequences
PEERS = 4  # rows that must share a beginning
# tokens times weights that sharing must save: it takes two passes more, and a GPU starts many kernels for each
SAVED = {"cuda": 10**12, "cpu": 0}


@dataclass(frozen=True, slots=True)
class _Row:
    """A context and the continuations scored after it, each with the requests that asked for it."""

    context: tuple[int, ...]
    branches: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    @property
    def width(self) -> int:
        """Tokens in the row; the last token of a continuation is predicted, never read."""
        return len(self.context) + sum(len(branch) - 1 for branch, _ in self.branches)

    @property
    def plain(self) -> bool:
        """Whether causal attention alone keeps its continuations apart."""
        return sum(len(branch) > 1 for branch, _ in self.branches) <= 1

    def alone(self) -> Iterator[_Row]:
        """Yield a row a continuation."""
        for branch in self.branches:
            yield _Row(self.context, (branch,))


@register_model("qnb")
class SharedContextLM(HFLM):
    """lm-eval's ``hf`` with shared contexts; the same arguments, the same answers, less work.

    `batch_size` sizes only what falls back to stock scoring: batches here hold a number of tokens that follows from
    the free memory, and half as many after an out-of-memory error.

    Equal to stock in float32 to rounding. In 16 bit stock takes the softmax in the model's own type, which is the
    larger error of the two. With LLM.int8 a row's outlier columns depend on its neighbours, in stock as here.

    Parameters
    ----------
    encoded
        Token ids by what was asked, filled and reused; share one between models with one tokenizer.
    kept
        A file in which answers are kept while they are given, so that a later run of the same requests goes on from
        there; one file a model and task.
    alone
        Whether every row is a batch of its own, for LLM.int8 free of neighbours; slow.
    compiled
        Whether `qnb.speed.fused` compiles kernels, which on a GPU takes some fifteen seconds for each type of weights; by
        default where there is work enough.
    """

    def __init__(
        self,
        *args: Any,
        encoded: Encoded | None = None,
        kept: str | Path | None = None,
        alone: bool = False,
        compiled: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.encoded = {} if encoded is None else encoded
        self._kept = Path(kept) if kept else None
        self._answers: Answers | None = None
        self._alone, self._budget = alone, 1 if alone else self._tokens()
        # transformers 5.24 renames the argument, and warns
        renamed = hasattr(self.model, "base_model") and "cache" in signature(self.model.base_model.forward).parameters
        self._cache_name = "cache" if renamed else "past_key_values"
        self._pieces, self._compiled = fuse.PLAIN, compiled
        if self.model not in self._proved:
            shared = self._prove()
            self._proved[self.model] = shared, shared and self._prove_fused()
        self.shared, self._fusable = self._proved[self.model]

    # What is scored

    def encode_pairs(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Encode (context, continuation) in one call, which fast tokenizers spread over the cores.

        As lm-eval's ``_encode_pair`` does it: a context's trailing spaces belong to the continuation.
        """
        asked = [pair for pair in dict.fromkeys(pairs) if pair[0] and pair not in self.encoded]
        if self.backend != "causal":
            return
        ids = self._encode_together({text for pair in asked for text in (pair[0].rstrip(), "".join(pair))})
        for pair in asked:
            context = ids[pair[0].rstrip()]
            self.encoded[pair] = (context, ids["".join(pair)][len(context) :])

    def encode_contexts(self, contexts: Iterable[str]) -> None:
        """Encode what is to be continued, in one call."""
        ids = self._encode_together({text for text in contexts if (text,) not in self.encoded})
        self.encoded |= {(text,): (found,) for text, found in ids.items()}

    def _encode_together(self, texts: set[str]) -> dict[str, list[int]]:
        bos = self.tokenizer.decode(self.prefix_token_id)
        alone = {text for text in texts if not text or text.startswith(bos)}  # they get no second one
        together = sorted(texts - alone)
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        ids = self.tokenizer(together, **special)["input_ids"] if together else []
        return dict(zip(together, ids, strict=True)) | {text: self.tok_encode(text) for text in alone}

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a pair, from those encoded together where it is one of them."""
        found = self.encoded.get((context, continuation))
        return (found[0], found[1]) if found else super()._encode_pair(context, continuation)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy) a request (context, continuation), in order."""
        self._answers = Answers(self._kept, [request.args for request in requests])
        try:
            if len(self._answers.known) < len(requests):
                self.encode_pairs(request.args for request in requests)
                return super().loglikelihood(requests, disable_tqdm)
            return [tuple(self._answers.known[place]) for place in range(len(requests))]
        finally:
            self._answers = None

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy) a request, in order.

        Too long a request loses tokens from its left, as in stock. Batches are those of all requests, also where some
        are answered already: what was interrupted ends as if it had not been.
        """
        answers = self._answers or Answers(None, ())  # none where the requests are windows of longer texts
        if not requests:
            return []
        bar = tqdm(total=len(requests), desc="scoring", disable=disable_tqdm or self.rank != 0)
        rows = self._rows(requests) if self.shared else []
        with bar, self._fused(sum(row.width for row in rows)) as self._pieces:
            if self.shared:
                tally = _Tally(len(requests), self.device, answers, bar)
                for prefix, alike in _alike(rows, self._window, SAVED[self._memory] / self._weights):
                    for plain in (False, True):  # where causal attention is enough, faster kernels know it
                        self._score(prefix, [row for row in alike if row.plain is plain], tally)
                tally.keep()
            else:
                for start in range(0, len(requests), STOCK_BLOCK):
                    block = requests[start : start + STOCK_BLOCK]
                    if not all(start + place in answers.known for place in range(len(block))):
                        answers.keep(dict(enumerate(super()._loglikelihood_tokens(block, True, override_bs), start)))
                    bar.update(len(block))
        found: list[tuple[float, bool]] = [tuple(answers.known[place]) for place in range(len(requests))]
        for (asked, *_), answer in zip(requests, found, strict=True):
            if asked is not None and self.shared:  # a window of a longer text has no key; stock adds its own
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return found

    def _rows(self, requests: list[Request]) -> list[_Row]:
        """Group requests by context."""
        contexts: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        longest, window = self.max_length, self._window  # asked of the configuration each time
        for place, (_, context, continuation) in enumerate(requests):
            assert 0 < len(continuation) <= longest and context
            kept = context[max(0, len(context) + len(continuation) - longest - 1) :]
            contexts.setdefault(tuple(kept), {}).setdefault(tuple(continuation), []).append(place)
        rows: list[_Row] = []
        for kept_context, branches in contexts.items():
            row = _Row(kept_context, tuple((branch, tuple(places)) for branch, places in branches.items()))
            # a window is measured from a position, not along the row: there a continuation needs its own
            rows += [row] if row.width <= window else row.alone()
        return rows

    @property
    def _window(self) -> int:
        """The longest row in which every token sees every earlier one."""
        config = self.model.config.get_text_config()
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
        return min([self.max_length, *(window for window in windows if isinstance(window, int) and window > 0)])

    def _score(self, prefix: tuple[int, ...], rows: list[_Row], tally: _Tally) -> None:
        """Score rows with one beginning, longest first; a batch that does not fit is halved and tried again."""
        rows = sorted(rows, key=lambda row: -row.width)
        cache, done = None, 0
        while done < len(rows):
            widest = rows[done].width - len(prefix) + len(prefix) // 4  # kept keys and values weigh less than work
            batch = rows[done : done + max(1, self._budget // widest)]
            asked = [place for row in batch for _, places in row.branches for place in places]
            if not tally.knows(asked):
                try:
                    if prefix and cache is None:
                        cache = self._read(prefix)
                    scored = self._forward(batch, len(prefix), cache)
                except Exception as error:
                    if not is_out_of_memory(error) or len(batch) == 1:
                        raise
                    self._budget = max(1, min(self._budget, len(batch) * widest) // 2)
                    del error
                    release()
                    continue
                tally.add(asked, *scored)
            done += len(batch)
            tally.bar.update(len(asked))

    def _fused(self, tokens: int = 0) -> AbstractContextManager[fuse.Pieces]:
        """Return a context in which what lies between products takes few kernels, where this scorer does the work."""
        if not self._fusable:
            return nullcontext(fuse.PLAIN)
        compiled = self._compiled
        if compiled is None:
            compiled = tokens * self._weights >= COMPILED_FROM
        return fuse.fused(self.model, compiled and fuse.compiles(self.device, self.model.dtype))

    @torch.inference_mode()
    def _read(self, prefix: tuple[int, ...]) -> Any:
        """Return the keys and values of a beginning, of one row."""
        ids = torch.tensor([prefix], device=self.device)  # (1, P)
        return self._run(input_ids=ids, use_cache=True).past_key_values

    def _run(self, cache: Any = None, **options: Any) -> Any:
        """Run the model without its output head."""
        given = {} if cache is None else {self._cache_name: cache}
        return self.model.base_model(**given, **options)

    @torch.inference_mode()
    def _forward(self, batch: list[_Row], skip: int, cache: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a scored position's request, its log-likelihood in float32, and whether another token was likelier.

        `skip` tokens of every row are in `cache` already.
        """
        hidden, where, tokens, owners = self._hidden(batch, skip, cache)
        targets = self._there(tokens)  # (N,)
        hidden = hidden[self._there(where)]  # (N, D)
        chunk = max(64, LOGITS_BYTES[self._memory] // (10 * self._vocabulary))
        parts = [self._compare(hidden[at : at + chunk], targets[at : at + chunk])
                 for at in range(0, len(targets), chunk)]  # fmt: skip
        likelihoods, misses = (torch.cat(part) for part in zip(*parts, strict=True))
        # a continuation asked for twice is scored once and counted for each
        places = self._there(list(itertools.chain.from_iterable(owners)))
        again = self._there([place for place, asked in enumerate(owners) for _ in asked])
        return places, likelihoods[again], misses[again]

    def _there(self, values: list[Any]) -> torch.Tensor:
        """Return integers as a tensor on the device, without waiting for the device to get to it."""
        made = torch.from_numpy(np.array(values, dtype=np.int64))  # of long lists seven times as fast as torch.tensor
        return made.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else made

    def _compare(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-likelihood of `targets`, and 1 where another token was likelier."""
        return self._pieces.likelihoods(self._project(hidden), targets)

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits of hidden states, (N, D) -> (N, V), as the model scales and caps them."""
        config, logits = self.model.config.get_text_config(), self.model.get_output_embeddings()(hidden)
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _hidden(
        self, batch: Sequence[_Row], skip: int = 0, cache: Any = None
    ) -> tuple[torch.Tensor, list[int], list[int], list[tuple[int, ...]]]:
        """Run the rows; return hidden states (B*L, D) and a scored position's place in it, its token, its requests."""
        width = max(row.width for row in batch) - skip
        tokens, positions, segments = [], [], []  # (B, L) each, as lists
        where: list[int] = []
        targets: list[int] = []
        owners: list[tuple[int, ...]] = []
        for place, row in enumerate(batch):
            end = len(row.context)
            ids, at, segment = list(row.context[skip:]), list(range(skip, end)), [0] * (end - skip)
            last = place * width + end - skip - 1
            for number, (branch, asked) in enumerate(row.branches, 1):
                more = len(branch) - 1
                start = place * width + len(ids)
                where += [last, *range(start, start + more)]
                targets += branch
                owners += [asked] * len(branch)
                ids += branch[:-1]
                at += range(end, end + more)
                segment += [number] * more
            rest = width - len(ids)
            tokens.append(ids + [0] * rest)
            positions.append(at + [0] * rest)
            segments.append(segment + [-1] * rest)
        options: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            cache = deepcopy(cache)
            cache.batch_repeat_interleave(len(batch))
        if batch[0].plain:  # nothing to keep apart, padding after all that is scored: causal attention is enough
            if skip:
                options["position_ids"] = torch.arange(skip, skip + width, device=self.device).expand(len(batch), -1)
        else:
            options["position_ids"] = self._there(positions)  # (B, L)
            options["attention_mask"] = self._mask(self._there(segments), skip)
        hidden = self._run(cache, input_ids=self._there(tokens), **options).last_hidden_state  # (B, L, D)
        return hidden.flatten(0, 1), where, targets, owners

    def _mask(self, segments: torch.Tensor, skip: int) -> torch.Tensor:
        """Return who sees whom, (B, 1, L, P+L): the beginning, the context, and one's own continuation so far."""
        count = segments.shape[1]
        order = torch.arange(count, device=segments.device)
        earlier = order[:, None] >= order  # (L, L)
        related = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # (B, L, L)
        mask = earlier & related | torch.eye(count, dtype=torch.bool, device=segments.device)
        return self._given(torch.nn.functional.pad(mask, (skip, 0), value=True)[:, None])

    def _given(self, mask: torch.Tensor) -> torch.Tensor:
        """Return a mask of who sees whom, (B, 1, L, P+L), in the form the model's attention takes it."""
        kind = self.model.config.get_text_config()._attn_implementation
        if kind == fuse.GROUPED:
            return fuse.grouped(mask, self.model)
        if kind == "sdpa":
            return mask
        dtype = self.model.dtype  # other implementations add the mask to the scores
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    # What is generated

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context greedily up to a stop sequence.

        Stock generation gets sampled requests, and all of a model whose own settings shape the texts (`PLAIN`).

        Rows that are done leave the batch, and a beginning that all contexts share is computed once.
        """
        answers = Answers(self._kept, [request.args for request in requests])
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        own = self.model.generation_config
        shaped = any(getattr(own, name, None) not in (None, plain) for name, plain in PLAIN.items())
        mine: list[tuple[int, list[str], int]] = []
        rest: list[int] = []
        for place, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            until = handle_stop_sequences(options.pop("until", None), eos=eos)
            most = options.pop("max_gen_toks")
            sampled = options.pop("do_sample", False) or options.pop("temperature", 0.0) or options
            if sampled or shaped or not self.shared or self.think_end_token:
                rest.append(place)
            else:
                mine.append((place, until, most))
        for start in range(0, len(rest), STOCK_BLOCK):
            places = rest[start : start + STOCK_BLOCK]
            if not all(place in answers.known for place in places):
                texts = super().generate_until([requests[place] for place in places], disable_tqdm)
                answers.keep(dict(zip(places, texts, strict=True)))
        self.encode_contexts(requests[place].args[0] for place, *_ in mine)
        asked: list[_Asked] = []
        for place, until, most in mine:
            ids = self.encoded[(requests[place].args[0],)][0][-(self.max_length - most) :]
            asked.append((ids, place, until, most))
        asked.sort(key=lambda one: -(len(one[0]) + one[3]))
        shared = _common([ids for ids, *_ in asked]) if len(asked) >= PEERS else 0
        shared = shared if shared >= PREFIX else 0
        cache, done = None, 0
        rows = self._generated_rows(len(asked[0][0]) + asked[0][3]) if asked and not self._alone else 1
        bar = tqdm(total=len(asked), desc="generating", disable=disable_tqdm or self.rank != 0)
        with bar, self._fused() as self._pieces:
            while done < len(asked):
                batch = asked[done : done + rows]
                if not all(place in answers.known for _, place, *_ in batch):
                    try:
                        if shared and cache is None:
                            cache = self._read(tuple(asked[0][0][:shared]))
                        texts = self._generate(batch, shared, cache)
                    except Exception as error:
                        if not is_out_of_memory(error) or len(batch) == 1:
                            raise
                        rows = len(batch) // 2
                        del error
                        release()
                        continue
                    cut = [postprocess_generated_text(text, until, None)
                           for (_, _, until, _), text in zip(batch, texts, strict=True)]  # fmt: skip
                    answers.keep({place: text for (_, place, *_), text in zip(batch, cut, strict=True)})
                done += len(batch)
                bar.update(len(batch))
        for place, *_ in mine:
            self.cache_hook.add_partial("generate_until", requests[place].args, answers.known[place])
        return [answers.known[place] for place in range(len(requests))]

    @torch.inference_mode()
    def _generate(self, batch: list[_Asked], skip: int, cache: Any) -> list[str]:
        """Return each context's continuation as text, uncut after its stop sequence."""
        count, width = len(batch), max(len(ids) for ids, *_ in batch) - skip
        steps = max(most for *_, most in batch)
        ids = self._there([[0] * (width + skip - len(ids)) + ids[skip:] for ids, *_ in batch])  # (B, L)
        pads = self._there([width + skip - len(ids) for ids, *_ in batch])  # (B,)
        order = torch.arange(width, device=self.device)
        mask = torch.nn.functional.pad(order >= pads[:, None], (skip, 0), value=True)  # (B, P+L)
        positions = (skip + order - pads[:, None]).clamp(min=0)  # (B, L)
        cache, last = self._begin(ids, mask, positions, cache, skip + width + steps)
        positions = positions[:, -1:]
        mask = torch.nn.functional.pad(mask, (0, steps), value=True)
        windowed = self._window < self.max_length  # then the model itself makes a mask for each kind of layer
        written: list[list[int]] = [[] for _ in batch]
        alive, fresh = list(range(count)), []  # fresh: tokens not yet read back, (B, 1) each
        for step in range(1, steps + 1):
            ids = self._project(last).argmax(-1, keepdim=True)  # (B, 1)
            fresh.append(ids)
            if step % CHECK_STEPS == 0 or step == steps:
                for row, new in zip(alive, torch.cat(fresh, 1).tolist(), strict=True):
                    written[row] += new
                fresh = []
                going = [place for place, row in enumerate(alive) if not self._stopped(written[row], *batch[row][2:])]
                if not going:
                    break
                if len(going) < len(alive):
                    kept = self._there(going)
                    cache.batch_select_indices(kept)
                    ids, positions, mask = ids[kept], positions[kept], mask[kept]
                    alive = [alive[place] for place in going]
            positions = positions + 1
            seen = mask[:, : skip + width + step]
            past = self._run(
                cache,
                input_ids=ids,
                attention_mask=seen.long() if windowed else self._given(seen[:, None, None]),
                position_ids=positions,
                use_cache=True,
            )
            cache, last = past.past_key_values, past.last_hidden_state[:, -1]  # (B, D)
        return [self.tok_decode(self._ended(tokens[:most])) for tokens, (*_, most) in zip(written, batch, strict=True)]

    @property
    def _ends(self) -> set[int]:
        """The tokens that end a text: a model may have several."""
        own = self.model.generation_config.eos_token_id
        return {self.eot_token_id, *(own if isinstance(own, list) else () if own is None else (own,))}

    def _ended(self, tokens: list[int]) -> list[int]:
        """Return a text's tokens, the first that ends it the last: what a row is given after that is no answer."""
        ends = self._ends
        return tokens[: 1 + next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]

    def _begin(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any, room: int
    ) -> tuple[Any, torch.Tensor]:
        """Read contexts (B, L), a budget's tokens at a time; return their cache and last hidden states (B, D).

        The cache has room for all that is to come, so that a step copies none of what is there.
        """
        count, width = ids.shape
        size = max(1, self._budget // width)
        parts, last = [], []
        for at in range(0, count, size):
            rows = slice(at, at + size)
            part = deepcopy(cache)
            if part is not None:
                part.batch_repeat_interleave(len(ids[rows]))
            past = self._run(
                part, input_ids=ids[rows], attention_mask=mask[rows].long(), position_ids=positions[rows],
                use_cache=True,
            )  # fmt: skip
            parts.append(past.past_key_values)
            last.append(past.last_hidden_state[:, -1])
        joined = parts[0]
        for number, layer in enumerate(joined.layers):
            those = [part.layers[number] for part in parts]
            if type(layer) is DynamicLayer:
                joined.layers[number] = _Roomy(those, room)
            elif len(parts) > 1:  # a sliding window's: it stays as long as it is
                layer.keys, layer.values = (
                    torch.cat([getattr(one, name) for one in those]) for name in ("keys", "values")
                )
            for one in those[1:]:
                one.keys = one.values = None
        return joined, torch.cat(last)

    def _stopped(self, tokens: list[int], until: list[str], most: int) -> bool:
        """Return whether a row needs no more tokens, given all it has: only what is new since the last look is read.

        A stop sequence found there is looked for in the whole text, which is cut at it; one missed where the texts
        meet costs further tokens, no answer.
        """
        tail = tokens[-(CHECK_STEPS + max(map(len, until), default=0)) :]
        if len(tokens) >= most or not self._ends.isdisjoint(tail):
            return True
        for part in (tail, tokens):
            text = self.tok_decode(part, skip_special_tokens=False)
            if not any(stop in text for stop in until):
                return False
        return True

    def _generated_rows(self, length: int) -> int:
        """Return how many rows of `length` tokens fit with their keys and values, beside a pass over contexts."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        a_token = 2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize
        # attention reads keys and values of one layer at a time, repeated for each of its queries' heads
        more = (1 + config.num_attention_heads / heads) / config.num_hidden_layers
        room = self._free_bytes() - self._budget * self._activation_bytes()
        fitting = 0.9 * room // (a_token * length * (1 + more))
        return int(max(1, min(fitting, 512 if self.device.type == "cuda" else 16)))

    # What fits

    @property
    def _memory(self) -> str:
        return "cuda" if self.device.type == "cuda" else "cpu"

    @property
    def _weights(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters())

    @property
    def _vocabulary(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    def _tokens(self) -> int:
        """Return the tokens a forward pass may hold: what fits in half of the free memory, and no more than helps."""
        room = self._free_bytes() // 2 - LOGITS_BYTES[self._memory]
        return int(max(256, min(TOKENS[self._memory], room // self._activation_bytes())))

    def _activation_bytes(self) -> int:
        """Return what a token's activations take that are alive at once, in float32."""
        config = self.model.config.get_text_config()
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        return int(4 * (10 * config.hidden_size + 4 * inner))

    def _free_bytes(self) -> int:
        """Return what may still be allocated, with what the allocator holds unused and its limit counted."""
        if self.device.type != "cuda":
            import psutil

            return int(psutil.virtual_memory().available)
        free, whole = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_reserved(self.device)
        allowed = torch.cuda.get_per_process_memory_fraction(self.device) * whole
        return int(min(free + held, allowed) - torch.cuda.memory_allocated(self.device))

    # Whether it holds

    _said: ClassVar[set[str]] = set()
    _proved: ClassVar[WeakKeyDictionary[Any, tuple[bool, bool]]] = WeakKeyDictionary()

    def _prove(self) -> bool:
        """Ask the model itself: are two continuations in one row what they are in rows of their own?"""
        if self.backend != "causal" or self.world_size > 1 or not hasattr(self.model.base_model, "forward"):
            return False
        try:
            worst, bound = self._difference()
            if worst <= bound:
                return True
            why = f"a difference of {worst:.2g}"
        except Exception as error:  # whatever a model raises when it is given a mask it cannot take
            why = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        kind = type(self.model).__name__
        if kind not in self._said:
            self._said.add(kind)
            log.warning("%s cannot score continuations in one row (%s); stock scoring is used", kind, why)
        return False

    def _prove_fused(self) -> bool:
        """Ask the same with the pieces of `fuse` in place, on a GPU, where they pay."""
        if self.device.type != "cuda":
            return False
        try:
            with fuse.fused(self.model) as self._pieces:
                worst, bound = self._difference()
        except Exception as error:  # whatever a model raises when it is given a part it cannot take
            log.warning("the model's own kernels are used: %s", f"{type(error).__name__}: {error}".splitlines()[0])
            return False
        finally:
            self._pieces = fuse.PLAIN
        return worst <= bound

    @torch.inference_mode()
    def _difference(self) -> tuple[float, float]:
        """Return how far a shared row's second continuation is from the same in a row of its own, and the bound.

        The unit is how far apart logits are. In float32 nothing but rounding may differ. Elsewhere rounding is large
        (LLM.int8's outlier columns depend on the neighbours), so the bound is half of what either fault would make:
        a continuation that sees the one before it, or one whose positions run on. Seen with SmolLM2-135M: bfloat16
        0.09 where the faults make 0.53 and 0.86, LLM.int8 0.22 where they make 0.64 and 0.91.
        """
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(10, min(1000, self._vocabulary), (24,), generator=draw).tolist()
        context, first, second = tuple(ids[:8]), tuple(ids[8:16]), tuple(ids[16:])
        row = _Row(context, ((first, (0,)), (second, (1,))))
        truth = self.model(torch.tensor([context + second[:-1]], device=self.device)).logits[0, 8:].float()  # (7, V)
        scale = truth.std(-1).mean()

        def far(hidden: torch.Tensor) -> float:
            return float((self._project(hidden).float() - truth).abs().mean() / scale)

        cache = self._read(context[:4])
        shared = [self._hidden([row])[:2], self._hidden([row, row], 4, cache)[:2]]
        worst = max(far(hidden[torch.tensor(where[9:16], device=self.device)]) for hidden, where in shared)
        if self.model.dtype == torch.float32 and not getattr(self.model, "is_quantized", False):
            return worst, 1e-3
        joined = torch.tensor([context + first[:-1] + second[:-1]], device=self.device)  # (1, 22)
        restarted, apart = [*range(15), *range(8, 15)], [0] * 8 + [1] * 7 + [2] * 7
        faults = []
        for positions, segments in ((restarted, [0] * 22), (list(range(22)), apart)):
            hidden = self._run(
                input_ids=joined,
                position_ids=torch.tensor([positions], device=self.device),
                attention_mask=self._mask(torch.tensor([segments], device=self.device), 0),
            ).last_hidden_state
            faults.append(far(hidden[0, 15:]))
        return worst, max(0.1, min(faults) / 2)


class _Tally:
    """A log-likelihood a request, and how many of its tokens were not the likeliest.

    Sums live on the device and are read where answers are due to be kept, and at the end: no batch waits for the one
    before.
    """

    def __init__(self, count: int, device: torch.device, answers: Answers, bar: Any) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.total = torch.zeros(count, dtype=wide, device=device)
        self.wrong = torch.zeros(count, dtype=torch.long, device=device)
        self.answers, self.bar = answers, bar
        self.fresh: list[int] = []  # answered, and not kept yet

    def knows(self, asked: Sequence[int]) -> bool:
        """Whether all these requests are answered already."""
        return all(place in self.answers.known for place in asked)

    def add(self, asked: list[int], places: torch.Tensor, likelihoods: torch.Tensor, misses: torch.Tensor) -> None:
        """Count a batch's positions, (N,) each, for the requests they belong to."""
        self.total.index_add_(0, places, likelihoods.to(self.total.dtype))
        self.wrong.index_add_(0, places, misses)
        self.fresh += asked
        if self.answers.due:
            self.keep()

    def keep(self) -> None:
        """Read the sums of what was answered since the last time, and keep them."""
        at = torch.tensor(self.fresh, device=self.total.device, dtype=torch.long)
        values, greedy = self.total[at].tolist(), (self.wrong[at] == 0).tolist()
        self.answers.keep(dict(zip(self.fresh, zip(values, greedy, strict=True), strict=True)))
        self.fresh = []


class _Roomy(DynamicLayer):
    """A layer's keys and values with room for tokens to come: a step writes its own and copies none."""

    def __init__(self, parts: Sequence[DynamicLayer], room: int) -> None:
        """Join layers of some rows each, in order."""
        super().__init__()
        first = parts[0].keys
        assert first is not None
        self.dtype, self.device, self.is_initialized = first.dtype, first.device, True
        self._length = first.shape[-2]
        self._held = [self._joined([getattr(part, name) for part in parts], room) for name in ("keys", "values")]
        self._show()

    def _joined(self, parts: list[torch.Tensor], room: int) -> torch.Tensor:
        _, heads, length, size = parts[0].shape
        held = parts[0].new_empty((sum(len(part) for part in parts), heads, room, size))  # (B, H, room, D)
        at = 0
        for part in parts:
            held[at : at + len(part), :, :length] = part
            at += len(part)
        return held

    def _show(self) -> None:
        self.keys, self.values = (held[:, :, : self._length] for held in self._held)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Write new keys and values (B, H, L, D) behind those there are; return all."""
        end = self._length + key_states.shape[-2]
        for held, new in zip(self._held, (key_states, value_states), strict=True):
            held[:, :, self._length : end] = new
        self._length = end
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        self._held = [held[indices] for held in self._held]
        self._show()


def _common(lists: Sequence[list[int]] | Sequence[tuple[int, ...]]) -> int:
    """Return how many tokens all begin with, one less than the shortest at most."""
    low, high = min(lists), max(lists)
    most = min(map(len, lists)) - 1
    return next((place for place in range(most) if low[place] != high[place]), most)


def _alike(rows: list[_Row], window: int, least: float = 0) -> Iterator[tuple[tuple[int, ...], list[_Row]]]:
    """Yield rows by a beginning they share, where computing it once pays; the others together with an empty one.

    It pays where `least` tokens are saved, and a fifth of all.
    """
    groups: dict[tuple[int, ...], list[_Row]] = {}
    for row in rows:
        groups.setdefault(row.context[:PREFIX] if row.width <= window else (), []).append(row)
    rest = groups.pop((), [])
    for group in groups.values():
        shared = _common([row.context for row in group])
        enough = max(least, sum(row.width for row in group) / 5)
        if len(group) >= PEERS and shared >= PREFIX and shared * (len(group) - 1) >= enough:
            yield group[0].context[:shared], group
        else:
            rest += group
    if rest:
        yield (), rest
