"""README, notebooks and pages: links lead somewhere, budgets hold, numbers are those of the kept studies."""

import json
import math
import re
import subprocess

import pandas as pd
import pytest

from qnb.precision import PRECISIONS, STUDY
from qnb.provenance import ROOT
from qnb.report import recommend
from qnb.report.results import read_reference, task_name
from qnb.report.verdicts import at_chance
from qnb.run import NOTEBOOKS

README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = ROOT / "outputs" / "reference"
REHEARSAL = REFERENCE / "t4-rehearsal"
WORDS = {"README.md": 1200, "outputs/reference/README.md": 500, "notebooks/METRICS.md": 500,
         "notebooks/01_quantize.ipynb": 450,
         "notebooks/02_accuracy.ipynb": 750, "notebooks/03_perf_bs1.ipynb": 700,
         "notebooks/04_perf_maxbatch.ipynb": 750, "notebooks/05_figures.ipynb": 500}  # fmt: skip
TYPED_NUMBERS = {"README.md": 4, "outputs/reference/README.md": 6, "notebooks/METRICS.md": 6}  # in 100 words
# README's numbers that are no results
SETTINGS = {"0", "1", "2", "4", "16", "25", "32", "100", "128", "3.11", "6.0", "95"}
NUMBER = r"(?<![\w.,-])[-+]?\d[\d,]*(?:\.\d+)?(?![\w-])"  # not in names such as Llama-3.2-1B, H200 or 4-bit


def source(page):
    """A page's Markdown, without code, links' addresses and pictures."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)


def prose(page):
    """A page's text without tables."""
    return "\n".join(line for line in source(page).splitlines() if not line.lstrip().startswith("|"))


def sentences(page):
    """The lengths of a page's sentences in words."""
    blocks = re.split(r"\n\s*\n|\n(?=[-*] |#)", prose(page))
    parts = [part for block in blocks for part in re.split(r"(?<=[.!?:])\s+", block.strip("#-* \n"))]
    return [len(re.findall(r"\b[\w'-]+\b", part)) for part in parts if re.search(r"\w", part)]


def numbers(text):
    """The numbers typed into a text, outside code."""
    return re.findall(NUMBER, re.sub(r"`[^`]*`", " ", text))


@pytest.mark.parametrize("page", WORDS)
def test_pages_keep_to_their_budgets(page):
    lengths = sentences(page)
    assert sum(lengths) <= WORDS[page]
    assert sum(lengths) / len(lengths) < 17 and sum(length > 30 for length in lengths) <= 1
    assert 100 * len(numbers(prose(page))) <= TYPED_NUMBERS.get(page, 2) * sum(lengths)
    # a notebook computes its results, which are the numbers with a decimal point
    assert not page.endswith(".ipynb") or not [number for number in numbers(source(page)) if "." in number]


@pytest.mark.parametrize("page", WORDS)
def test_links_and_pictures_lead_to_files(page):
    folder = (ROOT / page).parent
    targets = re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    for target in targets:
        assert (folder / target.partition("#")[0]).exists(), target


@pytest.fixture(scope="module")
def kept():
    """The kept studies' frames by folder."""
    return read_reference(REFERENCE)


def rows_of(columns):
    """The cells of README's rows of so many columns that begin with a format's name."""
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in README.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) == columns and row[0] in PRECISIONS}


@pytest.fixture(scope="module")
def speeds(kept):
    """The kept speeds: ms per token by format and engine, and a row a format, captured where it can be."""
    study = kept["llama-3.2-1b-shape"]
    tpot_ms = 1000 * study.bs1.pivot(index="precision", columns="engine", values="tpot_s")
    timed = (frame.dropna(subset=["tpot_s"]) for frame in (study.bs1, study.maxbatch))
    best, full = (frame.drop_duplicates("precision", keep="last").set_index("precision") for frame in timed)
    return tpot_ms, best.assign(batch=full.batch_size, served_rps=full.throughput_rps)


def test_the_table_of_speeds_holds_the_kept_runs_numbers(kept, speeds):
    tpot_ms, best = speeds
    rows = rows_of(8)
    assert list(rows) == kept["llama-3.2-1b-shape"].precisions
    for name, row in rows.items():
        of = best.loc[name]
        times_ms = [(tpot_ms.eager[name], 1), (tpot_ms.cuda_graph[name], 2)]
        rest = [(of.energy_j_per_token, 2), (of.batch, 0), (of.served_rps, 0)]
        values = [(of.weights_mib, 0), (of.peak_memory_mib, 0), *times_ms, *rest]
        assert row == ["-" if math.isnan(value) else f"{value:,.{digits}f}" for value, digits in values]


def test_the_table_of_verdicts_is_what_the_kept_study_is_judged_to_be(kept):
    answer = recommend.summary(kept["smollm2-135m"]).set_index("precision")
    rows = {name: row for name, row in rows_of(5).items() if name in answer.index}
    assert {"fp16", "int8", "int4", "nf4"} <= set(rows)
    for name, row in rows.items():
        of = answer.loc[name]
        change = f"{of.change_pp:+.1f} ({of.low_pp:+.2f} to {of.high_pp:+.2f})"
        assert row == [change, f"{of.perplexity_change_pct:+.1f}", f"{of.kl_mean_nats:.3f}", of.words]


def test_every_result_in_the_readmes_text_is_a_kept_tables(kept, speeds):
    """What is left beside the results computed here, the settings and the citation is no number."""
    tpot_ms, best = speeds
    ratios, memory_mib, weights_mib = tpot_ms.eager / tpot_ms.cuda_graph, best.peak_memory_mib, best.weights_mib
    assert (tpot_ms.cuda_graph.idxmin(), memory_mib.idxmin()) == ("int8-dynamic", "nf4-dq")
    judged = recommend.summary(kept["smollm2-135m"]).set_index("precision").words
    assert all(judged[name] == "within 1 point" for name in ("int8-dynamic", "fp8"))
    assert best.served_rps.idxmax() == "fp8" and best.served_rps["int4-hqq"] < best.served_rps.nf4 / 10
    assert tpot_ms.cuda_graph["int4-hqq"] < tpot_ms.cuda_graph.nf4
    assert judged["nf4-dq"] == "loses more than 1 point"
    swept = kept["llama-3.2-1b-shape"].sweep.pivot(index="batch_size", columns="precision", values="throughput_rps")
    assert (swept.fp8 > swept.bf16).sum() == swept.bf16.count() - 1  # the largest sizes differ
    assert (swept["int8-dynamic"] / swept.bf16).loc[2:64].between(0.57, 0.7).all()  # a third slower
    stand_in = pd.read_csv(REHEARSAL / "stand_in.csv")
    results = [
        f"{tpot_ms.cuda_graph.min():.2f} ms", f"{tpot_ms.cuda_graph.bf16:.2f} for BF16",
        f"{memory_mib.min():,.0f} MiB", f"{memory_mib.bf16:,.0f} for BF16",
        f"{ratios.min():.0f} to {ratios.max():.0f} times",
        f"{weights_mib.loc[list(STUDY)].sum() / weights_mib.bf16:.1f} times",
        f"{math.ceil(10 * stand_in.peak_pss_gib.max()) / 10:.1f} GiB of RAM",
        f"{stand_in.query('cores == 2').minutes.sum():.0f} of 25 minutes",
    ]  # fmt: skip
    text, citation = prose("README.md").split("## Citing")
    for result in results:
        assert result in text
        text = text.replace(result, "")
    assert set(numbers(re.sub(r"[Nn]otebooks? 0\d(?: (?:and|to) 0\d)?", "", text))) <= SETTINGS
    assert numbers(citation.replace("Llama 3.2 1B", "").replace("2025", "")) == []


@pytest.mark.parametrize("page", ["README.md", "outputs/reference/README.md"])
def test_the_tasks_that_are_left_out_are_named(kept, page):
    study = kept["smollm2-135m"]
    names = {task: task_name(task) for task in study.scores.asked.unique()}
    assert set(at_chance(study)) == {"arc_challenge", "mmlu", "gsm8k"}
    assert all(name in prose(page) for name in names.values())


def test_every_command_of_the_readme_is_one():
    help_text = subprocess.run(["qnb", "--help"], capture_output=True, text=True, check=True).stdout
    for command in set(re.findall(r"`(?:python -m )?qnb (\w+)", README)):
        assert command in help_text
    assert set(re.findall(r"`(\w+)`", README)) >= {path.stem for path in (NOTEBOOKS / "profiles").glob("*.yaml")}
