"""The published tables and their audit against hand counts; and the choices that explain them, from hand-made rows."""

import pandas as pd
import pytest

from qnb.report import paper
from qnb.report.results import BESIDE, SPEED

KEY = ["left", "right", "quantity"]


def runs(*rows):
    names = ["precision", "engine", "throughput_rps"]
    frame = pd.DataFrame([dict(zip(names, row[:3], strict=True)) | (row[3] if len(row) > 3 else {}) for row in rows])
    return frame.reindex(columns=[*SPEED, *BESIDE]).fillna({"conditions": "a"})


def test_audit_finds_what_a_hand_count_finds():
    """Requests: 0.3143 x 636.28 = 200, 2.8262 x 707.66 = 2,000. 32-bit weights: 1,235,814,400 x 4 B = 4,714 MiB."""
    assert [paper.performance(number).requests.round().unique().tolist() for number in (3, 4)] == [[200], [2000]]
    verdicts = {(finding.source, finding.claim): finding.holds for finding in paper.audit()}
    assert len(verdicts) == 11 and {claim for (_, claim), holds in verdicts.items() if not holds} == {
        "2,000 requests were run", "5,000 requests were run", "INT4 loses 14.49 % on MMLU Social Sciences",
        "FP16 changes accuracy by 0.00 to 0.36 %", "the BF16 baseline held its weights in 16 bit",
        "FP16 is three times as fast as BF16 at the largest batch",
    }  # fmt: skip
    assert len(paper.accuracy()) == 36 and paper.accuracy().change_pct.notna().sum() == 27


def test_each_choice_is_one_ratio_of_two_rows_measured_alike():
    table = paper.ablations(
        runs(
            ("fp32", "eager", 1.0, {"weights_mib": 400.0, "peak_memory_mib": 500.0}),
            ("bf16", "eager", 2.0, {"weights_mib": 200.0, "peak_memory_mib": 300.0}),
            ("bf16", "cuda_graph", 16.0), ("int8", "eager", 3.0), ("int4", "eager", 1.0),
            ("fp4", "eager", 2.0, {"conditions": "b"}),
        ), 3,
    ).set_index(KEY)  # fmt: skip
    width = table.loc[("fp32 eager", "bf16 eager")]
    assert width.ratio.to_dict() == {"peak_memory_mib": 0.6, "weights_mib": 0.5, "throughput_rps": 2}
    assert width.published_ratio["peak_memory_mib"] == pytest.approx(2523.89 / 4879.85, abs=1e-6)
    assert pd.isna(width.published_ratio["weights_mib"])  # the paper's VRAM is a peak
    assert table.ratio["bf16 eager", "bf16 cuda_graph", "throughput_rps"] == 8
    apart = table.loc[("int4 eager", "fp4 eager", "throughput_rps")]
    assert (apart.left_value, apart.right_value) == (1, 2) and pd.isna(apart.ratio)
    assert ("int8 eager", "int8-no-outliers eager", "throughput_rps") not in table.index
