"""lm-eval's tasks: what every format is asked, and the scores that its answers make.

A choice is scored by the log-likelihood of its text after the question; the model picks the largest. The softmax of
the log-likelihoods over an item's choices is the paper's p(y_i), which moves before the picked choice does.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from hashlib import sha256
from itertools import chain
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pandas as pd

from qnb.accuracy.statistics import agresti_coull, choice_probabilities
from qnb.errors import InputError, refusing
from qnb.patches import cached_templates, wide_products
from qnb.precision import listed
from qnb.prompts import DATA, reading_from

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

# items of each task, and the subtasks that a limit counts for
TASKS = {
    "sample": {"sample_easy": (48, 1), "sample_hard": (48, 1), "sample_completion": (48, 1),
               "sample_arithmetic": (40, 1), "sample_exam": (48, 4)},
    "paper": {"arc_challenge": (1172, 1), "arc_easy": (2376, 1), "gsm8k": (1319, 1), "gsm8k_cot": (1319, 1),
              "hellaswag": (10042, 1), "mmlu": (14042, 57)},
}  # fmt: skip
SIZES = TASKS["sample"] | TASKS["paper"]
FOLDERS = ("arc", "gsm8k", "hellaswag", "mmlu")  # of lm-eval's tasks: those that hold the paper's
LM_EVAL_SEED = 1234  # its default, for examples and for sampled texts
REHEARSED = 16  # items of a task that are scored without a model, to see that some can be
MISSING = (ImportError, OSError)  # what no other item or answer would bring
STAND_IN: Any = SimpleNamespace(  # for a model: one log-likelihood for all texts, one text after all prompts
    rank=0, world_size=1, device=SimpleNamespace(type="cpu"), loglikelihood=lambda asked: [(-1.0, False)] * len(asked),
    loglikelihood_rolling=lambda asked: [-1.0] * len(asked), generate_until=lambda asked: ["1"] * len(asked),
)  # fmt: skip
UNANSWERED = (math.nan, False)  # what a model says of a text that does not fit it
# words in the names of metrics that are shares, where lm-eval takes the mean of values from 0 to 1
SHARES = frozenset({"acc", "accuracy", "em", "exact", "pct"})


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task or group."""

    task: str
    metric: str  # acc, acc_norm, exact_match ...; p_correct: mean probability of the right choice
    filter: str  # how a generated answer was read; "none" for choices
    value: float
    stderr: float | None  # of a share: after Agresti and Coull where all items are right, or all wrong
    n_items: int
    n_total: int  # items that the task has
    shots: int
    group: bool  # a mean over other tasks, weighted by their items
    unit: str = "%"  # of a share, whose value is from 0 to 1; else the metric's own name, such as bits per byte
    higher_is_better: bool | None = True  # as the task declares it, if it does


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Scores of a task, of its subtasks and of their groups, and the items they were counted from."""

    scores: tuple[Score, ...]
    items: pd.DataFrame  # a row an item and filter; see `Task._items`
    bad_items: int = 0  # that could not be asked or scored; nothing else counts them
    answer_s: float = 0.0  # in which the model answered


# Which tasks there are


def names(tasks: str | Iterable[str]) -> tuple[str, ...]:
    """Return the task names meant by ``"sample"``, ``"paper"``, names separated by commas or spaces, or a list.

    Raises
    ------
    InputError
        No name was given.
    """
    words = listed(tasks)
    if not words:
        raise InputError("no task was given; give tasks='sample', tasks='paper', or names of lm-eval tasks")
    return tuple(dict.fromkeys(name for word in words for name in TASKS.get(word, (word,))))


def check(tasks: str | Iterable[str]) -> tuple[str, ...]:
    """Return `names(tasks)` after looking each up in lm-eval's index; a tag stands for its tasks.

    Raises
    ------
    InputError
        A task is unknown; the nearest names are offered.
    """
    found = (task for name in names(tasks) for task in ([name] if name in SIZES else _look_up(name)))
    return tuple(dict.fromkeys(found))


def _look_up(name: str) -> list[str]:
    """Return the tasks of a tag, or the name itself if it is a task's or a group's."""
    index = _index_with(name)
    if name in index.all_tags:
        return sorted(index.task_index[name].tags)
    if name in index.all_tasks:
        return [name]
    near = get_close_matches(name, index.all_tasks, 3, 0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else "; `lm_eval ls tasks` lists them"
    raise InputError(f"task {name!r} is unknown to lm-eval{hint}")


def _index_with(task: str) -> Any:
    """Return lm-eval's index of the built-in and the paper's tasks, or of all tasks if `task` is not one of these."""
    return small if task in (small := _index()).all_tasks else _index(include_defaults=True)


@cache
def _index(include_defaults: bool = False) -> Any:
    """Read lm-eval's index of tasks; that of all takes seconds."""
    import lm_eval.tasks

    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)  # it calls being given a loaded model an error
    folder = Path(lm_eval.tasks.__file__).parent
    folders = [DATA / "tasks", *(() if include_defaults else (folder / name for name in FOLDERS))]
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=include_defaults)


# One task, asked of every format


class Memo:
    """A function that answers once for each argument; unlike `functools.cache`, other processes can have it too."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._answers = function, dict[tuple[Any, ...], Any]()

    def __call__(self, *arguments: Any) -> Any:
        if arguments not in self._answers:
            self._answers[arguments] = self._function(*arguments)
        return self._answers[arguments]


class Task:
    """A task or group of lm-eval's with its data; its requests are built once and asked of every format.

    Parameters
    ----------
    name
        A name that `check` returned.
    data_dir
        A folder laid out like the hub's dataset repositories, read instead of the hub.
    window
        The most tokens that the model reads.

    Raises
    ------
    InputError
        The data cannot be read or lack a split, or nothing can be scored: the task shows images, plays sounds, runs
        code, asks for texts as long as the window, or needs a package or file that is not there.
    """

    def __init__(self, name: str, data_dir: Path | None = None, window: float = math.inf) -> None:
        self.name = name
        self._lm_eval = _load(name, data_dir)
        self._parts: dict[str, Any] = self._lm_eval["tasks"]
        self.groups = {group: tuple(part.task_name for part in members.get_all_tasks())
                       for group, members in self._lm_eval["groups"].items()}  # fmt: skip
        self._documents = {part: task.eval_docs for part, task in self._parts.items()}
        self.sizes = {part: len(documents) for part, documents in self._documents.items()}
        self._error: Exception | None = None  # of the last bad item
        self._not_shares: set[tuple[str, str]] = set()  # (part, metric) that had a value beyond 0 to 1
        self.encoded: dict[tuple[Any, ...], list[int]] = {}  # token ids by text, which all formats share
        self.data_sha256 = Memo(self._data_sha256)
        self._asked = Memo(self._requests)
        for part, task in self._parts.items():
            task._instances = []  # a part that cannot be asked keeps these
            task.build_all_requests = partial(self._ask, part)
            task.process_results = partial(self._process, task, task.process_results)
        with refusing(f"task {name!r} cannot be scored here; leave it out"):  # whatever a task's code raises
            self.evaluate(STAND_IN, REHEARSED)
            if self.new_tokens >= window:
                raise ValueError(f"it asks for {self.new_tokens} new tokens, and the model's window is {window}")

    @property
    def is_multiple_choice(self) -> bool:
        """Whether all items are choices."""
        return all(part.OUTPUT_TYPE == "multiple_choice" for part in self._parts.values())

    @property
    def is_generated(self) -> bool:
        """Whether answers of some items are generated."""
        return any(part.OUTPUT_TYPE == "generate_until" for part in self._parts.values())

    def n_items(self, limit: int | None) -> int:
        """Return how many items a limit takes, of all parts together; None takes all."""
        return sum(min(limit or size, size) for size in self.sizes.values())

    def pairs(self, limit: int | None) -> list[tuple[str, str]]:
        """Return (context, continuation) of all requests for a likelihood that a limit takes."""
        asked = chain.from_iterable(self._asked(part, limit)[0] for part in self._parts)
        return [request.args for request in asked if request.request_type == "loglikelihood"]

    @property
    def new_tokens(self) -> int:
        """How many new tokens an answer may have, of all parts the most; 0 where none is generated."""
        from lm_eval.models.utils import normalize_gen_kwargs

        asked = chain.from_iterable(part.instances for part in self._parts.values())
        texts = (instance for instance in asked if instance.request_type == "generate_until")
        return max((normalize_gen_kwargs(text.args[1])["max_gen_toks"] for text in texts), default=0)

    def _drawn(self, part: str, limit: int | None) -> list[tuple[int, Any]]:
        """Return (place, document) of the items that a limit takes of a part."""
        documents = self._documents[part]
        return [(place, documents[place]) for place in draw(part, len(documents), limit)]

    def _requests(self, name: str, limit: int | None) -> tuple[list[Any], list[tuple[int, Any]]]:
        """Return a part's requests, and the items that they ask about.

        An item is left out if the task's own code cannot ask it, or read what is right.
        """
        part, requests, items = self._parts[name], [], []
        part.set_fewshot_seed(seed=LM_EVAL_SEED)
        with cached_templates(), patch("lm_eval.api.task.tqdm", lambda documents, **_: documents):  # no bar an item
            for item in self._drawn(name, limit):
                try:
                    requests += self._build(part, item)
                    items.append(item)
                except Exception as error:  # whatever a template raises
                    self._error = error
        return requests, items

    def _build(self, part: Any, item: tuple[int, Any]) -> list[Any]:
        """Return the requests about an item."""
        part.doc_iterator = lambda **_: iter([item])
        type(part).build_all_requests(part)
        part.doc_to_target(item[1])  # lm-eval keeps it beside the answers
        return list(part.instances)

    def _ask(self, name: str, limit: int | None, **_: Any) -> None:
        """Take the place of lm-eval's method, which builds the requests again for every model.

        A part gets the requests of that limit without the answers of the model before.
        """
        part = self._parts[name]
        part._instances, items = self._asked(name, limit)
        part.doc_iterator = lambda **_: iter(items)
        for instance in part.instances:
            instance.resps, instance.filtered_resps = [], {}

    def _process(self, part: Any, process: Any, document: Any, answers: Sequence[Any]) -> dict[str, Any]:
        """Return an item's metrics; none where it cannot be scored."""
        try:
            if UNANSWERED in answers:
                raise ValueError("a text is empty, or longer than the model's window")
            metrics: dict[str, Any] = process(document, answers)
            if not all(math.isfinite(value) for name, value in metrics.items() if _is_averaged(part, name)):
                raise ValueError("a metric is not a finite number")
            return metrics
        except Exception as error:  # whatever a task's code raises over one item, the others are scored
            self._error = error
            return {}

    def _data_sha256(self, limit: int | None) -> str:
        """Return the hash of the documents that are asked about, and of those shown as examples."""
        digest = sha256()
        for name, part in self._parts.items():
            has_examples = part.get_config("num_fewshot") and hasattr(part, "sampler")
            for content in (name, *self._drawn(name, limit), *(part.sampler.df if has_examples else ())):
                digest.update(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
        return digest.hexdigest()

    def evaluate(self, lm: HFLM, limit: int | None = None) -> TaskResult:
        """Score a model, with the shots and metrics that the task defines.

        Parameters
        ----------
        lm
            The model, as lm-eval calls one.
        limit
            Items of the task, or of each subtask: the first of one fixed random order. None takes all.

        Raises
        ------
        RuntimeError
            All items are bad, or no metric is a finite number. A stand-in's texts may all be bad: a task's own code
            may read more than a number from a text.
        """
        from lm_eval.evaluator import evaluate

        # lm-eval draws bars and prints whatever it is told, and resamples in copies of this process
        with (redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()), cached_templates(),
              wide_products(lm.device.type), patch.dict(os.environ, DISABLE_MULTIPROC="1")):  # fmt: skip
            parts = {name: part for name, part in self._parts.items() if self._asked(name, limit)[1]}
            if not parts:
                raise RuntimeError(f"none of {self.n_items(limit)} items can be asked: {self._error}")
            # `simple_evaluate` would ask the system for its libraries each time, which takes a second
            results: Any = evaluate(lm, {**self._lm_eval, "tasks": parts}, limit=limit, bootstrap_iters=100)
        items = self._items(results)
        scores = tuple(self._scores(results, items)) if len(items) else ()
        is_text = lm is STAND_IN and items.empty and self.new_tokens and not isinstance(self._error, MISSING)
        if not scores and not is_text:
            raise RuntimeError(f"none of {self.n_items(limit)} items gives a score: {self._error or 'no metric'}")
        return TaskResult(scores, items, self.n_items(limit) - len(items.drop_duplicates(["task", "doc_id"])))

    def _items(self, results: Mapping[str, Any]) -> pd.DataFrame:
        """Return a row an item and filter, unless it is bad: task, doc_id, filter, gold, picked, correct.

        Choices have correct_norm, the log-likelihood of each choice, and p_correct, the probability of the right one.
        `picked` of a generation is its answer as the filter read it.
        """
        return pd.DataFrame([
            {"task": task, "doc_id": sample["doc_id"], "filter": sample["filter"], "gold": str(sample["target"]),
             "picked": _text(sample["filtered_resps"][0]),
             "correct": _is_correct(sample.get("acc", sample.get("exact_match"))),
             **(_choice(self._parts[task], sample) if self._parts[task].OUTPUT_TYPE == "multiple_choice" else {})}
            for task, samples in results["samples"].items() for sample in samples if sample["metrics"]
        ])  # fmt: skip

    def _scores(self, results: Mapping[str, Any], items: pd.DataFrame) -> Iterator[Score]:
        for task, metrics in results["results"].items():
            members, shots = self.groups.get(task, (task,)), results["n-shot"].get(task)
            parts = [part for part in members if part in results["samples"]]  # a part of bad items alone is not there
            answered = items[items.task.isin(parts)]
            n_items = len(answered.drop_duplicates(["task", "doc_id"]))
            n_total = sum(self.sizes[part] for part in members)
            score = partial(Score, task=task, n_items=n_items, n_total=n_total, group=task in self.groups,
                            shots=shots if isinstance(shots, int) else 0)  # fmt: skip
            for key, value in metrics.items():
                metric, _, filter_name = key.partition(",")
                stderr = metrics.get(f"{metric}_stderr,{filter_name}")  # every metric has one, be it "N/A"
                if stderr is not None and metric != "bypass" and math.isfinite(value):
                    unit = "%" if self._is_share(metric, parts, results["samples"]) else metric.replace("_", " ")
                    better = results["higher_is_better"][parts[0]].get(metric)
                    yield score(metric=metric, filter=filter_name, unit=unit, higher_is_better=better,
                                value=float(value), stderr=_stderr(unit, value, stderr, n_items))  # fmt: skip
            p_correct = answered.reindex(columns=["p_correct"]).p_correct.dropna()
            if len(p_correct):
                stderr = float(p_correct.sem()) if len(p_correct) > 1 else None
                yield score(metric="p_correct", filter="none", unit="%", higher_is_better=True,
                            value=float(p_correct.mean()), stderr=stderr, n_items=len(p_correct))  # fmt: skip

    def _is_share(self, metric: str, parts: Iterable[str], samples: Mapping[str, Any]) -> bool:
        """Return whether a metric is a share of items, by its name, lm-eval's aggregation, and all values so far."""
        if SHARES.isdisjoint(metric.split("_")) or not all(_is_averaged(self._parts[part], metric) for part in parts):
            return False
        self._not_shares |= {(part, metric) for part in parts for sample in samples[part]
                             if metric in sample["metrics"] and not 0 <= sample[metric] <= 1}  # fmt: skip
        return self._not_shares.isdisjoint((part, metric) for part in parts)


def draw(name: str, count: int, limit: int | None) -> list[int]:
    """Return `limit` of a task's `count` items, ascending: the first of a random order that is the same everywhere."""
    order = sorted(range(count), key=lambda place: sha256(f"{name} {place}".encode()).digest())
    return sorted(order[:limit])


def _load(name: str, data_dir: Path | None) -> Any:
    """Return lm-eval's tasks and groups by name, with their data."""
    unread = f"the data of task {name!r} could not be read from {data_dir or 'the hub'}"  # whatever a loader raises
    advice = "check the network, give data_dir, or take tasks='sample'"
    absent = f"task {name!r} cannot be scored here: it lacks a package, split or column; leave it out"
    with (refusing(f"{unread}; {advice}"), reading_from(DATA / "tasks" if name in TASKS["sample"] else data_dir),
          refusing(absent, (ImportError, KeyError))):  # fmt: skip
        loaded = _index_with(name).load([name])
    unsupported = ("MULTIMODAL", "UNSAFE_CODE")
    if any(getattr(part, attribute, False) for part in loaded["tasks"].values() for attribute in unsupported):
        raise InputError(f"task {name!r} shows images, plays sounds or runs a model's programs; leave it out")
    return loaded


# From lm-eval's results to scores and items


def _is_averaged(part: Any, metric: str) -> bool:
    """Return whether lm-eval takes the mean of a metric's values."""
    from lm_eval.api.metrics import mean

    return part.aggregation().get(metric, mean) is mean


def _stderr(unit: str, value: float, stderr: Any, n_items: int) -> float | None:
    """Return a score's standard error; lm-eval's is 0, or none at all, where all items are right or all wrong."""
    if unit == "%" and value in (0, 1):
        return agresti_coull(round(value * n_items), n_items)
    return float(stderr) if isinstance(stderr, Real) and math.isfinite(stderr) else None


def _text(answer: Any) -> str:
    """Return what a model answered: a generated text, or whether a text is its likeliest; empty for a likelihood."""
    return str(answer[1]) if isinstance(answer, tuple) else "" if isinstance(answer, float) else str(answer)


def _choice(part: Any, sample: Mapping[str, Any]) -> dict[str, Any]:
    loglikelihoods = [float(response[0]) for response in sample["filtered_resps"]]
    if "acc_mutual_info" in sample["metrics"]:  # each choice without its question follows
        loglikelihoods = loglikelihoods[: len(loglikelihoods) // 2]
    probabilities = choice_probabilities(loglikelihoods)
    golds = _golds(part, sample)
    is_plain = "acc" in sample["metrics"] and not part.config.process_results  # else a target may stand for nothing
    has_gold = is_plain and all(0 <= gold < len(probabilities) for gold in golds)
    return {
        "gold": ", ".join(map(str, golds)),
        "picked": str(loglikelihoods.index(max(loglikelihoods))),
        "correct_norm": _is_correct(sample.get("acc_norm")),
        "loglikelihoods": loglikelihoods,
        "p_correct": sum(probabilities[gold] for gold in golds) if has_gold else None,
    }


def _golds(part: Any, sample: Mapping[str, Any]) -> list[int]:
    """Return the places of the right choices, -1 for one that is not there; what differs may be the contexts."""
    gold = part.doc_to_text(sample["doc"]) if part.multiple_input else sample["target"]
    golds = gold if isinstance(gold, list) else [gold]
    if all(isinstance(gold, int) for gold in golds):
        return [int(gold) for gold in golds]
    choices = part.doc_to_choice(sample["doc"])
    return [choices.index(gold) if gold in choices else -1 for gold in golds]


def _is_correct(score: Any) -> bool | None:
    """Return whether an item is right; None where a task gives it another score."""
    return bool(score) if score in (0, 1) else None
