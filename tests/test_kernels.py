"""Compiled kernels: a machine that finds them on the Drive builds none, and no other folder's are read."""

import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from qnb import colab, kernels
from qnb.session import Session

COMPILE = """
import sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from torch._inductor import cpu_vec_isa
from qnb import colab, kernels
cpu_vec_isa.valid_vec_isa_list = list  # finding the processor's instructions builds six files
colab.MOUNT = Path(sys.argv[1])
with kernels.kept(colab.MOUNT / "MyDrive" / "study"):
    value = torch.compile(lambda x: x.sin().sum())(torch.ones(8)).item()
print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"], round(value, 4))
"""


def test_a_new_machine_builds_no_kernel_again_and_passes_over_a_damaged_file(tmp_path):
    kept, results = tmp_path / "MyDrive" / "study" / "kernels", []
    for machine in ("first", "second"):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / machine)}
        run = [sys.executable, "-c", COMPILE, str(tmp_path)]
        done = subprocess.run(run, env=environment, capture_output=True, text=True)
        results.append(done.stdout.split())
        assert len([*kept.glob("[0-9a-f]*.bin")]) == 1, done.stderr[-2000:]
        (kept / "z.bin").write_bytes(b"damaged")
    assert results == [["1", "0", "6.7318"], ["0", "1", "6.7318"]]


@pytest.fixture
def built(tmp_path, monkeypatch):
    """A drive, and kernels that each block builds."""
    counts = iter(range(9))
    monkeypatch.setattr(kernels, "_built", lambda: next(counts))
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"kernels", None))
    monkeypatch.setattr(colab, "MOUNT", tmp_path / "drive")
    (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    return tmp_path / "drive"


@pytest.mark.parametrize("folder", ["MyDrive/study", "Shareddrives/team", "MyDrive/../other", "../elsewhere"])
def test_kernels_are_kept_on_the_users_own_drive_alone(folder, built):
    """What lies in another folder may be anybody's, and a file of kernels is code."""
    with Session("smollm2-135m", "bf16", built / folder).exclusive():
        pass
    kept = [path.read_bytes() for path in (built / folder).glob("kernels/*.bin")]
    assert kept == [b"kernels"] * (folder == "MyDrive/study")


def test_a_drive_that_is_full_costs_no_measurement(built, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "write_atomic", Mock(side_effect=OSError(28, "No space left on device")))
    with kernels.kept(built / "MyDrive" / "study"):
        measured = True
    assert measured and "No space left" in caplog.text
