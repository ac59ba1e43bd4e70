"""What a study measured, as frames: read from its ledger, or from the tables that were kept of one.

Figures, panels and the report take these and nothing else, so they draw a study on a machine that has neither its
GPU nor its model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from qnb.errors import InputError
from qnb.precision import PRECISIONS
from qnb.report import paper
from qnb.report.tables import stacked
from qnb.speed.roofline import bound, shares

ALIKE = ["precision", "engine", "batch_size"]  # runs that are repeats of one another
GROUPS = ("mmlu", "sample_exam")  # tasks whose parts stand in Table 1 beside them
TABLES = {1: "table1_accuracy", 2: "table2_change", 3: "table3_bs1", 4: "table4_maxbatch"}

SPEED = ("precision", "engine", "batch_size", "throughput_rps")
NEEDED = {TABLES[1]: ("task", "metric", "filter", "items"), TABLES[2]: ("task", "precision", "change_pp"),
          TABLES[3]: SPEED, TABLES[4]: SPEED, "sweep": SPEED}  # fmt: skip
POSITIVE = ["batch_size", "throughput_rps", "batch_latency_s", "tpot_s"]
ELSE = "put back the file, or take it out of its folder"


@dataclass(frozen=True)
class Results:
    """One study's frames; an empty frame where nothing was measured."""

    name: str  # of the study
    model: str
    device: str
    tables: Mapping[int, pd.DataFrame]  # the paper's four, by number
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)  # a row a task, metric, filter and precision
    bs1: pd.DataFrame = field(default_factory=pd.DataFrame)  # a row a precision, engine and batch size, as `medians`
    maxbatch: pd.DataFrame = field(default_factory=pd.DataFrame)  # the same
    sweep: pd.DataFrame = field(default_factory=pd.DataFrame)  # the same
    samples: pd.DataFrame = field(default_factory=pd.DataFrame)  # the monitor's readings: setting, precision, t_s, ...
    checkpoints: pd.DataFrame = field(default_factory=pd.DataFrame)  # rows of stage quantize
    divergence: pd.DataFrame = field(default_factory=pd.DataFrame)
    rows: tuple[Mapping[str, Any], ...] = ()  # what was measured; none where tables were read
    failures: tuple[Mapping[str, Any], ...] = ()  # what could not be, each with its reason

    @property
    def of(self) -> str:
        """The model and the device, as a picture tells what it is of."""
        return ", ".join(filter(None, (self.model, self.device)))

    @property
    def speed(self) -> pd.DataFrame:
        """Batch size 1, the sweep and the largest batch, one below the other; ``setting`` tells them apart."""
        named = (("bs1", self.bs1), ("sweep", self.sweep), ("maxbatch", self.maxbatch))
        return stacked(frame.assign(setting=setting) for setting, frame in named if len(frame))


def medians(rows: pd.DataFrame) -> pd.DataFrame:
    """Return performance rows with repeats made one: medians, how many, and the throughput's range.

    Texts are the last row's; ``bound`` is of the medians, as kernels are traced in the first pass alone; flags are
    those of all. An engine that could not run has a row without a speed: it is left out.
    """
    if not {*ALIKE, "throughput_rps"} <= set(rows):
        return pd.DataFrame()
    rows = rows.dropna(subset=["batch_size", "throughput_rps"]).astype({"batch_size": int})
    made = []
    for key, runs in rows.groupby(ALIKE, sort=False):
        row = dict(zip(ALIKE, key, strict=True))
        for name in runs.columns.difference(ALIKE, sort=False):
            values = runs[name].dropna()
            if is_numeric_dtype(runs[name]) and not is_bool_dtype(runs[name]):
                row[name] = values.median()
            else:
                row[name] = values.iloc[-1] if len(values) else None
        row |= {"repeats": len(runs), "low_rps": runs.throughput_rps.min(), "high_rps": runs.throughput_rps.max()}
        if "flags" in runs:
            row["flags"] = list(dict.fromkeys(flag for flags in runs["flags"].dropna() for flag in flags))
        if "bound" in runs:
            row["bound"] = bound(*shares(row))
        made.append(row)
    return pd.DataFrame(made)


def readings(folder: Path, rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the monitor's readings during each row that has any, one below the other."""
    parts = []
    for row in rows:
        name = row.get("samples")
        path = folder / "samples" / Path(name).name if isinstance(name, str) and name else None
        if path and path.exists():
            about = {key: row[key] for key in ("setting", "precision", "engine")}
            parts.append(pd.read_parquet(path).assign(**about))
    return stacked(parts)


def reference(folder: Path) -> dict[str, Results]:
    """Return the studies whose tables were kept, each in a folder of its own, named device-model, below `folder`.

    Raises
    ------
    InputError
        A file there is no table.
    """
    kept = {path.name: {table.stem: _read(table) for table in path.glob("*.csv")}
            for path in sorted(folder.glob("*-*/"))}  # fmt: skip
    return {name: _of_tables(name, tables) for name, tables in kept.items() if tables}


def _read(table: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(table)
    except (OSError, ValueError) as error:  # pandas' own are ValueErrors
        raise InputError(f"{table} is no table ({error}); {ELSE}") from error
    if lacking := [name for name in NEEDED.get(table.stem, ()) if name not in frame]:
        raise InputError(f"{table} has no column {' or '.join(lacking)}; {ELSE}")
    if unknown := sorted(set(map(str, frame.get("precision", ()))) - set(PRECISIONS)):
        raise InputError(f"{table} has precision {', '.join(unknown)}; there are {', '.join(PRECISIONS)}; {ELSE}")
    for name in frame.columns.intersection(POSITIVE) if len(frame) else ():
        if not is_numeric_dtype(frame[name]) or (frame[name] <= 0).any():
            raise InputError(f"{table} has text, 0 or less in column {name}, which is of positive numbers; {ELSE}")
    return frame


def _of_tables(name: str, kept: Mapping[str, pd.DataFrame]) -> Results:
    device, _, model = name.partition("-")
    none = pd.DataFrame()
    tables = {number: kept.get(stem, none) for number, stem in TABLES.items()}
    bs1, maxbatch, sweep = (_as_measured(table) for table in (tables[3], tables[4], kept.get("sweep", none)))
    return Results(
        name, model, device, tables, _unfold(tables[1]), bs1, maxbatch, sweep,
        divergence=kept.get("divergence", none),
    )  # fmt: skip


def _as_measured(table: pd.DataFrame) -> pd.DataFrame:
    """Return Table 3, 4 or a sweep's by the names that performance rows have, without engines that could not run."""
    if table.empty:
        return table
    table = table.reindex(columns=list(dict.fromkeys([*table, "throughput_rps", "throughput_spread_pct"])))
    table = table.dropna(subset=["throughput_rps"])
    renamed = {"utilization_pct": "utilization_pct", "power_w": "power_w"}
    table = table[[name for name in table if not name.startswith("published_")]].rename(columns=renamed)
    half = (1 + table.throughput_spread_pct.fillna(0) / 100) ** 0.5  # the spread is the range over the lowest
    return table.assign(low_rps=table.throughput_rps / half, high_rps=table.throughput_rps * half)


def _unfold(table: pd.DataFrame) -> pd.DataFrame:
    """Return Table 1 as scores: a row a task, metric, filter and precision."""
    rows = []
    for row in table.to_dict("records"):
        if row["metric"].startswith("mean"):  # computed anew from the others
            continue
        asked = next((group for group in GROUPS if row["task"].startswith(f"{group}_")), row["task"])
        about = {name: row[name] for name in ("task", "metric", "filter", "items")}
        about |= {
            "of": row.get("of"),
            "asked": asked,
            "limit": row["items"],
            "group": row["task"] in GROUPS or (asked != row["task"] and row["task"] in paper.TABLE1),
        }
        for precision in PRECISIONS:
            value = row.get(f"{precision}_pct")
            if value is not None and pd.notna(value):
                error = row[f"{precision}_stderr_pp"] / 100
                rows.append({**about, "precision": precision, "value": value / 100, "stderr": error})
    return pd.DataFrame(rows)
