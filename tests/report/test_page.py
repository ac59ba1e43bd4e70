"""The report is one page, computed from rows; what it was given stays text, and its limits are counted."""

import re
from base64 import b64decode
from dataclasses import replace
from hashlib import sha256

import example
import pandas as pd
import pytest

from qnb.columns import header
from qnb.ledger import Ledger, file_sha256
from qnb.report import page, recommend
from qnb.report.figures import FIGURES
from qnb.report.findings import findings
from qnb.report.results import Results
from qnb.report.tables import TABLES, build, knees

EVIL = "<script>alert(1)</script>/x\"onload='alert(2)"


@pytest.fixture(scope="module")
def text(report_page):
    return report_page.read_text()


def body(text):
    """Return what follows plotly.js, which has strings of its own that look like markup."""
    return text.split("</head>")[-1]


def cells(text, caption):
    """Return a table's rows as texts."""
    rows = text.split(f"<caption>{caption}")[1].split("</table>")[0].split("<tr>")[2:]
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


def test_the_page_is_one_small_file_with_plotly_in_it_once(text, report_page):
    assert report_page.stat().st_size < 6e6
    assert text.count("* plotly.js v") == 1
    assert text.count('"showSendToCloud": false') == text.count("Plotly.newPlot(") > 0  # nothing is uploaded
    # the browser's test sees that nothing is asked for
    assert not re.search(r'(src|href|action)="(?!#|data:text/csv)', body(text))
    assert "default-src 'none'" in text


def test_the_answer_comes_first_and_sections_fold_in_order(text, study):
    order = ["summary", "pictures", "findings", "accuracy", "bs1", "maxbatch", "tradeoff", "cost", "card", "paper"]
    assert re.findall(r'<(?:section|details) id="(\w+)"', text) == [*order, "limits"]
    answer = text.split('id="summary"')[1].split("</section>")[0]
    assert "Recommended: " in answer
    assert re.findall(r"</span>([\w-]+)</th>", answer) == study.precisions
    verdicts = re.findall(r'<td class="verdict (\w+)">(\S+) \w', answer)
    assert verdicts == [("baseline", "○"), ("within", "✓"), ("within", "✓"), ("loses", "✗"), ("unclear", "?")]
    pictures = text.split('id="pictures"')[1].split("</section>")[0]
    assert re.findall(r'<div id="(\w+)"', pictures) == ["front_memory", "token_time"]


def test_the_page_holds_every_table_and_figure_the_card_the_audit_and_limits(text, study):
    for part in ("2,000 requests were run", "Example GPU", "kernels at work"):
        assert part in text, part
    assert len(re.findall(r'<div class="figure"', text)) == len(FIGURES)
    assert len(cells(text, "Table 2: change")) == len(example.TASKS) + 1  # and what the verdict rests on
    assert len(cells(text, "Table 4: largest batch")) == len(study.maxbatch)
    assert len(cells(text, "Perplexity, and how far")) == 5
    assert len(cells(text, "The sweep: where throughput")) == len(knees(study.sweep))
    assert sha256(Ledger(study.folder).path.read_bytes()).hexdigest() in text


def test_a_download_is_the_whole_table(text, study):
    files = dict(re.findall(r'download="(\w+)\.csv" href="data:text/csv;base64,(\S+)"', text))
    assert set(files) == {"table1_accuracy", "table2_change", "divergence", "table3_bs1", "table4_maxbatch", "sweep"}
    for name, file in files.items():
        assert b64decode(file).decode() == build(study, name).to_csv(index=False)


def test_all_columns_stand_with_formats_across(study):
    table = build(study, "table3_bs1")
    blocks = page.all_columns(table)
    assert set(blocks) == {"eager", "cuda graph"} and list(blocks["eager"])[1:] == study.precisions
    quantities = [name for name in table if table[name].astype(bool).any() and table[name].notna().any()]
    shown = {"format", "engine", *blocks["eager"][""], *blocks["cuda graph"][""]}
    assert set(map(header, quantities)) <= shown


def test_a_page_folds_a_groups_tasks_and_says_what_is_not_there(text, study):
    """Here that is BF16's accuracy, and an allocator's peak at batch size 1."""
    parts = [example.score(task, asked="mmlu", group=task == "mmlu", precision="nf4", limit="all")
             for task in ("mmlu", "mmlu_stem", "mmlu_other")]  # fmt: skip
    bs1 = study.bs1.assign(peak_reserved_mib=float("nan"))
    other = page.page(replace(study, scores=pd.DataFrame(parts), accuracy_rows=pd.DataFrame(), bs1=bs1))
    assert cells(other, "Table 1")[0][0] == "MMLU"
    folded = other.split("parts of MMLU</summary>")[1].split("</details>")[0]
    assert "MMLU STEM" in folded and "MMLU other" in folded
    assert "bf16 was not measured" in other
    assert "how far the process grew" in other and "how far the process grew" not in text


def test_published_columns_stand_beside_the_same_model_only(text, study):
    assert "published" not in body(text).split('id="paper"')[0]
    published = replace(study, model="meta-llama/Llama-3.2-1B")
    for name in ("table1_accuracy", "table2_change", "table3_bs1", "table4_maxbatch"):
        assert len(build(published, name).filter(like="published_").columns)


def test_writing_a_report_saves_every_table_that_rows_give_and_a_card_per_checkpoint(study, report_page):
    saved = {path.stem for path in (study.folder / "tables").glob("*.csv")}
    assert saved == {name for name in TABLES if len(build(study, name))} >= {"batch_plans", "sweep"}
    assert {path.parent.name for path in (study.folder / "cards").glob("*/README.md")} == set(study.precisions)


def test_what_a_model_or_a_row_says_stays_text(tmp_path):
    """A model's name, an engine, a note and a failure that carry tags reach the page as text."""
    ledger = Ledger(example.write(tmp_path / "study", EVIL, ("bf16", "int8"), ("eager",)))
    ledger.append({"stage": "perf", "setting": "bs1", "precision": "int8", "engine": EVIL, "note": EVIL,
                   "batch_size": 1, "fingerprint": "f"})  # fmt: skip
    ledger.append({"stage": "accuracy.failed", "precision": "int8", "task": EVIL, "reason": EVIL, "fingerprint": "f"})
    text = body(page.write(Results.read(ledger)).read_text())
    assert text.count("&lt;script&gt;alert(1)") > 4
    assert not re.search(r"<script>alert|<[^>]*onload=", text)


def test_an_empty_study_says_so_and_still_makes_a_page(tmp_path):
    text = body(page.page(Results.read(Ledger(tmp_path))))
    assert "No accuracy was measured" in text
    assert "Not measured here: How accurate is each format?" in text and 'class="figure"' not in text


def test_limits_count_what_rows_flag(study):
    found = page.limits(study)
    assert "The GPU's clocks were held down: 2 of 60 timed rows." in found  # INT4's two largest batches
    assert not any("One pass" in line or "of a sample" in line for line in found)
    flagged = page.limits(replace(study, sweep=study.sweep.assign(flags=[["cpu_shared", "too_short"]] * 40)))
    assert sum(": 40 of 60 timed rows." in line for line in flagged) == 2
    once = replace(study, bs1=study.bs1.assign(passes=1))
    assert "One pass only, so no range is known: 10 of 10 rows at batch size 1." in page.limits(once)


def test_limits_say_what_failed_and_what_accuracy_lacks(study):
    failures = [{"stage": "perf.failed", "precision": name, "engine": "eager", "reason": "out of memory"}
                for name in ("bf16", "fp16")]  # fmt: skip
    found = page.limits(replace(study, failures=failures))
    assert "Could not be measured: bf16 eager, fp16 eager (out of memory)." in found
    part = study.scores.assign(n_total=study.scores.n_items.where(study.scores.task != "arc_easy", 5000))
    assert "Only a sample of the items was asked: ARC easy 400 of 5,000." in page.limits(replace(study, scores=part))


def test_the_card_says_what_rows_say(study):
    card = page.card(study)
    assert (card["model"], card["device"], card["versions"]) == ("example/one-billion", "Example GPU", "torch 2.11.0")
    assert "60 perf" in card["rows"] and set(page.card(Results("", "", ""))) == {"written by"}


def test_the_answer_and_every_finding_are_written_as_markdown(study, report_page):
    found = (report_page.parent / "FINDINGS.md").read_text()
    assert recommend.sentence(study) in found
    assert all(line in found for lines in findings(study).values() for line in lines)
    assert found.count("\n## ") == 4 and file_sha256(study.folder / "ledger.jsonl") in found
