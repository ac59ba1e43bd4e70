"""What tests share: a GPU or a skip, the real data folder or a skip, the embedded model's checkpoints."""

from pathlib import Path

import example
import pytest

from qnb import model, precision

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


@pytest.fixture(scope="session")
def studied(tmp_path_factory):
    """A study with a ledger of every stage and nothing measured; read it, never write to it."""
    from qnb import Study

    return Study(precisions="study", output=example.write(tmp_path_factory.mktemp("example") / "study"))


@pytest.fixture(scope="session")
def report_page(studied):
    """The example's report, written once."""
    return studied.report()
