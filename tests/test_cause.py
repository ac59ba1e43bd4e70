"""Rows that differ in one choice are set against each other, and a T4's roofs are its datasheet's."""

import pandas as pd
import pytest

from qnb.report import ablations as cause
from qnb.report import paper

KEY = ["left", "right", "quantity"]


def run(precision, engine, throughput_rps, **more):
    return {"precision": precision, "engine": engine, "throughput_rps": throughput_rps, "batch_size": 1,
            "requests": 4, "prompt_tokens": 8, "new_tokens": 2, "monitor_source": "nvml", "workload": "a",
            "device": "one", **more}  # fmt: skip


def test_each_choice_is_one_ratio_and_what_is_missing_stays_empty():
    runs = pd.DataFrame([
        run("fp32", "eager", 1.0),
        run("bf16", "eager", 2.0),
        run("bf16", "cuda_graph", 16.0),
        run("int8", "eager", 3.0),
    ])  # fmt: skip
    made = cause.causes(runs, 3).set_index(KEY)
    width = made.loc[("fp32 eager", "bf16 eager", "throughput_rps")]
    assert width.ratio == 2 and width.published_ratio == pytest.approx(0.3249 / 0.3143)
    assert made.loc[("bf16 eager", "bf16 cuda_graph", "throughput_rps")].ratio == 8
    alone = made.loc[("int8 eager", "int8-no-outliers eager", "throughput_rps")]
    assert alone.left_value == 3 and pd.isna(alone.right_value) and pd.isna(alone.ratio)
    assert ("int4 eager", "fp4 eager", "throughput_rps") not in made.index  # nothing is known of either
    assert cause.causes(pd.DataFrame(), 3).empty


@pytest.mark.parametrize("other", [{"workload": "b"}, {"device": "two"}, {"memory_limit_mib": 2.0}, {"cap": 9}])
def test_rows_that_were_not_measured_alike_have_values_but_no_ratio(other):
    limits = {"memory_limit_mib": 1.0, "cap": 8}
    runs = pd.DataFrame([
        run("int4", "eager", 1.0, **limits),
        run("fp4", "eager", 2.0, **limits | other),
        run("int8", "eager", 1.0, **limits),
        run("int8-no-outliers", "eager", 3.0, **limits),
    ])  # fmt: skip
    made = cause.causes(runs, 4).set_index(KEY)
    apart = made.loc[("int4 eager", "fp4 eager", "throughput_rps")]
    assert (apart.left_value, apart.right_value) == (1, 2) and pd.isna(apart.ratio)
    assert made.loc[("int8 eager", "int8-no-outliers eager", "throughput_rps")].ratio == 3


def test_the_papers_vram_stands_beside_peak_memory_and_not_beside_the_weights():
    runs = pd.DataFrame([
        run("fp32", "eager", 1.0, weights_mib=400.0, memory_mib=500.0),
        run("bf16", "eager", 1.0, weights_mib=200.0, memory_mib=300.0),
    ])  # fmt: skip
    made = cause.causes(runs, 3)
    made = made[made.right == "bf16 eager"].set_index("quantity")
    assert made.ratio["memory_mib"] == 0.6 and made.ratio["weights_mib"] == 0.5
    assert made.published_ratio["memory_mib"] == pytest.approx(2523.89 / 4879.85)
    assert pd.isna(made.published_ratio["weights_mib"])


def test_replayed_kernels_fill_more_of_a_step_and_untraced_rows_are_left_out():
    """Eager: 2 ms of kernels in a step of 8. CudaGraph: 2 in 2.5. INT8 cannot be recorded."""
    runs = pd.DataFrame([
        run("bf16", "eager", 1.0, kernel_s_per_token=0.002, tpot_s=0.008),
        run("bf16", "cuda_graph", 3.2, kernel_s_per_token=0.002, tpot_s=0.0025),
        run("int8", "eager", 1.0, kernel_s_per_token=0.004, tpot_s=0.008),
        run("int8", "cuda_graph", None, note="cannot be recorded"),
        run("fp16", "eager", 1.0, kernel_s_per_token=None, tpot_s=0.008),
        run("fp16", "cuda_graph", 1.0, kernel_s_per_token=None, tpot_s=0.008),
    ])  # fmt: skip
    made = cause.causes(runs, 3)
    share = made[made.quantity == "gpu_busy_pct"].set_index("left")
    assert list(share.index) == ["bf16 eager", "int8 eager"] and set(share.choice) == {cause.LAUNCHES}
    assert share.loc["bf16 eager", ["left_value", "right_value", "ratio"]].tolist() == [25, 80, 3.2]
    assert share.left_value["int8 eager"] == 50
    assert share.loc["int8 eager", ["right_value", "ratio"]].isna().all()


def test_a_t4_is_held_to_the_longer_of_reading_and_computing():
    runs = pd.DataFrame([
        {"precision": "fp16", "batch_size": 1, "new_tokens": 100, "bytes_per_step": 3.2e9,
         "flops_by_type": {"float16": 1e9}},
        {"precision": "bf16", "batch_size": 100, "new_tokens": 100, "bytes_per_step": 3.2e9,
         "flops_by_type": {"bfloat16": 8.1e11}},
        {"precision": "int8", "batch_size": 1, "new_tokens": 100, "bytes_per_step": None,
         "flops_by_type": None},
    ])  # fmt: skip
    assert cause.t4(runs.assign(model="smollm2-135m"), 3).published_throughput_rps.isna().all()
    made = cause.t4(runs.assign(model="shape:llama-3.2-1b"), 3).set_index("precision")
    assert made.published_throughput_rps["bf16"] == paper.performance(3).set_index("precision").throughput_rps["bf16"]
    assert made.estimate_step_ms.round(6).to_dict() == {"fp16": 10, "bf16": 100}
    assert made.estimate_bound.to_dict() == {"fp16": "bandwidth", "bf16": "compute"}
    assert made.estimate_throughput_rps.round(6).to_dict() == {"fp16": 1, "bf16": 10}
