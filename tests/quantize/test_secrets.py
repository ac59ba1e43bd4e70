"""A hub token in the environment or in Colab's secrets is shown nowhere: not in results, not in errors."""

import json
import shutil

import pytest
from conftest import SECRET, command

from qnb.__main__ import NOTEBOOKS

STAND_IN = """
from types import SimpleNamespace
class SecretNotFoundError(Exception): ...
class NotebookAccessError(Exception): ...
userdata = SimpleNamespace(get=lambda name: "%s", SecretNotFoundError=SecretNotFoundError,
                           NotebookAccessError=NotebookAccessError)
"""


def shown(folder, *texts):
    """The files and texts in which the secret stands."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files or texts
    return [path for path in files if SECRET.encode() in path.read_bytes()] + [
        text for text in texts if SECRET in text
    ]


@pytest.fixture
def colab(tmp_path):
    """An environment in which Colab's secrets hold the token too."""
    folder = tmp_path / "stand-in" / "google" / "colab"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    (folder / "__init__.py").write_text(STAND_IN % SECRET)
    (folder / "userdata.py").write_text(STAND_IN % SECRET + "get = userdata.get")
    return {"PYTHONPATH": str(tmp_path / "stand-in"), "HF_TOKEN": SECRET, "COLAB_RELEASE_TAG": "release"}


@pytest.mark.slow
def test_a_whole_study_shows_no_secret(smoke):
    folder, done = smoke
    assert done.returncode == 0, done.stderr
    assert shown(folder, done.stdout, done.stderr) == []


@pytest.mark.parametrize(
    "words",
    [
        ["doctor"],
        ["run", "--profile", "smoke", "-p", "model", "nobody/nothing", "--only", "01"],
        ["run", "--profile", "smoke", "-p", "push_to", "me/x", "-p", "dry_run", "false", "--only", "01"],
        ["run", "--profile", "smoke", "-p", "tasks", "arc_easy", "--only", "02"],
        ["run", "--profile", "smoke", "-p", "prompts", "wikitext", "--only", "03"],
    ],
    ids=lambda words: " ".join(words[-4:]),
)
def test_no_failing_stage_shows_a_secret(colab, tmp_path, words):
    """The hub is a closed port: every stage that needs it fails, with the token in its hands."""
    more = ["--output", str(tmp_path / "study")] if words[0] == "run" else []
    done = command(*words, *more, HF_ENDPOINT="http://127.0.0.1:9", **colab)
    assert done.returncode == (0 if words[0] == "doctor" else 2), done.stderr
    assert shown(tmp_path / "study", done.stdout, done.stderr) == []


def test_a_failing_cell_shows_no_secret(colab, tmp_path):
    """A cell's traceback is kept in the executed notebook: what the environment holds is not in it."""
    root = tmp_path / "checkout"
    shutil.copytree(NOTEBOOKS.parent / "qnb", root / "qnb")
    shutil.copytree(NOTEBOOKS, root / "notebooks")
    path = root / "notebooks" / "05_figures.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][2]["source"] = [
        "from huggingface_hub import get_token\n", "token = get_token()\n", "1 / (len(token) - len(token))",
    ]  # fmt: skip
    path.write_text(json.dumps(notebook))
    words = ["run", "--profile", "smoke", "--only", "05", "--output", str(tmp_path / "study")]
    done = command(*words, cwd=root, **{**colab, "PYTHONPATH": f"{root}:{colab['PYTHONPATH']}"})
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert shown(tmp_path / "study", done.stdout, done.stderr) == []
