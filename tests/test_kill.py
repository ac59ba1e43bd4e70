"""Killed anywhere, any number of times: the study goes on, and ends as one that nobody touched."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import command

from qnb import Study
from qnb.__main__ import NAMES
from qnb.ledger import Line
from qnb.provenance import ROOT
from qnb.quantize import checkpoint as model
from qnb.report import figures as figure

# what a clock or a sensor read, or hangs on it; everything else of a row is the same in every run
MEASURED = re.compile(
    r"seconds_.*|.*_(s|mib|rps|tps|pct|w|mhz|j)|monitor_.*|measured_at|command|probes|(token_)?samples.*"
    r"|stopped|flags|bound"
)
EXACT = ("accuracy", "divergence", "drift")  # stages in which nothing that counts is read off a clock


def lines(folder):
    """Every line of a ledger; none may be damaged or torn."""
    path = folder / "ledger.jsonl"
    return [Line(line) for line in path.read_bytes().splitlines(keepends=True)] if path.exists() else []


def unmeasured(row):
    """A row without what is different in every run."""
    kept = {name: value for name, value in row.items() if not MEASURED.fullmatch(name)}
    return {**row, "measured_at": "", "command": "", "evaluate_s": 0} if row["stage"] in EXACT else kept


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_killed_anywhere_it_ends_as_an_undisturbed_run(smoke, tmp_path, kills):
    """SIGKILL to the whole process group after a random time, in a random notebook; then one run to the end."""
    whole, done = smoke
    assert done.returncode == 0, done.stderr
    folder, draw, kept = tmp_path / "study", random.Random(kills), set()
    for _ in range(kills):
        only, seconds = draw.choice(NAMES)[:2], draw.uniform(2, 18)
        run = subprocess.Popen(
            [sys.executable, "-m", "qnb", "run", "--profile", "smoke", "--output", str(folder), "--only", only],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            run.wait(seconds)
        except subprocess.TimeoutExpired:
            kernels = psutil.Process(run.pid).children(recursive=True)
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            for kernel in kernels if draw.random() < 0.5 else ():  # else one outlives its run, and is met by the next
                with contextlib.suppress(psutil.NoSuchProcess):
                    kernel.kill()
            kept.add(len(lines(folder)))
        time.sleep(draw.uniform(0, 0.5))
    assert kills < 25 or {count for count in kept if 0 < count < len(lines(whole))}, "no kill fell in the middle"
    done = command("run", "--profile", "smoke", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    made, expected = lines(folder), lines(whole)
    assert len({line.key for line in made}) == len(made) == len(expected)
    by_key = {line.key: line.row for line in expected}
    for line in made:
        assert unmeasured(line.row) == unmeasured(by_key[line.key])
    for checkpoint in (folder / "checkpoints").glob("[a-z]*"):
        assert model.damage(checkpoint) == ""
    hidden = {path.suffix for path in (folder / "checkpoints").glob(".*")}
    assert hidden <= {".lock"}, hidden


@pytest.mark.slow
def test_two_runs_are_equal(smoke, tmp_path):
    """One seed, one machine: equal accuracy, divergence, checkpoints, tables and figures of them, to the last bit."""
    again = command("run", "--profile", "smoke", "--output", str(tmp_path / "study"), "--only", "01,02")
    assert again.returncode == 0, again.stderr
    by_key = {line.key: line.row for line in lines(smoke[0])}
    made = lines(tmp_path / "study")
    assert {line.stage for line in made} == {"quantize", "accuracy", "divergence", "drift"}
    for line in made:
        assert unmeasured(line.row) == unmeasured(by_key[line.key])
    for name in ("table1_accuracy", "table2_change", "divergence", "drift"):
        assert (tmp_path / "study" / "tables" / f"{name}.csv").read_text() == (
            smoke[0] / "tables" / f"{name}.csv"
        ).read_text()
    drawn = [figure.draw_all(Study(output=folder).results()) for folder in (smoke[0], tmp_path / "study")]
    for name in ("fig1_accuracy", "fig2_change", "forest"):
        assert drawn[0][name].to_json() == drawn[1][name].to_json()
