"""What a study measured, as frames: read from its ledger, or from the tables that were kept of one.

Figures, panels and the report take these frames and nothing else. They draw a study on a machine that has neither its
GPU nor its model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from qnb.errors import InputError
from qnb.ledger import FAILED, Ledger, Row, file_sha256
from qnb.memory import MIB
from qnb.precision import PRECISIONS
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
BESIDE = ("low_rps", "high_rps", "batch_spread_pct", "bytes_per_step", "flops_per_step", "flops_by_type",
          "peak_bytes_per_s", "peak_flop_per_s", "idle_power_w", "peak_allocated_mib", "measured_at", "conditions",
          "model", "setting")  # fmt: skip
CONDITIONS = ("workload", "device", "memory_limit_mib", "cap")  # two rows that differ in one are not compared
OF_MEDIANS = ("gpu_busy_pct", "mbu_pct", "mfu_pct", "bound")  # kernels are traced in the first pass alone
# words of tasks' names that are written in another way
WORDS = {"arc": "ARC", "gsm8k": "GSM8K", "cot": "CoT", "hellaswag": "HellaSwag", "mmlu": "MMLU", "stem": "STEM"}


def task_name(task: str) -> str:
    """Return a task's name as people read it."""
    return " ".join(WORDS.get(word, word) for word in task.removeprefix("sample_").split("_"))


def _speeds() -> pd.DataFrame:
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
    folder: Path | None = None  # where the files that rows name lie; None for kept tables
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)  # a row a task, metric, filter and format
    accuracy_rows: pd.DataFrame = field(default_factory=pd.DataFrame)
    bs1: pd.DataFrame = field(default_factory=_speeds)  # a row a format and engine: medians over passes
    maxbatch: pd.DataFrame = field(default_factory=_speeds)  # the same
    bs1_passes: pd.DataFrame = field(default_factory=_speeds)  # a row a pass, and one an engine that cannot run
    maxbatch_passes: pd.DataFrame = field(default_factory=_speeds)  # the same
    sweep: pd.DataFrame = field(default_factory=_speeds)  # a row a format, engine and batch size that was timed
    sweep_rows: pd.DataFrame = field(default_factory=_speeds)  # what did not fit too
    batches: pd.DataFrame = field(default_factory=pd.DataFrame)  # searches for the largest batch
    divergence: pd.DataFrame = field(default_factory=pd.DataFrame)
    batch_sensitivity: pd.DataFrame = field(default_factory=pd.DataFrame)
    lengths: pd.DataFrame = field(default_factory=pd.DataFrame)  # one row: the prompts' lengths
    checkpoints: pd.DataFrame = field(default_factory=pd.DataFrame)
    rows: tuple[Row, ...] = ()  # what was measured; none for kept tables
    failures: tuple[Row, ...] = ()  # what could not be, each with its reason
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # kept ones by name
    built: dict[str, pd.DataFrame] = field(default_factory=dict, init=False, repr=False)  # tables made of the others

    @classmethod
    def read(cls, ledger: Ledger) -> Results:
        """Read the newest row of each key."""
        rows = tuple(row for row in ledger.rows() if not row["stage"].endswith(FAILED))

        def stage(name: str, setting: str = "") -> list[Row]:
            return [row for row in rows if row["stage"] == name and setting in ("", row["setting"])]

        def frame(name: str) -> pd.DataFrame:
            return in_order(pd.DataFrame(stage(name)))

        bs1, maxbatch, sweep = (_passes(stage(*key)) for key in (("perf", "bs1"), ("perf", "maxbatch"), ("sweep",)))
        return cls(
            name=ledger.folder.resolve().name,
            model=rows[-1].get("model", "") if rows else "",
            device=rows[-1].get("device", "") if rows else "",
            folder=ledger.folder,
            scores=in_order(_scores(stage("accuracy"))),
            accuracy_rows=frame("accuracy"),
            bs1=medians(bs1),
            maxbatch=medians(maxbatch),
            bs1_passes=bs1,
            maxbatch_passes=maxbatch,
            sweep=medians(sweep),
            sweep_rows=sweep,
            batches=frame("batch"),
            divergence=frame("divergence"),
            batch_sensitivity=frame("batch_sensitivity"),
            lengths=frame("lengths"),
            checkpoints=_checkpoints(frame("quantize")),
            rows=rows,
            failures=tuple(ledger.failures()),
        )

    @classmethod
    def of_tables(cls, folder: Path) -> Results:
        """Read the tables that were kept of a study, in a folder named device-model.

        Raises
        ------
        InputError
            A file there is not such a table.
        """
        try:
            tables = {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}
            names = ("table3_bs1", "table4_maxbatch", "sweep")
            bs1, maxbatch, sweep = (_kept_speeds(tables[name]) if name in tables else _speeds() for name in names)
        except (OSError, ValueError, KeyError) as error:  # pandas' own are ValueErrors
            raise InputError(f"{folder} holds a file that is no table of a study ({error}); remove it") from error
        device, _, model = folder.name.partition("-")
        frames = {name: tables[name] for name in ("scores", "divergence", "batch_sensitivity") if name in tables}
        return cls(folder.name, model, device, bs1=bs1, maxbatch=maxbatch, sweep=sweep, tables=tables, **frames)

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
        """Return the medians of setting ``"bs1"`` or ``"maxbatch"``."""
        return {"bs1": self.bs1, "maxbatch": self.maxbatch}[setting]

    @property
    def speed(self) -> pd.DataFrame:
        """Batch size 1, the sweep and the largest batch in one frame; ``setting`` tells them apart."""
        frames = {"bs1": self.bs1, "sweep": self.sweep, "maxbatch": self.maxbatch}
        return stack([frame.assign(setting=setting) for setting, frame in frames.items()])

    @cached_property
    def samples(self) -> pd.DataFrame:
        """The monitor's readings during each first pass: t_s, the readings, setting, precision and engine."""
        parts = []
        for frame in (self.bs1_passes, self.maxbatch_passes):
            first = frame.dropna(subset=["total_s"]).drop_duplicates(["precision", "engine"])
            for row in first.to_dict("records"):
                path = self._path(row.get("samples_file"))
                if path is not None and path.is_file():
                    about = {name: row[name] for name in ("setting", "precision", "engine")}
                    parts.append(pd.read_parquet(path).assign(**about))
        return stack(parts)

    def items(self, row: Mapping[str, Any]) -> pd.DataFrame | None:
        """Return the items that an accuracy row was counted from; None where their file is gone or was changed."""
        path = self._path(row.get("items_file"))
        if path is None or not path.is_file() or file_sha256(path) != row["items_sha256"]:
            return None
        return pd.read_parquet(path)

    def _path(self, name: Any) -> Path | None:
        return self.folder / name if self.folder is not None and isinstance(name, str) and name else None


def read_reference(folder: Path) -> dict[str, Results]:
    """Return the studies kept below `folder`, each as tables in a folder named device-model.

    Raises
    ------
    InputError
        A file there is not such a table.
    """
    return {path.name: Results.of_tables(path) for path in sorted(folder.glob("*-*/")) if any(path.glob("*.csv"))}


def stack(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of several frames, one below the other, with every column that any of them has."""
    frames = list(frames)
    columns = list(dict.fromkeys(name for frame in frames for name in frame))
    # a column that is empty in one frame has no say in the type of the whole
    filled = [frame.dropna(axis="columns", how="all") for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True).reindex(columns=columns) if filled else pd.DataFrame(columns=columns)


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort rows by format as `PRECISIONS` lists them, eager first; otherwise they stay as they are."""
    if frame.empty or "precision" not in frame:
        return frame
    rank = frame.precision.map({name: place for place, name in enumerate(PRECISIONS)})
    later = frame.engine != "eager" if "engine" in frame else False
    order = frame.assign(rank=rank, later=later).sort_values(["rank", "later"], kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def medians(passes: pd.DataFrame) -> pd.DataFrame:
    """Reduce passes to a row a format, engine and batch size; what was not timed is left out.

    Numbers are medians. Other values are the last pass's. Flags are those of all passes.
    """
    rows = []
    for _, runs in passes.dropna(subset=["total_s"]).groupby(["precision", "engine", "batch_size"], sort=False):
        row = {name: known.iloc[-1] if len(known := values.dropna()) else None for name, values in runs.items()}
        row |= runs.select_dtypes("number").median().to_dict()
        low, high = runs.throughput_rps.min(), runs.throughput_rps.max()
        row |= {"passes": len(runs), "low_rps": low, "high_rps": high}
        row["throughput_spread_pct"] = 100 * (high / low - 1) if len(runs) > 1 else None
        row["flags"] = list(dict.fromkeys(flag for flags in runs["flags"] for flag in flags))
        shares = derived(row)
        rows.append(row | {name: shares[name] for name in OF_MEDIANS})
    return _speed_frame(pd.DataFrame(rows))


def _passes(rows: list[Row]) -> pd.DataFrame:
    """Return a row a pass of the newest workload, with derived values and the conditions it was measured under."""
    if not rows:
        return _speeds()
    conditions = [", ".join(str(row.get(name)) for name in CONDITIONS) for row in rows]
    frame = _speed_frame(pd.DataFrame([{**row, **derived(row)} for row in rows]).assign(conditions=conditions))
    group = [frame.precision, frame.engine]
    frame = frame[frame.fingerprint == frame.fingerprint.groupby(group).transform("last")]
    frame = in_order(frame.sort_values("repeat", kind="stable", key=pd.to_numeric))
    # passes end where an earlier one settled after they were measured: that run was a new one
    stopped = pd.to_datetime(frame.measured_at).where(frame.stop_reason.fillna("").ne(""))
    settled = stopped.groupby([frame.precision, frame.engine]).transform(lambda times: times.cummax().ffill().shift())
    return frame[~(settled > pd.to_datetime(frame.measured_at))].reset_index(drop=True)


def _speed_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame of speeds with all their columns, whole batch sizes, and flags as lists."""
    frame = frame.dropna(axis="columns", how="all")
    frame = in_order(frame.reindex(columns=list(dict.fromkeys([*SPEED, *BESIDE, *frame]))))
    flags = [value if isinstance(value, list) else [] for value in frame["flags"]]
    return frame.assign(flags=pd.Series(flags, frame.index, dtype=object)).astype({"batch_size": int})


def _scores(rows: list[Row]) -> pd.DataFrame:
    """Unfold accuracy rows to a row a score; ``asked`` is the task that was asked for."""
    return pd.DataFrame(
        [
            {"precision": row["precision"], "asked": row["task"], "limit": row["limit"], **score}
            for row in rows
            for score in row["scores"]
        ]
    )


def _checkpoints(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the weights in MiB, and the measured bits of a quantized weight (of any where none is quantized)."""
    if frame.empty:
        return frame
    stored = frame.embedding_bytes + frame.linear_bytes + frame.other_bytes
    is_quantized = frame.quantized_parameters > 0
    counted_bytes = frame.quantized_bytes.where(is_quantized, stored)
    counted = frame.quantized_parameters.where(is_quantized, frame.parameters)
    return frame.assign(weights_mib=stored / MIB, bits_per_weight=8 * counted_bytes / counted)


def _kept_speeds(table: pd.DataFrame) -> pd.DataFrame:
    """Return a kept Table 3, 4 or sweep as a frame of speeds, without engines that could not run."""
    frame = table.dropna(subset=["throughput_rps"])
    if set(frame.precision) - set(PRECISIONS):
        raise ValueError(f"unknown formats beside {', '.join(PRECISIONS)}")
    flags = [
        text.split("; ") if isinstance(text, str) and text else [] for text in frame.get("flags", [""] * len(frame))
    ]
    frame = _speed_frame(frame.assign(flags=pd.Series(flags, frame.index, dtype=object)))
    half = (1 + frame.throughput_spread_pct.fillna(0) / 100) ** 0.5  # the spread is the range over the lowest
    return frame.assign(low_rps=frame.throughput_rps / half, high_rps=frame.throughput_rps * half)
