"""What notebooks measure, cut into cells: one format and stage each, of accuracy one task.

A cell's step is a stage that a notebook calls, with the notebook's own parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from statistics import fmean
from typing import Any

from qnb.accuracy import evaluate, perplexity, tasks
from qnb.cluster.schedule import Cell
from qnb.precision import BASELINE
from qnb.quantize import stages as checkpoints
from qnb.session import NothingMeasuredError, Session
from qnb.speed import stages as speed

# seconds that a cell of a stage or setting takes where no row tells, and an item of a task: of choices, or generated
GUESSED_S = {"task": 10.0, "divergence": 30.0, "bs1": 60.0, "maxbatch": 180.0}  # others take 20
GUESSED_ITEM_S = {False: 0.01, True: 0.3}
COLUMNS = {"quantize": "quantize_s", "accuracy": "evaluate_s", "perf": "pass_s"}  # of rows, that tell
PEAKS = Cell({"stage": "peaks"}, speed.device_peaks, is_alone=True, estimate_s=5.0)  # once, before all timing
TIMED = {"bs1": (speed.perf_bs1,), "maxbatch": (speed.perf_maxbatch, speed.sweep)}  # stages by setting


def plan(session: Session, values: Mapping[str, Any], numbers: set[str], here: str) -> list[Cell]:
    """Return what notebooks measure.

    Parameters
    ----------
    session
        Of the study, with the device that everything is measured on.
    values
        Every parameter of these notebooks.
    numbers
        The notebooks' numbers, such as 02.
    here
        The node whose checkpoints notebook 01 shows: the driver's, if it has workers.
    """
    cells = [PEAKS] if numbers & {*speed.NOTEBOOKS.values()} else []
    for precision in (precision.name for precision in session.precisions):
        if "01" in numbers:
            made = _checkpoint(session, precision)
            cells.append(Cell(made.about, made.step, (made,), node=here))
        if "02" in numbers:
            cells += _accuracy_cells(session, precision, values)
        for setting in (setting for setting, number in speed.NOTEBOOKS.items() if number in numbers):
            cells += _timed_cells(session, precision, values, setting)
    return cells


def _checkpoint(session: Session, precision: str) -> Cell:
    about = {"stage": "quantize", "precision": precision}
    estimate_s = _seconds(session, about)
    return Cell(about, checkpoints.quantize, makes=f"checkpoint {precision}", estimate_s=estimate_s)


def _accuracy_cells(session: Session, precision: str, values: Mapping[str, Any]) -> Iterator[Cell]:
    checkpoint, built = _checkpoint(session, precision), list[Cell]()
    for name in tasks.check(evaluate.wanted(session, values["tasks"])):
        options = evaluate.AccuracyOptions(name, values["limit"], values["batch_size"], values["scorer"])
        guess_s = (sum(evaluate.planned_items(session, options)) or 1000) * GUESSED_ITEM_S[name.startswith("gsm8k")]
        about, step = {"stage": "accuracy", "task": name}, partial(evaluate.prepare, name=name, options=options)
        built.append(Cell(about, step, makes=f"task {name}", estimate_s=GUESSED_S["task"]))
        about = {"stage": "accuracy", "precision": precision, "task": name}
        step = partial(evaluate.accuracy, options=options)
        yield Cell(about, step, (checkpoint, built[-1]), estimate_s=_seconds(session, about, guess_s))
    read = perplexity.DivergenceOptions(values["prompt_source"], values["ppl_tokens"], values["ppl_context"])
    about = {"stage": "divergence", "precision": precision}
    step = partial(perplexity.divergence, options=read)
    yield Cell(about, step, (checkpoint, _checkpoint(session, BASELINE)), estimate_s=_seconds(session, about))
    options = evaluate.AccuracyOptions(values["tasks"], values["sensitivity_limit"])
    about = {"stage": "batch_sensitivity", "precision": precision}
    step = partial(evaluate.batch_sensitivity, options=options)
    yield Cell(about, step, (checkpoint, built[0]), estimate_s=_seconds(session, about))


def _timed_cells(session: Session, precision: str, values: Mapping[str, Any], setting: str) -> Iterator[Cell]:
    from qnb.speed import engines

    for engine in engines.parse(values["engines"], session.device.kind):
        about = {"stage": "perf", "precision": precision, "engine": engine, "setting": setting, "repeat": 0}
        step = partial(time_engine, values=values, setting=setting, engine=engine)
        repeats = values[f"{setting}_repeats"]
        seconds = repeats * _seconds(session, about, GUESSED_S[setting] / repeats)
        is_alone = engine == "eager"  # whose launches the host's speed decides
        needs = (_checkpoint(session, precision),)
        yield Cell(about, step, needs, after=PEAKS.name, is_alone=is_alone, estimate_s=seconds)


def time_engine(session: Session, values: Mapping[str, Any], setting: str, engine: str) -> None:
    """Run the stages of notebook 03 or 04 for one engine; each worker reads the prompts itself."""
    lengths = (values[name] for name in ("prompt_tokens", "new_tokens", "prompt_source"))
    workload = speed.workload(session, speed.WorkloadOptions(setting, values[f"{setting}_requests"], *lengths))
    repeats, memory_mib, sweep_batch = values[f"{setting}_repeats"], values["memory_mib"], values["sweep_batch"]
    for stage in TIMED[setting]:
        with suppress(NothingMeasuredError):
            stage(session, speed.TimingOptions(workload, engine, repeats, memory_mib, sweep_batch))


def _seconds(session: Session, about: Mapping[str, Any], guess_s: float = 0.0) -> float:
    """Return what the format's earlier rows say that a cell takes, or those of other formats; else a guess."""
    stage, column, fields = about["stage"], COLUMNS.get(about["stage"], ""), ("engine", "setting", "task")
    rows = [row for row in session.ledger.rows(stage) if all(row[name] == about.get(name, "") for name in fields)]
    rows = [row for row in rows if row.get(column)]
    own = [row for row in rows if row["precision"] == about["precision"]]
    return fmean(row[column] for row in own or rows) if rows else guess_s or GUESSED_S.get(stage, 20.0)
