"""What tests share: a GPU or a skip, the real data or a skip, the embedded model's checkpoints, one small study.

Two workers share two cores: each computes in one thread, since threads of both would wait for each other's turns, and
what takes long to make is made by the first that needs it and found by the other.
"""

import gc
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, which reads it once
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import example
import pytest
from filelock import FileLock

from qnb import precision
from qnb.provenance import ROOT
from qnb.quantize import checkpoint as checkpoints
from qnb.quantize import sources

SECRET = "hf_" + "PlantedSecretToken" * 2  # shaped as a hub token is; nothing anywhere may show it
HUB = Path(__file__).parents[2] / "shared" / "hub"


def pytest_collection_modifyitems(items):
    import torch

    gc.freeze()  # memory is given back often, and what was imported is no garbage
    items.sort(key=lambda item: not item.get_closest_marker("timeout"))  # what takes minutes begins at once

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
    return sources.resolve(sources.EMBEDDED, "cpu")


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all workers of this session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def checkpoint(source, shared):
    """Returns a function that makes a precision's checkpoint once a session: (folder, record)."""

    def make(name):
        folder, record = shared / "checkpoints" / name, shared / f"{name}.json"
        with FileLock(shared / f"{name}.lock"):
            if not record.exists():
                made = checkpoints.convert(source, precision.PRECISIONS[name], folder, "cpu")
                record.write_text(json.dumps(asdict(made)))
        return folder, checkpoints.Checkpoint(**json.loads(record.read_text()))

    return make


def random_model(config, seed=0):
    """A random model in float32, the same in every process."""
    import torch
    import transformers

    torch.manual_seed(seed)
    network = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for weight in network.parameters():  # as drawn, logits are all but equal
        weight.data *= 4 if weight.dim() > 1 else 1
    return network


@pytest.fixture(scope="session")
def tokenizer(source):
    """The embedded model's."""
    return checkpoints.load_tokenizer(source.path)


@pytest.fixture(scope="session")
def tiny(tokenizer):
    """A random Llama of two layers, of sizes that bitsandbytes packs on a CPU, with that tokenizer."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=2048,
    )  # fmt: skip
    return random_model(config), tokenizer


@pytest.fixture
def answering(source, tiny, tmp_path, monkeypatch):
    """A session of bf16 whose model is the random one."""
    from qnb.session import Session

    session = Session("smollm2-135m", "bf16", tmp_path)
    monkeypatch.setattr(session, "loaded", lambda precision: nullcontext(tiny[0]))
    return session


def command(*arguments, cwd=None, **environment):
    """Run the command line to its end."""
    words, environment = [sys.executable, "-m", "qnb", *arguments], {**os.environ, **environment}
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd or ROOT, env=environment)


@pytest.fixture(scope="session")
def smoke(source, shared):
    """The whole path once, small, with a hub token about: its folder, and how the run ended."""
    folder, record = shared / "smoke" / "study", shared / "smoke.json"
    with FileLock(shared / "smoke.lock"):
        if not record.exists():
            done = command("run", "--profile", "smoke", "--output", str(folder), HF_TOKEN=SECRET)
            ended = {"returncode": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
            record.write_text(json.dumps(ended))
    return folder, SimpleNamespace(**json.loads(record.read_text()))


@pytest.fixture(scope="session")
def studied(tmp_path_factory):
    """A study with a ledger of every stage and nothing measured; read it, never write to it."""
    from qnb import Study

    return Study(precisions="study", output=example.write(tmp_path_factory.mktemp("example") / "study"))


@pytest.fixture(scope="session")
def study(studied):
    """What that study's ledger gives."""
    return studied.results()


@pytest.fixture(scope="session")
def report_page(studied):
    """The example's report, written once."""
    return studied.report()


@pytest.fixture
def measured(tmp_path):
    """Returns a function that gives the results of accuracy rows, from their items (or whether each is right)."""
    import pandas as pd

    from qnb.ledger import Ledger, write_parquet
    from qnb.report.results import Results

    ledger = Ledger(tmp_path)

    def measure(rows, **fields):
        for (name, task), items in rows.items():
            frame = items if isinstance(items, pd.DataFrame) else example.answers(task, items)
            file, sha256 = write_parquet(tmp_path, f"items/{task}.{name}", frame)
            row = {"stage": "accuracy", "precision": name, "task": task, "limit": 4, "scores": [example.score(task)],
                   "groups": {}, "data_sha256": task, "items_file": file, "items_sha256": sha256}  # fmt: skip
            ledger.append({**row, **fields.get(name, {}), **fields.get(task, {}), **fields.get("every", {})})
        return Results.read(ledger)

    return measure
