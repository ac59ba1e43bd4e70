"""Colab, by a stand-in for google.colab that records what it is asked; nothing here was run on Colab itself."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from qnb import InputError, colab, study
from qnb.run import NOTEBOOKS

SHELL = '''
"""Run the notebooks' setup cells in an IPython shell that takes itself for Colab's, and say what they asked for."""
import builtins, contextlib, importlib.util, io, json, sys
from types import ModuleType, SimpleNamespace
from IPython.core.interactiveshell import InteractiveShell

calls, printed, cells = [], io.StringIO(), json.loads(sys.argv[1])
google, colab, errors = map(ModuleType, ("google", "google.colab", "google.colab.errors"))
google.colab, errors.Error = colab, type("Error", (Exception,), {})
colab.output = SimpleNamespace(enable_custom_widget_manager=lambda: calls.append(["widgets"]))
colab.userdata = SimpleNamespace(get=lambda name: calls.append(["secret", name]) or "hf_from_the_secrets")
sys.modules |= {"google": google, "google.colab": colab, "google.colab.errors": errors}

shell = InteractiveShell.instance()
builtins.get_ipython = lambda: "<google.colab._shell.Shell object>"  # what huggingface_hub knows Colab by
shell.register_magic_function(lambda line: calls.append(["pip", line]), magic_name="pip")
with contextlib.redirect_stdout(printed):
    for cell in cells:
        shell.run_cell(cell).raise_error()
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "qnb" else found(name, *rest)
    shell.run_cell(cells[0]).raise_error()
from huggingface_hub import get_token
print(json.dumps({"calls": calls, "printed": printed.getvalue(), "token": get_token()}))
'''


def code_of(path):
    """The code cells up to the one that installs, as texts."""
    texts = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return texts[: [("%pip install" in text) for text in texts].index(True) + 1]


def setup_cells():
    return [code_of(path)[-1] for path in sorted(NOTEBOOKS.glob("*.ipynb"))]


@pytest.mark.parametrize(("hosted", "has_gpu"), [(True, False), (True, True), (False, False)])
def test_colab_without_a_gpu_stops_before_anything_is_installed(hosted, has_gpu, monkeypatch):
    """In each notebook that wants one: 05 draws without."""
    *checks, drawing = [code_of(path)[:-1] for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
    assert drawing == [] and checks == [checks[0]] * 4
    monkeypatch.setattr(Path, "exists", lambda path: has_gpu)
    monkeypatch.setitem(sys.modules, "google.colab" if hosted else "elsewhere", SimpleNamespace())
    with pytest.raises(AssertionError, match="T4 GPU") if hosted and not has_gpu else contextlib.nullcontext():
        exec(checks[0][0], {})


def test_the_setup_cell_installs_only_what_is_missing_and_lets_panels_be_drawn(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    environment.pop("HF_TOKEN", None)
    assert len(set(setup_cells())) == 1, "all notebooks have the same"
    run = [sys.executable, "-c", SHELL, json.dumps(setup_cells())]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    installed = [line for kind, *rest in said["calls"] if kind == "pip" for line in rest]
    assert said["printed"] == ""  # silent where all is there
    assert len(installed) == 2  # by the one cell that did not find qnb
    assert installed[0].startswith("list --format=freeze >") and "torch" not in installed[1]
    kept = installed[0].split(">")[1].strip()
    assert f"--constraint {kept}" in installed[1]  # nothing that Colab brings is replaced
    assert installed[1].endswith("| tail -n 1")  # pip's line of what it installed
    assert said["calls"].count(["widgets"]) == 6
    assert said["token"] == "hf_from_the_secrets" and ["secret", "HF_TOKEN"] in said["calls"]


def test_elsewhere_nothing_happens():
    assert not colab.hosted()
    colab.prepare()
    with pytest.raises(InputError, match="only Colab has"):
        colab.locate("drive:study")


@pytest.fixture
def drive(tmp_path, monkeypatch):
    """Google Drive as Colab offers it, in a folder; gives its function that mounts it."""
    mount = Mock(side_effect=lambda path: (tmp_path / "MyDrive").mkdir())
    monkeypatch.setitem(sys.modules, "google", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(drive=SimpleNamespace(mount=mount)))
    monkeypatch.setattr(colab, "MOUNT", tmp_path)
    return mount


def test_an_output_on_the_drive_mounts_it_once(drive, tmp_path):
    for _ in range(2):
        assert colab.locate("drive:qnb/study") == tmp_path / "MyDrive" / "qnb" / "study"
    drive.assert_called_once_with(str(tmp_path))
    assert study.Study(output="drive:qnb/study").folder == tmp_path / "MyDrive" / "qnb" / "study"


@pytest.mark.parametrize("output", ["drive:", "drive:/", "drive:../elsewhere", "drive:study"])
def test_a_drive_that_is_not_given_or_an_output_that_names_no_folder_on_it_is_refused(output, drive):
    drive.side_effect = NotImplementedError("no drive")
    expected = "allow it, or give a folder of the VM" if output == "drive:study" else "names no folder"
    with pytest.raises(InputError, match=expected):
        colab.locate(output)
