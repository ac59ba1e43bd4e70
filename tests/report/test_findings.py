"""Sentences are the rows' arithmetic."""

from dataclasses import replace

import pandas as pd
import pytest

from qnb.report import accuracy
from qnb.report.findings import NOTHING, about, findings, text
from qnb.report.results import Results


def test_sentences_are_the_rows_arithmetic(study):
    values = accuracy.headline(study.scores).set_index(["task", "precision"]).value
    mean, base = (100 * values[f"{accuracy.MEAN} (3)", name] for name in ("int4", "bf16"))
    rows = study.bs1.set_index(["precision", "engine"])
    share = rows.peak_memory_mib["int4", "eager"] / rows.peak_memory_mib["bf16", "eager"]
    sentences = " ".join(about(study, "int4"))
    for words in (f"{mean:.1f} %, BF16's {base:.1f} %", "1,200 items", "ARC easy", "batch 384 (BF16 256)",
                  f"takes {100 * share:.0f} % of BF16's peak memory", "bound by launch",
                  f"{1e3 * rows.tpot_s['int4', 'eager']:.2f} ms per token"):  # fmt: skip
        assert words in sentences
    assert findings(Results("", "", "")) == {} and text(study, "maxbatch").count("\n") == 2 * 4 - 1  # engines, formats
    assert "chance" not in about(study, "int4")[0] and "chance" in about(study, "fp16")[0]


@pytest.mark.parametrize(
    ("change", "low", "high", "words"),
    [(46.9, 38.0, 54.7, "+46.9 % (95 %: +38.0 to +54.7, 1,024 tokens)."), (-0.1, -0.4, 0.2, "may be chance"),
     (2.0, None, None, "+2.0 % (1,024 tokens).")],
)  # fmt: skip
def test_what_perplexity_shows_is_said(change, low, high, words, studied):
    row = {"perplexity_change_pct": change, "perplexity_change_pct_low": low, "perplexity_change_pct_high": high}
    frame = pd.DataFrame([{"precision": "int4", "tokens": 1024, **row}])
    study = Results("", "", "", divergence=frame)
    assert words in text(study, "accuracy") and text(study, "bs1") == NOTHING


def test_disturbed_rows_are_named_disturbed_peaks_bound_nothing_and_a_cpus_memory_is_its_weights(study):
    flags = [["cpu_shared", "peaks_disturbed"] if name == "int4" else [] for name in study.bs1.precision]
    disturbed = study.bs1.assign(flags=flags, peak_reserved_mib=float("nan"), peak_memory_mib=1.0)
    memory, speed, _ = about(replace(study, bs1=disturbed), "int4", ["bs1"])
    assert "34 % of BF16's weights" in memory  # 640 of 1,907 MiB
    assert "disturbed by other processes" in speed and "bound" not in speed
