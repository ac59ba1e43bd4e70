"""Columns: one label, unit and form a quantity; flags are codes until they are printed."""

import pandas as pd
import pytest

from qnb.columns import COLUMNS, format_value, header
from qnb.flags import Flag, flag_text, is_disturbed


def test_a_header_has_its_unit_and_an_unknown_name_is_its_own_label():
    names = ("throughput_rps", "some_thing", "knee_batch_latency_s", "n_prompts", "s")
    heads = ["throughput, requests/s", "some thing", "knee batch latency, s", "prompts", "s"]
    assert list(map(header, names)) == heads


def test_an_intervals_end_and_a_published_value_are_labelled_after_their_quantity():
    names = ("kl_mean_nats_low", "published_throughput_rps", "published_change_pct", "nf4_stderr_pp")
    heads = ["mean KL divergence, 95 % low, nats", "published throughput, requests/s", "published relative change, %",
             "nf4 standard error, points"]  # fmt: skip
    assert list(map(header, names)) == heads


def test_names_carry_the_units_that_are_stored():
    units = {"_pct": "%", "_pp": "points", "_mib": "MiB", "_rps": "requests/s", "_w": "W", "_mhz": "MHz"}
    for name, column in COLUMNS.items():
        for end, unit in units.items():
            assert not name.endswith(end) or column.unit == unit, name
        if name.endswith("_s"):
            assert (column.unit, column.scale) in (("s", 1.0), ("ms", 1000)), name
        assert column.better in ("more", "less", "")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("tpot_s", 0.00115, "1.15"), ("accuracy_pct", 64.5, "64.50"), ("weights_mib", 2357.1, "2,357"),
     ("throughput_rps", 0.3143, "0.3143"), ("n_items", 14042, "14,042"), ("p_holm", 1e-9, "< 0.000001"),
     ("p_holm", 0.0312, "0.0312"), ("reload_identical", True, "yes"), ("note", float("nan"), ""), ("note", None, ""),
     ("knee", pd.NA, ""), ("bound", "launch", "launch")],
)  # fmt: skip
def test_values_are_printed_in_the_unit_of_their_header(name, value, text):
    assert format_value(name, value) == text


def test_only_other_processes_disturb_and_words_are_never_searched():
    assert is_disturbed(["gpu_shared"]) and is_disturbed([Flag.CPU_SHARED])
    assert not is_disturbed(["throttled"]) and not is_disturbed("other processor") and not is_disturbed(None)
    assert flag_text(["cpu_shared", "new"]) == "other processes used the CPU; new" and flag_text(None) == ""
    assert all(flag.text for flag in Flag)
