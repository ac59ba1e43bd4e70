"""What the paper published, as data, and the arithmetic that audits it.

Source: N. Maddel, S. Ohol, A. Khobragade, "Optimizing Llama 3.2 1B Using Quantization Techniques Using
Bitsandbytes for Efficient AI Deployment", IJAR, March 2025 (CC BY 4.0). Numbers stand as printed; what follows
from them (requests, bytes a parameter) is computed here, never typed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from qnb.device import MIB

PARAMETERS = 1_235_814_400  # Llama-3.2-1B, tied embeddings counted once
PRECISIONS = ("bf16", "fp16", "int8", "int4")

# Table 1: accuracy in percent, at each task's default shots.
TABLE1: dict[str, tuple[float, ...]] = {
    "arc_challenge": (31.31, 31.31, 31.46, 30.38),
    "arc_easy": (65.49, 65.53, 64.84, 59.85),
    "gsm8k_average": (5.84, 5.61, 5.98, 2.73),
    "hellaswag": (47.72, 47.73, 47.41, 44.15),
    "mmlu": (37.70, 37.64, 36.72, 27.57),
    "mmlu_humanities": (35.26, 35.38, 34.73, 27.86),
    "mmlu_other": (41.41, 41.35, 40.19, 29.74),
    "mmlu_social_sciences": (41.24, 41.20, 40.39, 26.75),
    "mmlu_stem": (34.23, 33.87, 32.71, 25.82),
}
# Table 2: change against BF16 in percent of BF16's accuracy, for FP16, INT8, INT4.
TABLE2: dict[str, tuple[float, ...]] = {
    "arc_challenge": (0.00, 0.48, -2.97),
    "arc_easy": (0.06, -0.99, -8.61),
    "gsm8k_average": (-3.94, 2.40, -53.25),
    "hellaswag": (0.02, -0.65, -7.49),
    "mmlu": (-0.16, -2.60, -26.86),
    "mmlu_humanities": (0.34, -1.50, -21.00),
    "mmlu_other": (-0.14, -2.95, -28.19),
    "mmlu_social_sciences": (-0.10, -2.06, -35.15),
    "mmlu_stem": (-1.05, -4.43, -24.55),
}


@dataclass(frozen=True, slots=True)
class Performance:
    """One row of Table 3 or 4, on a Colab T4."""

    precision: str
    throughput_rps: float
    total_s: float
    seconds_per_request: float  # printed as "average latency": total time over requests
    utilization_pct: float
    vram_mib: float  # printed as MB; the overheads show that MiB is meant
    speedup: float

    @property
    def requests(self) -> float:
        """Requests that throughput times total time implies."""
        return self.throughput_rps * self.total_s

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes a parameter if all memory were weights: an upper bound of their width."""
        return self.vram_mib * MIB / PARAMETERS


TABLE3 = (
    Performance("bf16", 0.3143, 636.28, 3.1814, 88.35, 4879.85, 1.0000),
    Performance("fp16", 0.3249, 615.59, 3.0779, 52.44, 2523.89, 1.0336),
    Performance("int8", 0.1288, 1552.40, 7.7620, 35.80, 1621.06, 0.4099),
    Performance("int4", 0.2938, 680.66, 3.4033, 52.66, 1361.97, 0.9348),
)
TABLE4 = (
    Performance("bf16", 2.8262, 707.66, 0.3538, 98.76, 7376.07, 1.0000),
    Performance("fp16", 8.5661, 233.48, 0.1167, 97.42, 4800.91, 3.0309),
    Performance("int8", 8.4604, 236.39, 0.1182, 97.75, 9744.56, 2.9935),
    Performance("int4", 4.1443, 482.59, 0.2413, 99.18, 5226.48, 1.4664),
)
STATED_REQUESTS = {3: 2000, 4: 5000}  # in the text and in Table 4's caption


def accuracy() -> pd.DataFrame:
    """Return Table 1 as a tidy frame: task, precision, acc (a share, not percent)."""
    rows = [
        {"task": task, "precision": precision, "acc": value / 100}
        for task, values in TABLE1.items()
        for precision, value in zip(PRECISIONS, values, strict=True)
    ]
    return pd.DataFrame(rows)


def change() -> pd.DataFrame:
    """Return Table 2 as a tidy frame: task, precision, change_pct (relative to BF16, in percent)."""
    rows = [
        {"task": task, "precision": precision, "change_pct": value}
        for task, values in TABLE2.items()
        for precision, value in zip(PRECISIONS[1:], values, strict=True)
    ]
    return pd.DataFrame(rows)


def performance(table: int) -> pd.DataFrame:
    """Return Table 3 (batch size 1) or Table 4 (largest batch), a row a precision, units in the column names."""
    rows = {3: TABLE3, 4: TABLE4}[table]
    names = [name for name in Performance.__slots__]
    return pd.DataFrame([{name: getattr(row, name) for name in names} for row in rows])


def measured(model: str) -> bool:
    """Return whether a model's name is the measured one's, Llama-3.2-1B, tuned ones and its bare shape among them."""
    return "llama-3.2-1b" in model.lower()


@dataclass(frozen=True, slots=True)
class Finding:
    """One claim of the paper set against its own numbers."""

    claim: str
    source: str
    computed: str
    holds: bool


def audit() -> list[Finding]:
    """Check the paper's arithmetic; every number computed from the tables above.

    Checked: requests = throughput x time (Tables 3, 4), latency = time / requests, speed-up = throughput over
    BF16's, Table 2 from Table 1 within what rounding to 0.01 points allows, and the weight width that VRAM implies.
    """
    findings = []
    for number, table in ((3, TABLE3), (4, TABLE4)):
        stated, source = STATED_REQUESTS[number], f"Table {number}"
        implied = [row.requests for row in table]
        requests = round(implied[0], -1)
        findings.append(
            Finding(
                f"{stated:,} requests were run",
                f"{source} and its text",
                f"throughput x total time = {min(implied):,.1f} to {max(implied):,.1f} requests",
                all(abs(value / stated - 1) < 0.01 for value in implied),
            )
        )
        error = max(abs(row.total_s / requests - row.seconds_per_request) for row in table)
        findings.append(
            Finding(
                f"average latency is total time / requests, over {requests:,.0f} requests",
                source,
                f"largest difference {error:.4f} s; a batch of b requests really takes b times as long",
                error < 2e-3,
            )
        )
        base = table[0]
        error = max(abs(row.throughput_rps / base.throughput_rps - row.speedup) for row in table)
        findings.append(
            Finding("speed-up is throughput over BF16's", source, f"largest difference {error:.4f}", error < 1e-3)
        )
    findings.extend(_audit_change())
    overhead = {row.precision: row.vram_mib for row in TABLE3}
    half, full = PARAMETERS * 2 / MIB, PARAMETERS * 4 / MIB
    findings.append(
        Finding(
            "the BF16 baseline held its weights in 16 bit",
            "Table 3, VRAM",
            f"{TABLE3[0].bytes_per_parameter:.2f} bytes a parameter; "
            f"{overhead['bf16'] - full:.1f} MiB above 32-bit weights, "
            f"as FP16 is {overhead['fp16'] - half:.1f} MiB above 16-bit weights: it was most likely FP32",
            overhead["bf16"] < full,
        )
    )
    ratio = TABLE4[1].throughput_rps / TABLE4[0].throughput_rps
    findings.append(
        Finding(
            "FP16 is three times as fast as BF16 at the largest batch",
            "Table 4",
            f"{ratio:.2f}x as printed, but the baseline's weights are 32 bit wide by Table 3",
            overhead["bf16"] < full,
        )
    )
    return findings


def _audit_change() -> list[Finding]:
    """Set Table 2, and what the text says of it, against Table 1."""
    worst, off = 0.0, []
    for task, values in TABLE2.items():
        base = TABLE1[task][0]
        for precision, printed, value in zip(PRECISIONS[1:], values, TABLE1[task][1:], strict=True):
            error = abs((value / base - 1) * 100 - printed)
            # both accuracies are rounded to 0.005 points, the printed change to 0.005 percent
            allowed = (0.005 / base + 0.005 * value / base**2) * 100 + 0.005
            worst = max(worst, error)
            if error > allowed:
                off.append(f"{task} {precision}")
    table = Finding(
        "Table 2 is Table 1's relative change",
        "Table 2",
        f"largest difference {worst:.3f} %; "
        + (f"beyond rounding: {', '.join(off)}" if off else "all within rounding"),
        not off,
    )
    points = TABLE1["mmlu_social_sciences"][0] - TABLE1["mmlu_social_sciences"][3]
    text = Finding(
        "INT4 loses 14.49 % on MMLU Social Sciences",
        "text below Table 2",
        f"{points:.2f} percentage points, which is {-TABLE2['mmlu_social_sciences'][2]:.2f} % of BF16's accuracy",
        abs(points + TABLE2["mmlu_social_sciences"][2]) < 0.01,
    )
    spread = [abs(values[1] - values[0]) for values in TABLE1.values()]
    fp16 = Finding(
        "FP16 changes accuracy by 0.00 to 0.36 %",
        "text below Table 2",
        f"{min(spread):.2f} to {max(spread):.2f} percentage points; relative, Table 2 says up to "
        f"{max(abs(values[0]) for values in TABLE2.values()):.2f} %",
        max(abs(values[0]) for values in TABLE2.values()) <= 0.36,
    )
    return [table, text, fp16]
