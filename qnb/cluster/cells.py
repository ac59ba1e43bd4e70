"""What notebooks measure, cut into cells: one format and stage each, of accuracy one task.

A cell's step is a stage that a notebook calls, with the notebook's own parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from qnb.accuracy import evaluate, perplexity, tasks
from qnb.cluster.schedule import Cell
from qnb.precision import BASELINE
from qnb.quantize import stages as checkpoints
from qnb.session import Session
from qnb.speed import stages as speed

# seconds that a cell of a stage or setting takes where no row tells, and an item of a task: of choices, or generated
GUESSED_S = {"peaks": 5.0, "task": 10.0, "divergence": 30.0, "bs1": 60.0, "maxbatch": 120.0, "1": 60.0}
GUESSED_ITEM_S = {False: 0.01, True: 0.3}
COLUMNS = {"quantize": "quantize_s", "accuracy": "evaluate_s", "perf": "pass_s"}  # of rows, that tell


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
    cells = []
    for name in (each.name for each in session.precisions):
        if "01" in numbers:
            cells.append(_cell(session, checkpoints.quantize, {"stage": "quantize", "precision": name}, node=here))
        if "02" in numbers:
            cells += _accuracy_cells(session, name, values)
        if numbers & {*speed.NOTEBOOKS.values()}:
            cells += _timed_cells(session, name, values, numbers)
    return [*{cell.name: cell for cell in cells}.values()]  # what several formats need is in it once


def _accuracy_cells(session: Session, precision: str, values: Mapping[str, Any]) -> Iterator[Cell]:
    cell, about, checkpoint = partial(_cell, session), {"precision": precision}, f"checkpoint {precision}"
    names = tasks.check(evaluate.wanted(session, values["tasks"]))
    for name in names:
        options = evaluate.AccuracyOptions(name, values["limit"], values["batch_size"], values["scorer"])
        guess_s = (sum(evaluate.planned_items(session, options)) or 1000) * GUESSED_ITEM_S[name.startswith("gsm8k")]
        yield cell(partial(evaluate.prepare, name=name, options=options), {"stage": "task", "task": name})
        step, needs = partial(evaluate.accuracy, options=options), (checkpoint, f"task {name}")
        yield cell(step, {"stage": "accuracy", **about, "task": name}, needs, guess_s)
    read = perplexity.DivergenceOptions(values["prompt_source"], values["ppl_tokens"], values["ppl_context"])
    needs = checkpoint, f"checkpoint {BASELINE}"
    yield cell(partial(perplexity.divergence, options=read), {"stage": "divergence", **about}, needs)
    options = evaluate.AccuracyOptions(values["tasks"], values["sensitivity_limit"])
    step, needs = partial(evaluate.batch_sensitivity, options=options), (checkpoint, f"task {names[0]}")
    yield cell(step, {"stage": "batch_sensitivity", **about}, needs)


def _timed_cells(session: Session, precision: str, values: Mapping[str, Any], numbers: set[str]) -> Iterator[Cell]:
    from qnb.speed import engines

    yield _cell(session, speed.device_peaks, {"stage": "peaks"}, is_alone=True)
    for engine in engines.parse(values["engines"], session.device.kind):
        # what the host's speed decides runs alone
        cell, step = partial(_cell, session, is_alone=engine == "eager"), partial(time_engine, values, engine)
        about, needs = {"precision": precision, "engine": engine}, (f"checkpoint {precision}", "peaks")
        if "03" in numbers:
            timed = {"stage": "perf", **about, "setting": "bs1", "repeat": 0}
            yield cell(partial(step, speed.perf_bs1, "bs1"), timed, needs)
        if "04" in numbers:
            timed = {"stage": "perf", **about, "setting": "maxbatch", "repeat": 0}
            yield (searched := cell(partial(step, speed.perf_maxbatch, "maxbatch"), timed, needs))
            if session.count("sweep_batch", values["sweep_batch"]):
                timed = {"stage": "sweep", **about, "setting": "1", "repeat": 0}
                yield cell(partial(step, speed.sweep, "maxbatch"), timed, (*needs, searched.name))


def time_engine(
    values: Mapping[str, Any], engine: str, stage: Callable[..., None], setting: str, session: Session
) -> None:
    """Run a stage of notebook 03 or 04 for one engine; each worker reads the prompts itself."""
    lengths = (values[name] for name in ("prompt_tokens", "new_tokens", "prompt_source"))
    workload = speed.workload(session, speed.WorkloadOptions(setting, values[f"{setting}_requests"], *lengths))
    repeats, memory_mib, sweep_batch = values[f"{setting}_repeats"], values["memory_mib"], values["sweep_batch"]
    stage(session, speed.TimingOptions(workload, engine, repeats, memory_mib, sweep_batch))


def _cell(
    session: Session, step: Callable[..., Any], about: Mapping[str, Any], needs: Sequence[str] = (),
    guess_s: float = 20.0, **where: Any,
) -> Cell:  # fmt: skip
    """Return a cell that takes what its format's earlier rows say, or those of other formats; else a guess."""
    stage, fields = about["stage"], ("engine", "setting", "task")
    rows = [row for row in session.ledger.rows(stage) if all(row[name] == about.get(name, "") for name in fields)]
    rows = [row for row in rows if row.get(COLUMNS.get(stage, ""))]
    rows = [row for row in rows if row["precision"] == about.get("precision")] or rows
    estimate_s = GUESSED_S.get(about.get("setting", stage), guess_s)
    if rows:
        estimate_s = sum(row[COLUMNS[stage]] for row in rows) / len({row["precision"] for row in rows})
    return Cell(about, step, tuple(dict.fromkeys(needs)), estimate_s=estimate_s, **where)
