"""Compiled kernels: a machine that finds them on the Drive builds none, and no other folder's are read."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest

from qnb import colab, kernels
from qnb.session import Session

COMPILE = """
import sys
from contextlib import nullcontext
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from qnb import kernels
with kernels.kept(Path(sys.argv[1])):
    value = torch.compile(lambda x: x.sin().sum())(torch.ones(8)).item()
print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"], round(value, 4))
"""


def test_a_new_machine_builds_no_kernel_again_and_passes_over_a_damaged_file(tmp_path):
    kept, results = tmp_path / "kernels", []
    for machine in ("first", "second"):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / machine)}
        run = [sys.executable, "-c", COMPILE, str(kept)]
        done = subprocess.run(run, env=environment, capture_output=True, text=True)
        results.append(done.stdout.split())
        assert len([*kept.glob("[0-9a-f]*.bin")]) == 1, done.stderr[-2000:]
        (kept / "z.bin").write_bytes(b"damaged")
    assert results == [["1", "0", "6.7318"], ["0", "1", "6.7318"]]


@pytest.mark.parametrize("on_drive", [True, False])
def test_kernels_are_kept_on_the_drive_alone(on_drive, tmp_path, monkeypatch):
    """What lies in another folder may be anybody's, and a file of kernels is code."""
    folders = []
    monkeypatch.setattr(colab, "MOUNT", tmp_path if on_drive else tmp_path / "drive")
    monkeypatch.setattr(kernels, "kept", lambda folder: folders.append(folder) or nullcontext())
    with Session("smollm2-135m", "bf16", tmp_path / "study").exclusive():
        pass
    assert folders == [tmp_path / "study" / "kernels"] * on_drive
