"""Is a study still what was measured? Every byte that has a check is read, every table is built again.

The ledger's lines check themselves; its rows hold the sha256 of the files they were counted from and of each
checkpoint's manifest, which holds that of the weights. Tables are nothing but the ledger seen again, so they are built
again and compared. Figures and the report are drawn from the same tables and are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from qnb.accuracy.evaluate import items_name
from qnb.errors import InputError, path_of
from qnb.ledger import Ledger, unchecked
from qnb.quantize import checkpoint as model
from qnb.report.tables import HEADLINE, markdown
from qnb.study import Study


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one part of a study."""

    part: str  # a path below the study's folder
    wrong: str  # empty where it is as it was measured


def verify(folder: str | Path) -> Iterator[Finding]:
    """Yield a finding for each part of the study in `folder`.

    Raises
    ------
    InputError
        There is no study in `folder`.
    """
    folder = path_of(folder).resolve()
    ledger = Ledger(folder)
    if not ledger.path.exists():
        raise InputError(f"{folder} holds no study (no ledger.jsonl); give the output folder of one")
    torn = ledger.path.read_bytes().rpartition(b"\n")[2]
    for wrong in ledger.damaged or [f"{len(torn)} bytes of a torn line at its end"] * bool(torn) or [""]:
        yield Finding("ledger.jsonl", wrong.removeprefix(f"{ledger.path}, "))
    record = _record(folder)
    yield Finding("study.json", "" if record else "missing, or changed since it was written")
    rows = list(ledger)
    yield from _files(folder, rows)
    yield from _counts(folder, rows)
    yield from _requests(folder)
    yield from _checkpoints(folder, rows)
    if record:
        yield from _tables(folder)


def _record(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(unchecked((folder / "study.json").read_bytes())))
    except (OSError, ValueError):
        return {}


def _files(folder: Path, rows: list[dict[str, Any]]) -> Iterator[Finding]:
    """Read the files that rows were counted from."""
    kept = [(items_name(row), row["items_sha256"]) for row in rows if "items_sha256" in row]
    samples = ("samples", "token_samples")
    kept += [(row[name], row[f"{name}_sha256"]) for row in rows for name in samples if f"{name}_sha256" in row]
    for name, sha256 in kept:
        same = (folder / name).is_file() and model.file_sha256(folder / name) == sha256
        yield Finding(name, "" if same else "missing, or not the file its row was made of")


def _counts(folder: Path, rows: list[dict[str, Any]]) -> Iterator[Finding]:
    """Count each task's right answers again, item by item."""
    for row in rows:
        path = folder / items_name(row) if "items_sha256" in row else None
        if path is None or not path.is_file():
            continue
        try:
            items = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            yield Finding(f"scores of {row['task']}, {row['precision']}", f"its items cannot be read ({error})")
            continue
        for score in row["scores"]:
            right = items[(items.task == score["task"]) & (items["filter"] == score["filter"])].correct
            if score["metric"] in HEADLINE and len(right) and not right.isna().any():
                same = abs(right.astype(float).mean() - score["value"]) < 1e-9
                part = f"{score['metric']} of {score['task']}, {row['precision']}"
                yield Finding(part, "" if same else "not what its items come to")


def _requests(folder: Path) -> Iterator[Finding]:
    """Read what tasks ask, line by line."""
    for path in sorted((folder / "requests").glob("*.jsonl")):
        try:
            for line in path.read_bytes().splitlines(keepends=True):
                unchecked(line)
            yield Finding(f"requests/{path.name}", "")
        except ValueError as error:
            yield Finding(f"requests/{path.name}", str(error))


def _checkpoints(folder: Path, rows: list[dict[str, Any]]) -> Iterator[Finding]:
    """Read every checkpoint whole."""
    sealed = {row["precision"]: row["manifest_sha256"] for row in rows if row["stage"] == "quantize"}
    for checkpoint in sorted((folder / "checkpoints").glob("[!.]*")):
        manifest = checkpoint / "manifest.json"
        whole = manifest.is_file() and model.file_sha256(manifest) == sealed.get(checkpoint.name)
        wrong = model.damage(checkpoint) if whole else "manifest.json"
        yield Finding(f"checkpoints/{checkpoint.name}", f"{wrong} is not as it was saved" if wrong else "")


def _tables(folder: Path) -> Iterator[Finding]:
    """Build every table again from the ledger's rows."""
    study = cache(lambda *precisions: Study("auto", precisions, folder))  # each names the ledger's damage
    for path in sorted((folder / "tables").glob("*.csv")):
        part = f"tables/{path.name}"
        try:
            made = json.loads(unchecked((path.parent / f".{path.stem}.json").read_bytes()))
        except (OSError, ValueError):
            yield Finding(part, "what it was built for is missing, or changed since it was written")
            continue
        frame = study(*made["precisions"]).build(path.stem)
        for file, text in ((path, frame.to_csv(index=False)), (path.with_suffix(".md"), markdown(frame))):
            same = file.is_file() and file.read_bytes() == text.encode()
            yield Finding(
                f"tables/{file.name}", "" if same else "not what the ledger's rows give; run its notebook again"
            )
