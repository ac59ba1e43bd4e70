"""What every stage stands on: one model, one folder, one ledger, and checkpoints that were proved.

A stage asks the ledger first and measures what is missing. One process at a time measures into a folder. A measurement
that fails is recorded and retried on the next run.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from qnb import __version__, budget, colab, device, kernels
from qnb.budget import Clock, now_s
from qnb.errors import InputError, check_choice, expand_path, never_fail_to_print, refusing, scrub
from qnb.finite import NotFiniteError
from qnb.ledger import FAILED, PLANS, Ledger, file_sha256, fingerprint, is_outdated, row_key, write_atomic
from qnb.memory import describe_host, host_peak_mib, is_out_of_memory, kept, release, released
from qnb.options import AUTO, Count, Names, check_minutes, check_types, resolve_count
from qnb.precision import HALVES, PRECISIONS, Precision, parse
from qnb.provenance import REPLAY, command, commit, file_state
from qnb.quantize import checkpoint, existing, files, sources

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from qnb.ledger import Row

# The libraries that can change a stage's rows: another version of one of them is another measurement.
_MODEL = ("torch", "transformers", "bitsandbytes")
LIBRARIES = {
    "quantize": _MODEL,
    **dict.fromkeys(("divergence", "batch", "perf", "sweep"), (*_MODEL, "qnb")),
    **dict.fromkeys(("accuracy", "batch_sensitivity"), (*_MODEL, "qnb", "lm_eval")),
    "peaks": ("torch",),
}
# Stages whose rows are the same on any GPU: their keys hold the device's kind. All others hold its name.
ON_ANY_GPU = {"quantize", "accuracy", "divergence", "batch_sensitivity", "budget", "lengths"}


class NothingMeasuredError(RuntimeError):
    """Nothing of a stage could be measured; the ledger says why."""


class Session:
    """A model, formats, and the folder in which everything measured of them is kept.

    Parameters
    ----------
    model
        ``auto``, ``smollm2-135m``, ``shape:llama-3.2-1b``, a hub id or a local folder; see `qnb.quantize.sources`.
    precisions
        Names separated by commas; ``"study"`` is bf16, fp16, int8, int4, nf4. See `qnb.precision.parse`.
    output
        The study's folder, relative to the checkout; on Colab ``drive:name`` is one on Google Drive.
    data_dir
        A folder laid out like the hub's dataset repositories; empty reads the hub.
    seed
        Decides which prompts are drawn, and their order.
    overwrite
        Measure again what is there already.
    minutes
        A budget for the whole sitting, which its stages share; 0 sets none, ``"auto"`` is 25 on a GPU.
    device
        What everything is measured on; see `qnb.device.detect`.
    half
        The 16-bit type of quantized formats (torchao's take no float16): ``"bfloat16"``, ``"float16"``, or ``"auto"``,
        which is what the study began with, else what the device has units for. With ``"auto"`` a format that overflows
        in float16 goes on in bfloat16.

    Raises
    ------
    InputError
        A format or model is unknown, `output` cannot be written or holds a study of another model or `half`, or
        `data_dir` is not a folder.
    """

    def __init__(
        self,
        model: str = "auto",
        precisions: Names = "study",
        output: str | Path = "outputs/study",
        data_dir: str | Path = "",
        seed: int = 0,
        overwrite: bool = False,
        minutes: float | str = 0,
        device: str = "auto",
        half: str = "auto",
    ) -> None:
        never_fail_to_print()
        check_types(model, precisions, output, data_dir, seed, overwrite)
        check_minutes(minutes)
        self.model, self.seed, self.overwrite, self._minutes = model, seed, overwrite, minutes
        self.folder = colab.locate(output)
        self.ledger = Ledger(self.folder)
        self.precisions = parse(precisions, self.ledger.rows("quantize"))
        self.data_dir = expand_path(data_dir).resolve() if str(data_dir) else None
        if self.data_dir and not self.data_dir.is_dir():
            raise InputError(f"data_dir {data_dir} is not a folder; give one laid out like the hub, or leave it empty")
        self._wanted_device, self._wanted_half = device, half
        self._overflowing: set[str] = set()  # formats that overflowed in float16 in the stage at work
        self._measured: set[tuple[Any, ...]] = set()  # keys of this session's own rows, which overwriting spares
        self._verified: set[Path] = set()  # checkpoints and items whose every byte was read by this session
        self.existing: dict[str, sources.Source] = {}  # checkpoints that were made elsewhere, by label
        self.tasks: dict[str, Any] = {}  # lm-eval's tasks that were built, by name
        self.replays = REPLAY in os.environ  # what was measured elsewhere is shown
        for damage in self.ledger.damaged:
            tqdm.write(f"{damage}; it is passed over and measured again when it is needed")
        if not self.ledger.path.exists():  # what is there can be read wherever it lies
            self.check_writable()
        sources.check_name(self.model)
        check_choice("half", half, HALVES)
        record = self.record
        self.overflowed: list[str] = record.get("overflowed", [])  # in float16; they are measured in bfloat16
        if record:
            self._check_same_study(record)

    def _check_same_study(self, record: Mapping[str, Any]) -> None:
        """Refuse an output folder that holds another model's study, or one in another 16-bit type."""
        name, other, folder = str(record.get("name")), "", expand_path(self.model).resolve()
        same = {"auto", record.get("requested"), name, name.partition("@")[0]}
        if str(folder) != name if folder.is_dir() else self.model not in same:
            other = f"of {name}, not of {self.model}"
        elif self._wanted_half not in ("auto", self.half):
            other = f"in {self.half}, not in {self._wanted_half}"
        if other:
            raise InputError(f"output {self.folder} holds a study {other}; give another output, or remove this one")

    def check_writable(self) -> None:
        """Refuse an output folder that this user cannot write to.

        Raises
        ------
        InputError
            The folder, or the nearest parent that exists, is not writable.
        """
        parent = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        if not os.access(parent, os.W_OK):
            raise InputError(f"output {self.folder} cannot be written (no right to write in {parent}); give another")

    def check_weights(self) -> None:
        """Refuse a model of random weights, without fetching it.

        Raises
        ------
        InputError
            The model is a shape, or this study was made with one.
        """
        if self.record.get("name", self.model) == sources.SHAPE:
            raise InputError(f"model {sources.SHAPE} has random weights; leave 02_accuracy out, or take smollm2-135m")

    # The model and its device

    @property
    def record(self) -> dict[str, Any]:
        """What study.json says of the model; empty before a model was resolved."""
        path = self.folder / "study.json"
        if not path.exists():
            return {}
        with refusing(f"{path} is not JSON; remove it (the ledger stays) or give another output"):
            record = dict(json.loads(path.read_text(encoding="utf-8")))
            return {} if is_outdated(record) else record

    @cached_property
    def device(self) -> device.Device:
        """The device everything is measured on."""
        return device.detect(self._wanted_device)

    @cached_property
    def half(self) -> str:
        """The type in bfloat16's place in quantized formats: of study.json, or asked for, or the device's."""
        pinned = self.record.get("half", "bfloat16") if self.record else ""
        if pinned and not (pinned == "float32" and self.device.kind == "cuda"):  # a CPU's, of a study that moved
            return str(pinned)
        return self.device.half if self._wanted_half == "auto" else self._wanted_half

    def pinned(self, precision: Precision) -> Precision:
        """Return a format with the 16-bit type that this study measures it in."""
        return precision.in_half("bfloat16" if precision.name in self.overflowed else self.half)

    @cached_property
    def source(self) -> sources.Source:
        """The model as released; fetched on first use and then remembered in study.json."""
        record = self.record
        if record and file_state(Path(record["path"])) == record["files"]:
            return sources.Source(**{name: record[name] for name in sources.Source.__slots__})
        return self._resolved()

    def _resolved(self) -> sources.Source:
        """Bring the model here and write down which it is; one that has changed, or has no room, is refused."""
        record, shortage = self.record, self.disk_shortage()
        if shortage and not record:
            raise InputError(f"disk: {shortage}, or give another output")
        source = sources.resolve(record.get("name", self.model), self.device.kind)
        if record.get("fingerprint", source.fingerprint) != source.fingerprint:
            changed = f"model {source.name} has changed since output {self.folder} began, or is damaged"
            raise InputError(f"{changed}; fetch it again, or give another output")
        facts = {"requested": record.get("requested", self.model), "half": self.half, **asdict(source)}
        record |= {**facts, "files": file_state(Path(source.path)), **self._context}
        write_atomic(self.folder / "study.json", json.dumps(record, indent=1))
        if shortage := self.disk_shortage():
            tqdm.write(f"disk: {shortage}")
        return source

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, padding on the left; every checkpoint has the same."""
        return checkpoint.load_tokenizer(self.source.path)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration; of a multimodal model, that of its text half."""
        return checkpoint.read_config(self.source.path)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that a row may depend on."""
        return device.versions()

    @cached_property
    def minutes(self) -> float:
        """The budget of minutes for the whole sitting; 0 where there is none."""
        return float(AUTO[self.device.kind]["minutes"] if self._minutes == "auto" else self._minutes)

    def count(self, name: str, value: Count) -> int:
        """Return a count as a number: what was given, or for ``"auto"`` what suits the device."""
        return resolve_count(name, value, self.device.kind)

    def prompt_source(self, source: str) -> str:
        """Return where prompts come from; ``"auto"`` is WikiText-2 where there is a GPU or a `data_dir`."""
        auto = "wikitext" if self.data_dir or self.device.kind == "cuda" else "sample"
        return auto if source == "auto" else source

    def disk_shortage(self) -> str:
        """Return a line where the checkpoints still to be made need more disk than is free; else nothing."""
        fields = {name: self.record[name] for name in sources.Source.__slots__} if self.record else {}
        with suppress(OSError, ValueError):  # what is wrong with a model is said where it is resolved
            source = sources.Source(**fields) if fields else sources.expected(self.model, self.device.kind)
            return files.disk_shortage(source, self.folder / "checkpoints", map(self.pinned, self.precisions))
        return ""

    def facts(self) -> dict[str, str]:
        """Return what is measured, on what, with what, and what is done already. Nothing is fetched for it."""
        source, rows = self.record, self.ledger.rows()
        stages = Counter(row["stage"] for row in rows if row["stage"] not in PLANS)
        taken_s = self._taken_s() if self.minutes and source and Path(source["path"]).is_dir() else {}
        peak_mib = max((row.get("host_peak_mib") or 0 for row in rows), default=0)
        quantized = [each for each in map(self.pinned, self.precisions) if each.quantized and not each.origin]
        others = (f"{each.name} in {each.dtype}" for each in quantized if each.dtype != self.half)
        facts = {
            "model": f"{source['name']} ({source['reason']})" if source else f"{self.model} (not fetched yet)",
            "formats": ", ".join(precision.name for precision in self.precisions),
            "quantized formats in": ", ".join([self.half, *others]),
            **self.device.facts(rows[-1]["versions"] if self.replays and rows else self.versions),
            "time": budget.describe(self.minutes, taken_s) if self.minutes else "",
            "host memory": "" if self.replays else describe_host(peak_mib),
            "disk": "" if self.replays else self.disk_shortage(),
            "output": str(self.folder),
            "already measured": ", ".join(f"{count} {stage} rows" for stage, count in stages.items()) or "nothing",
        }
        return {name: fact for name, fact in facts.items() if fact}

    # What is measured is found again

    def key(
        self, stage: str, precision: Precision | None = None, asked: Mapping[str, Any] | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Return a row's key with its fingerprint: everything that can change what is measured.

        Parameters
        ----------
        stage
            The stage's name.
        precision
            The format; None for what is decided or measured once for all formats.
        asked
            What the stage was asked for.
        **fields
            Further parts of the key: engine, setting, task, repeat.
        """
        versions = {**self.versions, "qnb": __version__.rpartition(".")[0]}  # patch releases measure alike
        how_it_runs = stage == "quantize" and precision and (precision.origin or precision.kernels)
        parts: dict[str, Any] = {
            "device": self.device.kind if stage in ON_ANY_GPU and not how_it_runs else self.device.name,
            "versions": {name: versions[name] for name in LIBRARIES.get(stage, ())},
            "asked": dict(asked or {}),
        }
        if stage != "peaks":
            parts["weights"] = self.source.fingerprint
        if precision:
            precision = self.pinned(precision)
            parts |= {"quantization": existing.content(self, precision), "dtype": precision.dtype}
            fields |= {"precision": precision.name, "dtype": precision.dtype}
        return {"stage": stage, **fields, "fingerprint": fingerprint(parts)}

    def find(self, key: Mapping[str, Any]) -> Row | None:
        """Return the row that answers `key`, if it need not be measured (again); it becomes the one that is shown."""
        return self.decided(key) if self.counts(key) else None

    def counts(self, key: Mapping[str, Any]) -> bool:
        """Return whether a row answers `key` and stands: with `overwrite`, only this session's own rows do."""
        row, is_own = self.ledger.find(key), (row_key(key), key.get("fingerprint")) in self._measured
        return row is not None and (is_own or not self.overwrite) and self.has_items(row)

    def has_items(self, row: Mapping[str, Any]) -> bool:
        """Return whether the file of a row's items, if it names one, is the one written then; it is read once."""
        if "items_file" not in row:
            return True
        path = self.folder / row["items_file"]
        is_whole = path.exists() and (path in self._verified or file_sha256(path) == row["items_sha256"])
        if is_whole:
            self._verified.add(path)
        return is_whole

    def decided(self, key: Mapping[str, Any]) -> Row | None:
        """Return the row that answers `key`, even when overwriting, so that a decision shared by all formats stands.

        A row that answers, but is not the newest of its key, is appended again: what was asked last is shown.
        """
        row = self.ledger.find(key)
        return row if row is None or self.ledger.is_newest(row) else self.ledger.append(row)

    def append(self, key: Mapping[str, Any], *values: Mapping[str, Any]) -> Row:
        """Record a measurement with its key and where it comes from; return the row."""
        source = {"model": self.source.name, "model_reason": self.source.reason, "weights": self.source.fingerprint}
        fields = {name: value for part in values for name, value in part.items() if name not in key}
        return self.adopt({**key, **fields, **source, "host_peak_mib": host_peak_mib(), **self._context})

    def adopt(self, row: Mapping[str, Any]) -> Row:
        """Record a whole row, which a worker may have measured."""
        self._measured.add((row_key(row), row.get("fingerprint")))
        return self.ledger.append(row)

    @cached_property
    def _context(self) -> dict[str, Any]:
        """What every row says of where it comes from."""
        return {
            "device": self.device.name,
            "device_memory_mib": self.device.memory_mib,
            "host": device.host(),
            "driver": self.device.driver,
            "bf16": self.device.bf16,
            "versions": self.versions,
            "seed": self.seed,
            "command": command(),
            "commit": commit(),
        }

    @contextmanager
    def failing(self, key: Mapping[str, Any], what: str) -> Iterator[None]:
        """Record a measurement that fails, with its reason, say so, and go on with the others.

        Input that cannot be used and a disk that cannot be written to end the stage: the others would fail too.
        """
        try:
            yield
        except (InputError, OSError):
            raise
        except Exception as error:  # whatever a library raises over one model, the other formats are measured
            self.fail(key, what, error)

    def fail(self, key: Mapping[str, Any], what: str, error: BaseException) -> None:
        """Record why a measurement failed, and say so."""
        text = scrub(str(error)) or type(error).__name__
        reason = f"{type(error).__name__}: {text}"
        if is_out_of_memory(error):  # a search says what there was and what to do; an allocator prints a page
            reason = f"out of memory: {text}" if isinstance(error, MemoryError) and str(error) else "out of memory"
        self.append({**key, "stage": key["stage"] + FAILED}, {"error": type(error).__name__, "reason": reason})
        then = "tried again on the next run"
        is_overflow = isinstance(error, NotFiniteError) and key.get("dtype") == "float16"
        if is_overflow and PRECISIONS[key["precision"]].quantized and self._wanted_half == "auto":
            self._overflowing.add(key["precision"])
            then = "measured again in bfloat16"
        tqdm.write(f"{what} could not be measured ({reason}); it is {then}")

    def measure(self, stage: Callable[..., Any], *options: Any) -> Any:
        """Run a stage of this session, and once more in bfloat16 for the quantized formats that overflow in float16.

        A format's type changes between runs of a stage, never within: a row's key is that of the model it was
        measured with.
        """
        while True:
            result = stage(self, *options)
            if not self._overflowing:
                return result
            self.leave_float16(self._overflowing)
            self._overflowing.clear()

    def leave_float16(self, names: Iterable[str]) -> None:
        """Measure these formats in bfloat16 from now on."""
        record = self.record
        self.overflowed = sorted({*record.get("overflowed", ()), *names})
        write_atomic(self.folder / "study.json", json.dumps({**record, "overflowed": self.overflowed}, indent=1))

    def require(self, stage: str, setting: str | None = None) -> None:
        """Raise the last reason of a failure if nothing of a stage could be measured for this session's formats.

        Raises
        ------
        NothingMeasuredError
            There is no row, and a failure.
        """
        names = {precision.name for precision in self.precisions}
        failures = [row for row in self.ledger.rows(stage + FAILED) if row["precision"] in names]
        rows = [row for row in self.ledger.rows(stage) if setting in (None, row["setting"])]
        if failures and not self._overflowing and names.isdisjoint(row["precision"] for row in rows):
            raise NothingMeasuredError(f"nothing of stage {stage} could be measured: {failures[-1]['reason']}")

    @contextmanager
    def exclusive(self, notebook: str = "") -> Iterator[Clock]:
        """Measure while no other process measures into the same folder; wait for one that does, and say so.

        The block gets a clock with the time that its notebook, such as 02, may still take; what it takes is kept.
        """
        self.check_writable()
        waiting = f"another process is measuring into {self.folder}; waiting for it"
        with self.ledger.locked(".lock", lambda: tqdm.write(waiting)):
            if not self.replays:
                self.device.use()
            started_s, before = now_s(), self.ledger.revision
            is_planned = bool(notebook and self.minutes)
            taken_s = self._taken_s() if is_planned else {}
            allowed_s = budget.allowed_s(self.minutes, notebook, taken_s) if is_planned else math.inf
            clock = Clock(allowed_s, started_s, taken_s.get(notebook, 0.0))
            try:
                with released(), kernels.kept(self.folder):
                    existing.check(self)
                    yield clock
            finally:
                if is_planned and self.ledger.revision != before:
                    values = {"taken_s": clock.taken_s + clock.elapsed_s}
                    self.append(self.key("sitting", setting=notebook), values)
                    taken = f"notebook {notebook} took {values['taken_s'] / 60:.1f} minutes"
                    tqdm.write(f"{taken}; {max(0.0, clock.left_s) / 60:.1f} of those it may take are left")

    def _taken_s(self) -> dict[str, float]:
        """Return the seconds that each notebook took so far on this device, by number; overwriting begins anew."""
        keys = [self.key("sitting", setting=number) for number in budget.SHARES]
        rows = (self.ledger.find(key) for key in keys if self.counts(key))
        return {row["setting"]: row["taken_s"] for row in rows if row}

    def progress(self, total: int, what: str) -> tqdm:
        """Return a progress bar over `total` steps."""
        return tqdm(total=total, desc=what, unit="step", leave=False)

    def each_format(self, what: str, formats: Sequence[Precision] = ()) -> Iterator[Precision]:
        """Yield formats, or else all of this session; a progress bar says which is at work."""
        with self.progress(len(formats or self.precisions), what) as bar:
            for precision in formats or self.precisions:
                bar.set_postfix_str(precision.name)
                yield precision
                bar.update()

    # Checkpoints, and models loaded from them

    def checkpoint(self, precision: Precision, is_new: bool = False) -> Path:
        """Return the folder of a format's checkpoint; make it if it is missing, damaged or has to be `is_new`."""
        if precision.origin:
            existing.row(self, precision)
            return Path(existing.find(self, precision).path)
        precision = self.pinned(precision)
        folder = self.folder / "checkpoints" / precision.checkpoint
        if self.replays or (folder in self._verified and folder.exists()):  # bytes are read once
            return folder
        key = self.key("quantize", precision)
        row = self.ledger.find(key) if folder.exists() and not is_new else None
        damaged = files.damage(folder, row["manifest_sha256"]) if row else ""
        if damaged:
            tqdm.write(f"{precision.name}: {damaged} in {folder} is not as it was saved; making it again")
            self.source = self._resolved()  # the damage may be in a file of the source's
        if damaged or not row:
            with released():
                converted = checkpoint.convert(self.source, precision, folder, self.device)
            self.append(key, asdict(converted), {"manifest_sha256": file_sha256(folder / files.MANIFEST)})
        self._verified.add(folder)
        return folder

    @contextmanager
    def loaded(self, precision: Precision) -> Iterator[PreTrainedModel]:
        """Load a format's checkpoint for the block, and give its memory back, unless within `models_kept`.

        The block should stand in a function that is called once per format, within `exclusive`: the caller's variable
        keeps the model alive for as long as its frame lives.
        """
        folder = self.checkpoint(precision)
        release(workspaces=True)
        with released():
            yield kept(checkpoint.load, folder, self.pinned(precision), self.device)
