"""Requirements: bounds that are tested, the same in both places, and nothing that Colab brings is replaced."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import qnb

ROOT = Path(__file__).parents[1]
COLAB = ROOT.parent / "shared" / "colab" / "pip-freeze.gpu.txt"


def bounds():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-e"))]


def ends(requirement):
    """Return the floor, what is installed, and the ceiling."""
    limits = {part.operator: Version(part.version) for part in requirement.specifier}
    assert set(limits) == {">=", "<"}, requirement
    return limits[">="], Version(metadata.version(requirement.name)), limits["<"]


def test_each_has_a_floor_and_the_next_major_release_for_a_ceiling():
    for requirement in bounds():
        floor, installed, ceiling = ends(requirement)
        assert floor <= installed < ceiling, f"{requirement}, but {installed} is what these tests run on"
        assert re.fullmatch(r"[1-9]\d*|0\.[1-9]\d*", str(ceiling)), requirement
        following = [str(installed.major + 1), f"0.{installed.minor + 1}"]  # of 0.4.12 it is 1, or 0.5
        is_next = str(ceiling) in following[: 1 if installed.major else 2]
        assert is_next or os.environ.get("QNB_VERSIONS") != "newest", f"{requirement}, and {installed} is the newest"


def test_pyproject_says_the_same():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {str(Requirement(text)) for text in declared} == {str(requirement) for requirement in bounds()}
    assert "-e .[pictures]" in (ROOT / "requirements.txt").read_text().splitlines()


def test_the_package_is_found_from_beside_a_checkout_of_its_name(tmp_path):
    """A folder without `__init__.py` is a package too, where only a finder that comes after it knows better."""
    (tmp_path / "qnb").mkdir()
    code = "import qnb; print(qnb.__version__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == qnb.__version__


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture
def brought():
    """The versions that Colab brings, by name."""
    if not COLAB.exists():
        pytest.skip("no list of Colab's packages beside the project")
    pairs = re.findall(r"^([A-Za-z0-9_.\-]+)(?:==| @ \S*?-)([0-9][^\s;+]*)", COLAB.read_text(), re.MULTILINE)
    return {normalized(name): version for name, version in pairs}


def test_colab_keeps_what_it_brings(brought):
    assert {"torch", "transformers", "plotly", "ipywidgets", "pandas"} <= set(brought)
    for requirement in bounds():
        version = brought.get(normalized(requirement.name))
        if version is not None:
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement} would replace {version}"


def test_what_colab_lacks_is_there_for_its_python(brought, tmp_path):
    """All that pip would add, for Python 3.13 beside what Colab brings. PyTorch's own differ in Colab's build."""
    uv = shutil.which("uv") or pytest.skip("uv is not installed: pip install -e '.[test]'")
    torchs = re.compile(r"(nvidia-(?!ml)|cuda-|triton)")
    pins = {name: version for name, version in brought.items() if not torchs.match(name)}
    (tmp_path / "pins.txt").write_text("\n".join(f"{name}=={version}" for name, version in pins.items()))
    (tmp_path / "wanted.txt").write_text("\n".join(map(str, bounds())))
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", "3.13",
               "--python-platform", "x86_64-manylinux_2_28", "-c", "pins.txt", "wanted.txt"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if done.returncode and "No solution found" not in done.stderr:
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    found = {line.partition("==")[0] for line in done.stdout.split()}
    assert {"bitsandbytes", "lm-eval", "papermill", "gguf"} <= found - set(pins)
