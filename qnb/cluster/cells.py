"""What notebooks measure, cut into cells: one format and stage each, of accuracy one task.

A cell's steps are the stages that a notebook calls, with the notebook's own parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from qnb.accuracy import evaluate, perplexity, tasks
from qnb.cluster.schedule import Cell
from qnb.ledger import Row
from qnb.precision import BASELINE
from qnb.quantize import stages as checkpoints
from qnb.speed import stages as speed

if TYPE_CHECKING:
    from qnb.session import Session

PEAKS = "peaks"
# seconds that a stage takes for a format where no row tells, and an item of a task: of choices, or generated
GUESSED_S = {"quantize": 20.0, "divergence": 30.0, "batch_sensitivity": 20.0, "bs1": 60.0, "maxbatch": 180.0}
GUESSED_ITEM_S = {False: 0.01, True: 0.3}
BUILD_S = {"mmlu": 30.0}  # of a task; others take 3


def checkpoint_cell(session: Session, precision: str) -> Cell:
    """Return the cell that makes a format's checkpoint."""
    rows = [row for row in session.ledger.rows("quantize") if row.get("quantize_s")]
    seconds = _mean_s(rows, precision, lambda row: row["quantize_s"] + row["load_s"]) or GUESSED_S["quantize"]
    steps = ((checkpoints.quantize, ()),)
    about = {"stage": "quantize", "precision": precision}
    return Cell(f"{precision} checkpoint", about, steps, makes=("checkpoint", precision), estimate_s=seconds)


def task_cell(name: str, values: Mapping[str, Any]) -> Cell:
    """Return the cell that builds a task and its requests."""
    steps = ((evaluate.prepare, (name, evaluate.AccuracyOptions(name, values["limit"]))),)
    about = {"stage": "accuracy", "task": name}
    return Cell(f"task {name}", about, steps, makes=("task", name), estimate_s=BUILD_S.get(name, 3.0))


def plan(session: Session, values: Mapping[str, Any], numbers: set[str]) -> list[Cell]:
    """Return what notebooks measure.

    Parameters
    ----------
    session
        Of the study, with the device that everything is measured on.
    values
        Every parameter of these notebooks.
    numbers
        The notebooks' numbers, such as 02.
    """
    cells = []
    is_timed = not numbers.isdisjoint({"03", "04"})
    if is_timed:
        steps = ((speed.device_peaks, ()),)
        cells.append(Cell(PEAKS, {"stage": PEAKS}, steps, is_timed=True, is_alone=True, estimate_s=5.0))
    for precision in session.precisions:
        if "01" in numbers:
            cells.append(checkpoint_cell(session, precision.name))
        if "02" in numbers:
            cells += _accuracy_cells(session, precision.name, values)
        if is_timed:
            cells += _timed_cells(session, precision.name, values, numbers)
    return cells


def _accuracy_cells(session: Session, precision: str, values: Mapping[str, Any]) -> Iterator[Cell]:
    checkpoint = ("checkpoint", precision)
    names = tasks.check(evaluate.wanted(session, values["tasks"]))
    rows = session.ledger.rows("accuracy")
    for name in names:
        options = evaluate.AccuracyOptions(name, values["limit"], values["batch_size"], values["scorer"])
        own = [row for row in rows if row["task"] == name]
        n_items = sum(evaluate.planned_items(session, options)) or 1000
        seconds = _mean_s(own, precision, lambda row: row["evaluate_s"])
        seconds = seconds or n_items * GUESSED_ITEM_S[name.startswith("gsm8k")]
        needs = frozenset({checkpoint, ("task", name)})
        about = {"stage": "accuracy", "precision": precision, "task": name}
        yield Cell(f"{precision} {name}", about, ((evaluate.accuracy, (options,)),), needs, estimate_s=seconds)
    read = perplexity.DivergenceOptions(values["prompt_source"], values["ppl_tokens"], values["ppl_context"])
    asked = evaluate.AccuracyOptions(values["tasks"], values["sensitivity_limit"])
    both = frozenset({checkpoint, ("checkpoint", BASELINE)})
    for name, step, needs in (
        ("divergence", (perplexity.divergence, (read,)), both),
        ("batch_sensitivity", (evaluate.batch_sensitivity, (asked,)), frozenset({checkpoint, ("task", names[0])})),
    ):
        about = {"stage": name, "precision": precision}
        yield Cell(f"{precision} {name}", about, (step,), needs, estimate_s=GUESSED_S[name])


def _timed_cells(session: Session, precision: str, values: Mapping[str, Any], numbers: set[str]) -> Iterator[Cell]:
    from qnb.speed import engines

    for engine in engines.parse(values["engines"], session.device.kind):
        steps = {"bs1": ((time_bs1, (values, engine)),),
                 "maxbatch": ((time_maxbatch, (values, engine)), (time_sweep, (values, engine)))}  # fmt: skip
        rows = [row for row in session.ledger.rows("perf") if row["engine"] == engine and "pass_s" in row]
        for setting in (setting for setting, number in speed.NOTEBOOKS.items() if number in numbers):
            passes = [row for row in rows if row["setting"] == setting]
            pass_s = _mean_s(passes, precision, lambda row: row["pass_s"])
            about = {"stage": "perf", "precision": precision, "engine": engine, "setting": setting, "repeat": 0}
            yield Cell(
                f"{precision} {setting} {engine}", about, steps[setting], frozenset({("checkpoint", precision)}),
                after=PEAKS, is_timed=True, is_alone=engine == "eager",  # whose launches the host's speed decides
                estimate_s=pass_s * values[f"{setting}_repeats"] or GUESSED_S[setting],
            )  # fmt: skip


def _mean_s(rows: Sequence[Row], precision: str, seconds: Any) -> float:
    """Return what rows of a format took in the mean; of all formats where it has none, 0 where there is no row."""
    own = [row for row in rows if row["precision"] == precision]
    return fmean(map(seconds, own or rows)) if rows else 0.0


# Steps of 03 and 04: each worker reads the prompts itself


def _workload(session: Session, setting: str, values: Mapping[str, Any]) -> speed.Workload:
    lengths = (values[name] for name in ("prompt_tokens", "new_tokens", "prompt_source"))
    return speed.workload(session, speed.WorkloadOptions(setting, values[f"{setting}_requests"], *lengths))


def time_bs1(session: Session, values: Mapping[str, Any], engine: str) -> None:
    """Time one engine one request at a time, as notebook 03 does."""
    workload = _workload(session, "bs1", values)
    speed.perf_bs1(session, speed.TimingOptions(workload, engine, values["bs1_repeats"]))


def time_maxbatch(session: Session, values: Mapping[str, Any], engine: str) -> None:
    """Find one engine's largest batch and time it, as notebook 04 does."""
    options = speed.TimingOptions(
        _workload(session, "maxbatch", values), engine, values["maxbatch_repeats"], values["memory_mib"]
    )
    speed.perf_maxbatch(session, options)


def time_sweep(session: Session, values: Mapping[str, Any], engine: str) -> None:
    """Time one engine's batches of 1, 2, 4 ... requests, as notebook 04 does."""
    workload = _workload(session, "maxbatch", values)
    speed.sweep(session, speed.TimingOptions(workload, engine, sweep_batch=values["sweep_batch"]))
