"""Pack a measured study for outputs/reference: ``python tests/bench/keep.py outputs/reference/NAME STUDY...``.

Kept are the newest row of each key and the files of items and monitors, written anew. Left out are checkpoints, older
rows, texts of a data set, each token's divergence, which a row has reduced to means and intervals, and the readings
of a sweep. Each token's time is kept in single precision. Of several folders of one study, the first that has a row
counts.
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from qnb.ledger import FAILED, Ledger, Row, row_key, write_parquet

KINDS = ("items", "samples", "tokens")


def name(row: Row) -> tuple[object, ...]:
    """Return what a row is about, measured or failed."""
    return row_key({**row, "stage": row["stage"].removesuffix(FAILED)})


def add(study: Path, kept: Path) -> None:
    ledger, packed = Ledger(study), Ledger(kept)
    known = {name(row) for row in (*packed.rows(), *packed.failures())}
    for row in (*ledger.rows(), *ledger.failures()):
        if name(row) in known:
            continue
        for kind in KINDS:
            file = row.pop(f"{kind}_file", None)
            if row["stage"] in ("divergence", "sweep") or file is None:
                row.pop(f"{kind}_sha256", None)
                continue
            frame = pd.read_parquet(study / file)
            if kind == "items" and "loglikelihoods" not in frame:
                frame = frame.drop(columns="gold", errors="ignore")  # the right answer as the data set has it
            if kind == "tokens":
                frame = frame.map(partial(np.asarray, dtype="float32"))
            row[f"{kind}_file"], row[f"{kind}_sha256"] = write_parquet(kept, file.rsplit(".", 2)[0], frame)
            pd.testing.assert_frame_equal(frame, pd.read_parquet(kept / row[f"{kind}_file"]))
        assert '"/' not in json.dumps(row) and " /" not in row["command"], f"a path of this machine: {row}"
        packed.append(row)
    record = json.loads((study / "study.json").read_text()) | {"path": "not kept", "files": ""}
    (kept / "study.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    kept, *studies = map(Path, sys.argv[1:])
    shutil.rmtree(kept, ignore_errors=True)
    for study in studies:
        add(study, kept)
