"""Results of accuracy rows that are written by hand."""

import pandas as pd
import pytest
from example import answers, score

from qnb.ledger import Ledger, write_parquet
from qnb.report.results import Results


@pytest.fixture
def measured(tmp_path):
    """Returns a function that gives the results of accuracy rows, from their items (or whether each is right)."""
    ledger = Ledger(tmp_path)

    def measure(rows, **fields):
        for (precision, task), items in rows.items():
            frame = items if isinstance(items, pd.DataFrame) else answers(task, items)
            file, sha256 = write_parquet(tmp_path, f"items/{task}.{precision}", frame)
            row = {"stage": "accuracy", "precision": precision, "task": task, "limit": 4, "scores": [score(task)],
                   "groups": {}, "data_sha256": task, "items_file": file, "items_sha256": sha256}  # fmt: skip
            ledger.append({**row, **fields.get(precision, {}), **fields.get(task, {}), **fields.get("every", {})})
        return Results.read(ledger)

    return measure
