"""The published tables and their audit against hand counts; and the choices that explain them, from hand-made rows."""

import pandas as pd
import pytest

from qnb.report import paper
from qnb.report.results import BESIDE, SPEED


def test_requests_follow_from_throughput_and_time():
    assert paper.performance(3).requests.round().tolist() == [200] * 4
    assert paper.performance(4).requests.round().tolist() == [2000] * 4


def test_baseline_weights_are_32_bit_wide():
    bf16, fp16 = paper.performance(3).vram_mib[:2]
    # 1,235,814,400 x 4 B = 4714.3 MiB, x 2 B = 2357.1 MiB: the same overhead above either
    assert bf16 - 4714.3 == pytest.approx(fp16 - 2357.1, abs=2)


def test_audit_finds_what_a_hand_count_finds():
    verdicts = {(finding.source, finding.claim): finding.holds for finding in paper.audit()}
    assert verdicts["Table 3 and its text", "2,000 requests were run"] is False
    assert verdicts["Table 4 and its text", "5,000 requests were run"] is False
    assert verdicts["Table 4", "average latency is total time / requests, over 2,000 requests"] is True
    assert verdicts["Table 3", "speed-up is throughput over BF16's"] is True
    assert verdicts["Table 2", "Table 2 is Table 1's relative change"] is True
    assert verdicts["Table 3, VRAM", "the BF16 baseline held its weights in 16 bit"] is False
    assert verdicts["text below Table 2", "INT4 loses 14.49 % on MMLU Social Sciences"] is False


def test_frames_have_a_row_a_fact():
    table = paper.accuracy().set_index(["task", "precision"])
    assert len(table) == 36 and table.change_pct.notna().sum() == 27
    base, int4 = table.acc["hellaswag", "bf16"], table.acc["hellaswag", "int4"]
    assert table.change_pct["hellaswag", "int4"] == pytest.approx((int4 / base - 1) * 100, abs=0.02)
    assert paper.performance(4).loc[1, "throughput_rps"] == 8.5661


KEY = ["left", "right", "quantity"]


def runs(*rows):
    names = ["precision", "engine", "throughput_rps"]
    frame = pd.DataFrame([dict(zip(names, row[:3], strict=True)) | (row[3] if len(row) > 3 else {}) for row in rows])
    return frame.reindex(columns=list(dict.fromkeys([*SPEED, *BESIDE]))).fillna({"conditions": "a"})


def test_each_choice_is_one_ratio_and_what_is_missing_stays_empty():
    table = paper.ablations(
        runs(("fp32", "eager", 1.0), ("bf16", "eager", 2.0), ("bf16", "cuda_graph", 16.0), ("int8", "eager", 3.0)), 3
    ).set_index(KEY)
    width = table.loc[("fp32 eager", "bf16 eager", "throughput_rps")]
    assert width.ratio == 2 and width.published_ratio == pytest.approx(0.3249 / 0.3143, abs=1e-6)
    assert table.loc[("bf16 eager", "bf16 cuda_graph", "throughput_rps")].ratio == 8
    alone = table.loc[("int8 eager", "int8-no-outliers eager", "throughput_rps")]
    assert alone.left_value == 3 and pd.isna(alone.right_value) and pd.isna(alone.ratio)
    assert ("int4 eager", "fp4 eager", "throughput_rps") not in table.index  # nothing is known of either
    assert paper.ablations(runs(), 3).empty


def test_rows_that_were_measured_under_other_conditions_have_values_but_no_ratio():
    other = {"conditions": "b"}
    table = paper.ablations(runs(("int4", "eager", 1.0), ("fp4", "eager", 2.0, other)), 4).set_index(KEY)
    apart = table.loc[("int4 eager", "fp4 eager", "throughput_rps")]
    assert (apart.left_value, apart.right_value) == (1, 2) and pd.isna(apart.ratio)


def test_the_papers_vram_stands_beside_peak_memory_and_not_beside_the_weights():
    wide, half = ({"weights_mib": 200.0 * width, "peak_memory_mib": 100 + 200.0 * width} for width in (2, 1))
    table = paper.ablations(runs(("fp32", "eager", 1.0, wide), ("bf16", "eager", 1.0, half)), 3)
    table = table[table.right == "bf16 eager"].set_index("quantity")
    assert table.ratio["peak_memory_mib"] == 0.6 and table.ratio["weights_mib"] == 0.5
    assert table.published_ratio["peak_memory_mib"] == pytest.approx(2523.89 / 4879.85, abs=1e-6)
    assert pd.isna(table.published_ratio["weights_mib"])


def test_a_t4_is_held_to_the_longer_of_reading_and_computing():
    """3.2 GB take 10 ms at 320 GB/s; 8.1e11 products in bfloat16 take 100 ms at 8.1 TFLOP/s."""
    step = {"new_tokens": 100, "bytes_per_step": 3.2e9}
    frame = runs(
        ("fp16", "eager", 1.0, {**step, "batch_size": 1, "flops_by_type": {"float16": 1e9}}),
        ("bf16", "eager", 1.0, {**step, "batch_size": 100, "flops_by_type": {"bfloat16": 8.1e11}}),
        ("int8", "eager", 1.0, {"batch_size": 1}),
    )
    assert paper.t4_estimate(frame.assign(model="smollm2-135m"), 3).published_throughput_rps.isna().all()
    table = paper.t4_estimate(frame.assign(model="shape:llama-3.2-1b"), 3).set_index("precision")
    assert table.published_throughput_rps["bf16"] == 0.3143
    assert table.estimate_step_ms.round(6).to_dict() == {"fp16": 10, "bf16": 100}
    assert table.estimate_bound.to_dict() == {"fp16": "bandwidth", "bf16": "compute"}
    assert table.estimate_throughput_rps.round(6).to_dict() == {"fp16": 1, "bf16": 10}
