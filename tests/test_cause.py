"""Rows that differ in one choice are set against each other, and a T4's roofs are its datasheet's."""

import pandas as pd
import pytest

from qnb import cause


def test_each_choice_is_one_ratio_and_what_is_missing_stays_empty():
    table = pd.DataFrame([
        {"precision": "fp32", "engine": "eager", "throughput_rps": 1.0, "weights_mib": 400.0},
        {"precision": "bf16", "engine": "eager", "throughput_rps": 2.0, "weights_mib": 200.0},
        {"precision": "bf16", "engine": "graphed", "throughput_rps": 16.0, "weights_mib": 200.0},
    ])  # fmt: skip
    made = cause.causes(table, 3).set_index(["left", "right", "quantity"])
    width = made.loc[("fp32 eager", "bf16 eager", "weights_mib")]
    assert width.ratio == 0.5 and width.published_ratio == pytest.approx(2523.89 / 4879.85)
    assert made.loc[("bf16 eager", "bf16 graphed", "throughput_rps")].ratio == 8
    assert pd.isna(made.loc[("int8 eager", "int8-t0 eager", "throughput_rps")].ratio)


def test_a_t4_is_held_to_the_longer_of_reading_and_computing():
    runs = pd.DataFrame([
        {"precision": "fp16", "batch_size": 1, "new_tokens": 100, "bytes_per_step": 3.2e9, "flops_per_step": 1e9,
         "multiplies_in": "float16"},
        {"precision": "bf16", "batch_size": 100, "new_tokens": 100, "bytes_per_step": 3.2e9, "flops_per_step": 8.1e11,
         "multiplies_in": "bfloat16"},
        {"precision": "int8", "batch_size": 1, "new_tokens": 100, "bytes_per_step": None, "flops_per_step": None,
         "multiplies_in": None},
    ])  # fmt: skip
    made = cause.t4(runs, 3).set_index("precision")
    assert made.estimate_step_ms.round(6).to_dict() == {"fp16": 10, "bf16": 100}
    assert made.estimate_bound.to_dict() == {"fp16": "bandwidth", "bf16": "compute"}
    assert made.estimate_throughput_rps.round(6).to_dict() == {"fp16": 1, "bf16": 10}
