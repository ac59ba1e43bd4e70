"""lm-eval's tasks: what every format is asked, and the scores that its answers make.

A choice is scored by the log-likelihood of its text after the question; the model picks the largest. The softmax of
the log-likelihoods over an item's choices is the paper's p(y_i), which moves before the picked choice does.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from qnb.accuracy.patches import cached_templates, wide_products
from qnb.accuracy.statistics import agresti_coull
from qnb.errors import InputError, scrub
from qnb.precision import listed
from qnb.prompts import DATA, reading_from

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

TASKS = {
    "sample": ("sample_easy", "sample_hard", "sample_completion", "sample_arithmetic", "sample_exam"),
    "paper": ("arc_challenge", "arc_easy", "gsm8k", "gsm8k_cot", "hellaswag", "mmlu"),
}
# items of each, and the subtasks that a limit counts for
SIZES = {"sample_easy": (48, 1), "sample_hard": (48, 1), "sample_completion": (48, 1), "sample_arithmetic": (40, 1),
         "sample_exam": (48, 4), "arc_challenge": (1172, 1), "arc_easy": (2376, 1), "gsm8k": (1319, 1),
         "gsm8k_cot": (1319, 1), "hellaswag": (10042, 1), "mmlu": (14042, 57)}  # fmt: skip
FOLDERS = ("arc", "gsm8k", "hellaswag", "mmlu")  # of lm-eval's tasks: those that hold the paper's
FEWSHOT_SEED = 1234  # lm-eval's default


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task or group."""

    task: str
    metric: str  # acc, acc_norm, exact_match ...; p_correct: mean probability of the right choice
    filter: str  # how a generated answer was read; "none" for choices
    value: float  # 0..1
    stderr: float | None  # after Agresti and Coull where all items are right, or all wrong
    n_items: int
    n_total: int  # items that the task has
    shots: int
    group: bool  # a mean over other tasks, weighted by their items


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Scores of a task, of its subtasks and of their groups, and the items they were counted from."""

    scores: tuple[Score, ...]
    items: pd.DataFrame  # a row an item and filter; see `_items`


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
    preset = {name for group in TASKS.values() for name in group}
    return tuple(dict.fromkeys(task for name in names(tasks)
                               for task in ([name] if name in preset else _look_up(name))))  # fmt: skip


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


class Task:
    """A task or group of lm-eval's with its data; its requests are built once and asked of every format.

    Parameters
    ----------
    name
        A name that `check` returned.
    data_dir
        A folder laid out like the hub's dataset repositories, read instead of the hub.

    Raises
    ------
    InputError
        The data cannot be read or lack a split, or the task shows images, plays sounds or runs code.
    """

    def __init__(self, name: str, data_dir: Path | None = None) -> None:
        self.name = name
        self._lm_eval = _load(name, data_dir)
        self._parts: dict[str, Any] = self._lm_eval["tasks"]
        self.groups = {group: tuple(part.task_name for part in members.get_all_tasks())
                       for group, members in self._lm_eval["groups"].items()}  # fmt: skip
        self.sizes = {part: len(task.eval_docs) for part, task in self._parts.items()}
        self._built_limit: int | None = 0  # that requests were built for; 0 before any were
        self.data_sha256 = cache(self._data_sha256)

    @property
    def is_multiple_choice(self) -> bool:
        """Whether all items are choices."""
        return all(part.OUTPUT_TYPE == "multiple_choice" for part in self._parts.values())

    def n_items(self, limit: int | None) -> int:
        """Return how many items a limit takes, of all parts together; None takes all."""
        return sum(min(limit or size, size) for size in self.sizes.values())

    def _data_sha256(self, limit: int | None) -> str:
        """Return the hash of the documents that are asked about, and of those shown as examples."""
        digest = sha256()
        for name, part in self._parts.items():
            documents, has_examples = part.eval_docs, part.get_config("num_fewshot") and hasattr(part, "sampler")
            drawn = [(place, documents[place]) for place in draw(name, self.sizes[name], limit)]
            examples = list(part.sampler.df) if has_examples else []
            for content in (name, *drawn, *examples):
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
        """
        from lm_eval.evaluator import evaluate

        # lm-eval draws its progress bars whatever it is told, on standard error
        with contextlib.redirect_stderr(io.StringIO()), cached_templates(), wide_products(lm.device.type):
            self._build_requests(limit)
            # `simple_evaluate` would ask the system for its libraries each time, which takes a second
            results: Any = evaluate(lm, self._lm_eval, samples=self._draw(limit), bootstrap_iters=100)
        items = _items(results)
        return TaskResult(tuple(self._scores(results, items)), items)

    def _draw(self, limit: int | None) -> dict[str, list[int]] | None:
        """Return the items taken of each part; None takes all."""
        return {part: draw(part, size, limit) for part, size in self.sizes.items()} if limit else None

    def _build_requests(self, limit: int | None) -> None:
        """Build the requests, unless they are; clear the answers of the model before."""
        samples = self._draw(limit) or {}
        for name, part in self._parts.items():
            if self._built_limit != limit:
                part.set_fewshot_seed(seed=FEWSHOT_SEED)
                type(part).build_all_requests(part, samples=samples.get(name))
                part.build_all_requests = lambda **_: None  # lm-eval would build them again for every model
            for instance in part.instances:
                instance.resps, instance.filtered_resps = [], {}
        self._built_limit = limit

    def _scores(self, results: Mapping[str, Any], items: pd.DataFrame) -> Iterator[Score]:
        for task, metrics in results["results"].items():
            parts, shots = self.groups.get(task, (task,)), results["n-shot"].get(task)
            answered = items[items.task.isin(parts)]
            n_items = len(answered.drop_duplicates(["task", "doc_id"]))
            n_total = sum(self.sizes[part] for part in parts)
            score = partial(Score, task=task, n_items=n_items, n_total=n_total, group=task in self.groups,
                            shots=shots if isinstance(shots, int) else 0)  # fmt: skip
            for key, value in metrics.items():
                metric, _, filter_name = key.partition(",")
                if filter_name and not metric.endswith("_stderr") and isinstance(value, int | float):
                    stderr = _stderr(metric, value, metrics.get(f"{metric}_stderr,{filter_name}"), n_items)
                    yield score(metric=metric, filter=filter_name, value=float(value), stderr=stderr)
            p_correct = answered.reindex(columns=["p_correct"]).p_correct.dropna()
            if len(p_correct):
                stderr = float(p_correct.sem()) if len(p_correct) > 1 else None
                value = float(p_correct.mean())
                yield score(metric="p_correct", filter="none", value=value, stderr=stderr, n_items=len(p_correct))


def draw(name: str, count: int, limit: int | None) -> list[int]:
    """Return `limit` of a task's `count` items, ascending: the first of a random order that is the same everywhere."""
    order = sorted(range(count), key=lambda place: sha256(f"{name} {place}".encode()).digest())
    return sorted(order[:limit])


def _load(name: str, data_dir: Path | None) -> Any:
    """Return lm-eval's tasks and groups by name, with their data."""
    try:
        with reading_from(DATA / "tasks" if name in TASKS["sample"] else data_dir):
            loaded = _index_with(name).load([name])
    except Exception as error:  # whatever a task's loader raises, the data are what is missing
        text = scrub(str(error)) or type(error).__name__
        reason = f"it lacks the split or column {text}" if isinstance(error, KeyError) else text
        raise InputError(
            f"the data of task {name!r} could not be read from {data_dir or 'the hub'} ({reason}); "
            "check the network, give data_dir, or take tasks='sample'"
        ) from None  # the cause's own words may hold a signed address
    unsupported = ("MULTIMODAL", "UNSAFE_CODE")
    if any(getattr(part, attribute, False) for part in loaded["tasks"].values() for attribute in unsupported):
        raise InputError(f"task {name!r} shows images, plays sounds or runs a model's programs; leave it out")
    return loaded


# From lm-eval's results to scores and items


def _stderr(metric: str, value: float, stderr: Any, n_items: int) -> float | None:
    """Return a score's standard error; lm-eval's is 0, or none at all, where all items are right or all wrong."""
    is_number = isinstance(stderr, int | float) and math.isfinite(stderr)
    if value in (0, 1) and (is_number or metric in ("acc", "acc_norm", "exact_match")):
        return agresti_coull(round(value * n_items), n_items)
    return float(stderr) if is_number else None


def _items(results: Mapping[str, Any]) -> pd.DataFrame:
    """Return a row an item and filter: task, doc_id, filter, gold, picked, correct.

    Choices have correct_norm, and the log-likelihood and probability of each choice, with p_correct that of the right
    one. `picked` of a generation is its answer as the filter read it.
    """
    return pd.DataFrame([
        {"task": task, "doc_id": sample["doc_id"], "filter": sample["filter"], "gold": str(sample["target"]),
         **(_choice(sample) if "acc" in sample else {
             "picked": str(sample["filtered_resps"][0]), "correct": _is_correct(sample.get("exact_match"))})}
        for task, samples in results["samples"].items() for sample in samples
    ])  # fmt: skip


def _choice(sample: Mapping[str, Any]) -> dict[str, Any]:
    loglikelihoods = [float(response[0]) for response in sample["filtered_resps"]]
    largest = max(loglikelihoods)
    weights = [math.exp(value - largest) for value in loglikelihoods]
    probabilities = [weight / sum(weights) for weight in weights]
    gold = str(sample["target"])
    has_gold = gold.isdecimal() and int(gold) < len(probabilities)
    return {
        "picked": str(loglikelihoods.index(largest)),
        "correct": _is_correct(sample["acc"]),
        "correct_norm": bool(sample["acc_norm"]) if "acc_norm" in sample else None,
        "loglikelihoods": loglikelihoods,
        "probabilities": probabilities,
        "p_correct": probabilities[int(gold)] if has_gold else None,
    }


def _is_correct(score: Any) -> bool | None:
    """Return whether an item is right; None where a task gives it another score."""
    return bool(score) if score in (0, 1) else None
