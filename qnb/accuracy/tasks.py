"""lm-evaluation-harness tasks -> scores with standard errors, and every item's answer.

A choice is scored by the log-likelihood of its text after the question; the model picks the largest. The softmax of
these over an item's choices is the paper's p(y_i), which moves before the picked choice does. LLM.int8 chooses its
outlier columns over the whole batch, so an INT8 score depends a little on what shares a batch.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pandas as pd

from qnb.accuracy.request_cache import Questions
from qnb.accuracy.statistics import agresti_coull
from qnb.device import cpu_types
from qnb.errors import InputError
from qnb.ledger import fingerprint
from qnb.precision import listed
from qnb.prompts import DATA
from qnb.quantize.checkpoint import cache as cache_folder
from qnb.quantize.checkpoint import quiet
from qnb.quantize.hub import scrub

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qnb.accuracy.scorer import Encoded

TASKS = {
    "sample": ("sample_easy", "sample_hard", "sample_completion", "sample_arithmetic", "sample_exam"),
    "paper": ("arc_challenge", "arc_easy", "gsm8k", "gsm8k_cot", "hellaswag", "mmlu"),
}

SCORERS = ("qnb", "hf")
FOLDERS = ("arc", "gsm8k", "hellaswag", "mmlu")  # of lm-eval's, that hold the paper's tasks


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task or group."""

    task: str
    metric: str  # acc, acc_norm, exact_match; p_correct: mean probability of the right choice
    filter: str  # how a generated answer was read; "none" for choices
    value: float  # 0..1
    stderr: float | None  # where all are right or all wrong, after Agresti and Coull
    items: int
    of: int  # items there are
    shots: int
    group: bool  # a weighted mean of other tasks


@dataclass(frozen=True, slots=True)
class Result:
    """Scores and items of one evaluated task, its subtasks and groups with it."""

    scores: tuple[Score, ...]
    items: pd.DataFrame  # a row an item and filter; see `_items`
    data_sha256: str  # of the documents that were asked about, and of those shown as examples
    groups: dict[str, tuple[str, ...]]  # the tasks in each group, those in its groups with them


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
    wanted = names(tasks)
    if set(wanted) <= {name for group in TASKS.values() for name in group}:
        return wanted
    for name in wanted:
        if name not in (known := _manager(name).all_tasks):
            near = get_close_matches(name, known, 3, 0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else "; `lm_eval ls tasks` lists them"
            raise InputError(f"task {name!r} is unknown to lm-eval{hint}")
    return tuple(dict.fromkeys(task for name in wanted for task in _tagged(name)))


def _tagged(name: str) -> tuple[str, ...]:
    """Return the tasks that a tag of lm-eval's is given to; a task's or group's name is itself."""
    index = _manager(name)
    return tuple(sorted(index.task_index[name].tags)) if name in index.all_tags else (name,)


def check_scorer(name: str) -> None:
    """Refuse a scorer that there is not.

    Raises
    ------
    InputError
        `name` is none of `SCORERS`.
    """
    if name not in SCORERS:
        raise InputError(f"scorer {name!r} is unknown; choose from {', '.join(SCORERS)}")


def check_minutes(minutes: float) -> None:
    """Refuse a time budget that is none.

    Raises
    ------
    InputError
        `minutes` is no number, or below 0.
    """
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 <= minutes < math.inf:
        raise InputError(f"minutes is {minutes!r}; give a number, or 0 for no budget")


def _manager(task: str) -> Any:
    """Return an index of lm-eval's tasks with `task` in it, if any has it: the smallest, for the whole takes long."""
    import lm_eval.tasks

    theirs = Path(lm_eval.tasks.__file__).parent
    for folders in ((DATA / "tasks",), tuple(theirs / name for name in FOLDERS)):
        if task in (index := _index(folders)).all_tasks:
            return index
    return _index((DATA / "tasks",), whole=True)


@cache
def _index(folders: tuple[Path, ...], whole: bool = False) -> Any:
    """Return lm-eval's index of the tasks in `folders`, or of its own as well."""
    with _hushed():
        from lm_eval.tasks import TaskManager

        present = [str(folder) for folder in folders if folder.is_dir()]
        return TaskManager(include_path=present, include_defaults=whole)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep lm-eval's and datasets' notices and bars out of the way for a while."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    from tqdm import tqdm

    from qnb.accuracy import scorer

    def hidden(*things: Any, **options: Any) -> tqdm:
        return tqdm(*things, **{**options, "disable": True})

    library = logging.getLogger("lm_eval")
    level, bars = library.level, datasets.are_progress_bars_disabled()
    library.setLevel(logging.CRITICAL)  # what it calls an error is a remark on being given a loaded model
    datasets.disable_progress_bars()
    # these draw bars whatever they are told
    drawing: tuple[Any, ...] = (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface, scorer)
    for module in drawing:
        module.tqdm = hidden
    try:
        yield
    finally:
        for module in drawing:
            module.tqdm = tqdm
        library.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _templates_read_once() -> Iterator[None]:
    """Keep lm-eval from parsing a task's template again for every item: of MMLU's preparation that is five sixths."""
    import lm_eval.utils

    environment = lm_eval.utils.env
    environment.from_string = cache(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # the class's own is there again


@contextlib.contextmanager
def _undigested() -> Iterator[None]:
    """Keep lm-eval from fingerprinting each item's document, prompt and target, which nothing here reads."""
    import lm_eval.evaluator

    module: Any = lm_eval.evaluator
    digest, form = module.hash_string, module.json
    module.hash_string, module.json = str, SimpleNamespace(dumps=lambda *_, **__: "")
    try:
        yield
    finally:
        module.hash_string, module.json = digest, form


@contextlib.contextmanager
def _swept_seldom() -> Iterator[None]:
    """Look for garbage in cycles seldom: a task makes a million objects to keep, and a look goes through all of them.

    What needs memory (`qnb.quantize.checkpoint.release`) looks by itself.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(20_000, 20, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


@contextlib.contextmanager
def wide_products(device: str) -> Iterator[None]:
    """On a CPU without units for a 16-bit type, form its products of many rows in float32 and round the result once.

    That is what a GPU's matrix unit does with 16-bit inputs, and five times faster there than PyTorch's own products
    (measured: float16 on AVX512 with units for bfloat16 alone, both on AVX2). bitsandbytes unpacks its 4-bit weights
    into the same `linear`, so all precisions gain.
    """
    import torch
    from torch.nn import functional

    slow = {torch.bfloat16, torch.float16} - {getattr(torch, name) for name in cpu_types()}
    if device != "cpu" or not slow:
        yield
        return
    native = functional.linear

    def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = input.numel() // input.shape[-1]
        if input.dtype not in slow or rows < 8:  # few rows: reading the weights is the cost
            return native(input, weight, bias)
        wide = native(input.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(input.dtype)

    functional.linear = linear
    try:
        yield
    finally:
        functional.linear = native


class Evaluator:
    """Evaluates models on tasks that are built once and shared by all precisions.

    Parameters
    ----------
    tasks
        As for `names`.
    limit
        Items a task (a subtask of a group), the first of one fixed random order; None takes all.
    batch_size
        Rows a forward pass, where stock scoring is used.
    data_dir
        A folder laid out like the hub's dataset repositories, read instead of the hub.
    scorer
        ``"qnb"`` reads a context once for all its choices (`qnb.accuracy.scorer`); ``"hf"`` is lm-eval's own.
    requests
        A folder in which what tasks ask is kept, tokenized, for later runs; see `qnb.accuracy.request_cache`.

    Raises
    ------
    InputError
        A task or the scorer is unknown, a count is not positive, or `data_dir` is no folder.
    """

    def __init__(
        self,
        tasks: str | Iterable[str],
        limit: int | None = None,
        batch_size: int = 8,
        data_dir: str | Path | None = None,
        scorer: str = "qnb",
        requests: Path | None = None,
    ) -> None:
        check_scorer(scorer)
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit}; give at least 1 item a task, or none to take all")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; give at least 1")
        if data_dir and not Path(data_dir).is_dir():
            raise InputError(f"data_dir {data_dir} is not a folder; give one laid out like the hub, or leave it empty")
        self.tasks = check(tasks)
        self.limit, self.batch_size, self.scorer = limit, batch_size, scorer
        self.data_dir = Path(data_dir).resolve() if data_dir else None
        self.requests, self.alone = requests, False
        self._built: dict[str, Any] = {}
        self._asked: dict[str, Questions] = {}
        self._encoded: Encoded = {}  # all precisions have one tokenizer

    def limited(self, limit: int | None) -> Evaluator:
        """Return an evaluator of another limit, with the tasks that are built already."""
        other = copy(self)
        other.limit, other._asked = limit, {}
        return other

    def scored_by(self, scorer: str, alone: bool = False) -> Evaluator:
        """Return an evaluator of another scorer, with the tasks built already; `alone`, with one row a batch."""
        other = copy(self)
        other.scorer, other.alone = scorer, alone
        other.batch_size = 1 if alone else self.batch_size
        return other

    def chooses(self, task: str) -> bool:
        """Return whether all of a task's items are choices."""
        return all(part.OUTPUT_TYPE == "multiple_choice" for part in self.build(task)["tasks"].values())

    @_swept_seldom()
    def build(self, task: str) -> dict[str, Any]:
        """Return lm-eval's tasks and groups by name, loaded; their data are read here, from the folder they are in.

        `datasets` takes a name such as ``allenai/ai2_arc`` for a folder where there is one below the working
        directory: that is how the built-in tasks and `data_dir` are found without touching the tasks.

        Raises
        ------
        InputError
            The task's data cannot be read, lack a split, or are not text alone; or it runs what a model writes.
        """
        if task not in self._built:
            folder = DATA / "tasks" if task in TASKS["sample"] else self.data_dir
            splits: dict[str, list[str]] = {}
            try:
                with _hushed(), _only_from(folder, splits):
                    loaded = _manager(task).load([task])
                    for name, part in loaded["tasks"].items():
                        _check_kind(name, part)
                        _hold(part)
            except InputError:
                raise
            except Exception as error:  # whatever a task's loader raises, the data is what is missing
                place = self.data_dir or "the hub"
                path, there = next(reversed(splits.items()), ("", []))
                if isinstance(error, KeyError) and there and error.args[0] not in there:
                    raise InputError(
                        f"task {task!r} needs the split {error.args[0]!r}, which {path} in {place} does not have "
                        f"(there: {', '.join(there)}); add it, read the hub instead, or leave the task out"
                    ) from None
                text = scrub(str(error)) or type(error).__name__
                raise InputError(
                    f"the data of task {task!r} could not be read from {place} ({text}); "
                    "check the network, give data_dir, or take tasks='sample'"
                ) from None  # the cause's own words may hold a signed address
            self._built[task] = loaded
        return self._built[task]

    def drawn(self, task: str) -> dict[str, list[int]] | None:
        """Return the items taken of `task` (of each of its subtasks), ascending; None where all are."""
        if self.limit is None:
            return None
        parts = self.build(task)["tasks"]
        return {name: sorted(draw(name, len(part.eval_docs), self.limit)) for name, part in parts.items()}

    def asked(self, task: str) -> Questions:
        """Return what is asked of every model for `task`.

        Raises
        ------
        InputError
            As for `build`.
        """
        if task not in self._asked:
            self._asked[task] = Questions(self.build(task)["tasks"], self.drawn(task))
        return self._asked[task]

    @_swept_seldom()
    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: str,
        kept: str | Path | None = None,
    ) -> Result:
        """Score `model` on one task, with the shots and metrics the task itself defines.

        Parameters
        ----------
        model, tokenizer
            What is scored.
        task
            One of `tasks`.
        kept
            A file in which answers are kept while they are given, and found again by a later call.

        Raises
        ------
        InputError
            As for `build`.
        """
        asked, loaded = self.asked(task), self.build(task)
        with _hushed(), quiet(), _templates_read_once(), _undigested(), wide_products(model.device.type):
            from lm_eval.evaluator import evaluate

            lm = self._lm(model, tokenizer, kept)
            asked.prepare(lm, self.requests if self.scorer == "qnb" else None, task)
            # `simple_evaluate` would ask the system for its libraries each time, which takes a second
            results = evaluate(lm, loaded, samples=asked.samples, bootstrap_iters=100, log_samples=True)
        assert task in results["results"], f"asked for {task}, lm-eval answered {list(results['results'])}"
        items = _items(results)
        scores = (*_scores(results, asked.sizes), *_beliefs(results, items, asked.sizes))
        groups = {name: tuple(_leaves(results, name)) for name in results.get("group_subtasks", {})}
        return Result(scores, items, asked.data_sha256, groups)

    def _lm(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kept: str | Path | None) -> Any:
        options: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer, "batch_size": self.batch_size}
        if self.scorer == "hf":
            from lm_eval.models.huggingface import HFLM

            return HFLM(**options)
        from qnb.accuracy.scorer import SharedContextLM

        return SharedContextLM(**options, encoded=self._encoded, kept=kept, alone=self.alone)


def draw(name: str, count: int, limit: int) -> list[int]:
    """Return `limit` of `count` items of a task in its random order, the same everywhere; more hold fewer."""
    order = sorted(range(count), key=lambda place: sha256(f"{name} {place}".encode()).digest())
    return order[:limit]


def _check_kind(name: str, task: Any) -> None:
    """Refuse what cannot be asked here, before a model is made for it."""
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"task {name!r} shows images or plays sounds, which is not done here; leave it out")
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"task {name!r} runs the programs a model writes, which is not done here; leave it out")


def _hold(task: Any) -> None:
    """Read a task's documents once: lm-eval reads, and some tasks rewrite, all of them each time it looks.

    Also where it is seen that a split is missing.
    """
    documents = list(task.eval_docs)
    setattr(task, "test_docs" if task.has_test_docs() else "validation_docs", lambda: documents)
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)  # as lm-eval's `simple_evaluate` does


def _stamp(folder: str) -> str:
    """Return what changes when a file below `folder` does: names, sizes, times."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return fingerprint({"folder": Path(folder).resolve(), "files": [
        (path, path.stat().st_size, path.stat().st_mtime_ns) for path in files
    ]})  # fmt: skip


@contextlib.contextmanager
def _only_from(folder: Path | None, splits: dict[str, list[str]] | None = None) -> Iterator[None]:
    """Let `datasets` read from `folder` alone, where one is given: what is not there is not looked for on the hub.

    The splits of what is read are written into `splits`, by path.
    """
    import datasets

    load, card = datasets.load_dataset, datasets.load.DatasetCard
    stamps = cache(_stamp)  # MMLU's is asked for 57 times, as is its card, which takes longer to read than its data

    def load_here(path: str, *arguments: Any, **options: Any) -> Any:
        if folder and "/" in path:
            if not Path(path).is_dir():
                raise FileNotFoundError(f"no folder {path} there")
            # by itself it knows a folder by its name, and gives what was in it the first time
            options["cache_dir"] = str(cache_folder() / "datasets" / stamps(path))
        found = load(path, *arguments, **options)
        if splits is not None and isinstance(found, dict):
            splits[path] = list(found)
        return found

    datasets.load_dataset, card.load = load_here, cache(card.load)
    try:
        with contextlib.chdir(folder or Path.cwd()):
            yield
    finally:
        datasets.load_dataset = load
        del card.load  # the one of all cards is there again


def _leaves(results: dict[str, Any], task: str) -> Iterator[str]:
    """Yield a task itself, or the tasks in a group and in its groups."""
    members = results.get("group_subtasks", {}).get(task, [])
    if not members:
        yield task
    for member in members:
        yield from _leaves(results, member)


def _scores(results: dict[str, Any], sizes: Mapping[str, int]) -> Iterator[Score]:
    groups = set(results.get("groups", {}))
    counts = {name: len(samples) for name, samples in _by_item(results).items()}

    def size(task: str) -> int:
        return sum(counts[name] for name in _leaves(results, task))

    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter_name}")
            known = isinstance(stderr, int | float) and math.isfinite(stderr)
            if value in (0, 1) and (known or metric in ("acc", "acc_norm", "exact_match")):
                stderr, known = agresti_coull(round(value * size(task)), size(task)), True
            shots = results.get("n-shot", {}).get(task, 0)
            yield Score(
                task=task,
                metric=metric,
                filter=filter_name,
                value=float(value),
                stderr=float(stderr) if known else None,
                items=size(task),
                of=sum(sizes[name] for name in _leaves(results, task)),
                shots=int(shots) if isinstance(shots, int) else 0,
                group=task in groups,
            )


def _beliefs(results: dict[str, Any], items: pd.DataFrame, sizes: Mapping[str, int]) -> Iterator[Score]:
    """Yield the mean probability of the right choice, a task and group of choices."""
    if "probabilities" not in items:
        return
    shares = items.dropna(subset="p_correct")
    members, shots = results.get("group_subtasks", {}), results.get("n-shot", {})
    for task in results["results"]:
        leaves = set(_leaves(results, task))
        values = shares[shares.task.isin(leaves)].p_correct
        if len(values):
            error = float(values.sem()) if len(values) > 1 else None
            count = shots.get(task, 0)
            of = sum(sizes[name] for name in leaves)
            yield Score(task, "p_correct", "none", float(values.mean()), error, len(values), of,
                        count if isinstance(count, int) else 0, bool(members.get(task)))  # fmt: skip


def _by_item(results: dict[str, Any]) -> dict[str, set[int]]:
    return {name: {sample["doc_id"] for sample in samples} for name, samples in results["samples"].items()}


@dataclass(frozen=True, slots=True)
class Drift:
    """How far scores of the same choices moved between two batchings."""

    items: int
    choices: int
    mean_abs_logprob_diff: float  # of the differences' sizes
    max_abs_logprob_diff: float
    answers_changed: int  # items whose likeliest choice is another
    accuracy_change_pp: float


def moved(usual: pd.DataFrame, alone: pd.DataFrame) -> Drift:
    """Compare the items of one task of choices, scored twice by one model."""
    both = usual.merge(alone, on=["task", "doc_id", "filter"], suffixes=("", "_alone"), validate="one_to_one")
    assert len(both) == len(usual) == len(alone)
    pairs = zip(both.loglikelihoods, both.loglikelihoods_alone, strict=True)
    gaps = [abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True)]
    return Drift(
        items=len(both),
        choices=len(gaps),
        mean_abs_logprob_diff=sum(gaps) / len(gaps),
        max_abs_logprob_diff=max(gaps),
        answers_changed=int((both.picked != both.picked_alone).sum()),
        accuracy_change_pp=100 * float(both.correct_alone.mean() - both.correct.mean()),
    )


def _items(results: dict[str, Any]) -> pd.DataFrame:
    """Return a row an item (and filter): task, doc_id, filter, gold, picked, correct, and for choices the
    log-likelihood and probability of each, for generations the answer as it was read.
    """
    rows: list[dict[str, Any]] = []
    for task, samples in results["samples"].items():
        for sample in samples:
            row: dict[str, Any] = {"task": task, "doc_id": sample["doc_id"], "filter": sample["filter"]}
            if "acc" in sample:
                likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
                top = max(likelihoods)
                weights = [math.exp(value - top) for value in likelihoods]
                shares = [weight / sum(weights) for weight in weights]
                gold = str(sample["target"])
                known = gold.isdecimal() and int(gold) < len(shares)
                row |= {
                    "gold": gold,
                    "picked": str(likelihoods.index(top)),
                    "correct": bool(sample["acc"]) if sample["acc"] in (0, 1) else None,  # some tasks give a share
                    "correct_norm": bool(sample["acc_norm"]) if "acc_norm" in sample else None,
                    "loglikelihoods": likelihoods,
                    "probabilities": shares,
                    "p_correct": shares[int(gold)] if known else None,
                }
            else:
                row |= {
                    "gold": str(sample["target"]),
                    "picked": str(sample["filtered_resps"][0]),
                    "correct": bool(right) if (right := sample.get("exact_match")) in (0, 1) else None,  # other scores
                }
            rows.append(row)
    return pd.DataFrame(rows)
