"""What a study measured, as frames, read from its ledger.

Figures, panels and the report take these frames and nothing else. They draw a study on a machine that has neither its
GPU nor its model.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Self

import pandas as pd

from qnb.accuracy.statistics import unpack
from qnb.flags import Flag
from qnb.ledger import Ledger, Row, file_sha256
from qnb.memory import MIB
from qnb.precision import PRECISIONS, recall, title
from qnb.speed.roofline import derived

# columns that every frame of speeds has, as Tables 3 and 4 show them; missing values are NaN
SPEED = (
    "precision", "engine", "batch_size", "capped", "requests", "prompt_tokens", "new_tokens", "passes", "stop_reason",
    "throughput_rps", "throughput_tps", "total_s", "seconds_per_request", "batch_latency_s", "ttft_s", "tpot_s",
    "itl_p50_s", "itl_p95_s", "itl_p99_s", "latency_p50_s", "latency_p95_s", "latency_p99_s", "kernel_s_per_token",
    "kernels_per_token", "weights_mib", "kv_cache_mib", "peak_reserved_mib", "energy_j_per_request",
    "energy_above_idle_j_per_request", "energy_j_per_token", "energy_above_idle_j_per_token", "throughput_spread_pct",
    "gpu_busy_pct", "mbu_pct", "mfu_pct", "bound", "monitor", "utilization_pct", "peak_memory_mib",
    "peak_used_memory_mib", "power_w", "clock_mhz", "flags", "note",
)  # fmt: skip
# more columns that they all have
BESIDE = ("setting", "batch_spread_pct", "bytes_per_step", "flops_per_step", "flops_by_type", "peak_bytes_per_s",
          "peak_flop_per_s", "peak_allocated_mib", "measured_at", "conditions", "samples_file")  # fmt: skip
CONDITIONS = ("workload", "device", "memory_limit_mib", "cap")  # two rows that differ in one are not compared
OF_MEDIANS = ("gpu_busy_pct", "mbu_pct", "mfu_pct", "bound")  # kernels are traced in the first pass alone
STAGES = {"accuracy_rows": "accuracy", "batches": "batch", "divergence": "divergence", "lengths": "lengths",
          "batch_sensitivity": "batch_sensitivity"}  # fmt: skip
ORIGIN = ("version", "device", "host", "date")  # of the rows that a table is made of
MARGIN_PP = 1.0  # the loss of accuracy that is accepted, unless a study says otherwise
EMULATED = "bfloat16 is emulated"  # of a row, where the device has no units for it
NOT_FUSED = ", not fused"  # after a captured engine's name, where other rows are
# words of tasks' names that are written in another way
WORDS = {"arc": "ARC", "gsm8k": "GSM8K", "cot": "CoT", "hellaswag": "HellaSwag", "mmlu": "MMLU", "stem": "STEM"}


def task_name(task: str) -> str:
    """Return a task's name as people read it."""
    return " ".join(WORDS.get(word, word) for word in task.removeprefix("sample_").split("_"))


def _no_speeds() -> pd.DataFrame:
    return pd.DataFrame(columns=[*SPEED, *BESIDE], dtype=float)


@dataclass(frozen=True)
class Results:
    """One study's frames; a frame is empty where nothing was measured.

    Formats stand in the order of `PRECISIONS`, and eager before other engines. Every frame of speeds has all columns
    of `SPEED` and `BESIDE`.
    """

    name: str  # of the study
    model: str
    device: str
    folder: Path | None = None  # where the files that rows name lie
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)  # a row a task, metric, filter and format
    accuracy_rows: pd.DataFrame = field(default_factory=pd.DataFrame)
    passes: pd.DataFrame = field(default_factory=_no_speeds)  # a row a pass, and what could not run; see `setting`
    bs1: pd.DataFrame = field(default_factory=_no_speeds)  # a row a format and engine: medians over passes
    maxbatch: pd.DataFrame = field(default_factory=_no_speeds)  # the same
    sweep: pd.DataFrame = field(default_factory=_no_speeds)  # a row a format, engine and batch size that was timed
    batches: pd.DataFrame = field(default_factory=pd.DataFrame)  # searches for the largest batch
    divergence: pd.DataFrame = field(default_factory=pd.DataFrame)
    batch_sensitivity: pd.DataFrame = field(default_factory=pd.DataFrame)
    lengths: pd.DataFrame = field(default_factory=pd.DataFrame)  # one row: the prompts' lengths
    checkpoints: pd.DataFrame = field(default_factory=pd.DataFrame)
    rows: tuple[Row, ...] = ()  # what was measured
    failures: tuple[Row, ...] = ()  # what could not be, each with its reason
    margin_pp: float = MARGIN_PP
    cache: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # what was made of the other fields

    @classmethod
    def read(cls, ledger: Ledger, margin_pp: float = MARGIN_PP) -> Self:
        """Read the newest row of each key."""
        rows = tuple(ledger.rows())
        recall(rows)
        newest = rows[-1] if rows else {}
        frames = {name: in_order(pd.DataFrame(ledger.rows(stage))) for name, stage in STAGES.items()}
        passes = _passes([row for row in rows if row["stage"] in ("perf", "sweep")])
        frames |= {setting: medians(passes[passes.setting == setting]) for setting in ("bs1", "maxbatch", "sweep")}
        scores = in_order(_scores(ledger.rows("accuracy")))
        return cls(
            ledger.folder.resolve().name, newest.get("model", ""), newest.get("device", ""), ledger.folder,
            scores, passes=passes, rows=rows, failures=tuple(ledger.failures()), margin_pp=margin_pp,
            checkpoints=_checkpoints(in_order(pd.DataFrame(ledger.rows("quantize")))), **frames,
        )  # fmt: skip

    @property
    def label(self) -> str:
        """The model and the device."""
        return ", ".join(filter(None, (self.model, self.device)))

    @property
    def precisions(self) -> list[str]:
        """The formats that anything was measured of."""
        frames = (self.checkpoints, self.scores, self.divergence, self.bs1, self.maxbatch, self.sweep)
        names = {name for frame in frames if "precision" in frame for name in frame.precision}
        return [name for name in PRECISIONS if name in names]

    def timed(self, setting: str) -> pd.DataFrame:
        """Return the medians of setting ``"bs1"``, ``"maxbatch"`` or ``"sweep"``."""
        return {"bs1": self.bs1, "maxbatch": self.maxbatch, "sweep": self.sweep}[setting]

    @property
    def speed(self) -> pd.DataFrame:
        """Batch size 1, the sweep and the largest batch in one frame; ``setting`` tells them apart."""
        return stack((self.bs1, self.sweep, self.maxbatch))

    @cached_property
    def origins(self) -> pd.DataFrame:
        """Where each row comes from: `ORIGIN`, beside its stage, setting, precision and engine."""
        names = ["stage", "setting", "precision", "engine", "device", "host", "versions", "measured_at"]
        rows = pd.DataFrame(self.rows, columns=names)
        version = rows.versions.map(lambda versions: versions.get("qnb"), na_action="ignore")
        return rows.assign(version=version, date=rows.measured_at.str[:10]).fillna("")

    @cached_property
    def samples(self) -> pd.DataFrame:
        """The monitor's readings during each first pass at batch size 1: t_s, the readings, precision and engine."""
        about = ["precision", "engine"]
        first = self.passes[self.passes.setting == "bs1"].dropna(subset=["total_s"]).drop_duplicates(about)
        return stack(
            pd.read_parquet(path).assign(**{name: row[name] for name in about})
            for row in first.to_dict("records") if (path := self._path(row["samples_file"]))
        )  # fmt: skip

    def items(self, row: Mapping[str, Any]) -> pd.DataFrame | None:
        """Return the items that an accuracy row was counted from; None where their file is gone or was changed."""
        path = self._path(row.get("items_file"))
        return unpack(pd.read_parquet(path)) if path and file_sha256(path) == row["items_sha256"] else None

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what was made of this study under a name; it is made at the first call. Do not write into it."""
        if name not in self.cache:
            self.cache[name] = make()
        return self.cache[name]

    def _path(self, name: Any) -> Path | None:
        """Return the path of a file that a row names; None where it names none, or the file is gone."""
        path = self.folder / name if self.folder and isinstance(name, str) else None
        return path if path and path.is_file() else None


def read_reference(folder: Path) -> dict[str, Results]:
    """Return the studies kept below `folder`, by name."""
    return {path.parent.name: Results.read(Ledger(path.parent)) for path in sorted(folder.glob("*/ledger.jsonl"))}


def stack(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of several frames, one below the other, with every column that any of them has."""
    frames = list(frames)
    columns = list(dict.fromkeys(name for frame in frames for name in frame))
    # a column that is empty in one frame has no say in the type of the whole
    filled = [frame.dropna(axis="columns", how="all") for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True).reindex(columns=columns) if filled else pd.DataFrame(columns=columns)


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort rows by format as `PRECISIONS` lists them, eager first; otherwise they stay as they are."""
    by = [name for name in ("precision", "engine") if name in frame]
    order = {name: place for place, name in enumerate([*PRECISIONS, "eager"])}
    place = {"key": lambda names: names.map(order).fillna(len(order)), "kind": "stable", "ignore_index": True}
    return frame.sort_values(by, **place) if by else frame


def medians(passes: pd.DataFrame) -> pd.DataFrame:
    """Reduce passes to a row a format, engine and batch size; what was not timed is left out.

    Numbers are medians. Other values are the last pass's. Flags are those of all passes.
    """
    timed = passes.dropna(subset=["total_s"])
    if timed.empty:
        return _speed_frame(pd.DataFrame())
    runs = timed.groupby(["precision", "engine", "batch_size"], sort=False)
    numbers = timed.select_dtypes("number").columns.drop("batch_size")
    spread = runs.throughput_rps.max() / runs.throughput_rps.min() - 1
    frame = runs.last().assign(**runs[list(numbers)].median()).assign(
        passes=runs.size(),
        throughput_spread_pct=100 * spread.where(runs.size() > 1),
        flags=runs["flags"].apply(lambda lists: list(dict.fromkeys(chain.from_iterable(lists)))),
    ).reset_index().infer_objects()  # fmt: skip
    shares = [derived(row) for row in frame.to_dict("records")]
    return _speed_frame(frame.assign(**{name: [each[name] for each in shares] for name in OF_MEDIANS}))


def _passes(rows: list[Row]) -> pd.DataFrame:
    """Return a row a pass of the newest workload, with derived values and the conditions it was measured under."""
    if not rows:
        return _no_speeds()
    conditions = [", ".join(str(row.get(name)) for name in CONDITIONS) for row in rows]
    frame = pd.DataFrame([{**row, **derived(row)} for row in rows]).assign(conditions=conditions)
    frame["setting"] = frame.setting.where(frame.stage == "perf", "sweep")
    about = frame.reindex(columns=["dtype", "bf16", "note"]).fillna("")
    is_emulated = about["dtype"].eq("bfloat16") & about.bf16.eq("emulated")
    frame["note"] = (about.note + is_emulated.map({True: f"; {EMULATED}", False: ""})).str.removeprefix("; ")
    line = ["setting", "precision", "engine"]
    frame = frame[frame.fingerprint == frame.groupby(line).fingerprint.transform("last")]
    frame = frame.sort_values("repeat", key=pd.to_numeric, kind="stable")
    # a pass that is older than the first one is an earlier run's
    first = frame.groupby([*line, "batch_size"]).measured_at.transform("first")
    return _speed_frame(frame[frame.measured_at >= first])


def _speed_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame of speeds with all their columns, whole batch sizes, and flags as lists."""
    frame = frame.dropna(axis="columns", how="all")
    frame = in_order(frame.reindex(columns=list(dict.fromkeys([*SPEED, *BESIDE, *frame]))))
    flags = pd.Series(map(flag_list, frame["flags"]), frame.index, dtype=object)
    return frame.assign(flags=flags).astype({"batch_size": int})


def flag_list(flags: Any) -> list[str]:
    """Return flags as a list: rows hold one, tables a text, and where there are none, the value may be missing."""
    return flags.split("; ") if isinstance(flags, str) else flags if isinstance(flags, list) else []


def is_unfused(runs: pd.DataFrame) -> pd.Series:
    """Return which rows were captured without fusing small kernels; none where all captured rows were."""
    runs = runs.reindex(columns=["engine", "flags", "throughput_rps"])  # frames of accuracy have none
    is_flagged = runs["flags"].map(lambda flags: Flag.UNFUSED in flag_list(flags)).astype(bool)
    is_fused = ~is_flagged & (runs.engine != "eager") & runs.throughput_rps.notna()
    return is_flagged & is_fused.any()


def unfused(runs: pd.DataFrame) -> str:
    """Return the formats of the rows of `is_unfused`, in words; "" where captured rows can be compared."""
    return ", ".join(map(title, runs.precision[is_unfused(runs)].unique()))


def _scores(rows: Iterable[Row]) -> pd.DataFrame:
    """Unfold accuracy rows to a row a score; ``asked`` is the task that was asked for."""
    return pd.DataFrame(
        {"precision": row["precision"], "asked": row["task"], "limit": row["limit"], "unit": "%", **score}
        for row in rows for score in row["scores"]
    )  # fmt: skip


def _checkpoints(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the weights in MiB, the share that is quantized, and the bits that one takes: of all, and of the quantized.

    bits_per_quantized_weight is missing where none is quantized. A row without `dtype` has its format's own.
    """
    if frame.empty:
        return frame
    usual = frame.precision.map({name: precision.dtype for name, precision in PRECISIONS.items()})
    stored = frame.embedding_bytes + frame.linear_bytes + frame.other_bytes
    return frame.reindex(columns=list(dict.fromkeys([*frame, "ran_as", "is_unpacked"]))).assign(
        dtype=frame.get("dtype", usual).fillna(usual),
        weights_mib=stored / MIB,
        bits_per_weight=8 * stored / frame.parameters,
        quantized_pct=100 * frame.quantized_parameters / frame.parameters,
        bits_per_quantized_weight=8 * frame.quantized_bytes / frame.quantized_parameters,
    )
