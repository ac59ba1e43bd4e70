"""What goes wrong on the way: said in one line, nothing finished lost, tried again the next time."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import papermill
import psutil
import pytest
import torch
import yaml
from filelock import FileLock

from qnb import InputError, Study, __main__
from qnb.__main__ import NOTEBOOKS, ROOT
from qnb.ledger import Line
from qnb.quantize import checkpoint as model
from qnb.speed import benchmark
from qnb.speed.engines import Eager

SMOKE = yaml.safe_load((NOTEBOOKS / "profiles" / "smoke.yaml").read_text())


def start(folder, *more, **options):
    """Start a run in a process group of its own."""
    command = [sys.executable, "-m", "qnb", "run", "--profile", "smoke", "--output", str(folder), *more]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )


def rows(folder):
    """Every line of a ledger, none of them damaged."""
    path = Path(folder) / "ledger.jsonl"
    return [Line(line).row for line in path.read_bytes().splitlines(keepends=True)] if path.exists() else []


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.1)


# Notebooks


def test_the_help_of_a_run_names_its_profiles_and_an_example_that_is_taken(tmp_path, monkeypatch, capsys):
    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    (tmp_path / "notebooks" / "profiles" / "100%d.yaml").write_text("limit: 2")
    monkeypatch.setattr(__main__, "NOTEBOOKS", tmp_path / "notebooks")
    with pytest.raises(SystemExit) as ended:
        __main__.main(["run", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and ", ".join(__main__.profiles()) in told and "100%d" in told
    example = re.search(r"such as -p (\w+) ([\w,]+)", told).groups()
    known = set().union(*(papermill.inspect_notebook(NOTEBOOKS / f"{name}.ipynb") for name in __main__.NAMES))
    values = __main__.parameters("100%d", [example, ("output", str(tmp_path / "study"))], known)
    asked = __main__.validate(values, ["02_accuracy"]).precisions
    assert [precision.name for precision in asked] == example[1].split(",")


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Returns a function that runs 05 with a cell of one's own."""

    def run(source):
        shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
        path = tmp_path / "notebooks" / "05_figures.ipynb"
        notebook = json.loads(path.read_text())
        notebook["cells"][2]["source"] = [source]
        path.write_text(json.dumps(notebook))
        monkeypatch.setattr(__main__, "NOTEBOOKS", tmp_path / "notebooks")
        return __main__.main(["run", "--profile", "smoke", "--only", "05", "--output", str(tmp_path / "study")])

    return run


def test_a_kernel_that_dies_is_said_in_one_line(broken, capfd):
    assert broken("import os; os._exit(3)") == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("qnb: 05_figures") and "DeadKernelError" in last and "kept in" in last


@pytest.mark.parametrize("deaths, ended", [(1, 0), (2, 1)])
def test_a_kernel_that_dies_before_it_is_there_is_started_once_more(deaths, ended, tmp_path, monkeypatch, capsys):
    calls = []

    def start(*_, **__):
        calls.append(1)
        if len(calls) <= deaths:
            raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(papermill, "execute_notebook", start)
    asked = ["run", "--profile", "smoke", "--only", "05", "--output", str(tmp_path / "study")]
    assert __main__.main(asked) == ended and len(calls) == 2
    assert ("Kernel died" in capsys.readouterr().err) == bool(ended)


def test_a_cell_that_hangs_is_ended(broken, capfd, monkeypatch):
    monkeypatch.setattr(__main__, "CELL_TIMEOUT_S", 2)
    assert broken("import time; time.sleep(60)") == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("qnb: 05_figures") and "CellTimeoutError: A cell timed out" in last


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_run_told_to_end_ends_cleanly(source, tmp_path, sent):
    """Exit code 130, one line below the bar's, no kernel left behind, what was measured kept, locks free."""
    run = start(tmp_path / "study", "--only", "01")
    wait_for(lambda: rows(tmp_path / "study"))
    kernels = psutil.Process(run.pid).children(recursive=True)
    assert any("ipykernel" in " ".join(kernel.cmdline()) for kernel in kernels)
    run.send_signal(sent)
    said = [line for line in run.communicate(timeout=60)[1].splitlines() if line.strip() and " elapsed" not in line]
    assert run.returncode == 130 and len(said) == 1 and "what was measured is kept" in said[0]
    _, left = psutil.wait_procs(kernels, timeout=10)
    assert not left and rows(tmp_path / "study")
    FileLock(tmp_path / "study" / ".lock", timeout=5).acquire().lock.release()


# Two at once


def test_a_second_run_into_the_same_folder_is_refused(tmp_path, capsys):
    (tmp_path / "study").mkdir()
    with FileLock(tmp_path / "study" / ".run.lock"):
        run = start(tmp_path / "study", "--only", "05")
        said = run.communicate(timeout=120)[1].strip()
    assert run.returncode == 2 and said.startswith("qnb: ") and "in use by another run" in said
    assert len(said.splitlines()) == 1 and not rows(tmp_path / "study")


def test_a_second_notebook_waits_for_the_first(source, tmp_path, capsys):
    study, code = Study("smollm2-135m", "bf16", tmp_path), "import sys, time; from filelock import FileLock\n"
    code += "with FileLock(sys.argv[1]):\n    print('held', flush=True); time.sleep(2)"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    study.quantize()
    assert other.poll() == 0 and len(rows(tmp_path)) == 1
    assert "waiting for it" in capsys.readouterr().out


# Disks


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 100 MiB, where it can be had."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.name != "posix" or os.geteuid() or mount is None:
        pytest.skip("mounting a small disk needs root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder)]).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    yield folder
    subprocess.run([shutil.which("umount"), "-l", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_measured_and_goes_on_when_there_is_room(source, small_disk, capsys):
    """The checkpoint's 257 MiB do not fit: nothing half-written is left."""
    with pytest.raises(RuntimeError, match=r"nothing of stage quantize could be measured.*[Nn]o space"):
        Study("smollm2-135m", "bf16", small_disk / "study").quantize()
    assert "No space left" in capsys.readouterr().out
    left = [path.name for path in (small_disk / "study" / "checkpoints").iterdir()]
    assert left == [".bf16.lock"] and [row["stage"] for row in rows(small_disk / "study")] == ["quantize.failed"]
    subprocess.run([shutil.which("mount"), "-o", "remount,size=1g", str(small_disk)], check=True)
    again = Study("smollm2-135m", "bf16", small_disk / "study")
    assert again.quantize().proved.tolist() == [True] and again.ledger.failures() == []


def test_a_disk_that_is_full_to_the_last_byte_is_one_line(small_disk, capsys):
    (small_disk / "study").mkdir()
    with (small_disk / "filler").open("wb") as file, pytest.raises(OSError, match="space"):
        while True:
            file.write(bytes(2**20))
    assert __main__.main(["run", "--profile", "smoke", "--only", "05", "--output", str(small_disk / "study")]) in (
        1,
        2,
    )
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("qnb: ") and "space" in said


def test_a_read_only_folder_is_refused(small_disk, capsys):
    subprocess.run([shutil.which("mount"), "-o", "remount,ro", str(small_disk)], check=True)
    assert __main__.main(["run", "--profile", "smoke", "--output", str(small_disk / "study")]) == 2
    said = capsys.readouterr().err.strip()
    assert "cannot be written" in said and len(said.splitlines()) == 1


# Checkpoints


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_noticed_and_made_again(source, tmp_path, capsys):
    """Truncated, flipped in one bit, a file gone, its manifest changed: each is named and made again."""
    study = Study("smollm2-135m", "bf16", tmp_path)
    study.quantize()
    folder = tmp_path / "checkpoints" / "bf16"
    weights, whole = folder / "model.safetensors", model.file_sha256(folder / "model.safetensors")
    damages = {
        "model.safetensors": lambda: flip(weights),
        "model.safetensors ": lambda: os.truncate(weights, 1000),
        "config.json": lambda: (folder / "config.json").unlink(),
        "manifest.json": lambda: flip(folder / "manifest.json", 20),
    }
    for name, damage in damages.items():
        damage()
        Study("smollm2-135m", "bf16", tmp_path).checkpoint(study.precisions[0])
        assert f"{name.strip()} in" in capsys.readouterr().out
        assert model.damage(folder) == "" and model.file_sha256(weights) == whole


def test_a_checkpoint_of_other_library_versions_is_made_again(source, tmp_path):
    first = Study("smollm2-135m", "bf16", tmp_path)
    first.quantize()
    second = Study("smollm2-135m", "bf16", tmp_path)
    second.versions = {**first.versions, "bitsandbytes": "0.0.1"}
    second.quantize()
    assert [row["versions"]["bitsandbytes"] for row in rows(tmp_path)] == [first.versions["bitsandbytes"], "0.0.1"]


def test_a_damaged_source_is_unpacked_again(source, tmp_path, monkeypatch):
    kept = tmp_path / "cache"
    kept.mkdir()
    shutil.copytree(source.path, kept / Path(source.path).name)
    shutil.copy(model.fetch_gguf(), kept)
    monkeypatch.setenv("QNB_CACHE", str(kept))
    flip(next(kept.glob("*/model.safetensors")), 100_000_000)
    assert model.resolve(model.EMBEDDED, "cpu").fingerprint == source.fingerprint


def test_a_changed_study_file_is_refused(source, tmp_path):
    Study("smollm2-135m", "bf16", tmp_path).card()
    flip(tmp_path / "study.json", 30)
    with pytest.raises(InputError, match="was changed since it was written"):
        Study("smollm2-135m", "bf16", tmp_path)


# A GPU's memory, simulated: the error is torch's own


def full(*_, **__):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def tight(smoke, tmp_path):
    """A study whose int8 runs out of memory where the test says; its bf16 does not. Its checkpoints are made."""
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(smoke[0] / "checkpoints")
    shutil.copy(smoke[0] / "study.json", folder)
    lines = (smoke[0] / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    made = [line for line in lines if Line(line).stage == "quantize"]
    assert len(made) == 2
    (folder / "ledger.jsonl").write_bytes(b"".join(made))
    return Study("smollm2-135m", "bf16,int8", folder)


def tried_again(study, measure, stage, capsys):
    """Only int8 failed, with its reason, in one line; asked again with room it is measured, and nothing else is."""
    failed = study.ledger.failures()
    assert {(row["stage"], row["precision"], row["reason"].partition(":")[0]) for row in failed} == {
        (f"{stage}.failed", "int8", "out of memory")
    }
    assert "int8" in (said := capsys.readouterr().out) and "could not be measured (out of memory" in said
    assert set(study.ledger.frame(stage).precision) == {"bf16"}
    count = len(rows(study.folder))
    again = Study("smollm2-135m", "bf16,int8", study.folder)
    measure(again)
    assert again.ledger.failures() == [] and set(again.ledger.frame(stage).precision) == {"bf16", "int8"}
    new = rows(study.folder)[count:]
    assert {row["precision"] for row in new} == {"int8"}


def test_out_of_memory_when_loading(tight, monkeypatch, capsys):
    def measure(study):
        study.accuracy("sample_easy", 2)

    load = model.load
    with monkeypatch.context() as patch:
        patch.setattr(model, "load", lambda folder, precision, *rest: (
            full() if precision.name == "int8" else load(folder, precision, *rest)))  # fmt: skip
        measure(tight)
    tried_again(tight, measure, "accuracy", capsys)


def test_out_of_memory_in_the_scorer(tight, monkeypatch, capsys):
    """Not even one row fits: there is no smaller batch left to try."""
    from qnb.accuracy.scorer import SharedContextLM

    def measure(study):
        study.accuracy("sample_easy", 2)

    forward = SharedContextLM._forward
    with monkeypatch.context() as patch:
        patch.setattr(SharedContextLM, "_forward", lambda lm, *rest: (
            full() if getattr(lm.model, "is_quantized", False) else forward(lm, *rest)))  # fmt: skip
        measure(tight)
    tried_again(tight, measure, "accuracy", capsys)


def test_out_of_memory_in_every_probe(tight, monkeypatch, capsys):
    """Not even one request of int8 fits; bf16 is searched and timed all the same."""

    def measure(study):
        study.perf_maxbatch(study.workload("maxbatch", 2, 8, 2, "sample"), 2, 2000)

    generate = Eager.generate
    with monkeypatch.context() as patch:
        patch.setattr(Eager, "generate", lambda engine, *rest: (
            full() if getattr(engine._model, "is_quantized", False) else generate(engine, *rest)))  # fmt: skip
        measure(tight)
    assert set(tight.frame("perf", "maxbatch").precision) == {"bf16"}
    tried_again(tight, measure, "batch", capsys)


def test_out_of_memory_in_a_timed_run(tight, monkeypatch, capsys):
    def measure(study):
        study.perf_bs1(study.workload("bs1", 2, 8, 2, "sample"))

    work = benchmark.run
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "run", lambda network, *rest, **more: (
            full() if getattr(network, "is_quantized", False) else work(network, *rest, **more)))  # fmt: skip
        measure(tight)
    tried_again(tight, measure, "perf", capsys)
