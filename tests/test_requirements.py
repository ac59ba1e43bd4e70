"""Requirements: bounds that are tested, the same in both places, and nothing that Colab brings is replaced."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
COLAB = ROOT.parent / "shared" / "colab" / "pip-freeze.gpu.txt"


def bounds():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-e"))]


def test_each_has_a_floor_and_the_next_major_release_for_a_ceiling():
    for requirement in bounds():
        ends = {part.operator: Version(part.version) for part in requirement.specifier}
        assert set(ends) == {">=", "<"}, requirement
        installed = Version(metadata.version(requirement.name))
        assert ends[">="] <= installed < ends["<"], f"{requirement}, but {installed} is what these tests run on"
        assert ends["<"].major - installed.major == 1 or installed.major == 0


def test_pyproject_says_the_same():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {str(Requirement(text)) for text in declared} == {str(requirement) for requirement in bounds()}
    assert "-e .[pictures]" in (ROOT / "requirements.txt").read_text().splitlines()


def test_colab_keeps_what_it_brings():
    if not COLAB.exists():
        pytest.skip("no list of Colab's packages beside the project")
    pairs = re.findall(r"^([A-Za-z0-9_.\-]+)(?:==| @ \S*?-)([0-9][^\s;+]*)", COLAB.read_text(), re.MULTILINE)
    brought = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}
    assert {"torch", "transformers", "plotly", "ipywidgets", "pandas"} <= set(brought)
    for requirement in bounds():
        version = brought.get(re.sub(r"[-_.]+", "-", requirement.name).lower())
        if version is not None:
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement} would replace {version}"
