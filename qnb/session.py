"""What every stage of a study stands on: one model, one folder, one ledger, and checkpoints that are proved.

Every stage asks the ledger first and measures what is missing; a checkpoint that a stage needs and does not find is
made. One process at a time measures into a folder, and what cannot be measured is kept as failed and asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from io import BytesIO
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from qnb import __version__, colab, device
from qnb.device import MIB
from qnb.errors import InputError, path_of
from qnb.ledger import FAILED, Ledger, checked, fingerprint, unchecked
from qnb.precision import Precision, parse
from qnb.provenance import ROOT, command, commit
from qnb.quantize import checkpoint as model
from qnb.quantize.checkpoint import Source
from qnb.quantize.hub import scrub
from qnb.report import tables as table
from qnb.report.results import Results
from qnb.speed.batch_search import is_out_of_memory
from qnb.speed.monitor import sensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


Result = TypeVar("Result")
Count = int | str  # a number, or "auto": what the device allows in minutes
# what may stand for a count beside a number and 'auto', by its name
BESIDE = {"limit": "'all'", "ppl_tokens": "'all'", "sweep_batch": "0", "requests": "a time such as '4 minutes'"}
AUTO: dict[str, dict[str, int]] = {
    "cuda": {"bs1_requests": 20, "maxbatch_requests": 512, "prompt_tokens": 128, "new_tokens": 100, "limit": 200,
             "batch_size": 32, "max_batch": 512, "memory_mib": 0, "ppl_tokens": 65536, "context": 512,
             "sweep_batch": 256, "sensitivity_limit": 100},
    "cpu": {"bs1_requests": 4, "maxbatch_requests": 16, "prompt_tokens": 32, "new_tokens": 8, "limit": 12,
            "batch_size": 8, "max_batch": 16, "memory_mib": 400, "ppl_tokens": 1024, "context": 128,
            "sweep_batch": 0, "sensitivity_limit": 4},  # no sweep
}  # fmt: skip


def locate(output: str | Path) -> Path:
    """Return the study's folder: a relative path is taken from the checkout, or from where one is if there is none.

    So the five notebooks meet in one folder, from whichever folder each is opened. ``drive:name`` is a folder of the
    user's Google Drive, on Colab.
    """
    if str(output).startswith(colab.DRIVE):
        return colab.folder(str(output))
    path = path_of(output)
    base = ROOT if (ROOT / "notebooks").is_dir() else Path.cwd()
    return path if path.is_absolute() else base / path


class Workbench:
    """A model, precisions, and the folder in which everything measured of them lies.

    Parameters
    ----------
    model
        ``auto``, ``smollm2-135m``, ``shape:llama-3.2-1b``, a hub id or a local folder; see `qnb.quantize.checkpoint.resolve`.
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
    device
        What everything is measured on; see `qnb.device.detect`.

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
        output: str | Path = "outputs/study",
        data_dir: str | Path = "",
        seed: int = 0,
        overwrite: bool = False,
        device: str = "auto",
    ) -> None:
        kinds = {"model": (model, str), "output": (output, str | Path), "precisions": (precisions, str | list | tuple)}
        for name, (value, kind) in kinds.items():
            if not value or not isinstance(value, kind):
                raise InputError(f"{name} is {value!r}; give a name")
        if not isinstance(data_dir, str | Path) or "\0" in f"{output}{data_dir}{model}":
            raise InputError(f"output is {str(output)!r} and data_dir {data_dir!r}; give folders, or no data_dir")
        if not isinstance(overwrite, bool):
            raise InputError(f"overwrite is {overwrite!r}; give true or false")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise InputError(f"seed is {seed!r}; give a whole number")
        self.precisions = parse(precisions)
        self.folder = locate(output)
        self.data_dir = path_of(data_dir).resolve() if str(data_dir) else None
        self.seed, self.overwrite, self._asked_device = seed, overwrite, device
        self._settled = False  # whether the libraries have made what they make at their first use
        self._made: set[str] = set()  # checkpoints made by this object: overwriting makes each once
        self._sound: dict[Path, str] = {}  # checkpoints read whole and found unchanged, by their stamp then
        self._lock = FileLock(self.folder / ".lock")
        self._read: tuple[int, Results] | None = None  # the ledger's bytes, and what was read from them
        if self.data_dir and not self.data_dir.is_dir():
            raise InputError(f"data_dir {data_dir} is not a folder; give one laid out like the hub, or leave it empty")
        self.ledger = Ledger(self.folder)
        for damage in self.ledger.damaged:
            tqdm.write(f"{damage}; it is passed over, and measured again where it is asked for")
        if not self.ledger.path.exists():  # what is there can be read and verified wherever it lies
            self._check_writable()
        self.model = model
        self._check_model()

    def _check_writable(self) -> None:
        parent = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        if not os.access(parent, os.W_OK):
            raise InputError(f"output {self.folder} cannot be written (no right to write in {parent}); give another")

    def _check_model(self) -> None:
        model.check(self.model)
        record = self._record
        name = str(record.get("name"))
        known = {record.get("asked"), name, name.partition("@")[0]}
        if record and self.model not in known | {"auto"}:
            raise InputError(
                f"output {self.folder} holds a study of {record['name']}, not of {self.model}; give another output "
                "folder, or remove this one"
            )

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
        return device.detect(self._asked_device)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.source.path)

    @cached_property
    def source(self) -> Source:
        """The model as released; fetched on first use and then remembered in study.json."""
        record = self._record
        if record and Path(record["path"]).is_dir() and model.stamp(Path(record["path"])) == record.get("stamp"):
            return Source(**{name: record[name] for name in Source.__slots__})
        source = model.resolve(record.get("name", self.model), self.device.kind)
        before = record.get("fingerprint", source.fingerprint)
        # the second is what versions before 0.9.0 took; it reads all weights once more
        if before != source.fingerprint and before != model.digest(Path(source.path), sealed=False, beside=False):
            raise InputError(
                f"model {source.name} is not the one that output {self.folder} was measured with (its files have "
                "changed since); give another output folder"
            )
        facts = {"asked": record.get("asked", self.model), **asdict(source), "stamp": model.stamp(Path(source.path))}
        asked = {"precisions": [precision.name for precision in self.precisions], "data_dir": str(self.data_dir or "")}
        self._replace("study.json", checked({**facts, **asked, **self._context}))
        return source

    def _replace(self, name: str, content: bytes) -> None:
        """Write a file below the study's folder, whole or not at all."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, padding on the left; every checkpoint has the same."""
        return model.load_tokenizer(self.source.path)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that decide what is measured."""
        return {"qnb": __version__, **device.versions()}

    def count(self, name: str, value: Count, auto: str = "") -> int:
        """Return a count as a number: what was given, or for ``"auto"`` what suits the device.

        Raises
        ------
        InputError
            `value` is neither ``"auto"`` nor a whole number of at least 1.
        """
        known = AUTO[self.device.kind]
        if value == "auto" and (auto or name) in known:
            return known[auto or name]
        try:
            if not isinstance(value, bool) and str(value).isdecimal() and int(value) >= 1:
                return int(value)
        except ValueError:  # thousands of digits
            value = "a number of thousands of digits"
        beside = BESIDE.get("requests" if name.endswith("_requests") else name)
        accepted = ["a whole number of at least 1", beside, "'auto'" if (auto or name) in known else None]
        raise InputError(f"{name} is {value!r}; give {', or '.join(filter(None, accepted))}")

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

    def _shared_key(self, stage: str, asked: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Return the key and fingerprint of what is decided once for all precisions."""
        parts = {"weights": self.source.fingerprint, "device": self.device.name, "versions": self.versions}
        return {"stage": stage, **more, "fingerprint": fingerprint({**parts, **asked})}

    def _find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        return None if self.overwrite else self.ledger.find(**key)

    def _decided(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return what was decided for all precisions: measuring them anew, some or all, does not decide it anew."""
        return self.ledger.find(**key)

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
            text = scrub(str(error)) or type(error).__name__
            reason = f"{type(error).__name__}: {text}"
            if is_out_of_memory(error):  # a search says what there was and what to do, an allocator a page
                reason = f"out of memory: {text}" if isinstance(error, MemoryError) and str(error) else "out of memory"
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
        self._check_writable()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0.5)
        except Timeout:
            tqdm.write(f"another process is measuring into {self.folder}; waiting for it")
            self._lock.acquire(poll_interval=0.5)
        try:
            self.device.use()
            yield
        finally:
            self._lock.release()

    def _bar(self, total: int, what: str) -> tqdm:
        return tqdm(total=total, desc=what, unit="step", leave=False)

    # Checkpoints, and models loaded from them

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
        with _letting_go():
            made = model.convert(self.source, precision, folder, self.device.place)
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

    def on(self, precision: Precision, measure: Callable[[PreTrainedModel, float | None], Result]) -> Result:
        """Load a precision's checkpoint, measure it, and give its memory back.

        `measure` is called with the model, and the memory in MiB in use before it was loaded, None where that could
        not be read. It must not keep the model: the next precision needs the room.
        """
        from qnb.speed.engines import give_back

        folder = self.checkpoint(precision, say=True)
        give_back()
        idle_mib = self._idle_mib()
        with _letting_go():
            return measure(model.load(folder, precision, self.device.place), idle_mib)

    def _idle_mib(self) -> float | None:
        """Return the memory in use that is no model's, in MiB; None where a sensor answers no more."""
        sense = sensor(self.device.place)
        try:
            read: float | None = sense.sample().get("memory_mib")
        except OSError:  # costs its own numbers alone
            return None
        if read is None or sense.source == "process":
            return read
        import torch

        free = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # the next model is loaded into it
        return read - free / MIB

    def _settle(self, precision: Precision) -> None:
        """Once, load a model for nothing: what the libraries allocate at their first use is no precision's memory."""
        if self._settled or self.device.kind != "cpu":
            return
        from qnb.speed.engines import Eager

        self._settled = True
        network = model.load(self.checkpoint(precision, say=True), precision, self.device.place)
        with model.quiet():
            Eager(network).generate([[1, 2, 3, 4]], 2)

    # What was measured

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
        if setting and "stopped" in rows:
            rows = rows.loc[[not _outdated(row, rows) for row in rows.to_dict("records")]]
            rows = rows.sort_values("repeat", kind="stable")  # some may have been asked for again, or anew
        order = {precision.name: place for place, precision in enumerate(self.precisions)}
        rows = rows[rows.precision.isin(order)]
        rows = rows.sort_values("precision", key=lambda names: names.map(order), kind="stable")
        return rows.dropna(axis="columns", how="all").reset_index(drop=True)

    def _prompts(self, source: str) -> str:
        if source == "auto":
            return "wikitext" if self.device.kind == "cuda" or self.data_dir else "sample"
        return source

    def _write(self, stem: str, frame: pd.DataFrame) -> tuple[str, str]:
        """Write what a row is counted from, whole or not at all; return the file's name and sha256.

        Its name tells its content, so that what is measured anew leaves the file of the row before alone.
        """
        buffer = BytesIO()
        frame.to_parquet(buffer)
        sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
        name = f"{stem}.{sha256[:8]}.parquet"
        self._replace(name, buffer.getvalue())
        return name, sha256

    def build(self, name: str) -> pd.DataFrame:
        """Make a table from the ledger's rows without keeping it; `name` is its file's."""
        return self._makers()[name]()

    def _makers(self) -> dict[str, Callable[[], pd.DataFrame]]:
        """Return what makes each table."""
        return {}

    def _save(self, name: str) -> pd.DataFrame:
        """Build a table and keep it, with the precisions it was built for."""
        return self._keep(name, self.build(name))

    def _keep(self, name: str, frame: pd.DataFrame) -> pd.DataFrame:
        if not frame.empty:
            self._replace(f"tables/{name}.csv", frame.to_csv(index=False).encode())
            made = {"precisions": [precision.name for precision in self.precisions]}
            self._replace(f"tables/.{name}.json", checked(made))
            self._replace(f"tables/{name}.md", table.markdown(frame).encode())
        return frame


def _outdated(row: Mapping[str, Any], rows: pd.DataFrame) -> bool:
    """Return whether a pass is one that a run which measured all anew, and settled sooner, did not come to."""
    same = rows[(rows.precision == row["precision"]) & (rows.engine == row["engine"])]
    ends = same[(same.repeat < row["repeat"]) & same.stopped.fillna("").ne("")]
    return bool((ends.measured_at > row["measured_at"]).any())


@contextmanager
def _letting_go() -> Iterator[None]:
    """Give memory back in the end, also what a failure's frames hold: a notebook keeps its last traceback."""
    from qnb.speed.engines import give_back

    try:
        yield
    except BaseException as error:
        failures: list[BaseException | None] = [error]
        for failure in failures:
            if failure is not None:
                clear_frames(failure.__traceback__)
                failures += [one for one in (failure.__cause__, failure.__context__) if one not in failures]
        raise
    finally:
        give_back()
