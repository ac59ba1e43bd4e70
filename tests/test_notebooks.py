"""The five notebooks: thin, clean, alike; and run whole by papermill and by the command line."""

import ast
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib

import nbformat
import pytest
import yaml
from conftest import command
from tiny_models import save_tiny

import qnb
from qnb.__main__ import main
from qnb.provenance import ROOT
from qnb.run import NAMES, NOTEBOOKS, notebook_parameters

ALL = [pytest.param(NOTEBOOKS / f"{name}.ipynb", id=name) for name in NAMES]
PROFILES = sorted((NOTEBOOKS / "profiles").glob("*.yaml"))


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def text_of(cell):
    return "".join(cell["source"])


def tagged(path, tag):
    (cell,) = (cell for cell in cells(path, "code") if tag in cell["metadata"].get("tags", []))
    return cell


@pytest.mark.parametrize("path", ALL)
def test_cells_are_short_and_hold_no_machinery_and_nothing_of_a_run(path):
    """At most 10 lines a cell; no def, class, try, while; one for."""
    about = json.loads(path.read_text())["metadata"]
    assert not {"widgets", "papermill"} & set(about)
    assert (about["accelerator"], about["colab"]["gpuType"]) == ("GPU", "T4")
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        text = text_of(cell)
        assert len(text.splitlines()) <= 10, text
        tree = list(ast.walk(ast.parse(text.replace("%pip", "pass  # "))))
        machinery = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Try, ast.While)
        assert not any(isinstance(node, machinery) for node in tree), text
        assert sum(isinstance(node, ast.For) for node in tree) <= 1, text


@pytest.mark.parametrize("path", ALL)
def test_parameters_are_literals_six_of_them_in_the_tagged_cell_and_all_are_used(path):
    """Papermill puts its values after the tagged cell, so nothing may be derived in it or set after it."""
    texts = [text_of(tagged(path, tag)) for tag in ("rarely-used", "parameters")]
    statements = [ast.parse(text).body for text in texts]
    for statement in itertools.chain(*statements):
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)
    assert len(statements[1]) <= 6
    order = [text_of(cell) for cell in cells(path, "code")]
    assert order.index(texts[0]) < order.index(texts[1])
    names = {statement.targets[0].id for statement in itertools.chain(*statements)}
    assert notebook_parameters(path).keys() == names
    nodes = [node for text in order[order.index(texts[1]) + 1 :] for node in ast.walk(ast.parse(text))]
    uses = [(node.id, type(node.ctx)) for node in nodes if isinstance(node, ast.Name) and node.id in names]
    assert {name for name, _ in uses} == names and {use for _, use in uses} == {ast.Load}


@pytest.mark.parametrize("path", ALL)
def test_badge_and_setup_name_the_projects_repository_and_the_tag_of_its_version(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == qnb.__version__
    repository, tag = project["urls"]["repository"], f"v{project['version']}"
    badge = f"https://colab.research.google.com/github/{repository.removeprefix('https://github.com/')}/blob/{tag}"
    assert f"({badge}/notebooks/{path.name})" in text_of(cells(path, "markdown")[0])
    assert sum(f'git+{repository}@{tag}"' in text_of(cell) for cell in cells(path, "code")) == 1


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_profiles_set_only_what_a_notebook_has(profile):
    known = set().union(*map(notebook_parameters, NOTEBOOKS.glob("*.ipynb")))
    assert set(yaml.safe_load(profile.read_text())) <= known


@pytest.mark.slow
def test_smoke_leaves_rows_tables_figures_and_notebooks(smoke):
    folder, done = smoke
    assert done.returncode == 0, done.stderr[-2000:]
    assert "\r" not in done.stderr and done.stderr.startswith("01_quantize: done in ")  # a log has lines
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    for precision in ("bf16", "int8"):
        mine = [(row["stage"], row["setting"]) for row in rows if row["precision"] == precision]
        once = [(stage, "") for stage in ("quantize", "accuracy", "divergence", "batch")]
        both = [("batch_sensitivity", "hf"), ("batch_sensitivity", "qnb"), ("perf", "bs1"), ("perf", "maxbatch")]
        assert sorted(mine) == sorted(once + both)
    tables = {path.stem for path in (folder / "tables").glob("*.csv")}
    assert tables == {
        "table1_accuracy", "table2_change", "divergence", "batch_sensitivity",
        "table3_bs1", "table4_maxbatch", "batch_plans",
    }  # fmt: skip
    assert len(list((folder / "figures").glob("fig[1-6]_*.html"))) == 6
    for name in NAMES:
        for cell in cells(folder / "notebooks" / f"{name}.ipynb", "code"):
            for output in cell["outputs"]:
                assert output["output_type"] != "error" and output.get("name") != "stderr", output


@pytest.mark.slow
def test_a_kept_study_is_shown_without_its_model_and_measures_nothing(smoke, tmp_path):
    """The notebooks of another machine's study are whole notebooks, without widgets and paths."""
    folder = shutil.copytree(smoke[0], tmp_path / "study", ignore=shutil.ignore_patterns("checkpoints", "notebooks"))
    record = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps({**record, "path": "gone", "device": "Example GPU"}))
    before = (folder / "ledger.jsonl").read_bytes()
    done = command("report", str(folder), "--notebooks")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "ledger.jsonl").read_bytes() == before and not (folder / "checkpoints").exists()
    for path in (folder / "notebooks" / f"{name}.ipynb" for name in NAMES):
        nbformat.validate(nbformat.read(path, 4))
        outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
        assert len(outputs) > 3 and not any("widget" in kind for each in outputs for kind in each.get("data", ()))
        assert f"{ROOT}/" not in path.read_text()
    (given,) = [cell for cell in cells(folder / "notebooks" / "03_perf_bs1.ipynb", "code")
                if cell["metadata"].get("tags") == ["injected-parameters"]]  # fmt: skip
    said = "".join(given["source"])
    assert all(f"# {words}\n" in said for words in ("prompt_tokens: 16", "engines: eager", "model: smollm2-135m"))
    assert "# $ qnb run --profile smoke" in said and said.endswith("minutes = 0\n")


@pytest.mark.slow
def test_tables_shown_are_narrow_and_have_no_gaps(smoke):
    """At most eight columns, no index, no missing value."""
    outputs = [output for name in NAMES for cell in cells(smoke[0] / "notebooks" / f"{name}.ipynb", "code")
               for output in cell["outputs"]]  # fmt: skip
    pages = ["".join(output.get("data", {}).get("text/html", "")) for output in outputs]
    tables = [page for page in pages if "<table" in page]
    assert len(tables) > len(NAMES) + 15
    for table in tables:
        assert "row_heading" not in table and "dataframe" not in table
        for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL):
            texts = [text.strip() for text in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)]
            assert 0 < len(texts) <= 8 and {"", "nan", "None", "NaT", "&lt;NA&gt;"}.isdisjoint(texts), texts


@pytest.mark.slow
def test_a_notebook_alone_from_elsewhere_makes_what_it_needs(tmp_path):
    import papermill

    given = yaml.safe_load((NOTEBOOKS / "profiles" / "smoke.yaml").read_text())
    given |= {"model": str(save_tiny(tmp_path / "model")), "precisions": "int8", "output": str(tmp_path / "study")}
    given = {name: given[name] for name in notebook_parameters(NOTEBOOKS / "03_perf_bs1.ipynb").keys() & given.keys()}
    papermill.execute_notebook(
        str(NOTEBOOKS / "03_perf_bs1.ipynb"), str(tmp_path / "out.ipynb"), given, cwd=str(tmp_path),
        progress_bar=False, execution_timeout=300,
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "study" / "ledger.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["peaks", "quantize", "perf"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--profile", "nope"], ["nope", "demo"]),
        (["-p", "precisions", "int3"], ["int3", "nf4"]),
        (["-p", "precisions", "''"], ["precisions is ''"]),
        (["-p", "tasks", "arc_eazy"], ["arc_eazy", "arc_easy"]),
        (["-p", "limt", "3"], ["limt", "limit"]),
        (["-p", "limit", "-3"], ["-3", "at least 1, or 'all', or 'auto'"]),
        (["-p", "minutes", "-1"], ["-1", "minutes"]),
        (["-p", "margin_pp", "0"], ["margin_pp is 0", "points"]),
        (["-p", "margin_pp", ".nan"], ["margin_pp is nan", "points"]),
        (["-p", "margin_pp", "100"], ["margin_pp is 100", "points"]),
        (["-p", "margin_pp", "true"], ["margin_pp is True", "points"]),
        (["-p", "bs1_requests", "0"], ["0", "at least 1"]),
        (["-p", "device", "cuda:9"], ["cuda:9", "NVIDIA GPU"]),
        (["-p", "engines", "fast"], ["fast", "eager", "cuda_graph"]),
        (["-p", "model", "5"], ["5", "name"]),
        (["-p", "tasks", "5"], ["5", "give names in one text"]),
        (["-p", "batch_size", "-1"], ["batch_size", "-1"]),
        (["-p", "ppl_tokens", "0"], ["ppl_tokens", "'all'"]),
        (["-p", "seed", "1.5"], ["seed", "whole number"]),
        (["-p", "half", "float32"], ["half", "auto, bfloat16"]),
        (["-p", "model", __file__], ["or a folder with config.json"]),
        (["-p", "model", "~nouser/x"], ["'~nouser/x' begins with an unknown user's home"]),
        (["-p", "data_dir", "~nouser/x"], ["'~nouser/x' begins with an unknown user's home"]),
        (["--output", "~nouser/x"], ["'~nouser/x' begins with an unknown user's home"]),
        (["--output", __file__], ["is a file"]),
        (["--output", ""], ["--output is empty"]),
        (["--only", " "], ["--only is empty"]),
        (["-p", "output", "one", "--output", "two"], ["output is given twice"]),
        (["--output", "/proc/study"], ["/proc/study cannot be written"]),
        (["-p", "prompt_source", "novel"], ["novel", "sample, wikitext"]),
        (["-p", "scorer", "mine"], ["mine", "qnb, hf"]),
        (["-p", "push_to", "a b"], ["a b", "you/llama-3.2-1b"]),
        (["-p", "overwrite", "maybe"], ["maybe", "true or false"]),
        (["-p", "dry_run", "maybe"], ["dry_run is 'maybe'", "true or false"]),
        (["-p", "run_all", "maybe"], ["maybe", "auto, always, never"]),
        (["-p", "model", "nonsense"], ["nonsense", "smollm2-135m"]),
        (["-p", "model", "shape:llama-3.2-1b"], ["random", "smollm2-135m"]),
        (["-p", "data_dir", "/no/such/folder"], ["/no/such/folder"]),
        (["--only", "07"], ["07", "01, 02"]),
        (["-p", "precisions", "mine=checkpoint:/no/such"], ["/no/such", "is no folder"]),  # seen by a notebook
    ],
)
def test_bad_input_is_one_line_and_loses_nothing(arguments, names, tmp_path, capsys):
    """One line naming what was given and what is accepted, exit code 2, nothing written, no folder left."""
    assert main(["run", "--profile", "smoke", "--output", str(tmp_path / "new" / "study"), *arguments]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert all(name in said for name in names), said
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("word", "words"), [("audit", ("FAILS", "holds")), ("doctor", ("bfloat16",))])
def test_audit_and_doctor_answer(word, words, capsys):
    assert main([word]) == 0
    said = capsys.readouterr().out
    assert all(each in said for each in words)


def test_help_names_the_profiles_and_comes_at_once():
    started = time.perf_counter()
    done = command("run", "--help")
    assert done.returncode == 0 and "colab, demo, paper, smoke" in " ".join(done.stdout.split())
    assert time.perf_counter() - started < 2, "half a second on an idle machine"
    code = "import sys, qnb.__main__; print({'torch', 'pandas', 'papermill', 'transformers'} & set(sys.modules))"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert imported.stdout.strip() == "set()"
