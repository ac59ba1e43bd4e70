"""Runs: what goes wrong is said in one line, nothing finished is lost, and the next run goes on."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import nbformat
import papermill
import psutil
import pytest
from conftest import SECRET, command
from filelock import FileLock
from tiny_models import save_tiny

from qnb import InputError, Study, run
from qnb.__main__ import main
from qnb.ledger import Ledger, row_key
from qnb.provenance import ROOT
from qnb.quantize import files
from qnb.run import NAMES, NOTEBOOKS

# What a clock or a sensor reads, or depends on it. Everything else of a row is the same in every run.
MEASURED = re.compile(
    r".*_(s|mib|rps|tps|pct|w|mhz|j|sha256|file)|samples|failed_readings|missing_readings|throttle|gpu_processes"
    r"|measured_at|command|probes|matmul_flop_per_s|flags|stop_reason"
)
KILLS = int(os.environ.get("QNB_KILLS", 2))
EXACT = ("accuracy", "divergence", "batch_sensitivity")  # stages in which nothing that counts is read off a clock


def start(folder, *arguments):
    """Start a run in a process group of its own."""
    words = [sys.executable, "-m", "qnb", "run", "--profile", "smoke", "--output", str(folder), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=ROOT, start_new_session=True, **pipes)


def rows(folder):
    """The newest rows of a ledger; no line of it may be damaged."""
    ledger = Ledger(folder)
    assert ledger.damaged == []
    return ledger.rows()


@pytest.fixture
def filled(tmp_path):
    """The folder of a study that has a row, so that 05 is not refused."""
    Ledger(tmp_path / "study").append({"stage": "peaks"})
    return tmp_path / "study"


# Notebooks


@pytest.mark.parametrize(
    ("source", "reason"),
    [("import os; os._exit(3)", "05_figures: DeadKernelError"),
     ("import time; time.sleep(60)", "05_figures: CellTimeoutError: A cell timed out")],
)  # fmt: skip
def test_what_stops_a_notebook_is_said_in_one_line(source, reason, filled, tmp_path, capfd, monkeypatch):
    """The setup of 05 is another cell."""
    monkeypatch.setattr(run, "NOTEBOOKS", shutil.copytree(NOTEBOOKS, tmp_path / "notebooks"))
    monkeypatch.setattr(run, "CELL_TIMEOUT_S", 5)
    notebook = nbformat.read(path := run.NOTEBOOKS / "05_figures.ipynb", 4)
    notebook.cells[2].source = source
    nbformat.write(notebook, path)
    assert main(["run", "--profile", "smoke", "--only", "05", "--output", str(filled)]) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"qnb: {reason}") and "what was measured is kept in" in last


@pytest.mark.parametrize(("deaths", "code"), [(1, 0), (2, 1)])
def test_a_kernel_that_dies_before_it_answers_is_started_once_more(deaths, code, filled, monkeypatch, capsys):
    died = RuntimeError("Kernel died before replying to kernel_info")
    monkeypatch.setattr(papermill, "execute_notebook", execute := Mock(side_effect=[died] * deaths + [None]))
    words = ["run", "--profile", "smoke", "--only", "05", "--output", str(filled)]
    assert main(words) == code and execute.call_count == 2
    assert ("Kernel died" in capsys.readouterr().err) == bool(code)


def test_the_interpreter_that_started_the_run_executes_the_notebooks(tmp_path, monkeypatch):
    """A kernelspec `python3` of another environment is passed over."""
    other = tmp_path / "kernels" / "python3"
    other.mkdir(parents=True)
    (other / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    from jupyter_client.kernelspec import get_kernel_spec

    with run._own_kernel():
        assert get_kernel_spec("python3").argv[0] == sys.executable
    assert os.environ["JUPYTER_PATH"] == str(tmp_path)


@pytest.mark.parametrize(
    "console",
    [{"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
     {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}],
)  # fmt: skip
def test_a_console_without_the_letters_gets_escapes(console, tmp_path):
    done = command("report", str(tmp_path / "東京"), **console)
    assert done.returncode == 2 and "holds no study" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_run_names_what_was_disturbed_or_measured_before_and_a_report_that_is_older(studied, tmp_path, capsys):
    folder = shutil.copytree(studied.folder, tmp_path / "study")
    study = Study(output=folder)
    (folder / "report.html").touch()
    row = next(row for row in study.session.ledger.rows("perf") if row["setting"] == "bs1" and "total_s" in row)
    time.sleep(0.01)
    study.session.ledger.append({**row, "flags": ["cpu_shared"]})
    text = "\n".join(run.summary(study))
    assert f"--only 03 -p precisions {row['precision']} -p overwrite true" in text and "older than the newest" in text
    study.session.ledger.append({**row, "flags": ["throttled"]})
    assert "disturbed" not in "\n".join(run.summary(study))
    assert run._report_end(Study(precisions="int8", output=folder), []) == 0
    assert "also shows bf16, fp16, int4, nf4\n" in capsys.readouterr().out


# From within 01


@pytest.mark.parametrize(
    ("run_all", "within", "hosted", "count"),
    [("auto", "", False, 0), ("auto", "", True, 4), ("never", "", True, 0), ("always", "qnb run", True, 0)],
)
def test_01_runs_the_others_on_colab_not_in_a_run(run_all, within, hosted, count, studied, tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(papermill, "execute_notebook", lambda path, *_, **__: names.append(path.stem))
    monkeypatch.setattr(run.colab, "hosted", lambda: hosted)
    monkeypatch.setenv(run.COMMAND, within)
    study = Study(output=shutil.copytree(studied.folder, tmp_path / "study"))
    assert (run.rest(study, run_all) is None) == (count == 0) and names == list(NAMES[1:])[:count]


def test_01s_last_cell_gives_its_parameters_to_the_others_and_ends_with_the_advice(studied, tmp_path, monkeypatch):
    """In a kernel, as Jupyter has it. A notebook that stops is named, and the next is run."""
    monkeypatch.delenv(run.COMMAND, raising=False)  # other tests here are runs
    folder = shutil.copytree(studied.folder, tmp_path / "study")
    last = json.loads((NOTEBOOKS / "01_quantize.ipynb").read_text())["cells"][-2]["source"]
    begin = ["import pathlib, qnb.run", f"qnb.run.NOTEBOOKS = pathlib.Path({str(tmp_path)!r})",
             "study = qnb.Study(output=output)",
             "run_all, model, precisions, overwrite = 'always', 'auto', 'bf16', False", "minutes, half = 0, 'auto'",
             "".join(last)]  # fmt: skip
    codes = ["\n".join(begin),
             "import os, pathlib\npathlib.Path(output, 'given').write_text(str(seed) + os.environ['QNB_WAITING'])",
             "1 / 0", "import qnb; raise qnb.InputError('a bad input')", "print()"]  # fmt: skip
    about = {"language_info": {"name": "python"}, "kernelspec": {"name": "python3", "display_name": "Python 3"}}
    for name, code in zip(NAMES, codes, strict=True):
        notebook = nbformat.v4.new_notebook(metadata=about)
        notebook.cells = [nbformat.v4.new_code_cell(each) for each in ("seed = 0\noutput = ''", code)]
        notebook.cells[0].metadata.tags = ["parameters"]
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    done = papermill.execute_notebook(tmp_path / "01_quantize.ipynb", None, {"output": str(folder), "seed": 7})
    *said, advice = done.cells[-1].outputs
    text = "".join(output.get("text", "") for output in said)
    for words in ("03_perf_bs1, cell 3: ZeroDivisionError", "a bad input", "05_figures: done in", "report", "fastest"):
        assert words in text
    assert "may fit" in advice.data["text/html"] and (folder / "given").read_text() == "70"  # 01 holds no GPU


@pytest.mark.slow
def test_an_installed_package_brings_its_notebooks(filled, tmp_path):
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    kept = shutil.ignore_patterns(".git", "outputs", "tests", "build", "*.egg-info", "__pycache__")
    copy = shutil.copytree(ROOT, tmp_path / "copy", symlinks=True, ignore=kept)
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "build", "--build-lib", "../site"]
    subprocess.run(build, cwd=copy, check=True, capture_output=True)
    words = ["run", "--profile", "smoke", "--only", "05", "--output", str(filled)]
    done = command(*words, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0 and done.stderr.startswith("05_figures: done in"), done.stderr
    assert (
        "ledger.jsonl: 1\n" in done.stdout and "rows in all: 1\n" in done.stderr and (filled / "report.html").exists()
    )


# A hub token in the environment


def shown(folder, *texts):
    """Whether the secret stands in one of the texts or in a file below `folder`."""
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return any(SECRET in text for text in texts) or any(SECRET.encode() in content for content in files)


@pytest.mark.slow
def test_a_whole_study_shows_no_secret(smoke):
    folder, done = smoke
    assert done.returncode == 0, done.stderr
    assert (folder / "ledger.jsonl").exists() and not shown(folder, done.stdout, done.stderr)


@pytest.mark.parametrize("options", ["push_to me/x -p dry_run false --only 01", "tasks arc_easy --only 02"])
def test_no_failing_stage_shows_a_secret(tmp_path, options):
    """The hub is a closed port: every stage that needs it fails, with the token in its hands. No retry waits long."""
    brief = "import time; wait = time.sleep; time.sleep = lambda seconds: wait(min(seconds, 0.05))"
    (tmp_path / "sitecustomize.py").write_text(brief)
    words = ["run", "--profile", "smoke", "--output", str(tmp_path / "study"), "-p", "model"]
    words += [str(save_tiny(tmp_path / "model")), "-p", *options.split()]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = command(*words, HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN=SECRET, PYTHONPATH=path)
    assert done.returncode == 2, done.stderr
    assert not shown(tmp_path, done.stdout, done.stderr)


# Ended, and two at once


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_run_told_to_end_ends_cleanly(source, tmp_path, sent):
    """Exit code 130, one line, no kernel left behind, what was measured kept, locks free."""
    process = start(tmp_path / "study", "--only", "01")
    while not rows(tmp_path / "study"):
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.1)
    kernels = psutil.Process(process.pid).children(recursive=True)
    assert any("ipykernel" in " ".join(kernel.cmdline()) for kernel in kernels)
    process.send_signal(sent)
    said = process.communicate(timeout=60)[1].strip().splitlines()
    assert process.returncode == 130 and len(said) == 1 and "what was measured is kept" in said[0]
    _, left = psutil.wait_procs(kernels, timeout=10)
    assert not left and rows(tmp_path / "study")
    FileLock(tmp_path / "study" / ".lock", timeout=5).acquire().lock.release()


def test_a_second_run_into_the_same_folder_is_refused(tmp_path, capsys):
    (tmp_path / "study").mkdir()
    with FileLock(tmp_path / "study" / ".run.lock"):
        assert main(["run", "--profile", "smoke", "--output", str(tmp_path / "study")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("qnb: ") and "in use by another run" in said and len(said.splitlines()) == 1
    assert not rows(tmp_path / "study")


# Disks


def test_a_refused_run_leaves_the_notebook_that_was_executed_before(tmp_path, monkeypatch):
    def refuse(_, target, *__, **___):
        target.write_text("half of it")
        raise papermill.PapermillExecutionError(0, 1, "", "InputError", "no such checkpoint", [])

    monkeypatch.setattr(papermill, "execute_notebook", refuse)
    executed = tmp_path / "notebooks" / "01_quantize.ipynb"
    executed.parent.mkdir()
    executed.write_text("all of it")
    assert main(["run", "--profile", "smoke", "--only", "01", "--output", str(tmp_path)]) == 2
    assert executed.read_text() == "all of it" and len(list(executed.parent.iterdir())) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 100 MiB, where it can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.name != "posix" or os.geteuid() or mount is None:
        pytest.skip("mounting a small disk needs root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder)]).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    yield folder
    subprocess.run([shutil.which("umount"), "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_loses_nothing_and_the_study_goes_on_when_there_is_room(
    source, small_disk, capsys, monkeypatch
):
    """The checkpoint's 257 MiB do not fit: nothing half-written is left. Then another file takes the last byte."""
    study = Study("smollm2-135m", "bf16", small_disk / "study")
    with pytest.raises(InputError, match="make room"):
        study.quantize()
    monkeypatch.setattr(files, "disk_shortage", lambda *_: "")  # as where another process fills the disk meanwhile
    with pytest.raises((RuntimeError, OSError), match=r"[Nn]o space"):
        study.quantize()
    assert not list((small_disk / "study" / "checkpoints").glob("[a-z]*"))
    with (small_disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
        while True:
            file.write(bytes(2**20))
    assert main(["run", "--profile", "smoke", "--only", "01", "--output", str(small_disk / "study")]) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("qnb: ") and "space" in said
    subprocess.run([shutil.which("mount"), "-o", "remount,size=1g", str(small_disk)], check=True)
    again = Study("smollm2-135m", "bf16", small_disk / "study")
    assert again.quantize().reload_identical.tolist() == [True] and again.session.ledger.failures() == []


# Killed


def unmeasured(row):
    """A row without what is different in every run."""
    if row["stage"] in EXACT:
        return {**row, "measured_at": "", "command": "", "evaluate_s": 0, "alone_s": 0, "host_peak_mib": 0}
    return {name: value for name, value in row.items() if not MEASURED.fullmatch(name)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_anywhere_it_ends_as_an_undisturbed_run(smoke, tmp_path):
    """SIGKILL to the whole process group after a random time, in a random notebook; then one run to the end.

    Nothing is lost or measured twice, and what no clock reads is equal to the last bit, in tables too.
    """
    whole, done = smoke
    assert done.returncode == 0, done.stderr
    folder, draw, counts = tmp_path / "study", random.Random(KILLS), set()
    for _ in range(KILLS):
        only, seconds = draw.choice(NAMES)[:2], draw.uniform(2, 13)
        process = start(folder, "--only", only)
        try:
            process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            kernels = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            for kernel in kernels if draw.random() < 0.5 else ():  # else one outlives its run, and meets the next
                with contextlib.suppress(psutil.NoSuchProcess):
                    kernel.kill()
            counts.add(len(rows(folder)))
        time.sleep(draw.uniform(0, 0.5))
    assert KILLS < 25 or {count for count in counts if 0 < count < len(rows(whole))}, "no kill fell in the middle"
    done = command("run", "--profile", "smoke", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    resumed, expected = rows(folder), {row_key(row): row for row in rows(whole)}
    assert len((folder / "ledger.jsonl").read_bytes().splitlines()) == len(resumed) == len(expected)
    for row in resumed:
        assert unmeasured(row) == unmeasured(expected[row_key(row)])
    for name in ("table1_accuracy", "table2_change", "divergence", "batch_sensitivity"):
        first, second = (each / "tables" / f"{name}.csv" for each in (whole, folder))
        assert first.read_text() == second.read_text(), name
    for checkpoint in (folder / "checkpoints").glob("[a-z]*"):
        assert files.damage(checkpoint) == ""
    assert not [path for path in (folder / "checkpoints").glob(".*") if path.suffix != ".lock"]
