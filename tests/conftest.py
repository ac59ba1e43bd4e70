"""What tests share: a GPU or a skip, the real data folder or a skip, the embedded model's checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qnb import model, precision
from qnb.provenance import ROOT

SECRET = "hf_" + "PlantedSecretToken" * 2  # shaped as a hub token is; nothing anywhere may show it
HUB = Path(__file__).parents[2] / "shared" / "hub"


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def hub():
    """A folder of real data sets laid out like the hub's repositories."""
    if not HUB.is_dir():
        pytest.skip("no folder of hub data sets beside the project")
    return HUB


@pytest.fixture(scope="session")
def source():
    """The embedded model, fetched once into the cache."""
    return model.resolve(model.EMBEDDED, "cpu")


@pytest.fixture(scope="session")
def checkpoint(source, tmp_path_factory):
    """Returns a function that makes a precision's checkpoint once a session: (folder, record)."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(name):
        if name not in made:
            made[name] = folder / name, model.convert(source, precision.PRECISIONS[name], folder / name, "cpu")
        return made[name]

    return make


def command(*arguments, cwd=None, **environment):
    """Run the command line to its end."""
    return subprocess.run(
        [sys.executable, "-m", "qnb", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd or ROOT,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="session")
def smoke(source, tmp_path_factory):
    """The whole path once, small, with a hub token about: its folder, and how the run ended."""
    folder = tmp_path_factory.mktemp("smoke") / "study"
    return folder, command("run", "--profile", "smoke", "--output", str(folder), HF_TOKEN=SECRET)
