"""What the paper published, as data; the arithmetic that audits it; and why its tables look as they do.

Source: N. Maddel, S. Ohol, A. Khobragade, "Optimizing Llama 3.2 1B Using Quantization Techniques Using
Bitsandbytes for Efficient AI Deployment", IJAR, March 2025 (CC BY 4.0). Numbers stand as printed; what follows
from them (requests, bytes a parameter) is computed here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from qnb.memory import MIB
from qnb.report.results import NOT_FUSED, is_unfused

DATA = Path(__file__).parents[1] / "data"
PARAMETERS = 1_235_814_400  # Llama-3.2-1B, tied embeddings counted once
STATED_REQUESTS = {3: 2000, 4: 5000}  # in the text and in Table 4's caption


def accuracy() -> pd.DataFrame:
    """Return Tables 1 and 2 as printed, a row a task and format, at each task's default shots.

    ``accuracy_pct`` is Table 1's, ``change_pct`` Table 2's change in percent of BF16's accuracy.
    """
    return pd.read_csv(DATA / "paper_accuracy.csv")


def performance(number: int) -> pd.DataFrame:
    """Return Table 3 (batch size 1) or 4 (largest batch), on a Colab T4; a row a format.

    ``seconds_per_request`` is printed as "average latency": total time over requests. ``vram_mib`` is printed as MB;
    the overheads show that MiB is meant. ``requests`` is what throughput times total time implies.
    """
    frame = pd.read_csv(DATA / "paper_performance.csv").query("table == @number").drop(columns="table")
    return frame.assign(requests=frame.throughput_rps * frame.total_s).reset_index(drop=True)


def is_published_model(model: str) -> bool:
    """Return whether a model's name is the published one's: Llama-3.2-1B, tuned ones and its bare shape among them."""
    return "llama-3.2-1b" in model.lower()


# What its numbers say


@dataclass(frozen=True, slots=True)
class Finding:
    """One claim of the paper set against its own numbers."""

    claim: str
    source: str
    computed: str
    holds: bool


def audit() -> list[Finding]:
    """Check the paper's arithmetic; every number is computed from the tables above.

    Checked: requests = throughput x time (Tables 3, 4), latency = time / requests, speed-up = throughput over
    BF16's, Table 2 from Table 1 within what rounding to 0.01 points allows, and the weight width that VRAM implies.
    """
    checks = (*_check_performance(3), *_check_performance(4), *_check_change(), *_check_baseline())
    return [Finding(claim, source, computed, bool(holds)) for claim, source, computed, holds in checks]


def _check_performance(number: int) -> Iterator[tuple[str, str, str, bool]]:
    table, stated, source = performance(number), STATED_REQUESTS[number], f"Table {number}"
    requests = round(table.requests[0], -1)
    latency_error = (table.total_s / requests - table.seconds_per_request).abs().max()
    speedup_error = (table.throughput_rps / table.throughput_rps[0] - table.speedup).abs().max()
    run = f"throughput x total time = {table.requests.min():,.1f} to {table.requests.max():,.1f} requests"
    waited = f"largest difference {latency_error:.4f} s; a batch of b requests really takes b times as long"
    latency = f"average latency is total time / requests, over {requests:,.0f} requests"
    yield f"{stated:,} requests were run", f"{source} and its text", run, abs(requests / stated - 1) < 0.01
    yield latency, source, waited, latency_error < 2e-3
    yield "speed-up is throughput over BF16's", source, f"largest difference {speedup_error:.4f}", speedup_error < 1e-3


def _check_change() -> Iterator[tuple[str, str, str, bool]]:
    """Hold Table 2, and what the text says of it, against Table 1."""
    table = accuracy()
    table["base_pct"] = table.task.map(table[table.precision == "bf16"].set_index("task").accuracy_pct)
    table = table.dropna(subset=["change_pct"]).set_index(["task", "precision"])
    table["loss_pp"] = table.base_pct - table.accuracy_pct
    error = (100 * table.loss_pp / table.base_pct + table.change_pct).abs()
    # both accuracies are rounded to 0.005 points, the printed change to 0.005 percent
    rounding = 0.5 / table.base_pct + 0.5 * table.accuracy_pct / table.base_pct**2 + 0.005
    largest = f"largest difference {error.max():.3f} %; {(error > rounding).sum()} beyond rounding"
    yield "Table 2 is Table 1's relative change", "Table 2", largest, (error <= rounding).all()
    int4, text = table.loc[("mmlu_social_sciences", "int4")], "text below Table 2"
    points = f"{int4.loss_pp:.2f} percentage points, which is {-int4.change_pct:.2f} % of BF16's accuracy"
    yield "INT4 loses 14.49 % on MMLU Social Sciences", text, points, abs(int4.loss_pp + int4.change_pct) < 0.01
    fp16 = table.xs("fp16", level="precision").abs()
    largest = f"up to {fp16.loss_pp.max():.2f} percentage points; relative, up to {fp16.change_pct.max():.2f} %"
    yield "FP16 changes accuracy by 0.00 to 0.36 %", text, largest, fp16.change_pct.max() <= 0.36


def _check_baseline() -> Iterator[tuple[str, str, str, bool]]:
    """Hold the memory of Table 3's BF16 row against weights of 16 and 32 bit."""
    table = performance(3).set_index("precision")
    bf16_mib, fp16_mib = table.vram_mib["bf16"] - PARAMETERS * 4 / MIB, table.vram_mib["fp16"] - PARAMETERS * 2 / MIB
    width = (
        f"{table.vram_mib['bf16'] * MIB / PARAMETERS:.2f} bytes a parameter; {bf16_mib:.1f} MiB above 32-bit weights, "
        f"as FP16 is {fp16_mib:.1f} MiB above 16-bit weights: it was most likely FP32"
    )
    yield "the BF16 baseline held its weights in 16 bit", "Table 3, VRAM", width, bf16_mib < 0
    speedup = f"{performance(4).speedup[1]:.2f}x as printed, but the baseline's weights are 32 bit wide by Table 3"
    yield "FP16 is three times as fast as BF16 at the largest batch", "Table 4", speedup, bf16_mib < 0


# Why its tables look as they do: choices of a harness that move its numbers more than the formats do

ABLATIONS = (  # the choice, the two rows that differ in it alone, the quantity compared
    ("the baseline's weights in 32 bit or in 16", "fp32 eager", "bf16 eager", "peak_memory_mib"),
    ("the baseline's weights in 32 bit or in 16", "fp32 eager", "bf16 eager", "weights_mib"),
    ("the baseline's weights in 32 bit or in 16", "fp32 eager", "bf16 eager", "throughput_rps"),
    ("4-bit weights multiplied in 32 bit or in 16", "int4 eager", "fp4 eager", "throughput_rps"),
    ("4-bit weights multiplied in 32 bit or in 16", "int4 cuda_graph", "fp4 cuda_graph", "throughput_rps"),
    ("LLM.int8 with outliers in 16 bit or without", "int8 eager", "int8-no-outliers eager", "throughput_rps"),
)
LAUNCHES = "kernels launched one by one or replayed"


def ablations(runs: pd.DataFrame, number: int) -> pd.DataFrame:
    """Set rows that differ in one choice of the harness against each other; a row a choice and quantity.

    A pair needs both rows. ``ratio`` is right over left; it is empty where they were measured under other conditions.
    By its memory, the paper's BF16 row is 32 bit wide and its FP16 row 16: ``published_ratio`` is theirs. The paper's
    VRAM is a peak, not the weights.

    Parameters
    ----------
    runs
        `Results.bs1` or `Results.maxbatch`.
    number
        The table of the paper that they are held against, 3 or 4.
    """
    if runs.empty:
        return pd.DataFrame()
    launches = [(LAUNCHES, f"{name} eager", f"{name} cuda_graph", quantity)
                for name in runs.precision.unique() for quantity in ("throughput_rps", "gpu_busy_pct")]  # fmt: skip
    table = pd.DataFrame([*ABLATIONS, *launches], columns=["choice", "left", "right", "quantity"])
    quantities = table.quantity.unique()
    values = runs.assign(name=runs.precision + " " + runs.engine).melt(["name", "conditions"], quantities, "quantity")
    for side in ("left", "right"):
        names = {"name": side, "value": f"{side}_value", "conditions": f"{side}_conditions"}
        table = table.merge(values.rename(columns=names), how="left", on=[side, "quantity"])
    is_alike = table.left_conditions == table.right_conditions
    published = performance(number).rename(columns={"vram_mib": "peak_memory_mib"}).set_index("precision")
    ratios = (published.loc["fp16"] / published.loc["bf16"])[["peak_memory_mib", "throughput_rps"]]
    table["ratio"] = (table.right_value / table.left_value).where(is_alike)
    table["published_ratio"] = table.quantity.map(ratios).where(table.left == "fp32 eager")
    table = table.dropna(subset=["left_value", "right_value"])
    table = table.replace({name: name + NOT_FUSED for name in (runs.precision + " " + runs.engine)[is_unfused(runs)]})
    return table.drop(columns=["left_conditions", "right_conditions"]).round(6)
