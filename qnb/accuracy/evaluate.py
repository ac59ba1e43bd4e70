"""The stages that ask tasks: how many items fit the minutes, accuracy, and how far a score depends on its batch.

Every format answers the same items, and each answer is kept, so that any two formats can be compared item by item.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from qnb.accuracy.allocation import Pace, allocate
from qnb.accuracy.answer_cache import kept_s
from qnb.accuracy.statistics import pack
from qnb.accuracy.tasks import LM_EVAL_SEED, SIZES, Task, TaskResult, check, names
from qnb.budget import Clock, name_left_out, now_s
from qnb.errors import check_choice
from qnb.ledger import Row, write_parquet
from qnb.memory import young_collections
from qnb.options import Count, check_count
from qnb.precision import Precision
from qnb.quantize.checkpoint import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qnb.session import Session

SCORERS = ("qnb", "hf")
# items of a task, to learn the pace from, at least one of each subtask; a GPU generates for many as fast as for few
FIRST_ITEMS, FIRST_GENERATED = {"cuda": 8, "cpu": 4}, {"cuda": 40, "cpu": 4}
GENERATED_SHARE = 0.4  # of the time, at most, for tasks whose answers are generated
GENERATED = "generated answers"  # as they are named where there is no time for them
REPLAYED_SHARE = 0.25  # of the time that a launched step takes, where a GPU replays a captured one
# items of a task of choices, and of one with subtasks, before any task gets more
LEAST_ITEMS, LEAST_GROUP_ITEMS = 500, 1000
STRETCH_SHARE = 0.2  # of the time, more of it where that buys all tasks their least items
PLANNED_SHARE = 0.95  # of the time left that a round is planned for
MIN_GROWTH = 1.5  # times as many items of a task, or all, or asking it again is not worth its time


@dataclass(frozen=True, slots=True)
class AccuracyOptions:
    """What `accuracy` asks; `batch_sensitivity` takes its first task of choices, and `limit` items of it.

    Parameters
    ----------
    tasks
        ``"sample"``, ``"paper"``, ``"auto"`` (the paper's on a GPU, else the sample) or names of lm-eval tasks.
    limit
        Items a task or subtask, the first of one fixed random order; ``"all"`` takes all. In a session with a budget
        of minutes it is the most there may be, and ``"auto"`` means all.
    batch_size
        Rows a forward pass in stock scoring.
    scorer
        ``"qnb"`` reads a context once for all its choices; ``"hf"`` is lm-eval's own.

    Raises
    ------
    InputError
        A value is not one of these.
    """

    tasks: str | Iterable[str] = "auto"
    limit: Count = "auto"
    batch_size: Count = "auto"
    scorer: str = "qnb"

    def __post_init__(self) -> None:
        names(self.tasks)
        check_count("limit", self.limit)
        check_count("batch_size", self.batch_size)
        check_choice("scorer", self.scorer, SCORERS)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What every format is asked, and how."""

    tasks: Sequence[Task]
    limits: Mapping[str, int | None]  # items of each task, or of each of its subtasks; None takes all
    scorer: str
    batch_size: int
    alone: bool = False  # every row in a batch of its own
    in_rounds: bool = False  # a model's answers to fewer items of a task are taken over

    def parameters(self, task: Task) -> dict[str, Any]:
        """Return what the answers to a task depend on, beside the model."""
        return {
            "limit": self.limits[task.name] or "all",
            "scorer": self.scorer,
            "batch_size": self.batch_size if self.scorer == "hf" else None,  # ours follows from the memory
            "data_sha256": task.data_sha256(self.limits[task.name]),
        }

    def evaluate(
        self, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers_path: Path | None = None
    ) -> TaskResult:
        """Score a model on a task; answers are kept in `answers_path` meanwhile, so that a killed task goes on."""
        import torch

        from qnb.accuracy.scorer import SharedContextLM, StockLM, encode

        torch.manual_seed(LM_EVAL_SEED)  # some tasks sample
        limit, before_s = self.limits[task.name], kept_s(answers_path)
        options: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer, "batch_size": self.batch_size}
        with quiet(), young_collections():
            if self.scorer == "qnb":
                encode(tokenizer, task.pairs(limit), task.encoded)  # so that no format's answers take longer for it
                options |= {"encoded": task.encoded, "answers_path": answers_path}
                options |= {"alone": self.alone, "in_rounds": self.in_rounds}
            lm = (SharedContextLM if self.scorer == "qnb" else StockLM)(**options)
            times_s = _answer_times_s(lm)
            return replace(task.evaluate(lm, limit), answer_s=before_s + sum(times_s))


def _answer_times_s(lm: Any) -> list[float]:
    """Let a model note how long it takes to answer each kind of lm-eval's requests; return the list that gets it."""
    times_s: list[float] = []

    def timed(answer: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        started_s = now_s()
        answers = answer(*arguments, **options)
        times_s.append(now_s() - started_s)
        return answers

    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, name, partial(timed, getattr(lm, name)))
    return times_s


# Accuracy


def accuracy(session: Session, options: AccuracyOptions) -> None:
    """Evaluate every format on every task; the ledger gets a row each, and a file of items.

    Raises
    ------
    InputError
        A task is unknown or its data cannot be read, the model has no tokenizer, or its weights are random.
    RuntimeError
        Nothing could be measured.
    """
    with session.exclusive("02") as clock:
        tasks = list(_load_tasks(session, options.tasks))
        limits = dict.fromkeys((task.name for task in tasks), _limit(session, options))
        evaluation = Evaluation(tasks, limits, options.scorer, session.count("batch_size", options.batch_size))
        if session.minutes:
            _spend_budget(session, evaluation, clock)
        else:
            _evaluate(session, evaluation)
            name_left_out(session, GENERATED, dict.fromkeys(limits, False))
    session.require("accuracy")


def _limit(session: Session, options: AccuracyOptions) -> int | None:
    """Return the items that are taken of a task or subtask; None takes all."""
    takes_all = options.limit == "all" or (options.limit == "auto" and session.minutes > 0)
    return None if takes_all else session.count("limit", options.limit)


def planned_items(session: Session, options: AccuracyOptions) -> list[int]:
    """Return how many items of each task are asked, of the tasks whose sizes are known without fetching them.

    A budget's are not known before the run: there are none then.
    """
    if session.minutes:
        return []
    limit = _limit(session, options)
    sizes = [SIZES[name] for name in names(wanted(session, options.tasks)) if name in SIZES]
    return [min(size, limit * parts) if limit else size for size, parts in sizes]


def wanted(session: Session, tasks: str | Iterable[str]) -> str | Iterable[str]:
    """Return the tasks; ``"auto"`` is the paper's on a GPU, else the sample."""
    return tasks if tasks != "auto" else "sample" if session.device.kind == "cpu" else "paper"


def _load_tasks(session: Session, tasks: str | Iterable[str]) -> Iterator[Task]:
    """Yield tasks with their data; what cannot be evaluated is refused here, before a checkpoint is made."""
    session.check_weights()
    checked = check(wanted(session, tasks))
    return (build(session, name) for name in checked)


def prepare(session: Session, name: str, options: AccuracyOptions) -> None:
    """Build a task, and build and encode all its requests, so that no format has to wait for them."""
    from qnb.accuracy.scorer import encode

    task, limit = build(session, name), _limit(session, options)
    task.data_sha256(limit)
    if options.scorer == "qnb":
        encode(session.tokenizer, task.pairs(limit), task.encoded)


def build(session: Session, name: str) -> Task:
    """Return a task with its data, which a session builds once."""
    if name not in session.tasks:
        session.tasks[name] = Task(name, session.data_dir, _window(session))
    return session.tasks[name]


def _window(session: Session) -> int:
    """Return the most tokens that lm-eval lets the model read: by its own rule, before there is a model."""
    from lm_eval.models.huggingface import HFLM

    rule: Any = HFLM.max_length
    model, default = SimpleNamespace(config=session.config), HFLM._DEFAULT_MAX_LENGTH
    lm = SimpleNamespace(model=model, tokenizer=session.tokenizer, _max_length=None, _DEFAULT_MAX_LENGTH=default)
    return int(rule.fget(lm))


def _evaluate(session: Session, evaluation: Evaluation) -> list[Row]:
    """Return a row a format and task; those that are missing are measured."""
    with session.progress(len(session.precisions) * len(evaluation.tasks), "accuracy") as bar:
        return [row for each in session.precisions for row in _evaluate_format(session, each, evaluation, bar)]


def _evaluate_format(session: Session, precision: Precision, evaluation: Evaluation, bar: tqdm) -> list[Row]:
    keys = {task: session.key("accuracy", precision, evaluation.parameters(task), task=task.name)
            for task in evaluation.tasks}  # fmt: skip
    rows = {task: row for task, key in keys.items() if (row := session.find(key))}
    bar.update(len(rows))
    missing = [task for task in evaluation.tasks if task not in rows]
    batches_count = precision.threshold or precision.origin  # LLM.int8, and what was made elsewhere may be that
    evaluation = replace(evaluation, in_rounds=evaluation.in_rounds and not batches_count)
    if missing:
        what = f"{precision.name}'s accuracy"
        with session.failing(keys[missing[0]], what), session.loaded(precision) as model:
            for task in missing:
                bar.set_postfix_str(f"{precision.name} {task.name}")
                with session.failing(keys[task], f"{what} on {task.name}"):
                    rows[task] = _measure(session, keys[task], model, precision, task, evaluation)
                bar.update()
    return list(rows.values())


def _answers_path(session: Session, precision: Precision, task: Task, evaluation: Evaluation) -> Path:
    """Return the file of a format's answers to a task, which all rounds share."""
    asked = {"scorer": evaluation.scorer} if evaluation.in_rounds else evaluation.parameters(task)
    key = session.key("accuracy", precision, asked, task=task.name)
    return session.folder / f"items/{task.name}.{precision.name}.{key['fingerprint']}.answers"


def _measure(
    session: Session, key: Mapping[str, Any], model: PreTrainedModel, precision: Precision, task: Task,
    evaluation: Evaluation,
) -> Row:  # fmt: skip
    answers_path = _answers_path(session, precision, task, evaluation)
    if session.overwrite and not evaluation.in_rounds:
        answers_path.unlink(missing_ok=True)
    result = evaluation.evaluate(task, model, session.tokenizer, answers_path)
    stem = f"items/{task.name}.{key['precision']}.{key['fingerprint']}"
    items_file, items_sha256 = write_parquet(session.folder, stem, pack(result.items))
    values = {
        "scores": [asdict(score) for score in result.scores],
        "groups": task.groups,
        "bad_items": result.bad_items,
        "items_file": items_file,
        "items_sha256": items_sha256,
        "evaluate_s": result.answer_s,
    }
    budget = {"minutes": session.minutes} if session.minutes else {}
    row = session.append(key, evaluation.parameters(task), values, budget)
    if not evaluation.in_rounds:
        answers_path.unlink(missing_ok=True)
    return row


# A time budget


def _spend_budget(session: Session, evaluation: Evaluation, clock: Clock) -> None:
    """Evaluate rounds of more and more items, the same for every format, until the time is spent.

    The pace of a round says how many items of each task the next may have. First all tasks of choices get their
    least items. Few items take longer each, so first guesses are low. A format that fails has no pace, and does not
    hold the others up. A GPU takes as long to generate a few answers as for many. Where even a few would take longer
    than their share, no generated task is asked. A round asks what earlier ones did not; LLM.int8 is asked all again,
    as its answers depend on what shares a batch.
    The numbers of items are in the ledger before a round begins: an interrupted round goes on with them, and so do
    formats that are added later. More minutes go on from there.
    """
    tasks, sizes = evaluation.tasks, {task.name: max(task.sizes.values()) for task in evaluation.tasks}
    most = {name: min(evaluation.limits[name] or size, size) for name, size in sizes.items()}
    key = session.key("budget", asked={"scorer": evaluation.scorer, "most": most}, task=", ".join(sizes))
    begun = [task for task in tasks if session.device.kind == "cpu" or not task.is_generated] or tasks
    first = {task.name: _first_limit(task, session.device.kind, most) for task in begun}
    # where every format is measured again, so is what fits
    named = {each.name for each in session.precisions}
    is_new = session.overwrite and named >= {row["precision"] for row in session.ledger.rows("accuracy")}
    row = (session.find if is_new else session.decided)(key) or {"limits": first, "growing": list(first)}
    plan: dict[str, Any] = {name: row.get(name, 0) for name in ("limits", "growing", "minutes", "done")}
    plan["step_s"] = row.get("step_s") or {}  # by format
    evaluation = replace(evaluation, in_rounds=True)
    files = {task.name: [_answers_path(session, each, task, evaluation) for each in session.precisions]
             for task in tasks}  # fmt: skip
    if session.overwrite or not plan["minutes"]:  # what is there is of another plan
        _remove(files)
    if session.minutes > plan["minutes"]:
        plan |= {"minutes": session.minutes, "done": False}
        session.append(key, plan)
    while True:
        before_s, asked = _kept_s(files), [task for task in tasks if task.name in plan["limits"]]
        started_s = now_s()
        rows = _evaluate(session, replace(evaluation, tasks=asked, limits=plan["limits"]))
        if rows and not plan["done"]:
            plan["step_s"] = _step_s(session.precisions, rows) | plan["step_s"]
            round_s = now_s() - started_s + sum(before_s[name] for name in plan["growing"])
            more = _next_round(tasks, most, plan, rows, round_s, _kept_s(files), clock)
            plan |= {"limits": {**plan["limits"], **more}, "growing": list(more), "done": not more}
            session.append(key, plan)
        if not rows:
            return  # where all failed there is no pace: the round is tried again on the next run
        if plan["done"]:
            _remove(files)
            return name_left_out(session, GENERATED, {task.name: task not in asked for task in tasks})


def _kept_s(files: Mapping[str, Sequence[Path]]) -> dict[str, float]:
    """Return how long the answers to each task took that are kept."""
    return {task: sum(map(kept_s, paths)) for task, paths in files.items()}


def _remove(files: Mapping[str, Sequence[Path]]) -> None:
    for path in chain.from_iterable(files.values()):
        path.unlink(missing_ok=True)


def _step_s(precisions: Sequence[Precision], rows: Sequence[Row]) -> dict[str, float]:
    """Return about how long a token of generated answers takes in each format: as long as its shortest task did.

    A GPU replays captured steps in less time. It cannot capture those of LLM.int8, which reads outliers back.
    """
    times_s = {each: [row["evaluate_s"] for row in rows if row["precision"] == each.name] for each in precisions}
    shares = {each: 1 if each.threshold else REPLAYED_SHARE for each in precisions}
    return {each.name: shares[each] * min(times) for each, times in times_s.items() if times}


def _next_round(
    tasks: Sequence[Task], most: Mapping[str, int], plan: Mapping[str, Any], rows: Sequence[Row], round_s: float,
    saved_s: Mapping[str, float], clock: Clock,
) -> dict[str, int]:  # fmt: skip
    """Return which tasks get how many items in the round after one that took `round_s`; none if there is no more.

    Both times include answers of earlier rounds: `round_s` those that this one took over, `saved_s` those that the
    next may, by task.

    First come generated answers, where there is time for them. Then tasks get more that are worth it, within
    `allocate`'s seconds; the others stay, at no cost.
    """
    evaluate_s = sum(row["evaluate_s"] for row in rows if row["task"] in plan["growing"])
    beside_s = max(0.0, round_s - evaluate_s)  # the next round takes as long; an interrupted one answered before
    generated = {task.name for task in tasks if task.is_generated}
    generated_s = sum(row["evaluate_s"] for row in rows if row["task"] in generated)
    share = 1.0 if len(generated) == len(tasks) else GENERATED_SHARE
    whole_s = clock.allowed_s + clock.taken_s
    seconds = PLANNED_SHARE * (clock.left_s - beside_s), share * whole_s - generated_s, STRETCH_SHARE * whole_s
    later = [task for task in tasks if task.name not in plan["limits"]]
    step_s = sum(plan["step_s"][name] for name in {row["precision"] for row in rows})
    if later and step_s * sum(task.new_tokens for task in later) <= min(seconds[:2]):
        return {task.name: _first_limit(task, "cuda", most) for task in later}
    limits, paces = plan["limits"], [_pace(task, most[task.name], rows, saved_s[task.name]) for task in tasks]
    growing = [pace for pace in paces if pace.item_s and limits[pace.task] < most[pace.task]]
    least = {name: min(MIN_GROWTH * limit, most[name]) for name, limit in limits.items()}
    while growing:
        items = allocate(growing, *seconds)
        more = {task.name: bisect_right(range(1, most[task.name] + 1), items[task.name], key=task.n_items)
                for task in tasks if task.name in items}  # fmt: skip
        worth_it = [pace for pace in growing if more[pace.task] >= least[pace.task]]
        if len(worth_it) == len(growing):
            return more
        growing = worth_it
    return {}


def _first_limit(task: Task, device_kind: str, most: Mapping[str, int]) -> int:
    items = (FIRST_GENERATED if task.is_generated else FIRST_ITEMS)[device_kind]
    return min(max(1, items // len(task.sizes)), most[task.name])


def _pace(task: Task, most: int, rows: Sequence[Row], saved_s: float) -> Pace:
    """Return what an item of a task costs and tells, from the task's rows; it costs 0 where there are none."""
    own = [row for row in rows if row["task"] == task.name]
    item_s = sum(row["evaluate_s"] / task.n_items(row["limit"]) for row in own)
    shares = [score for row in own for score in row["scores"] if score["task"] == task.name and score["unit"] == "%"]
    n_items = sum(score["n_items"] for score in shares)
    # few items may all be right, or all wrong
    share = (sum(score["value"] * score["n_items"] for score in shares) + 2) / (n_items + 4)
    deviation = math.sqrt(share * (1 - share))
    least = math.ceil((LEAST_GROUP_ITEMS if len(task.sizes) > 1 else LEAST_ITEMS) / len(task.sizes))
    n_least = 0 if task.is_generated else task.n_items(min(least, most))
    return Pace(task.name, task.n_items(most), item_s, deviation, task.is_generated, n_least, saved_s)


# What a score owes to its batch


def batch_sensitivity(session: Session, options: AccuracyOptions) -> None:
    """Score the same choices in the usual batches and one row at a time, by each scorer; the ledger gets a row each.

    In 16 bit the difference is rounding. LLM.int8 chooses its outlier columns over the whole batch. With a budget of
    minutes there are rows of the scorer in use alone: more items matter more.

    Raises
    ------
    InputError
        As for `accuracy`.
    RuntimeError
        Nothing could be measured.
    """
    task = next((task for task in _load_tasks(session, options.tasks) if task.is_multiple_choice), None)
    if task is None:
        tqdm.write(f"no batch sensitivity: tasks {options.tasks!r} name none of choices; sample_easy and arc_easy are")
        return
    limit = session.count("sensitivity_limit", options.limit)
    scorers = [options.scorer] if session.minutes else SCORERS
    with session.exclusive("02") as clock:
        for precision in session.each_format("batch sensitivity"):
            _compare_batchings(session, precision, task, limit, scorers, clock)
    session.require("batch_sensitivity")


def _compare_batchings(
    session: Session, precision: Precision, task: Task, limit: int, scorers: Sequence[str], clock: Clock
) -> None:
    asked = {"limit": limit, "data_sha256": task.data_sha256(limit)}
    keys = {scorer: session.key("batch_sensitivity", precision, asked, setting=scorer, task=task.name)
            for scorer in scorers}  # fmt: skip
    missing = [scorer for scorer, key in keys.items() if not session.find(key)]
    what = f"{precision.name}'s batch sensitivity"
    if missing and clock.left_s < 0:
        tqdm.write(f"no time is left for {what}")
    if not missing or clock.left_s < 0:
        return
    with session.failing(keys[missing[0]], what), session.loaded(precision) as model:
        for scorer in missing:
            with session.failing(keys[scorer], f"{what} by scorer {scorer}"):
                usual = Evaluation([task], {task.name: limit}, scorer, 32)
                alone = replace(usual, batch_size=1, alone=True)
                usual_items = usual.evaluate(task, model, session.tokenizer).items
                started_s = now_s()
                items = alone.evaluate(task, model, session.tokenizer).items
                alone_s = now_s() - started_s
                session.append(keys[scorer], asked, compare_items(usual_items, items), {"alone_s": alone_s})


def compare_items(usual: pd.DataFrame, alone: pd.DataFrame) -> dict[str, float | None]:
    """Compare the items of one task of choices, scored twice by one model and in the same order."""
    usual_share, alone_share = (frame.correct.astype(float).mean() for frame in (usual, alone))  # nan: no shares
    differences = np.abs(np.concatenate(usual.loglikelihoods) - np.concatenate(alone.loglikelihoods))  # (choices,)
    return {
        "n_items": len(usual),
        "n_choices": len(differences),
        "mean_abs_logprob_diff": float(differences.mean()),
        "max_abs_logprob_diff": float(differences.max()),
        "answers_changed": int((usual.picked != alone.picked).sum()),  # items whose likeliest choice differs
        "accuracy_change_pp": 100 * float(alone_share - usual_share) if usual_share == usual_share else None,
    }
