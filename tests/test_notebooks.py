"""The five notebooks: thin, clean, alike; and run whole by papermill and by the command line."""

import ast
import csv
import itertools
import json
import shutil
import tomllib

import pytest
import yaml
from conftest import command

from qnb.__main__ import NAMES, NOTEBOOKS, ROOT, main
from qnb.ledger import checked

ALL = [pytest.param(NOTEBOOKS / f"{name}.ipynb", id=name) for name in NAMES]
PROFILES = sorted((NOTEBOOKS / "profiles").glob("*.yaml"))


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def text_of(cell):
    return "".join(cell["source"])


def parameters(path):
    (cell,) = (cell for cell in cells(path, "code") if "parameters" in cell["metadata"].get("tags", []))
    return cell


def test_there_are_five():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == list(NAMES)


@pytest.mark.parametrize("path", ALL)
def test_cells_are_short_and_hold_no_machinery(path):
    """At most 10 lines a cell, 15 for setup and parameters; no def, class, try, while; one for."""
    for cell in cells(path, "code"):
        text = text_of(cell)
        roomy = "parameters" in cell["metadata"].get("tags", []) or "%pip" in text
        assert len(text.splitlines()) <= (15 if roomy else 10), text
        tree = list(ast.walk(ast.parse(text.replace("%pip", "pass  # "))))
        machinery = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Try, ast.While)
        assert not any(isinstance(node, machinery) for node in tree), text
        assert sum(isinstance(node, ast.For) for node in tree) <= 1, text


@pytest.mark.parametrize("path", ALL)
def test_words_stand_between_code(path):
    assert len(cells(path, "markdown")) >= len(cells(path, "code"))
    kinds = [cell["cell_type"] for cell in json.loads(path.read_text())["cells"]]
    assert kinds[0] == kinds[-1] == "markdown"
    assert all(pair != ("code", "code") for pair in itertools.pairwise(kinds))


@pytest.mark.parametrize("path", ALL)
def test_nothing_is_kept_of_a_run(path):
    notebook = json.loads(path.read_text())
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(path, "code"))
    assert "widgets" not in notebook["metadata"] and "papermill" not in notebook["metadata"]
    assert notebook["metadata"]["accelerator"] == "GPU" and notebook["metadata"]["colab"]["gpuType"] == "T4"


@pytest.mark.parametrize("path", ALL)
def test_parameters_are_literals(path):
    """Papermill puts its values after this cell, so nothing may be derived in it."""
    for statement in ast.parse(text_of(parameters(path))).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)


@pytest.mark.parametrize("path", ALL)
def test_badge_and_setup_name_the_projects_repository(path):
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["repository"]
    owner_name = repository.removeprefix("https://github.com/")
    first, setup = text_of(cells(path, "markdown")[0]), text_of(cells(path, "code")[0])
    assert f"https://colab.research.google.com/github/{owner_name}/blob/main/notebooks/{path.name}" in first
    assert f"git+{repository}" in setup


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_profiles_set_only_what_a_notebook_has(profile):
    known = {
        target.id
        for path in NOTEBOOKS.glob("*.ipynb")
        for statement in ast.parse(text_of(parameters(path))).body
        for target in statement.targets
    }
    assert set(yaml.safe_load(profile.read_text())) <= known


@pytest.mark.slow
def test_smoke_leaves_rows_tables_figures_and_notebooks(smoke):
    folder, done = smoke
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    for precision in ("bf16", "int8"):
        mine = [(row["stage"], row["setting"]) for row in rows if row["precision"] == precision]
        assert sorted(mine) == [
            ("accuracy", ""),
            ("batch", ""),
            ("divergence", ""),
            ("drift", ""),
            ("drift", ""),
            ("perf", "bs1"),
            ("perf", "maxbatch"),
            ("quantize", ""),
        ]
    tables = {path.stem for path in (folder / "tables").glob("*.csv")}
    assert tables == {
        "table1_accuracy", "table2_change", "divergence", "drift",
        "table3_bs1", "table3_causes", "table3_t4_estimate",
        "table4_maxbatch", "table4_causes", "table4_t4_estimate", "examples",
    }  # fmt: skip
    assert len(list((folder / "figures").glob("fig[1-6]_*.html"))) == 6
    for name in NAMES:
        for cell in cells(folder / "notebooks" / f"{name}.ipynb", "code"):
            for output in cell["outputs"]:
                assert output["output_type"] != "error" and output.get("name") != "stderr", output


@pytest.mark.slow
def test_running_again_measures_nothing(smoke):
    folder, _ = smoke
    before = (folder / "ledger.jsonl").read_bytes()
    done = command("run", "--profile", "smoke", "--output", str(folder), "--only", "03")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "ledger.jsonl").read_bytes() == before
    said = done.stderr.splitlines()
    assert "\r" not in done.stderr and len(said) == len(set(said)) and "1/1" in said[-1]  # a log has lines


@pytest.mark.slow
def test_a_notebook_alone_from_elsewhere_makes_what_it_needs(source, tmp_path):
    import papermill

    given = {**yaml.safe_load((NOTEBOOKS / "profiles" / "smoke.yaml").read_text()), "precisions": "int8"}
    known = papermill.inspect_notebook(str(NOTEBOOKS / "03_perf_bs1.ipynb"))
    given = {name: value for name, value in given.items() if name in known} | {"output": str(tmp_path / "study")}
    papermill.execute_notebook(
        str(NOTEBOOKS / "03_perf_bs1.ipynb"), str(tmp_path / "out.ipynb"), given, cwd=str(tmp_path),
        progress_bar=False, execution_timeout=300,
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "study" / "ledger.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["limits", "quantize", "perf"]
    assert "no checkpoint" in (tmp_path / "out.ipynb").read_text()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--profile", "nope"], ["nope", "demo"]),
        (["-p", "precisions", "int3"], ["int3", "nf4"]),
        (["-p", "tasks", "arc_eazy"], ["arc_eazy", "arc_easy"]),
        (["-p", "limt", "3"], ["limt", "limit"]),
        (["-p", "limit", "-3"], ["-3", "at least 1, or 'all', or 'auto'"]),
        (["-p", "minutes", "-1"], ["-1", "minutes"]),
        (["-p", "bs1_requests", "0"], ["0", "at least 1"]),
        (["-p", "bs1_requests", "all"], ["all", "at least 1, or a time such as '4 minutes', or 'auto'"]),
        (["-p", "device", "cuda:9"], ["cuda:9", "NVIDIA GPU"]),
        (["-p", "bs1_repeats", "auto"], ["bs1_repeats", "at least 1\n"]),
        (["-p", "engines", "fast"], ["fast", "eager, cuda_graph"]),
        (["-p", "model", "5"], ["5", "name"]),
        (["-p", "overwrite", "maybe"], ["maybe", "true or false"]),
        (["-p", "tasks", "[sample_easy]"], ["tasks", "one text"]),
        (["-p", "model", "nonsense"], ["nonsense", "smollm2-135m"]),
        (["-p", "model", "shape:llama-3.2-1b"], ["random", "smollm2-135m"]),
        (["-p", "data_dir", "/no/such/folder"], ["/no/such/folder"]),
        (["--only", "07"], ["07", "01_quantize"]),
    ],
)
def test_bad_input_is_one_line_and_loses_nothing(arguments, names, tmp_path, capsys):
    """One line naming what was given and what is accepted, exit code 2, nothing written."""
    assert main(["run", "--profile", "smoke", "--output", str(tmp_path / "study"), *arguments]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert all(name in said for name in names), said
    assert not (tmp_path / "study" / "ledger.jsonl").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    done = command("run", "--profile", "smoke", "--output", str(tmp_path / "file"))
    assert done.returncode == 2 and "is a file" in done.stderr and (tmp_path / "file").read_text() == "mine"


def test_an_output_that_cannot_be_made_is_refused():
    done = command("run", "--profile", "smoke", "--output", "/proc/study")
    assert done.returncode == 2 and "/proc/study cannot be written" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "given",
    ["report ~nouser/x", "verify ~nouser/x", "run --output ~nouser/x", "run -p data_dir ~nouser/x",
     "run -p model ~nouser/x"],
)  # fmt: skip
def test_a_home_that_nobody_has_is_refused(given, capsys):
    assert main(given.split()) == 2 and "'~nouser/x' begins with a home" in capsys.readouterr().err


def test_an_output_of_another_model_is_refused(tmp_path):
    (tmp_path / "study.json").write_bytes(checked({"asked": "a/b", "name": "a/b", "path": "", "why": "named"}))
    done = command("run", "--profile", "smoke", "--output", str(tmp_path))
    assert done.returncode == 2 and "a/b" in done.stderr and "smollm2-135m" in done.stderr


def test_a_failing_notebook_is_named_with_its_cell_and_reason(tmp_path, monkeypatch, capsys):
    from qnb import __main__

    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    broken = tmp_path / "notebooks" / "05_figures.ipynb"
    notebook = json.loads(broken.read_text())
    notebook["cells"][2]["source"] = ["import qnb\n", "1 / 0"]
    broken.write_text(json.dumps(notebook))
    monkeypatch.setattr(__main__, "NOTEBOOKS", tmp_path / "notebooks")
    code = __main__.main(["run", "--profile", "smoke", "--only", "05", "--output", str(tmp_path / "study")])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1 and "05_figures, cell 3: ZeroDivisionError: division by zero" in last
    assert (tmp_path / "study" / "notebooks" / "05_figures.ipynb").exists()


@pytest.mark.slow
def test_overwrite_measures_again_and_the_table_shows_the_newest(smoke, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(smoke[0], folder)
    before = (folder / "ledger.jsonl").read_text()
    done = command(
        "run", "--profile", "smoke", "--output", str(folder), "--only", "03",
        "-p", "overwrite", "true", "-p", "precisions", "bf16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    after = (folder / "ledger.jsonl").read_text()
    assert after.startswith(before)
    (row,) = [json.loads(line) for line in after[len(before) :].splitlines() if '"perf"' in line]
    with (folder / "tables" / "table3_bs1.csv").open() as file:
        (shown,) = csv.DictReader(file)
    assert float(shown["total_s"]) == pytest.approx(row["total_s"], abs=1e-3)


def test_audit_and_doctor_answer():
    audit, doctor = command("audit"), command("doctor")
    assert audit.returncode == 0 and "FAILS" in audit.stdout and "holds" in audit.stdout
    assert doctor.returncode == 0 and "bfloat16" in doctor.stdout
