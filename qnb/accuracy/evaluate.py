"""What every precision is asked: lm-eval's tasks, running text, and the same items in other batches.

Every precision answers the same items, and each answer is kept, so that any two can be paired afterwards.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm.auto import tqdm

from qnb.accuracy.perplexity import distances, summarize
from qnb.accuracy.tasks import SCORERS, Evaluator, check_minutes, moved, wide_products
from qnb.device import MIB
from qnb.errors import InputError
from qnb.ledger import fingerprint
from qnb.precision import BASELINE, PRECISIONS, Precision
from qnb.prompts import paragraphs
from qnb.quantize import checkpoint as model
from qnb.report import tables as table
from qnb.session import Count, Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FIRST_ROUND = {"cuda": 8, "cpu": 4}  # items a task, to learn a pace from; MMLU is 57 tasks
SAFE = 0.9  # of the time left that a round is planned for
WORTHWHILE = 1.5  # times as many items, or a round is not worth its time


class Asking(Workbench):
    """The stages of accuracy: tasks, drift between batchings, perplexity and divergence."""

    def accuracy(
        self,
        tasks: str | Iterable[str] = "auto",
        limit: Count = "auto",
        batch_size: Count = "auto",
        scorer: str = "qnb",
        minutes: float = 0,
    ) -> pd.DataFrame:
        """Evaluate every precision on every task; return a row a task, metric and precision.

        Parameters
        ----------
        tasks
            ``"sample"``, ``"paper"``, ``"auto"`` (the paper's with a GPU, else the sample) or names of lm-eval tasks.
        limit
            Items a task, the first of one fixed random order; ``"all"`` takes all.
        batch_size
            Rows a forward pass, where stock scoring is used.
        scorer
            ``"qnb"``, or ``"hf"`` for lm-eval's own.
        minutes
            A budget for all precisions and tasks together; 0 sets none. Then `limit` follows from it, the same for
            every precision, and what was given as `limit` is the most there may be (``"auto"`` is all).

        Raises
        ------
        InputError
            A task is unknown, its data cannot be read, a count is not positive, the model has no tokenizer, or its
            weights are random.
        """
        check_minutes(minutes)
        every = limit == "all" or (limit == "auto" and minutes > 0)
        most = None if every else self.count("limit", limit)
        evaluator = self._evaluator(tasks, most, self.count("batch_size", batch_size), scorer)
        if minutes:
            with self._alone():
                self._spend(evaluator, minutes)
        else:
            self._evaluate(evaluator)
        return self._measured(self.scores(), "accuracy")

    def _evaluator(
        self, tasks: str | Iterable[str], limit: int | None, batch_size: int, scorer: str = "qnb"
    ) -> Evaluator:
        """Return an evaluator whose tasks are known and whose model can be asked."""
        self.check_weights()
        if tasks == "auto":
            tasks = "sample" if self.device.kind == "cpu" else "paper"
        evaluator = Evaluator(tasks, limit, batch_size, self.data_dir, scorer, self.folder / "requests")
        _ = self.tokenizer  # a model without one ends this before a checkpoint is made
        return evaluator

    def _evaluate(self, evaluator: Evaluator, more: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Return a row a precision and task; what is missing is measured, and gets the fields `more` as well."""
        asked = {
            "limit": evaluator.limit or "all",
            "scorer": evaluator.scorer,
            "batch_size": evaluator.batch_size if evaluator.scorer == "hf" else None,
        }
        # data that cannot be read end this before a checkpoint is made; other data are another measurement
        data = {task: evaluator.asked(task).data_sha256 for task in evaluator.tasks}
        keys = {
            (precision.name, task): self._key("accuracy", precision, {**asked, "data": data[task]}, task=task)
            for precision in self.precisions
            for task in evaluator.tasks
        }
        with self._alone(), self._bar(len(keys), "accuracy") as bar:
            rows = {pair: row for pair, key in keys.items() if (row := self._scored(key))}
            bar.update(len(rows))
            for precision in self.precisions:
                todo = [task for task in evaluator.tasks if (precision.name, task) not in rows]

                def answer(
                    network: PreTrainedModel, _: float | None, name: str = precision.name, todo: list = todo
                ) -> None:
                    for task in todo:
                        bar.set_postfix_str(f"{name} {task}")
                        key, started = keys[name, task], perf_counter()
                        kept = self.folder / f"{_items_stem(key)}.answers"
                        if self.overwrite:
                            kept.unlink(missing_ok=True)
                        with self._failing(key, asked, f"{name} on {task}"):
                            result = evaluator.evaluate(network, self.tokenizer, task, kept)
                            file, sha256 = self._write(_items_stem(key), result.items)
                            values = {
                                "scores": [asdict(score) for score in result.scores],
                                "items_file": file,
                                "items_sha256": sha256,
                                "data_sha256": result.data_sha256,
                                "groups": result.groups,
                                "evaluate_s": perf_counter() - started,
                                **(more or {}),
                            }
                            rows[name, task] = self._append(key, asked, values)
                            kept.unlink(missing_ok=True)
                        bar.update()

                if todo:
                    with self._failing(keys[precision.name, todo[0]], asked, f"{precision.name}'s accuracy"):
                        self.on(precision, answer)
        return list(rows.values())

    def _spend(self, evaluator: Evaluator, minutes: float) -> None:
        """Evaluate rounds of more and more items, every precision the same ones, until the budget is spent.

        A round's pace says how many items the next may have; of few items each takes longer, so first guesses are low.
        The number of items is in the ledger before a round begins: an interrupted one goes on with it, and so do
        precisions that are added later.
        """
        tasks, cap = ", ".join(evaluator.tasks), evaluator.limit
        asked = {"minutes": minutes, "scorer": evaluator.scorer, "cap": cap or "all"}
        key = self._shared_key("budget", {**asked, "tasks": tasks}, task=tasks, setting=f"{minutes:g} min")
        sizes = {task: evaluator.asked(task).sizes for task in evaluator.tasks}
        largest = max(size for parts in sizes.values() for size in parts.values())
        cap = min(cap or largest, largest)
        first = {"limit": min(FIRST_ROUND[self.device.kind], cap), "spent_s": 0.0, "done": False}
        plan = self._decided(key) or self._append(key, asked, first)
        while True:
            started, limit = perf_counter(), int(plan["limit"])
            rows = self._evaluate(evaluator.limited(limit), {"minutes": minutes})
            if plan["done"] or len(rows) < len(self.precisions) * len(evaluator.tasks):
                return  # what failed has no pace: the round is asked again the next time
            spent_s = plan["spent_s"] + max(perf_counter() - started, sum(row["evaluate_s"] for row in rows))
            overhead_s = spent_s - plan["spent_s"] - sum(row["evaluate_s"] for row in rows)
            left_s = 60 * minutes - spent_s - overhead_s

            def cost_s(items: int, rows: list = rows, limit: int = limit) -> float:
                return sum(row["evaluate_s"] * _items_of(sizes[row["task"]], items)
                           / _items_of(sizes[row["task"]], limit) for row in rows)  # fmt: skip

            more = bisect_right(range(1, cap + 1), SAFE * left_s, key=cost_s)  # the most items that still fit
            if more < WORTHWHILE * limit:
                self._append(key, asked, {"limit": limit, "spent_s": spent_s, "done": True})
                return
            plan = self._append(key, asked, {"limit": more, "spent_s": spent_s, "done": False})

    def drift(self, tasks: str | Iterable[str] = "auto", limit: Count = "auto") -> pd.DataFrame:
        """Measure what a choice's score owes to its neighbours in a batch; return a row a precision and scorer.

        The same items are scored in the usual batches and each row alone, by this project's scorer and by lm-eval's.
        In 16 bit the difference is rounding; LLM.int8 chooses its outlier columns over the whole batch.

        Parameters
        ----------
        tasks
            As for `accuracy`; the first task of choices among them is asked, and nothing where there is none.
        limit
            Items of it.

        Raises
        ------
        InputError
            As for `accuracy`.
        """
        usual = self._evaluator(tasks, self.count("limit", limit, "sensitivity_limit"), 32)
        task = next((task for task in usual.tasks if usual.chooses(task)), None)
        if task is None:
            tqdm.write(f"no drift: tasks {tasks!r} names none of choices, such as sample_easy or arc_easy")
            return self.build("drift")
        asked = {"limit": usual.limit}
        with self._alone(), self._bar(len(self.precisions), "drift") as bar:
            for precision in self.precisions:
                keys = {name: self._key("drift", precision, asked, engine=name, task=task) for name in SCORERS}
                missing = [name for name, key in keys.items() if not self._find(key)]

                def compare(
                    network: PreTrainedModel, _: float | None, missing: list = missing, keys: dict = keys
                ) -> None:
                    for name in missing:
                        with self._failing(keys[name], asked, f"drift by scorer {name}"):
                            found = [
                                each.evaluate(network, self.tokenizer, task).items
                                for each in (usual.scored_by(name), usual.scored_by(name, alone=True))
                            ]
                            self._append(keys[name], asked, asdict(moved(*found)))

                bar.set_postfix_str(precision.name)
                if missing:
                    with self._failing(keys[missing[0]], asked, f"{precision.name}'s drift"):
                        self.on(precision, compare)
                bar.update()
        return self._measured(self._save("drift"), "drift")

    def divergence(self, prompts: str = "auto", ppl_tokens: Count = "auto", context: Count = "auto") -> pd.DataFrame:
        """Measure perplexity on running text, and how far each precision's predictions are from BF16's.

        Parameters
        ----------
        prompts
            ``"wikitext"`` (WikiText-2's test split), ``"sample"``, or ``"auto"``, as for `workload`.
        ppl_tokens
            Tokens taken from the text's beginning; ``"all"`` takes all.
        context
            Tokens in a window; it moves on by half of them.

        Raises
        ------
        InputError
            A count is not positive, the text cannot be had, the weights are random, or a window is longer than the
            model's.
        """
        from qnb.speed.engines import window

        most = None if ppl_tokens == "all" else self.count("ppl_tokens", ppl_tokens)
        width = self.count("context", context)
        self.check_weights()
        most_tokens = window(self.config) or width
        if width > most_tokens and context != "auto":
            raise InputError(f"context is {width}, and the model's window {most_tokens} tokens; give at most these")
        source = self._prompts(prompts)
        text = "\n\n".join(paragraphs(source, self.data_dir))
        ids = self.tokenizer(text, verbose=False)["input_ids"][:most]
        width = max(2, min(width, most_tokens, len(ids)))
        asked = {"text": source, "text_sha256": fingerprint({"ids": ids}), "tokens": len(ids), "context": width,
                 "stride": width // 2}  # fmt: skip
        with self._alone(), self._bar(len(self.precisions), "divergence") as bar:
            for precision in self.precisions:
                bar.set_postfix_str(precision.name)
                key = self._key("divergence", precision, asked)
                if not self._find(key):
                    with self._failing(key, asked, f"{precision.name}'s divergence"):
                        tokens = self.on(precision, partial(self._distances, precision, ids, width))
                        found = {name: asdict(estimate) for name, estimate in summarize(tokens).items()}
                        self._append(key, asked, {**found, **self._keep_tokens(key, tokens)})
                bar.update()
        return self._measured(self._save("divergence"), "divergence")

    def _keep_tokens(self, key: dict[str, Any], tokens: pd.DataFrame) -> dict[str, Any]:
        """Write a row's tokens; return what the row says of them. Nothing else of a divergence is ever on the disk."""
        name, sha256 = self._write(f"samples/divergence.{key['precision']}.{key['fingerprint']}", tokens)
        return {"samples": name, "samples_sha256": sha256, "disk_mib": (self.folder / name).stat().st_size / MIB}

    def _distances(
        self, precision: Precision, ids: list[int], context: int, network: PreTrainedModel, _: float | None
    ) -> pd.DataFrame:
        """Compare a loaded precision with BF16, loaded beside it."""
        base = PRECISIONS[BASELINE]
        baseline = None
        if precision != base:
            baseline = model.load(self.checkpoint(base, say=True), base, self.device.place)
        with model.quiet(), wide_products(self.device.kind):
            return distances(network, baseline, ids, context, context // 2)

    def check_weights(self) -> None:
        """Refuse a model of random weights, without fetching it.

        Raises
        ------
        InputError
            The model is a shape, or this study was made with one.
        """
        if self.model == model.SHAPE or self._record.get("random_weights"):
            raise InputError(
                f"model {self._record.get('name', self.model)} has random weights, so its accuracy means nothing; "
                "leave 02_accuracy out, or take smollm2-135m or a model from the hub"
            )

    def _scored(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return the row that answers, if its items are those it was counted from."""
        row = self._find(key)
        return row if row is not None and self.items(row) is not None else None

    def items(self, row: dict[str, Any]) -> pd.DataFrame | None:
        """Return every item that an accuracy row was counted from: gold, picked, correct, log-likelihoods.

        None where the file is gone or is not the one written then.
        """
        path = self.folder / items_name(row)
        if not path.exists() or model.file_sha256(path) != row["items_sha256"]:
            return None
        return pd.read_parquet(path)

    def beliefs(self, place: int = 0) -> pd.DataFrame:
        """Return one item of the first multiple-choice task as each precision sees it: the paper's p(y_i) a choice."""
        rows: dict[str, dict[str, Any]] = {}
        found = ((row, self.items(row)) for row in self.frame("accuracy").to_dict("records"))
        choices = [(row, items) for row, items in found if items is not None and "probabilities" in items]
        for row, items in choices:
            if row["task"] == choices[0][0]["task"]:
                item = items.iloc[place]
                shares = {f"p(choice {number})": share for number, share in enumerate(item.probabilities)}
                rows[row["precision"]] = {**shares, "picked": item.picked, "gold": item.gold}
        return pd.DataFrame(rows).T.infer_objects()

    def scores(self) -> pd.DataFrame:
        """Return a row a task, metric, filter and precision."""
        return table.scores(self.frame("accuracy"))

    def table1(self) -> pd.DataFrame:
        """Accuracy with standard errors, the aggregate, and the published values beside."""
        return self._save("table1_accuracy")

    def table2(self) -> pd.DataFrame:
        """Change against BF16 in points and relative, with a paired test, and the published values beside."""
        return self._save("table2_change")

    def _makers(self) -> dict[str, Callable[[], pd.DataFrame]]:
        return {
            **super()._makers(),
            "table1_accuracy": lambda: table.accuracy(self.scores()),
            "table2_change": lambda: table.change(self.frame("accuracy"), self.items),
            "divergence": lambda: table.divergence(self.frame("divergence")),
            "drift": lambda: table.drift(self.frame("drift")),
        }


def _items_of(sizes: Mapping[str, int], limit: int) -> int:
    """Return the items a task and its subtasks have with a limit each."""
    return sum(min(limit, size) for size in sizes.values())


def items_name(row: Mapping[str, Any]) -> str:
    """Return the file of an accuracy row's items, below the study's folder."""
    name = row.get("items_file")  # not told before version 0.9.0
    return name if isinstance(name, str) else f"{_items_stem(row)}.parquet"


def _items_stem(row: Mapping[str, Any]) -> str:
    return f"items/{row['task']}.{row['precision']}.{row['fingerprint']}"
