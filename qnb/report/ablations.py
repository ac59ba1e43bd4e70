"""Why the paper's performance tables look as they do: one cause at a time, from rows that differ in it alone.

Four choices of a harness move its numbers more than the formats do: what "BF16" was loaded as, whether launches or
the GPU are timed, what 4-bit weights are multiplied in, and LLM.int8's outlier path. A T4 itself is only estimated
here, from its datasheet: a roof is what no program passes, and eager generation stays far below it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from qnb.report import paper
from qnb.report import tables as table


@dataclass(frozen=True, slots=True)
class Cause:
    """One choice, and the two rows that differ in it."""

    choice: str
    left: tuple[str, str]  # precision and engine
    right: tuple[str, str]
    quantity: str  # a column of a performance table


CAUSES = (
    Cause("the baseline's weights in 32 bit or in 16", ("fp32", "eager"), ("bf16", "eager"), "memory_mib"),
    Cause("the baseline's weights in 32 bit or in 16", ("fp32", "eager"), ("bf16", "eager"), "weights_mib"),
    Cause("the baseline's weights in 32 bit or in 16", ("fp32", "eager"), ("bf16", "eager"), "throughput_rps"),
    Cause("4-bit weights multiplied in 32 bit or in 16", ("int4", "eager"), ("fp4", "eager"), "throughput_rps"),
    Cause("4-bit weights multiplied in 32 bit or in 16", ("int4", "cuda_graph"), ("fp4", "cuda_graph"), "throughput_rps"),
    Cause("LLM.int8 with outliers in 16 bit or without", ("int8", "eager"), ("int8-no-outliers", "eager"), "throughput_rps"),
)
LAUNCHES = "kernels launched one by one or replayed"
LAUNCHED = ("throughput_rps", "gpu_busy_pct")
PUBLISHED = {"fp32": "bf16", "bf16": "fp16"}  # by its memory, the paper's BF16 row is 32 bit wide and FP16's is 16
PUBLISHED_AS = {"memory_mib": "vram_mib", "throughput_rps": "throughput_rps"}  # its VRAM is a peak, not the weights


def causes(runs: pd.DataFrame, number: int) -> pd.DataFrame:
    """Set rows that differ in one choice against each other; a row a choice and quantity.

    Parameters
    ----------
    runs
        Performance rows of the ledger, those of Table 3 or 4.
    number
        Which of the two, for what the paper published; its BF16 row stands for 32 bit here.

    Returns
    -------
    pandas.DataFrame
        ``left`` and ``right`` name the rows of the table, ``ratio`` is right over left, and ``published_ratio`` the
        paper's where it has both. What was not measured is empty, and so is the ratio of two rows that differ in
        workload, device or memory too; a pair of which nothing is known is left out.
    """
    if runs.empty:
        return pd.DataFrame()
    made = table.performance(runs, number)
    measured = {(row["precision"], row["engine"]): row for row in made.to_dict("records")}
    conditions = runs.reindex(columns=list(table.ALIKE)).groupby(list(table.ALIKE), dropna=False).ngroup()
    condition = dict(zip(zip(runs.precision, runs.engine, strict=True), conditions, strict=True))
    published = paper.performance(number).set_index("precision")
    launched = [Cause(LAUNCHES, (name, "eager"), (name, "cuda_graph"), quantity)
                for name in dict.fromkeys(made.precision) for quantity in LAUNCHED]  # fmt: skip
    rows = []
    for cause in (*CAUSES, *launched):
        left, right = (measured.get(pair, {}).get(cause.quantity) for pair in (cause.left, cause.right))
        alike = condition.get(cause.left) == condition.get(cause.right)
        known = pd.notna(left) and pd.notna(right) and left
        row: dict[str, Any] = {
            "choice": cause.choice,
            "quantity": cause.quantity,
            "left": " ".join(cause.left),
            "right": " ".join(cause.right),
            "left_value": left,
            "right_value": right,
            "ratio": right / left if known and alike else None,
        }
        pair = [PUBLISHED.get(name) for name, _ in (cause.left, cause.right)]
        column = PUBLISHED_AS.get(cause.quantity)
        if column and all(pair) and "eager" == cause.left[1] == cause.right[1]:
            row["published_ratio"] = published[column][pair[1]] / published[column][pair[0]]
        if pd.notna(left) or pd.notna(right) or row.get("published_ratio"):
            rows.append(row)
    return pd.DataFrame(rows)


# NVIDIA T4 datasheet (DS-09120): GDDR6 320+ GB/s; FP16 65 TFLOP/s, FP32 8.1, INT8 130 TOPS. Turing has no bfloat16
# units: such products are done in 32 bit.
T4_BYTES_PER_S = 320e9
T4_FLOP_PER_S = {"float16": 65e12, "float32": 8.1e12, "bfloat16": 8.1e12, "int8": 130e12}


def t4(runs: pd.DataFrame, number: int) -> pd.DataFrame:
    """Estimate the least time a T4 needs for the work of measured rows, from its datasheet alone.

    Parameters
    ----------
    runs
        Performance rows of the ledger, which carry what a decode step reads and computes.
    number
        Table 3 or 4, for the published throughput.

    Returns
    -------
    pandas.DataFrame
        A row a precision and batch size: ``estimate_step_ms`` the longer of reading and computing,
        ``estimate_throughput_rps`` what that allows at most, without prompts and launches. The published rate stands
        beside rows of the published model alone.
    """
    needed = ["bytes_per_step", "flops_by_type"]
    if runs.empty or not set(needed) <= set(runs):
        return pd.DataFrame()
    published = paper.performance(number).set_index("precision").throughput_rps
    rows = []
    for row in runs.dropna(subset=needed).drop_duplicates(["precision", "batch_size"]).to_dict("records"):
        read_s = row["bytes_per_step"] / T4_BYTES_PER_S
        computed_s = sum(count / T4_FLOP_PER_S[name] for name, count in row["flops_by_type"].items())
        step_s = max(read_s, computed_s)
        rows.append(
            {
                "precision": row["precision"],
                "batch_size": int(row["batch_size"]),
                "estimate_step_ms": 1000 * step_s,
                "estimate_bound": "bandwidth" if read_s >= computed_s else "compute",
                "estimate_throughput_rps": row["batch_size"] / (row["new_tokens"] * step_s),
                "published_throughput_rps": (
                    published.get(row["precision"]) if paper.measured(str(row.get("model"))) else None
                ),
            }
        )
    return pd.DataFrame(rows)
