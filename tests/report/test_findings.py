"""Sentences are the rows' arithmetic."""

from dataclasses import replace

import pandas as pd
import pytest

from qnb.provenance import ROOT
from qnb.report import tables
from qnb.report.findings import about, findings, opening
from qnb.report.results import Results, read_reference


def test_sentences_are_the_rows_arithmetic(studied):
    study = studied.results()
    text = " ".join(about(study, "int4"))
    values = tables.headline(study.scores).set_index(["task", "precision"]).value
    mean, base = (100 * values[f"{tables.MEAN} (3)", name] for name in ("int4", "bf16"))
    assert f"keeps {100 * mean / base:.1f} % of BF16's mean accuracy: {mean:.1f} against {base:.1f} %" in text
    assert "n = 1,200" in text and "cannot tell" not in text and "ARC easy" in text
    rows = study.bs1.set_index(["precision", "engine"])
    share = rows.peak_memory_mib["int4", "eager"] / rows.peak_memory_mib["bf16", "eager"]
    assert f"takes {100 * share:.0f} % of BF16's peak memory" in text and "(launch-bound)" in text
    assert f"{1e3 * rows.tpot_s['int4', 'eager']:.2f} ms per token" in text
    assert "batch 384 against 256" in text and "cannot tell it from none" in " ".join(about(study, "fp16"))


def test_without_a_gpu_memory_is_the_weights(studied):
    study = studied.results()
    grown = replace(study, bs1=study.bs1.assign(peak_reserved_mib=float("nan"), peak_memory_mib=1.0))
    assert "34 % of BF16's memory for weights" in " ".join(about(grown, "int4"))  # 640 of 1,907 MiB


@pytest.mark.parametrize(
    ("change", "low", "high", "words"),
    [
        (46.9, 38.0, 54.7, "46.9 % above BF16's (95 %: +38.0 to +54.7, n = 1,024 tokens)."),
        (-0.1, -0.4, 0.2, "0.1 % below BF16's (95 %: -0.4 to +0.2, n = 1,024 tokens). This text cannot tell"),
        (2.0, None, None, "2.0 % above BF16's (n = 1,024 tokens)."),
    ],
)
def test_what_perplexity_shows_is_said(change, low, high, words, studied):
    row = {"perplexity_change_pct": change, "perplexity_change_pct_low": low, "perplexity_change_pct_high": high}
    frame = pd.DataFrame([{"precision": "int4", "tokens": 1024, **row}])
    assert f"Its perplexity is {words}" in " ".join(about(replace(studied.results(), divergence=frame), "int4"))


def test_what_other_processes_disturbed_is_said_and_what_bounds_it_is_not_where_peaks_were(studied):
    study = studied.results()
    flags = [["cpu_shared", "peaks_disturbed"] if name == "int4" else [] for name in study.maxbatch.precision]
    sentence = about(replace(study, maxbatch=study.maxbatch.assign(flags=flags)), "int4")[-1]
    assert "other processes disturbed INT4" in sentence and "bound" not in sentence
    assert "disturbed" not in about(study, "int4")[-1] and "bound by" in about(study, "int4")[-1]


def test_every_study_has_an_opening_and_kept_ones_have_findings(studied):
    assert opening(Results("", "", "")) == "Nothing was measured yet." and findings(Results("", "", "")) == {}
    text = opening(studied.results())
    assert all(part in text for part in ("5 formats", "example/one-billion", "Example GPU", "1,200 items", "1 to 64"))
    assert all(findings(study) for study in read_reference(ROOT / "outputs" / "reference").values())
