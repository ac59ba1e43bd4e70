"""Requirements: floors only, the same in both places, and nothing that Colab brings is replaced."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
COLAB = ROOT.parent / "shared" / "colab" / "pip-freeze.gpu.txt"


def floors():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-e"))]


def test_only_floors_are_set():
    assert all({part.operator for part in requirement.specifier} == {">="} for requirement in floors())


def test_pyproject_says_the_same():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {str(Requirement(text)) for text in declared} == {str(requirement) for requirement in floors()}
    assert "-e .[pictures]" in (ROOT / "requirements.txt").read_text().splitlines()


def test_colab_keeps_what_it_brings():
    if not COLAB.exists():
        pytest.skip("no list of Colab's packages beside the project")
    pairs = re.findall(r"^([A-Za-z0-9_.\-]+)(?:==| @ \S*?-)([0-9][^\s;+]*)", COLAB.read_text(), re.MULTILINE)
    brought = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}
    assert {"torch", "transformers", "plotly", "ipywidgets", "pandas"} <= set(brought)
    for requirement in floors():
        version = brought.get(re.sub(r"[-_.]+", "-", requirement.name).lower())
        if version is not None:
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement} would replace {version}"
