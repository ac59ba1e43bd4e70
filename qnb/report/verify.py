"""Check that a study is still what was measured: files against their hashes, tables against the rows.

Figures and the report are drawn from the same tables and are not read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qnb.errors import InputError, expand_path
from qnb.ledger import Ledger, file_sha256
from qnb.precision import PRECISIONS
from qnb.quantize.files import damage
from qnb.report.results import Results
from qnb.report.tables import TABLES, build, markdown


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one part of a study."""

    part: str  # a path below the study's folder
    problem: str  # empty where it is as it was measured


def verify(folder: str | Path) -> Iterator[Finding]:
    """Yield a finding for each part of the study in `folder`.

    Raises
    ------
    InputError
        There is no study in `folder`.
    """
    ledger = Ledger(expand_path(folder).resolve())
    if not ledger.path.exists():
        raise InputError(f"{folder} holds no study (no ledger.jsonl); give the output folder of one")
    torn = [] if ledger.path.read_bytes().endswith(b"\n") else ["its last line is torn"]
    yield Finding("ledger.jsonl", "; ".join([*ledger.damaged, *torn]))
    results = Results.read(ledger)
    for row in results.rows:
        for kind in ("items", "samples", "tokens"):
            if name := row.get(f"{kind}_file"):
                path = ledger.folder / name
                is_same = path.is_file() and file_sha256(path) == row[f"{kind}_sha256"]
                yield Finding(name, "" if is_same else "missing, or not the file its row was made of")
    for row in results.checkpoints.to_dict("records"):
        if PRECISIONS[row["precision"]].origin:
            continue  # it lies where it was made
        name = PRECISIONS[row["precision"]].in_half(row["dtype"]).checkpoint
        checkpoint = ledger.folder / "checkpoints" / name
        if checkpoint.is_dir():  # every byte is read
            damaged = damage(checkpoint, row["manifest_sha256"])
            yield Finding(f"checkpoints/{name}", f"{damaged} is not as it was saved" if damaged else "")
    yield from _tables(ledger.folder / "tables", results)


def _tables(folder: Path, results: Results) -> Iterator[Finding]:
    """Build every table again from the rows."""
    for name in TABLES:
        path = folder / f"{name}.csv"
        if path.exists():
            table = build(results, name)
            for file, text in ((path, table.to_csv(index=False)), (path.with_suffix(".md"), markdown(table))):
                is_same = file.is_file() and file.read_bytes() == text.encode()
                yield Finding(f"tables/{file.name}", "" if is_same else "not what the rows give: run its notebook")
