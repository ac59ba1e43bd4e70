"""README, notebooks and pages: links lead somewhere, budgets hold, numbers are those of the kept tables."""

import json
import re
import subprocess
import tomllib

import pandas as pd
import pytest

import qnb
from qnb.precision import PRECISIONS
from qnb.provenance import ROOT
from qnb.run import NOTEBOOKS

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": 1200, "outputs/reference/README.md": 500, "notebooks/METRICS.md": 500,
         "notebooks/01_quantize.ipynb": 450,
         "notebooks/02_accuracy.ipynb": 750, "notebooks/03_perf_bs1.ipynb": 700,
         "notebooks/04_perf_maxbatch.ipynb": 750, "notebooks/05_figures.ipynb": 500}  # fmt: skip


def markdown(page):
    """The page's prose, without code, tables, links' addresses and pictures."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("|")]
    return re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(lines))


def sentences(page):
    """The lengths of a page's sentences in words."""
    blocks = re.split(r"\n\s*\n|\n(?=[-*] |#)", markdown(page))
    parts = [part for block in blocks for part in re.split(r"(?<=[.!?:])\s+", block.strip("#-* \n"))]
    return [len(re.findall(r"\b[\w'-]+\b", part)) for part in parts if re.search(r"\w", part)]


@pytest.mark.parametrize("page", PAGES)
def test_pages_keep_to_their_budgets(page):
    lengths = sentences(page)
    assert sum(lengths) <= PAGES[page]
    assert sum(lengths) / len(lengths) < 17 and sum(length > 30 for length in lengths) <= 1


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".ipynb")])
def test_notebooks_report_no_typed_results(page):
    """Numbers with a decimal point are results; what a study found is computed from its rows."""
    text = re.sub(r"Llama-3\.2|SmolLM2-[\w.]+|`[^`]*`", "", markdown(page))
    assert re.findall(r"\b\d+\.\d+\b", text) == []


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_to_files(page):
    folder = (ROOT / page).parent
    targets = re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    for target in targets:
        assert (folder / target.partition("#")[0]).exists(), target


def test_the_table_holds_the_kept_runs_numbers():
    folder = ROOT / "outputs" / "reference" / "h200-llama-3.2-1b-shape"
    keys = ["precision", "engine"]
    bs1, full = (pd.read_csv(folder / f"{name}.csv").set_index(keys) for name in ("table3_bs1", "table4_maxbatch"))
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.-]+) \| ([\d.]+) \| (.+?) \|$",
                      README, re.MULTILINE)  # fmt: skip
    assert [row[0] for row in rows] == list(PRECISIONS)
    for name, weights, memory, eager, captured, joules, served in rows:
        engine = "cuda_graph" if captured != "-" else "eager"
        best, batch = bs1.loc[(name, engine)], full.loc[(name, engine)]
        assert weights == f"{best.weights_mib:,.0f}" and memory == f"{best.peak_memory_mib:,.0f}"
        assert eager == f"{1000 * bs1.loc[(name, 'eager')].tpot_s:.1f}"
        assert captured in ("-", f"{1000 * best.tpot_s:.2f}") and joules == f"{best.energy_j_per_token:.2f}"
        assert served == f"{batch.throughput_rps:,.0f} at {batch.batch_size:,.0f}"
    times = bs1.tpot_s.unstack().dropna()
    ratios = times.eager / times.cuda_graph
    assert f"{min(ratios):.0f} to {max(ratios):.0f} times faster" in README


def test_the_loss_named_is_the_kept_tables():
    changes = pd.read_csv(ROOT / "outputs" / "reference" / "h100-smollm2-135m" / "table2_change.csv")
    mean = changes[changes.task.str.startswith("mean over tasks")].set_index("precision")
    interval = f"95 % interval {-mean.high_pp.nf4:.1f} to {-mean.low_pp.nf4:.1f}"
    assert f"NF4 lost {-mean.change_pp.nf4:.1f} points on average ({interval})" in README
    assert mean.low_pp.int8 < 0 < mean.high_pp.int8


def test_every_command_of_the_readme_is_one():
    help_text = subprocess.run(["qnb", "--help"], capture_output=True, text=True, check=True).stdout
    for command in set(re.findall(r"`(?:python -m )?qnb (\w+)", README)):
        assert command in help_text
    assert set(re.findall(r"`(\w+)`", README)) >= {path.stem for path in (NOTEBOOKS / "profiles").glob("*.yaml")}


def test_the_version_stands_once_and_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == qnb.__version__
