"""One model across precisions: the only thing a notebook holds.

Every stage asks the ledger first and measures what is missing; a checkpoint that a stage needs and does not find is
made. Precisions take turns within a repeat, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from inspect import signature
from itertools import count, cycle, islice, pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from qnb import __version__, cause, colab, device, hub, model, table
from qnb.accuracy import SCORERS, Evaluator, check_minutes, moved, wide_products
from qnb.batch import is_out_of_memory
from qnb.batch import sweep as batch_sizes
from qnb.device import MIB
from qnb.divergence import distances, summarize
from qnb.error import InputError
from qnb.ledger import FAILED, Ledger, checked, fingerprint, unchecked
from qnb.model import Source
from qnb.monitor import sensor
from qnb.precision import BASELINE, PRECISIONS, Precision, parse
from qnb.provenance import ROOT, command, commit
from qnb.results import Results, medians, readings
from qnb.workload import Workload, paragraphs
from qnb.workload import load as load_workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qnb.benchmark import Limits, Run

Result = TypeVar("Result")
Count = int | str  # a number, or "auto": what the device allows in minutes
AUTO: dict[str, dict[str, int]] = {
    "cuda": {"bs1_requests": 20, "maxbatch_requests": 512, "prompt_tokens": 128, "new_tokens": 100, "limit": 200,
             "batch_size": 32, "max_batch": 512, "memory_mib": 0, "text_tokens": 65536, "context": 512,
             "sweep_batch": 256, "drift_limit": 100},
    "cpu": {"bs1_requests": 4, "maxbatch_requests": 16, "prompt_tokens": 32, "new_tokens": 8, "limit": 12,
            "batch_size": 8, "max_batch": 16, "memory_mib": 400, "text_tokens": 1024, "context": 128,
            "sweep_batch": 0, "drift_limit": 4},  # no sweep
}  # fmt: skip

FIRST_ROUND = {"cuda": 32, "cpu": 4}  # items a task, to learn a pace from
SAFE = 0.9  # of the time left that a round is planned for
WORTHWHILE = 1.5  # times as many items, or a round is not worth its time


def locate(output: str | Path) -> Path:
    """Return the study's folder: a relative path is taken from the checkout, or from where one is if there is none.

    So the five notebooks meet in one folder, from whichever folder each is opened. ``drive:name`` is a folder of the
    user's Google Drive, on Colab.
    """
    if str(output).startswith(colab.DRIVE):
        return colab.folder(str(output))
    path = Path(output).expanduser()
    base = ROOT if (ROOT / "notebooks").is_dir() else Path.cwd()
    return path if path.is_absolute() else base / path


class Study:
    """A model, precisions, and the folder in which everything measured of them lies.

    Parameters
    ----------
    model
        ``auto``, ``smollm2-135m``, ``shape:llama-3.2-1b``, a hub id or a local folder; see `qnb.model.resolve`.
    precisions
        Names separated by commas; ``"study"`` is bf16, fp16, int8, int4, nf4.
    output
        The study's folder, relative to the checkout; on Colab ``drive:name`` is one on Google Drive.
    data_dir
        A folder laid out like the hub's dataset repositories; empty reads the hub.
    seed
        Decides which prompts are drawn, and their order.
    overwrite
        Measure again what is there already.

    Raises
    ------
    InputError
        A precision or model is unknown, `output` cannot be written or holds another model's study, or `data_dir` is
        no folder.
    """

    def __init__(
        self,
        model: str = "auto",
        precisions: str | Iterable[str] = "study",
        output: str | Path = "outputs/demo",
        data_dir: str | Path = "",
        seed: int = 0,
        overwrite: bool = False,
    ) -> None:
        kinds = {"model": (model, str), "output": (output, str | Path), "precisions": (precisions, str | list | tuple)}
        for name, (value, kind) in kinds.items():
            if not value or not isinstance(value, kind):
                raise InputError(f"{name} is {value!r}; give a name")
        if not isinstance(data_dir, str | Path) or "\0" in f"{output}{data_dir}{model}":
            raise InputError(f"output is {str(output)!r} and data_dir {data_dir!r}; give folders, or no data_dir")
        if not isinstance(overwrite, bool) or isinstance(seed, bool) or not isinstance(seed, int):
            raise InputError(f"overwrite is {overwrite!r} and seed {seed!r}; give true or false, and a whole number")
        self.precisions = parse(precisions)
        self.folder = locate(output)
        self.data_dir = Path(data_dir).expanduser().resolve() if str(data_dir) else None
        self.seed, self.overwrite = seed, overwrite
        self._settled = False  # whether the libraries have made what they make at their first use
        self._made: set[str] = set()  # checkpoints made by this object: overwriting makes each once
        self._sound: dict[Path, str] = {}  # checkpoints read whole and found unchanged, by their stamp then
        self._lock = FileLock(self.folder / ".lock")
        self._read: tuple[int, Results] | None = None  # the ledger's bytes, and what was read from them
        if self.data_dir and not self.data_dir.is_dir():
            raise InputError(f"data_dir {data_dir} is not a folder; give one laid out like the hub, or leave it empty")
        self.ledger = Ledger(self.folder)
        parent = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        if not os.access(parent, os.W_OK):
            raise InputError(f"output {self.folder} cannot be written (no right to write in {parent}); give another")
        self.model = model
        self._check_model()

    def _check_model(self) -> None:
        record = self._record
        name = str(record.get("name"))
        known = {record.get("asked"), name, name.partition("@")[0]}
        if record and self.model not in known | {"auto"}:
            raise InputError(
                f"output {self.folder} holds a study of {record['name']}, not of {self.model}; give another output "
                "folder, or remove this one"
            )
        model.check(self.model)

    @property
    def _record(self) -> dict[str, Any]:
        path = self.folder / "study.json"
        if not path.exists():
            return {}
        try:
            return dict(json.loads(unchecked(path.read_bytes())))
        except ValueError as error:
            raise InputError(
                f"{path} was changed since it was written; remove it (what is measured stays) or give another output"
            ) from error

    @cached_property
    def device(self) -> device.Device:
        """The device everything is measured on."""
        return device.detect()

    @cached_property
    def source(self) -> Source:
        """The model as released; fetched on first use and then remembered in study.json."""
        record = self._record
        if record and Path(record["path"]).is_dir() and model.stamp(Path(record["path"])) == record.get("stamp"):
            return Source(**{name: record[name] for name in Source.__slots__})
        source = model.resolve(record.get("name", self.model), self.device.kind)
        if record.get("fingerprint", source.fingerprint) != source.fingerprint:
            raise InputError(
                f"model {source.name} is not the one that output {self.folder} was measured with (its weights have "
                "changed since); give another output folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / "study.json.draft"
        facts = {"asked": record.get("asked", self.model), **asdict(source), "stamp": model.stamp(Path(source.path))}
        draft.write_bytes(checked({**facts, **self._context}))
        draft.replace(self.folder / "study.json")
        return source

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, padding on the left; every checkpoint has the same."""
        return model.load_tokenizer(self.source.path)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that decide what is measured."""
        return {"qnb": __version__, **device.versions()}

    def card(self) -> pd.DataFrame:
        """Return the study's card: what is measured, on what, with what, and what is done already."""
        here, done = self.device, self.ledger.stages()
        known = self._record or asdict(self.source)  # a study that was copied here shows without its model
        facts = {
            "model": f"{known['name']} ({known['why']})",
            "weights": f"fingerprint {known['fingerprint']}" + (", random" if known["random_weights"] else ""),
            "precisions": ", ".join(precision.name for precision in self.precisions),
            "device": f"{here.name}, {here.memory_mib / 1024:.1f} GiB"
            + (f", driver {here.driver}" if here.driver else ""),
            "bfloat16": here.bf16,
            "versions": ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            "output": str(self.folder),
            "already measured": ", ".join(f"{count} {stage} rows" for stage, count in done.items()) or "nothing",
        }
        return pd.DataFrame({"": facts})

    def count(self, name: str, value: Count, auto: str = "") -> int:
        """Return a count as a number: what was given, or for ``"auto"`` what suits the device.

        Raises
        ------
        InputError
            `value` is neither ``"auto"`` nor a whole number of at least 1.
        """
        if value == "auto" and (auto or name) in (known := AUTO[self.device.kind]):
            return known[auto or name]
        if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
            raise InputError(f"{name} is {value!r}; give a whole number of at least 1, or 'auto'")
        return int(value)

    # What is asked and found is not measured again.

    def _key(self, stage: str, precision: Precision, asked: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Return a row's key and fingerprint: weights, precision, parameters, versions, device."""
        parts = {
            "weights": self.source.fingerprint,
            "quantization": precision.quantization,
            "dtype": precision.dtype,
            "device": self.device.name,
            "versions": self.versions,
            "asked": asked,
        }
        return {"stage": stage, "precision": precision.name, **more, "fingerprint": fingerprint(parts)}

    def _find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        return None if self.overwrite else self.ledger.find(**key)

    @cached_property
    def _context(self) -> dict[str, Any]:
        """What every row says of where it comes from."""
        return {
            "device": self.device.name,
            "driver": self.device.driver,
            "bf16": self.device.bf16,
            "versions": self.versions,
            "seed": self.seed,
            "command": command(),
            "commit": commit(),
        }

    def _append(self, key: dict[str, Any], asked: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        source = {"model": self.source.name, "picked": self.source.why, "weights": self.source.fingerprint}
        return self.ledger.append({**key, **asked, **values, **source, **self._context})

    @contextmanager
    def _failing(self, key: dict[str, Any], asked: dict[str, Any], measured: str) -> Iterator[None]:
        """Keep a measurement that cannot be made as failed, with its reason, say so, and go on with the others.

        It is tried again when it is asked for again. Input that cannot be used and a disk that cannot be written to
        end the stage: they would fail the others too.
        """
        try:
            yield
        except (InputError, OSError):
            raise
        except Exception as error:  # whatever a library raises over one model, the other precisions are measured
            text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            reason = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {text}"
            self._append({**key, "stage": key["stage"] + FAILED}, asked, {"reason": reason, "detail": text})
            tqdm.write(f"{measured} could not be measured ({reason}); kept as failed, asked again the next time")

    def _measured(self, frame: pd.DataFrame, stage: str) -> pd.DataFrame:
        """Return `frame`, or raise what stood against it where nothing of a stage could be measured."""
        failed = [row for row in self.ledger.failures() if row["stage"] == stage + FAILED]
        if frame.empty and failed:
            raise RuntimeError(f"nothing of stage {stage} could be measured: {failed[-1]['reason']}")
        return frame

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Measure while no other process measures into the same folder; wait for one that does, and say so."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0.5)
        except Timeout:
            tqdm.write(f"another process is measuring into {self.folder}; waiting for it")
            self._lock.acquire(poll_interval=0.5)
        try:
            yield
        finally:
            self._lock.release()

    def _bar(self, total: int, what: str) -> tqdm:
        return tqdm(total=total, desc=what, unit="step", leave=False)

    # 01: checkpoints

    def quantize(self) -> pd.DataFrame:
        """Make, save, reload and prove every precision's checkpoint; return a row each.

        Raises
        ------
        InputError
            The model cannot be had.
        """
        with self._alone(), self._bar(len(self.precisions), "quantize") as bar:
            for precision in self.precisions:
                bar.set_postfix_str(precision.name)
                with self._failing(self._key("quantize", precision, {}), {}, f"{precision.name}'s checkpoint"):
                    self.checkpoint(precision)
                bar.update()
        return self._measured(self.frame("quantize"), "quantize")

    def push(self, push_to: str, private: bool = True, dry_run: bool = True) -> pd.DataFrame:
        """Upload every precision's checkpoint to the hub, or show what would be; return a row each, kept in push.csv.

        Parameters
        ----------
        push_to
            A hub name such as ``you/llama-3.2-1b``; each checkpoint goes to ``<push_to>-<precision>``. Empty: none.
        private
            Whether the repositories are private.
        dry_run
            Upload nothing; needs neither token nor network.

        Raises
        ------
        InputError
            The model cannot be had, or the push is refused.
        """
        rows = []
        columns = ["precision", *hub.Push.__slots__]
        if not push_to:
            return pd.DataFrame(columns=columns)
        hub.check_push(push_to, dry_run)
        with self._alone(), self._bar(len(self.precisions), "push") as bar:
            for precision in self.precisions:
                bar.set_postfix_str(precision.name)
                with self._failing(self._key("quantize", precision, {}), {}, f"{precision.name}'s checkpoint"):
                    sent = hub.push(self.checkpoint(precision), f"{push_to}-{precision.name}", private, dry_run)
                    rows.append({"precision": precision.name, **asdict(sent), "files": " ".join(sent.files)})
                bar.update()
        frame = pd.DataFrame(rows, columns=columns)
        frame.to_csv(self.folder / "push.csv", index=False)
        return frame

    def checkpoint(self, precision: Precision, say: bool = False) -> Path:
        """Return the folder of a precision's checkpoint, made now if it is not there."""
        folder = self.folder / "checkpoints" / precision.name
        key = self._key("quantize", precision, {})
        row = self.ledger.find(**key)
        there = row is not None and folder.exists()
        wrong = self._damage(folder, row) if row is not None and there else ""
        renew = self.overwrite and precision.name not in self._made
        if there and not wrong and not renew:
            return folder
        self._made.add(precision.name)
        if wrong:
            tqdm.write(f"{precision.name}: {wrong} in {folder} is not as it was saved, making the checkpoint again")
        elif say and not folder.exists():
            tqdm.write(f"{precision.name}: no checkpoint in {folder.parent} yet, making it")
        made = model.convert(self.source, precision, folder, self.device.kind)
        manifest = model.file_sha256(folder / "manifest.json")
        values = {**asdict(made), "weights_mib": made.weights_mib, "bits": precision.bits, "manifest_sha256": manifest}
        self._append(key, {}, {name: value for name, value in values.items() if name != "precision"})
        return folder

    def _damage(self, folder: Path, row: dict[str, Any]) -> str:
        """Return the first file of a checkpoint that is not as its row and manifest say; its bytes are read once."""
        stamp = model.stamp(folder)
        if self._sound.get(folder) != stamp:
            try:
                sealed = model.file_sha256(folder / "manifest.json") == row["manifest_sha256"]
            except OSError:
                sealed = False
            if wrong := model.damage(folder) if sealed else "manifest.json":
                return wrong
            self._sound[folder] = stamp
        return ""

    def on(self, precision: Precision, measure: Callable[[PreTrainedModel, float], Result]) -> Result:
        """Load a precision's checkpoint, measure it, and give its memory back.

        `measure` is called with the model, and the memory in MiB in use before it was loaded. It must not keep the
        model: the next precision needs the room.
        """
        folder = self.checkpoint(precision, say=True)
        model.release()
        baseline_mib = sensor(self.device.kind).sample().get("memory_mib", 0.0)
        network = model.load(folder, precision, self.device.kind)
        try:
            return measure(network, baseline_mib)
        finally:
            del network
            model.release()

    def _settle(self, precision: Precision) -> None:
        """Once, load a model for nothing: what the libraries allocate at their first use is no precision's memory."""
        if self._settled or self.device.kind != "cpu":
            return
        from qnb.decode import Eager

        self._settled = True
        network = model.load(self.checkpoint(precision, say=True), precision, self.device.kind)
        with model.quiet():
            Eager(network).generate([[1, 2, 3, 4]], 2)

    # 02: accuracy

    def accuracy(
        self,
        tasks: str = "auto",
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
            self._spend(evaluator, minutes)
        else:
            self._evaluate(evaluator)
        return self._measured(self.scores(), "accuracy")

    def _evaluator(self, tasks: str, limit: int | None, batch_size: int, scorer: str = "qnb") -> Evaluator:
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
        keys = {
            (precision.name, task): self._key("accuracy", precision, asked, task=task)
            for precision in self.precisions
            for task in evaluator.tasks
        }
        rows = {pair: row for pair, key in keys.items() if (row := self._scored(key))}
        for task in {task for name, task in keys if (name, task) not in rows}:
            evaluator.asked(task)  # data that cannot be read end this before a checkpoint is made
        with self._alone(), self._bar(len(keys), "accuracy") as bar:
            bar.update(len(rows))
            for precision in self.precisions:
                todo = [task for task in evaluator.tasks if (precision.name, task) not in rows]

                def answer(network: PreTrainedModel, _: float, name: str = precision.name, todo: list = todo) -> None:
                    for task in todo:
                        bar.set_postfix_str(f"{name} {task}")
                        key, started = keys[name, task], perf_counter()
                        kept = self._items_path(key).with_suffix(".answers")
                        with self._failing(key, asked, f"{name} on {task}"):
                            result = evaluator.evaluate(network, self.tokenizer, task, kept)
                            values = {
                                "scores": [asdict(score) for score in result.scores],
                                "items_sha256": self._write(self._items_path(key), result.items),
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
        parts = {"weights": self.source.fingerprint, "device": self.device.name, "versions": self.versions}
        key = {"stage": "budget", "task": tasks, "setting": f"{minutes:g} min",
               "fingerprint": fingerprint({**parts, **asked, "tasks": tasks})}  # fmt: skip
        sizes = {task: evaluator.asked(task).sizes for task in evaluator.tasks}
        largest = max(size for parts in sizes.values() for size in parts.values())
        cap = min(cap or largest, largest)
        first = {"limit": min(FIRST_ROUND[self.device.kind], cap), "spent_s": 0.0, "done": False}
        plan = self._find(key) or self._append(key, asked, first)
        while True:
            started, limit = perf_counter(), int(plan["limit"])
            rows = self._evaluate(evaluator.limited(limit), {"minutes": minutes})
            if plan["done"]:
                return
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

    def drift(self, tasks: str = "auto", limit: Count = "auto") -> pd.DataFrame:
        """Measure what a choice's score owes to its neighbours in a batch; return a row a precision and scorer.

        The same items are scored in the usual batches and each row alone, by this project's scorer and by lm-eval's.
        In 16 bit the difference is rounding; LLM.int8 chooses its outlier columns over the whole batch.

        Parameters
        ----------
        tasks
            As for `accuracy`; the first task of choices among them is asked.
        limit
            Items of it.

        Raises
        ------
        InputError
            As for `accuracy`; or there is no task of choices among `tasks`.
        """
        usual = self._evaluator(tasks, self.count("limit", limit, "drift_limit"), 32)
        task = next((task for task in usual.tasks if usual.chooses(task)), None)
        if task is None:
            raise InputError(f"tasks {tasks!r} names none of choices; give one such as sample_easy or arc_easy")
        asked = {"limit": usual.limit}
        with self._alone(), self._bar(len(self.precisions), "drift") as bar:
            for precision in self.precisions:
                keys = {name: self._key("drift", precision, asked, engine=name, task=task) for name in SCORERS}
                missing = [name for name, key in keys.items() if not self._find(key)]

                def compare(network: PreTrainedModel, _: float, missing: list = missing, keys: dict = keys) -> None:
                    for name in missing:
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

    def divergence(self, prompts: str = "auto", text_tokens: Count = "auto", context: Count = "auto") -> pd.DataFrame:
        """Measure perplexity on running text, and how far each precision's predictions are from BF16's.

        Parameters
        ----------
        prompts
            ``"wikitext"`` (WikiText-2's test split), ``"sample"``, or ``"auto"``, as for `workload`.
        text_tokens
            Tokens taken from the text's beginning; ``"all"`` takes all.
        context
            Tokens in a window; it moves on by half of them.

        Raises
        ------
        InputError
            A count is not positive, the text cannot be had, or the weights are random.
        """
        most = None if text_tokens == "all" else self.count("text_tokens", text_tokens)
        width = self.count("context", context)
        self.check_weights()
        source = self._prompts(prompts)
        text = "\n\n".join(paragraphs(source, self.data_dir))
        ids = self.tokenizer(text, verbose=False)["input_ids"][:most]
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
        name = f"samples/divergence.{key['precision']}.{key['fingerprint']}.parquet"
        sha256 = self._write(self.folder / name, tokens)
        return {"samples": name, "samples_sha256": sha256, "disk_mib": (self.folder / name).stat().st_size / MIB}

    def _distances(
        self, precision: Precision, ids: list[int], context: int, network: PreTrainedModel, _: float
    ) -> pd.DataFrame:
        """Compare a loaded precision with BF16, loaded beside it."""
        base = PRECISIONS[BASELINE]
        baseline = None
        if precision != base:
            baseline = model.load(self.checkpoint(base, say=True), base, self.device.kind)
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

    def _write(self, path: Path, frame: pd.DataFrame) -> str:
        """Write a file, whole or not at all, and return its sha256."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        frame.to_parquet(draft)
        draft.replace(path)
        return model.file_sha256(path)

    def _items_path(self, row: Mapping[str, Any]) -> Path:
        return self.folder / items_name(row)

    def _scored(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return the row that answers, if its items are those it was counted from."""
        row = self._find(key)
        return row if row is not None and self.items(row) is not None else None

    def items(self, row: dict[str, Any]) -> pd.DataFrame | None:
        """Return every item that an accuracy row was counted from: gold, picked, correct, log-likelihoods.

        None where the file is gone or is not the one written then.
        """
        path = self._items_path(row)
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

    # 03 and 04: performance

    def workload(
        self,
        setting: str,
        requests: Count = "auto",
        prompt_tokens: Count = "auto",
        new_tokens: Count = "auto",
        prompts: str = "auto",
    ) -> Workload:
        """Return the prompts every precision gets.

        Parameters
        ----------
        setting
            ``"bs1"`` or ``"maxbatch"``, for the number of requests that suits it.
        requests, prompt_tokens, new_tokens
            How many prompts, of at most how many tokens, and the new tokens asked of each.
        prompts
            ``"wikitext"``, ``"sample"``, or ``"auto"``: WikiText-2 where there is a GPU or a `data_dir`.

        Raises
        ------
        InputError
            A count is not positive, or the prompts cannot be had.
        """
        counts = (
            self.count("requests", requests, f"{setting}_requests"),
            self.count("prompt_tokens", prompt_tokens),
            self.count("new_tokens", new_tokens),
        )
        return load_workload(self.tokenizer, self._prompts(prompts), *counts, self.data_dir, self.seed)

    def _prompts(self, source: str) -> str:
        if source == "auto":
            return "wikitext" if self.device.kind == "cuda" or self.data_dir else "sample"
        return source

    def limits(self) -> pd.DataFrame:
        """Measure the device's bandwidth and products once; return a row a limit.

        Every performance row is held against these.
        """
        found = self._limits
        rows = [("copy", found.copy_bytes_per_s / 1e9, "GB/s")]
        rows += [(f"product in {name}", rate / 1e12, "Top/s" if name == "int8" else "TFLOP/s")
                 for name, rate in found.matmul_flop_per_s.items()]  # fmt: skip
        if found.idle_power_w is not None:
            rows.append(("power when idle", found.idle_power_w, "W"))
        return pd.DataFrame(rows, columns=["limit", "measured", "unit"])

    @cached_property
    def _limits(self) -> Limits:
        from qnb.benchmark import Limits, measure_limits

        parts = {"device": self.device.name, "versions": self.versions}
        key = {"stage": "limits", "fingerprint": fingerprint(parts)}
        row = self._find(key) or self._append(key, {}, asdict(measure_limits(self.device.kind)))
        return Limits(**{name: row[name] for name in Limits.__slots__})

    def perf_bs1(self, workload: Workload, repeats: int = 1, engines: str | Iterable[str] = "auto") -> pd.DataFrame:
        """Time the workload one request at a time; return a row a precision, engine and repeat (Table 3).

        Parameters
        ----------
        workload
            The requests.
        repeats
            The most passes; what has settled is not repeated (see `qnb.benchmark.settled`).
        engines
            Names in `qnb.decode.ENGINES`, or ``"auto"``: eager, and graphed where there is a GPU.

        Raises
        ------
        InputError
            `repeats` is below 1, or an engine is unknown or cannot run here.
        """
        self.count("repeats", repeats)
        asked = {"workload": workload.fingerprint, "prompts": workload.source}
        names = self._engines(engines)
        with self._alone(), self._bar(repeats * len(self.precisions), "batch size 1") as bar:
            self._repeat(_Asked("bs1", workload, repeats, lambda *_: (1, asked)), names, bar)
        return self._measured(self.frame("perf", "bs1"), "perf")

    def perf_maxbatch(
        self,
        workload: Workload,
        max_batch: Count = "auto",
        memory_mib: Count = "auto",
        repeats: int = 1,
        engines: str | Iterable[str] = "auto",
    ) -> pd.DataFrame:
        """Find the largest batch of each precision and engine, then time the workload at it (Table 4).

        Parameters
        ----------
        workload
            The requests; the search takes the longest of them with all its new tokens.
        max_batch
            The largest batch worth trying.
        memory_mib
            The memory allowed; ``"auto"`` is a whole GPU. On a CPU it is how much the process may grow.
        repeats, engines
            As for `perf_bs1`.

        Raises
        ------
        InputError
            A count is not positive, not even one request fits, or an engine is unknown or cannot run here.
        """
        self.count("repeats", repeats)
        names = self._engines(engines)
        allowed_mib = self.count("memory_mib", memory_mib)
        limit_mib = float(allowed_mib or self.device.memory_mib)
        cap = min(self.count("max_batch", max_batch), len(workload.prompts))
        wanted = {
            "workload": workload.fingerprint,
            "prompts": workload.source,
            "memory_limit_mib": limit_mib,
            "cap": cap,
        }
        searched: dict[tuple[str, str], Mapping[str, Any]] = {}

        def size(precision: Precision, engine: str) -> tuple[int, dict[str, Any]] | None:
            found = searched.get((precision.name, engine))
            if found is None:
                return None
            return found["batch_size"], {**wanted, "batch_size": found["batch_size"], "capped": found["capped"]}

        def smaller(precision: Precision, engine: str) -> bool:
            found = searched[precision.name, engine]
            if found["batch_size"] == 1:
                return False
            key = self._key("batch", precision, wanted, engine=engine)
            searched[precision.name, engine] = self._append(key, wanted, _smaller(found))
            return True

        steps = (1 + repeats) * len(self.precisions)
        with self._alone(), self._bar(steps, "largest batch") as bar, self._limited(allowed_mib):
            for precision in self.precisions:
                bar.set_postfix_str(f"search {precision.name}")
                for engine in names:
                    key = self._key("batch", precision, wanted, engine=engine)
                    with self._failing(key, wanted, f"{precision.name}'s largest batch with engine {engine}"):
                        row = self._find(key) or self._search(precision, key, workload, wanted)
                        searched[precision.name, engine] = row
                bar.update()
            self._repeat(_Asked("maxbatch", workload, repeats, size, smaller), names, bar)
        return self._measured(self.frame("perf", "maxbatch"), "perf")

    def _search(
        self, precision: Precision, key: dict[str, Any], workload: Workload, wanted: dict[str, Any]
    ) -> Mapping[str, Any]:
        """Search the largest batch and return its row; where the engine cannot run there is none, and it is 1."""
        from qnb.benchmark import largest_batch
        from qnb.decode import absent

        engine, limit_mib, cap = key["engine"], wanted["memory_limit_mib"], wanted["cap"]

        def measure(network: PreTrainedModel, base_mib: float) -> dict[str, Any] | None:
            if absent(engine, self.device.kind, network):
                return None
            return asdict(largest_batch(network, workload, limit_mib, cap, engine, base_mib))

        self._settle(precision)
        found = self.on(precision, measure)
        return self._append(key, wanted, found) if found else {"batch_size": 1, "capped": False}

    def sweep(self, workload: Workload, most: Count = "auto", engines: str | Iterable[str] = "auto") -> pd.DataFrame:
        """Time one batch of 1, 2, 4 … `most` requests; return a row a precision, engine and batch size, with the knee.

        A size that does not fit ends its precision's and engine's row of sizes, with a note.

        Parameters
        ----------
        workload
            Its prompts are gone round as often as a batch needs.
        most
            The largest batch; ``"auto"`` sweeps where there is a GPU.
        engines
            As for `perf_bs1`.

        Raises
        ------
        InputError
            `most` is not positive, or an engine is unknown or cannot run here.
        """
        names, largest = self._engines(engines), self.count("sweep_batch", most)
        sizes = batch_sizes(largest) if largest else ()
        asked = {"workload": workload.fingerprint, "prompts": workload.source}
        if not sizes:
            return self.build("sweep")
        with self._alone(), self._bar(len(self.precisions), "batch sizes") as bar:
            self.limits()
            for precision in self.precisions:
                bar.set_postfix_str(precision.name)
                keys = [
                    self._key("sweep", precision, asked, engine=engine, setting=str(size))
                    for engine in names
                    for size in sizes
                ]
                if missing := [key for key in keys if not self._find(key)]:
                    with self._failing(missing[0], asked, f"{precision.name}'s batch sizes"):
                        self.on(precision, partial(self._sweep, missing, workload, asked))
                bar.update()
        return self._save("sweep")

    def _sweep(
        self,
        keys: Sequence[dict[str, Any]],
        workload: Workload,
        asked: dict[str, Any],
        network: PreTrainedModel,
        base_mib: float,
    ) -> None:
        """Time a batch of each key's size with a loaded precision, and keep the rows."""
        full: set[str] = set()
        for key in keys:
            size = int(key["setting"])
            batch = replace(workload, prompts=tuple(islice(cycle(workload.prompts), size)))
            values: dict[str, Any] = {"note": "a smaller batch did not fit"}
            try:
                if key["engine"] not in full:
                    values = self._time(network, base_mib, key, batch, size, ("memory",))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                full.add(key["engine"])
                values = {"note": "out of memory"}
            self._append(key, asked, {"batch_size": size, **values})
            model.release()

    def _engines(self, names: str | Iterable[str]) -> tuple[str, ...]:
        from qnb.decode import parse as parse_engines

        return parse_engines(names, self.device.kind)

    def _repeat(self, asked: _Asked, engines: Sequence[str], bar: tqdm) -> None:
        """Time precisions and engines in turn, each until it has settled or all repeats are done."""
        self.limits()  # measured before a model is loaded, and power while nothing runs
        rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        order = count()
        for repeat, precision in self._turns(asked.repeats):
            bar.set_postfix_str(precision.name)
            turn = engines if repeat % 2 == 0 else engines[::-1]
            mine = {engine: rows.setdefault((precision.name, engine), []) for engine in turn
                    if asked.size(precision, engine)}  # fmt: skip
            mine = {engine: before for engine, before in mine.items() if not _settled(before)}
            for engine, row in self._turn(asked, precision, repeat, mine, order).items():
                mine[engine].append(row)
            bar.update()

    def _turn(
        self,
        asked: _Asked,
        precision: Precision,
        repeat: int,
        before: Mapping[str, Sequence[dict[str, Any]]],
        order: Iterator[int],
    ) -> dict[str, dict[str, Any]]:
        """Return one pass of a precision with each engine of `before`, measured now where the ledger has none."""

        def sized(engine: str) -> tuple[int, dict[str, Any], dict[str, Any]]:
            found = asked.size(precision, engine)
            assert found is not None
            key = self._key("perf", precision, found[1], engine=engine, setting=asked.setting, repeat=repeat)
            return *found, key

        def fit(engine: str, network: PreTrainedModel, base_mib: float) -> dict[str, Any]:
            passes = () if repeat else ("memory", "trace", "agreement")
            while True:
                batch_size, wanted, key = sized(engine)
                try:
                    values = self._time(network, base_mib, key, asked.workload, batch_size, passes)
                    break
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or not asked.smaller(precision, engine):
                        raise
                model.release()
            stopped = asked.stopped(repeat, [row["batch_s"] for row in before[engine]], values)
            return self._append(key, wanted, {**values, "order": next(order), "stopped": stopped})

        def measure(network: PreTrainedModel, base_mib: float) -> None:
            for engine in missing:
                _, wanted, key = sized(engine)
                with self._failing(key, wanted, f"{precision.name} with engine {engine}"):
                    rows[engine] = fit(engine, network, base_mib)
                model.release()

        found = {engine: self._find(sized(engine)[2]) for engine in before}
        rows = {engine: row for engine, row in found.items() if row}
        missing = [engine for engine in found if engine not in rows]
        if missing:
            _, wanted, key = sized(missing[0])
            with self._failing(key, wanted, precision.name):
                self._settle(precision)
                self.on(precision, measure)
        return {engine: rows.get(engine, {"stopped": "failed"}) for engine in before}

    def _time(
        self,
        network: PreTrainedModel,
        base_mib: float,
        key: dict[str, Any],
        workload: Workload,
        batch_size: int,
        passes: Sequence[str],
    ) -> dict[str, Any]:
        """Run the workload once and return the row's values; where the engine cannot run, why not."""
        from qnb.benchmark import run
        from qnb.decode import absent

        engine = key["engine"]
        if why := absent(engine, self.device.kind, network):
            return {"batch_size": batch_size, "note": why}
        timed = run(network, workload, batch_size, engine, base_mib, limits=self._limits, passes=passes)
        return {**timed.row(), **self._keep_samples(key, timed)}

    def _keep_samples(self, key: Mapping[str, Any], timed: Run) -> dict[str, Any]:
        """Write what a row was counted from, the monitor's readings and each token's time; return the files' names."""
        parts = [key["stage"], key["setting"], key["precision"], key["engine"], key.get("repeat", 0)]
        stem = f"samples/{'.'.join(map(str, [*parts, key['fingerprint']]))}"
        frames = {"samples": timed.readings, "token_samples": timed.tokens()}
        names = {field: f"{stem}{'.tokens' * (field == 'token_samples')}.parquet" for field in frames}
        hashes = {f"{field}_sha256": self._write(self.folder / names[field], pd.DataFrame(frames[field]))
                  for field in frames}  # fmt: skip
        return {**names, **hashes}

    def _turns(self, repeats: int) -> Iterator[tuple[int, Precision]]:
        """Let precisions take turns, each repeat beginning with another one."""
        count = len(self.precisions)
        for repeat in range(repeats):
            for place in range(count):
                yield repeat, self.precisions[(place + repeat) % count]

    @contextmanager
    def _limited(self, allowed_mib: int) -> Iterator[None]:
        """Hold a GPU's allocator to `allowed_mib` for a while; 0 leaves it the whole device."""
        if self.device.kind != "cuda" or not allowed_mib:
            yield
            return
        import torch

        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed_mib / self.device.memory_mib))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    # what was measured

    def frame(self, stage: str, setting: str = "") -> pd.DataFrame:
        """Return the newest rows of a stage for this study's precisions, in their order."""
        rows = self.ledger.frame(stage)
        if rows.empty:
            return rows
        if setting:
            rows = rows[rows.setting == setting]
        if setting or stage == "sweep":
            newest = rows.groupby(["precision", "engine"]).fingerprint.transform("last")
            rows = rows[rows.fingerprint == newest]  # repeats of another workload are another measurement
        order = {precision.name: place for place, precision in enumerate(self.precisions)}
        rows = rows[rows.precision.isin(order)]
        rows = rows.sort_values("precision", key=lambda names: names.map(order), kind="stable")
        return rows.dropna(axis="columns", how="all").reset_index(drop=True)

    def results(self) -> Results:
        """Return everything measured, as frames: what figures, panels and the report are made of."""
        size = self.ledger.path.stat().st_size if self.ledger.path.exists() else 0
        if self._read is None or self._read[0] != size:
            self._read = size, self._results()
        return self._read[1]

    def _results(self) -> Results:
        rows = tuple(row for row in self.ledger if not row["stage"].endswith(FAILED))
        runs = {setting: self.frame("perf", setting) for setting in ("bs1", "maxbatch")}
        timed = [row for frame in runs.values() for row in frame.to_dict("records")]
        return Results(
            name=self.folder.name,
            model=self._record.get("name", self.model),
            device=rows[-1].get("device", "") if rows else "",
            tables={1: self.table1(), 2: self.table2(), 3: self.table3(), 4: self.table4()},
            scores=self.scores(),
            bs1=medians(runs["bs1"]),
            maxbatch=medians(runs["maxbatch"]),
            sweep=medians(self.frame("sweep")),
            samples=readings(self.folder, timed),
            checkpoints=self.frame("quantize"),
            divergence=table.divergence(self.frame("divergence")),
            rows=rows,
            failures=tuple(self.ledger.failures()),
        )

    def figures(self, pictures: bool = True) -> dict[str, Any]:
        """Draw every figure, save them below ``figures/``, and return them by name.

        Parameters
        ----------
        pictures
            Whether to save PNG and SVG beside HTML; that takes a browser and some seconds.
        """
        from qnb import export, figure

        drawn = figure.draw_all(self.results())
        export.pages(drawn, self.folder / "figures")
        if pictures and (problem := export.pictures(drawn, self.folder / "figures")):
            tqdm.write(problem)
        return drawn

    def report(self) -> Path:
        """Write ``report.html``, one page that needs no network, and a model card a checkpoint; return the page."""
        from qnb import modelcard, report

        results = self.results()
        path = self.folder / "report.html"
        draft = path.with_suffix(".draft")
        draft.write_text(report.page(results, self.ledger.path), encoding="utf-8")
        draft.replace(path)
        for precision in self.precisions:
            if precision.name in set(results.checkpoints.get("precision", ())):
                modelcard.write(results, precision, self.folder / "cards")
        return path

    def continuation(self, prompt: str, precision: str, new_tokens: int = 24) -> list[str]:
        """Return what a precision's checkpoint writes after a prompt, greedily, token by token as text.

        Raises
        ------
        InputError
            The prompt is empty, the precision unknown, or `new_tokens` below 1.
        """
        from qnb.decode import Eager

        (asked,) = parse(precision)
        self.count("new_tokens", new_tokens)
        ids = self.tokenizer(prompt, verbose=False)["input_ids"] if prompt.strip() else []
        if not ids:
            raise InputError("the prompt is empty; give some words to go on from")

        def generate(network: PreTrainedModel, _: float) -> list[int]:
            with model.quiet():
                return Eager(network).generate([ids], new_tokens)[0].tolist()  # (N,)

        with self._alone():  # what another process times meanwhile would notice
            made = self.on(asked, generate)
        # a character may take several tokens: a piece is what its token adds to the text
        texts = [str(self.tokenizer.decode(made[:count])).rstrip("\ufffd") for count in range(len(made) + 1)]
        return [now.removeprefix(before) for before, now in pairwise(texts)]

    def scores(self) -> pd.DataFrame:
        """Return a row a task, metric, filter and precision."""
        return table.scores(self.frame("accuracy"))

    def table1(self) -> pd.DataFrame:
        """Accuracy with standard errors, the aggregate, and the published values beside."""
        return self._save("table1_accuracy")

    def table2(self) -> pd.DataFrame:
        """Change against BF16 in points and relative, with a paired test, and the published values beside."""
        return self._save("table2_change")

    def table3(self) -> pd.DataFrame:
        """Performance at batch size 1, and the published values beside."""
        return self._save("table3_bs1")

    def table4(self) -> pd.DataFrame:
        """Performance at the largest batch, and the published values beside."""
        return self._save("table4_maxbatch")

    def causes(self, number: int) -> pd.DataFrame:
        """Set rows of Table 3 or 4 that differ in one choice of the harness against each other."""
        return self._save(f"table{number}_causes")

    def t4_estimate(self, number: int) -> pd.DataFrame:
        """Estimate from its datasheet the least time that a T4 needs for the work of Table 3 or 4."""
        return self._save(f"table{number}_t4_estimate")

    def build(self, name: str) -> pd.DataFrame:
        """Make a table from the ledger's rows without keeping it; `name` is its file's."""
        makers: dict[str, Callable[[], pd.DataFrame]] = {
            "table1_accuracy": lambda: table.accuracy(self.scores()),
            "table2_change": lambda: table.change(self.frame("accuracy"), self.items),
            "table3_bs1": lambda: table.performance(self.frame("perf", "bs1"), 3),
            "table3_causes": lambda: cause.causes(self.build("table3_bs1"), 3),
            "table3_t4_estimate": lambda: cause.t4(self.frame("perf", "bs1"), 3),
            "table4_maxbatch": lambda: table.performance(self.frame("perf", "maxbatch"), 4),
            "table4_causes": lambda: cause.causes(self.build("table4_maxbatch"), 4),
            "table4_t4_estimate": lambda: cause.t4(self.frame("perf", "maxbatch"), 4),
            "sweep": lambda: table.sweep(self.frame("sweep")),
            "divergence": lambda: table.divergence(self.frame("divergence")),
            "drift": lambda: table.drift(self.frame("drift")),
        }
        return makers[name]()

    def _save(self, name: str) -> pd.DataFrame:
        """Build a table and keep it, with the precisions it was built for."""
        frame = self.build(name)
        if not frame.empty:
            folder = self.folder / "tables"
            folder.mkdir(parents=True, exist_ok=True)
            frame.to_csv(folder / f"{name}.csv", index=False)
            made = {"precisions": [precision.name for precision in self.precisions]}
            (folder / f".{name}.json").write_bytes(checked(made))
            (folder / f"{name}.md").write_text(table.markdown(frame), encoding="utf-8")
        return frame


def _items_of(sizes: Mapping[str, int], limit: int) -> int:
    """Return the items a task and its subtasks have with a limit each."""
    return sum(min(limit, size) for size in sizes.values())


def items_name(row: Mapping[str, Any]) -> str:
    """Return the file of an accuracy row's items, below the study's folder."""
    return f"items/{row['task']}.{row['precision']}.{row['fingerprint']}.parquet"


def _smaller(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a search's result after its batch ran out of memory when timed: a twentieth smaller, no longer capped."""
    failed = {"batch_size": found["batch_size"], "fits": False, "memory_mib": None}
    return {
        "batch_size": found["batch_size"] - max(1, found["batch_size"] // 20),
        "limit_mib": found["limit_mib"],
        "capped": False,
        "probes": [*found["probes"], failed],
    }


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is timed in turn: the batch size of a precision and engine, and what makes it less when memory runs out."""

    setting: str
    workload: Workload
    repeats: int
    size: Callable[[Precision, str], tuple[int, dict[str, Any]] | None]  # None where none was found
    smaller: Callable[[Precision, str], bool] = lambda *_: False

    def stopped(self, repeat: int, earlier: Sequence[list[float]], values: Mapping[str, Any]) -> str:
        """Return why a pass is the last: the median has settled, or the limit of passes is hit; "" where it is not."""
        from qnb.benchmark import settled

        if "batch_s" not in values:
            return "limit"  # what cannot run need not be tried again
        whole = values["requests"] // values["batch_size"]  # a smaller last batch takes another time
        if settled([seconds for batch_s in (*earlier, values["batch_s"]) for seconds in batch_s[:whole]]):
            return "interval"
        return "limit" if repeat + 1 == self.repeats else ""


def _settled(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether passes of one precision and engine need no further one."""
    return any(row["stopped"] == "interval" or "batch_s" not in row for row in rows)


PARAMETERS = tuple(signature(Study).parameters)  # what every notebook gives to its study
