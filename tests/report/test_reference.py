"""The kept studies are what their ledgers give, hold no text of a data set, and agree with stock lm-eval."""

import json
import re
import subprocess

import pandas as pd
import pytest

from qnb.provenance import ROOT
from qnb.report import findings, page
from qnb.report.results import read_reference
from qnb.report.tables import MEASURED_BY, build
from qnb.report.verify import verify

REFERENCE = ROOT / "outputs" / "reference"
STUDIES = read_reference(REFERENCE)
assert "smollm2-135m" in STUDIES
# stock lm-eval 0.4.13 in BF16: acc, and acc_norm where it has one
STOCK = {"arc_challenge": (0.2466, 0.2713), "arc_easy": (0.5156, 0.4676), "hellaswag": (0.3636, 0.4252),
         "mmlu": (0.2308,)}  # fmt: skip
ITEMS = {"task", "doc_id", "filter", "gold", "picked", "correct", "correct_norm", "loglikelihoods", "has_gold"}


@pytest.fixture(scope="module", params=STUDIES)
def study(request):
    return STUDIES[request.param]


def test_files_and_tables_are_what_the_rows_give(study):
    assert {finding.part: finding.problem for finding in verify(study.folder) if finding.problem} == {}
    for name in MEASURED_BY:
        table = build(study, name)
        assert table.empty or {"version", "device", "host", "date"} <= set(table)


def test_findings_and_notebooks_are_of_this_ledger(study):
    assert (study.folder / "FINDINGS.md").read_text() == page.text(study)
    books = {path.name[:2]: json.loads(path.read_text()) for path in (study.folder / "notebooks").glob("*.ipynb")}
    sections = {"02": "accuracy", "03": "bs1", "04": "maxbatch"}
    for number, book in books.items():
        outputs = [output for cell in book["cells"] for output in cell.get("outputs", ())]
        shown = json.dumps(outputs, ensure_ascii=False)
        assert not re.search(r"/(home|root|tmp|work|Users)/|widget-view|\"error\"", shown)
        texts = "".join("".join(output.get("text", ())) for output in outputs)
        assert number not in sections or findings.text(study, sections[number]) in texts
    measured = {"02": study.scores, "03": study.bs1, "04": study.maxbatch}
    assert {"05", *(number for number, frame in measured.items() if len(frame))} <= set(books)


def test_what_is_kept_is_small_and_holds_no_text_of_a_data_set(study):
    listed = subprocess.run(["git", "ls-files", "-z", REFERENCE], capture_output=True, text=True, cwd=ROOT).stdout
    sizes = {name: (ROOT / name).stat().st_size for name in listed.split("\0") if name and (ROOT / name).exists()}
    assert sum(sizes.values()) < 8 * 2**20
    assert all(size < 2**20 for name, size in sizes.items() if name.endswith(".ipynb"))
    pictures = [name for name in sizes if name.endswith(".png") and f"/{study.name}/" in name]
    assert 1 <= len(pictures) <= 8
    for row in study.accuracy_rows.to_dict("records"):
        items = pd.read_parquet(study.folder / row["items_file"])
        assert set(items) <= ITEMS
        assert "loglikelihoods" in items or "gold" not in items  # which is a text of the data set then


def test_bf16_agrees_with_stock_lm_eval():
    scores = STUDIES["smollm2-135m"].scores.query("precision == 'bf16' and task == asked")
    values = scores.set_index(["task", "metric"]).value
    for task, expected in STOCK.items():
        assert [values[task, name] for name in ("acc", "acc_norm")[: len(expected)]] == pytest.approx(
            expected, abs=0.003
        )


def test_captured_passes_agree_and_power_adds_up_to_energy():
    """Passes differ by 3 % at most. In 3 s, power read now and then gives the counter's energy within 5 %.

    In less NVML's power, a mean over the second before, lags behind.
    """
    study = STUDIES["llama-3.2-1b-shape"]
    for frame in (study.bs1, study.maxbatch):
        captured = frame[frame.engine == "cuda_graph"].dropna(subset=["tpot_s"])
        assert len(captured) and (captured.throughput_spread_pct < 3).all() and (captured.passes >= 2).all()
    long = study.passes[(study.passes.duration_s > 3) & study.passes.samples_file.notna()]  # a sweep keeps none
    assert {"eager", "cuda_graph"} == set(long.engine)
    for row in long.itertuples():
        read = pd.read_parquet(study.folder / row.samples_file)
        integral_j = (read.power_w.rolling(2).mean() * read.t_s.diff()).sum()
        assert integral_j == pytest.approx(read.energy_j.iloc[-1] - read.energy_j.iloc[0], rel=0.05)
