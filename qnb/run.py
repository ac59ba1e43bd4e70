"""Run the notebooks with papermill, each into ``<output>/notebooks/``, as one study."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from inspect import signature
from pathlib import Path
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any, NoReturn
from unittest.mock import patch

from huggingface_hub import get_token
from tqdm.auto import tqdm

from qnb import colab, device
from qnb.accuracy import tasks
from qnb.accuracy.evaluate import AccuracyOptions
from qnb.accuracy.perplexity import DivergenceOptions
from qnb.errors import INPUT_ERRORS, InputError, check_choice, expand_path, refusing, scrub
from qnb.flags import is_disturbed
from qnb.ledger import FAILED, KEY, PLANS, Ledger, Row
from qnb.options import check_count
from qnb.precision import listed
from qnb.provenance import COMMAND, NOTEBOOKS, REPLAY, ROOT, WAITING
from qnb.quantize.stages import PushOptions
from qnb.report import recommend, tables
from qnb.speed.stages import WorkloadOptions
from qnb.study import Study

if TYPE_CHECKING:
    from qnb.cluster.driver import ClusterOptions

NAMES = ("01_quantize", "02_accuracy", "03_perf_bs1", "04_perf_maxbatch", "05_figures")
COUNTS = {"sensitivity_limit", "bs1_repeats", "maxbatch_repeats", "memory_mib", "sweep_batch"}
RUN_ALL = ("auto", "always", "never")  # when 01 runs the other notebooks; "auto" is on Colab alone
# columns that keep a parameter under another name
ASKED = {"tasks": "task", "engines": "engine", "ppl_tokens": "tokens", "ppl_context": "context",
         "maxbatch_requests": "cap", "memory_mib": "memory_limit_mib"}  # fmt: skip
BAR = "{l_bar}{bar}| {n_fmt} of {total_fmt} notebooks, {elapsed}{postfix}"
CELL_TIMEOUT_S = 24 * 3600  # a cell that hangs ends one day, and the run with it


def run(
    profile: str,
    output: str | None,
    only: str | None,
    given: Sequence[Sequence[str]],
    workers: ClusterOptions | None = None,
) -> int:
    """Execute notebooks, print where the results are, and return the exit code.

    Parameters
    ----------
    profile
        A parameter file in ``notebooks/profiles``, by its name.
    output
        The study's folder; None takes the profile's.
    only
        Numbers of notebooks, such as ``"02,03"``; None takes all.
    given
        Names and values of parameters, in place of the profile's.
    workers
        Who measures, before the notebooks run; None lets the notebooks measure.

    Raises
    ------
    InputError
        A parameter cannot be used, or there is nothing for 05 to show; no notebook was run.
    """
    names = chosen(only or "")
    defaults = ChainMap(*(notebook_parameters(NOTEBOOKS / f"{name}.ipynb") for name in NAMES))
    values = parameters(profile, given, {"device", *defaults})
    if workers:
        values = {**defaults, "minutes": 0, **values}
    if output and "output" in (name for name, _ in given):
        raise InputError("output is given twice, by -p output and by --output; give one of them")
    if output:
        values["output"] = output if output.startswith(colab.DRIVE) else str(expand_path(output).resolve())
    # what a cluster's nodes can do is not known here
    study = check_parameters({**values, "device": "auto", "engines": "auto"} if workers else values, names)
    if names == ["05_figures"]:
        check_measured(study)
    study.session.check_writable()
    if "device" in values:
        os.environ[device.CHOICE] = str(values["device"])  # for the notebooks' kernels
    os.environ[COMMAND] = shlex.join(["qnb", *sys.argv[1:]])
    earlier = study.session.ledger.failures()  # this run may not retry all of them
    with _sole_run(study):
        if workers:
            values |= _measured_by(workers, study, values, names)
            if workers.only_plan:
                return 0
        for name in names:
            try:
                print(_execute(study, name, values), file=sys.stderr, flush=True)
            except NotebookError as error:
                print(f"qnb: {error}; what was measured is kept in {study.folder}", file=sys.stderr)
                return 1
    if "01_quantize" in names and values.get("push_to") and values.get("dry_run", True):
        print(f"nothing was uploaded: {study.folder / 'push.csv'} says what would be, -p dry_run false does it")
    return _report_end(study, earlier)


def _measured_by(
    workers: ClusterOptions, study: Study, values: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Let workers measure what notebooks would; return the parameters by which the notebooks show it."""
    from qnb.cluster import driver

    measured_on = driver.measure(study, values, {name[:2] for name in names}, workers)
    if not workers.only_plan:
        if "04_perf_maxbatch" in names:
            study.batch_plans(values["prompt_source"])
        os.environ[REPLAY] = json.dumps(asdict(measured_on))
    return {"overwrite": False}


def _report_end(study: Study, earlier: Sequence[Row]) -> int:
    """Print where the results are, what else they show, and what failed in this run; return the exit code."""
    print("\n".join(summary(study)))
    asked = {precision.name for precision in study.precisions}
    if others := [name for name in study.results().precisions if name not in asked]:
        print(f"the report also shows {', '.join(others)}")
    for line in (failures := _failures(study, earlier)):
        print(f"qnb: {line}", file=sys.stderr)
    return 1 if failures else 0


def _failures(study: Study, earlier: Sequence[Row]) -> list[str]:
    """Return what failed since there were those `earlier` failures, each with its reason."""
    rows = [row for row in study.session.ledger.failures() if row not in earlier]
    names = (" ".join(str(row[name]) for name in KEY if row[name] != "").replace(FAILED, "") for row in rows)
    return [f"{name} could not be measured: {row['reason']}" for name, row in zip(names, rows, strict=True)]


def rest(study: Study, run_all: str = "auto", **values: Any) -> Any:
    """Run the other four notebooks from within 01, on its machine; return the ranked formats for display.

    A notebook that stops is named with its reason; the next one is run. In a kernel of `qnb run`, nothing happens.

    Parameters
    ----------
    study
        The study of 01_quantize, in whose folder the others go on.
    run_all
        One of `RUN_ALL`.
    **values
        Parameters of 01, for the notebooks that have them.

    Raises
    ------
    InputError
        `run_all` is no such word, or another run is at work in the study's folder.
    """
    check_choice("run_all", run_all, RUN_ALL)
    if os.environ.get(COMMAND) or run_all == "never" or (run_all == "auto" and not colab.hosted()):
        tqdm.write(f"the other notebooks are not run from here (run_all is {run_all!r})")
        return None
    import torch

    has_context = torch.cuda.memory_stats().get("num_device_alloc", 0) > 0  # for its whole life
    environment = {WAITING: str(int(has_context)), "HF_TOKEN": get_token() or ""}  # Colab's secrets are 01's alone
    earlier = study.session.ledger.failures()
    with _sole_run(study, **environment), _progress(study, len(NAMES) - 1) as bar:
        for name in NAMES[1:]:
            bar.set_description_str(name)
            try:
                tqdm.write(_execute(study, name, values))
            except (NotebookError, InputError) as error:
                tqdm.write(f"{error}; what was measured is kept")
            bar.update()
    advice, places = study.recommend(), summary(study)[:2]  # its other lines are for a command line
    answer = [recommend.sentence(study.results()), *advice.attrs["notes"]]
    tqdm.write("\n".join([*_failures(study, earlier), *places, *_left_out(study), *answer]))
    return tables.view(advice, tables.ADVICE)


def _progress(study: Study, total: int) -> tqdm:
    """Return a bar over notebooks; until it is closed, its time and the number of the study's rows move on."""
    bar, ledger = tqdm(total=total, bar_format=BAR), Ledger(study.folder)  # of its own: it is read in a thread

    def tick() -> None:
        while not bar.disable:
            bar.set_postfix_str(f"measured rows: {len(ledger)}")
            sleep(1)

    threading.Thread(target=tick, name="qnb-progress", daemon=True).start()
    return bar


# Parameters


def chosen(only: str) -> list[str]:
    """Return the notebooks named by numbers such as ``"02,3"``, in their order; all if none is named.

    Raises
    ------
    InputError
        A number is not a notebook's.
    """
    numbers, wanted = {name[:2]: name for name in NAMES}, [word.zfill(2) for word in listed(only)]
    for number in wanted:
        check_choice("notebook", number, numbers)
    return [name for number, name in numbers.items() if number in wanted or not wanted]


def notebook_parameters(path: Path) -> dict[str, Any]:
    """Return what a notebook's two parameter cells set; papermill injects after the second."""
    tags = {"parameters", "rarely-used"}
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if tags.intersection(cell["metadata"].get("tags", ()))]
    nodes = (node for text in texts for node in ast.parse(text).body if isinstance(node, ast.Assign))
    pairs = ((target, node.value) for node in nodes for target in node.targets if isinstance(target, ast.Name))
    return {target.id: ast.literal_eval(value) for target, value in pairs}


def parameters(profile: str, given: Sequence[Sequence[str]], known: set[str]) -> dict[str, Any]:
    """Return a profile's parameters, replaced by those given on the command line.

    Raises
    ------
    InputError
        There is no such profile, or a parameter is not one of `known`.
    """
    files = {path.stem: path for path in sorted((NOTEBOOKS / "profiles").glob("*.yaml"))}
    check_choice("profile", profile, files)
    with refusing(f"profile {files[profile]} is no list of names and values; give lines such as 'limit: 40'"):
        values = dict(_plain(f"profile {files[profile]}", files[profile].read_bytes()))
    values |= {name: _plain(f"parameter {name}", text) for name, text in given}
    for name in values:
        check_choice("parameter", name, sorted(known))
    return values


def _plain(what: str, text: str | bytes) -> Any:
    """Return the plain value that YAML reads in `text`."""
    import yaml

    with refusing(f"{what} holds {text[:40]!r}, which is not a plain value"):
        value = yaml.safe_load(text)
    return text if isinstance(text, str) and isinstance(value, dict) else value  # a name with a colon at its end


def check_parameters(values: Mapping[str, Any], names: Sequence[str]) -> Study:
    """Build each stage's options, so that input is refused before any notebook runs; return the shared study."""
    study = Study(**{name: values[name] for name in signature(Study).parameters if name in values})
    check_choice("run_all", values.get("run_all", "auto"), RUN_ALL)
    if values.get("device", "auto") != "auto":
        study.session.device  # noqa: B018  # raises where there is no such device
    for name in ("pictures", "private", "dry_run"):
        if not isinstance(values.get(name, True), bool):
            raise InputError(f"{name} is {values[name]!r}; give true or false")
    if "01_quantize" in names and values.get("push_to"):
        _options(PushOptions, values)
    options = _options(AccuracyOptions, values)
    _options(DivergenceOptions, values)
    if "02_accuracy" in names:
        study.session.check_weights()
        if options.tasks != "auto":
            tasks.check(options.tasks)
    for setting in ("bs1", "maxbatch"):
        _options(WorkloadOptions, {**values, "setting": setting}, requests=f"{setting}_requests")
    for name in COUNTS & values.keys():
        check_count(name, values[name])
    if values.get("engines", "auto") != "auto":
        from qnb.speed import engines  # imports torch

        engines.parse(values["engines"], study.session.device.kind)
    return study


def check_measured(study: Study) -> None:
    """Raise InputError where nothing was measured: there is nothing to show."""
    ledger = study.session.ledger
    if not (ledger.failures() or [row for row in ledger.rows() if row["stage"] not in PLANS]):
        raise InputError(f"{study.folder} holds no study (no row in ledger.jsonl); give a folder such as outputs/demo")


def _options(kind: type[Any], values: Mapping[str, Any], **renamed: str) -> Any:
    """Build a stage's options from the parameters that have their fields' names, or those in `renamed`."""
    names = {field.name: renamed.get(field.name, field.name) for field in fields(kind)}
    return kind(**{field: values[name] for field, name in names.items() if name in values})


# Running


class NotebookError(Exception):
    """Say where a notebook stopped, and why."""


_interrupted = threading.Event()  # an exception raised in a callback may be passed over; this is not


@contextmanager
def _interruptible() -> Iterator[None]:
    """End at SIGTERM as at Ctrl-C: the notebook's kernel is stopped and locks are given back."""

    def interrupt(*_: object) -> NoReturn:
        _interrupted.set()
        logging.disable(logging.CRITICAL)  # nobody asked how the stopped cell and its kernel ended
        raise KeyboardInterrupt

    _interrupted.clear()
    before = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        logging.disable(logging.NOTSET)


@contextmanager
def _sole_run(study: Study, **environment: str) -> Iterator[None]:
    """Be the only one that executes notebooks into the study's folder, with further variables for their kernels.

    Raises
    ------
    InputError
        Another run does so, or the folder cannot be written.
    """

    def refuse() -> NoReturn:
        raise InputError(f"output {study.folder} is in use by another run; let it end, or give another output")

    logging.getLogger("papermill").setLevel(logging.ERROR)  # it calls the rarely used parameters unknown
    locked = study.session.ledger.locked(".run.lock", refuse)
    with _interruptible(), locked, _own_kernel(), patch.dict(os.environ, environment):
        with refusing(f"output {study.folder} cannot be written; give another", OSError):
            (study.folder / "notebooks").mkdir(exist_ok=True)
        yield


@contextmanager
def _own_kernel() -> Iterator[None]:
    """Let this interpreter execute the notebooks, whatever environment the kernelspec ``python3`` belongs to."""
    from ipykernel.kernelspec import write_kernel_spec

    with tempfile.TemporaryDirectory() as folder:
        write_kernel_spec(Path(folder) / "kernels" / "python3")
        path = os.pathsep.join(filter(None, (folder, os.environ.get("JUPYTER_PATH"))))
        # an older kernel's debugger would write to the console
        with patch.dict(os.environ, JUPYTER_PATH=path, PYDEVD_DISABLE_FILE_VALIDATION="1"):
            yield


def _execute(study: Study, name: str, values: Mapping[str, Any], tries: int = 2) -> str:
    """Execute one notebook with those of `values` that are its parameters; return how long it took.

    Raises
    ------
    InputError
        The notebook found that input cannot be used.
    NotebookError
        It stopped for another reason.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    started, source = perf_counter(), NOTEBOOKS / f"{name}.ipynb"
    target = study.folder / "notebooks" / source.name
    draft = target.with_name(f".{target.name}")  # a refused run leaves what was executed before
    values = {**values, "output": str(study.folder), "data_dir": str(study.session.data_dir or "")}
    try:
        papermill.execute_notebook(
            source,
            draft,
            {key: values[key] for key in notebook_parameters(source) if key in values},
            kernel_name="python3",
            progress_bar={"desc": name, "leave": False, "disable": not sys.stderr.isatty()},
            execution_timeout=CELL_TIMEOUT_S,
            extra_arguments=["--log-level=CRITICAL"],  # the kernel's remarks would break the progress line
        )
    except papermill.PapermillExecutionError as error:
        if error.ename in INPUT_ERRORS:
            draft.unlink()
            raise InputError(scrub(error.evalue, 1000)) from None
        place = f"{name}, cell {error.cell_index + 1}: {error.ename}"
        raise NotebookError(f"{place}: {scrub(error.evalue)}".rstrip(": ")) from None
    except (CellTimeoutError, DeadKernelError, OSError) as error:
        raise NotebookError(f"{name}: {type(error).__name__}: {scrub(str(error))}".rstrip(": ")) from None
    except RuntimeError as error:
        # two kernels that start at once may take one port (nteract/papermill issue 511); nothing has run by then
        if "before replying to kernel_info" not in str(error) or tries == 1:
            raise
        return _execute(study, name, values, tries - 1)
    finally:
        if draft.exists():
            draft.replace(target)
    if _interrupted.is_set():
        raise KeyboardInterrupt
    return f"{name}: done in {perf_counter() - started:.0f} s, rows in all: {len(study.session.ledger)}"


def show(study: Study) -> None:
    """Execute the notebooks over a study's rows, with still pictures: nothing is measured, and no model is needed.

    Raises
    ------
    InputError
        There is no browser to draw the pictures.
    NotebookError
        A notebook stopped.
    """
    session, rows = study.session, study.session.ledger.rows()
    stages = {"01": ["quantize"], "02": ["accuracy", "divergence"], "03": ["bs1"], "04": ["maxbatch", "batch"]}
    environment = {REPLAY: json.dumps(asdict(device.recorded(rows[-1]))), "PLOTLY_RENDERER": "plotly_mimetype",
                   COMMAND: shlex.join(["qnb", *sys.argv[1:]])}  # fmt: skip
    values = {"precisions": ",".join(study.results().precisions), "half": session.half, "minutes": 0,
              "pictures": False, "margin_pp": study.margin_pp}  # fmt: skip
    with _sole_run(study, **environment):
        for name in NAMES:
            drawn = [row for row in rows if name[:2] == "05" or (row["setting"] or row["stage"]) in stages[name[:2]]]
            if drawn:
                print(_execute(study, name, values), file=sys.stderr, flush=True)
                _make_portable(study.folder / "notebooks" / f"{name}.ipynb", _measured_with(name, drawn))


def _measured_with(name: str, rows: Sequence[Row]) -> str:
    """Return what rows say of a notebook's parameters, and the commands that measured them, as lines of comment."""
    lines = ["The rows were measured with the following, not with the defaults above:"]
    for parameter in notebook_parameters(NOTEBOOKS / f"{name}.ipynb"):
        values = (row.get(ASKED.get(parameter, parameter)) for row in rows)
        words = ", ".join(dict.fromkeys(str(value).removesuffix(".0") for value in values if value not in (None, "")))
        lines += [f"{parameter}: {words}"] * bool(words)
    commands = dict.fromkeys(f"$ {row['command']}" for row in rows if row["command"])
    return "".join(f"# {line}\n" for line in [*lines, *commands, "They are drawn with:"])


def _make_portable(path: Path, measured_with: str) -> None:
    """Give an executed notebook still pictures, and take out what another machine cannot show: widgets and paths.

    `measured_with` is put above the injected parameters, which only draw. Links to the notebooks' folder still lead
    there where both lie in the checkout.
    """
    import nbformat

    from qnb.report import export

    text = path.read_text(encoding="utf-8")
    for folder in (ROOT, path.parents[2]):
        text, measured_with = (each.replace(f"{folder}{os.sep}", "") for each in (text, measured_with))
    book = nbformat.reads(text, as_version=4)
    for part in (book, *book.cells):
        for name in ("papermill", "widgets", "execution"):
            part.metadata.pop(name, None)
        if "injected-parameters" in part.metadata.get("tags", ()):
            part.id = "injected-parameters"  # as in every other drawing
            part.source = part.source.replace("# Parameters\n", measured_with)
        for output in part.get("outputs", ()):
            if {"text/html", "text/plain"} <= output.get("data", {}).keys():
                del output.data["text/plain"]  # an object's address
        if outputs := part.get("outputs"):
            part.outputs = [each for each in outputs if not any("widget" in kind for kind in each.get("data", ()))]
        elif part.get("cell_type") == "markdown" and path.is_relative_to(ROOT):
            part.source = re.sub(r"\]\((?=\w+\.md\))", f"]({os.path.relpath(NOTEBOOKS, path.parent)}/", part.source)
    outputs = (output.get("data", {}) for cell in book.cells for output in cell.get("outputs", ()))
    if problem := export.draw_into([data for data in outputs if export.PLOTLY in data]):
        raise InputError(problem)
    nbformat.write(book, path)


def _left_out(study: Study) -> list[str]:
    """Return what the minutes did not suffice for."""
    return [f"{row['setting']}: {row['note']}" for row in study.session.ledger.rows("left_out") if row["note"]]


def summary(study: Study) -> list[str]:
    """Return where the results are, what is older than they are, and what other processes disturbed."""
    ledger, page = study.session.ledger, study.folder / "report.html"
    renew = shlex.join(["qnb", "report", str(study.folder), "--margin-pp", f"{study.margin_pp:g}"])
    lines = [f"measurements in {ledger.path}: {len(ledger)}"]
    if not page.exists():
        lines.append(f"no report yet: {renew} draws the figures and writes one")
    else:
        stale = ledger.path.exists() and page.stat().st_mtime < ledger.path.stat().st_mtime
        lines.append(f"report: {page}" + f" (older than the newest measurements; {renew} renews it)" * stale)
    lines += _left_out(study)
    speed = study.results().speed
    disturbed = speed.loc[[is_disturbed(flags) for flags in speed["flags"]]]
    for number, rows in disturbed.groupby(disturbed.setting.eq("bs1").map({True: "03", False: "04"})):
        again = f"--only {number} -p precisions {','.join(rows.precision.unique())} -p overwrite true"
        lines.append(f"disturbed by other processes in {number}; the same command with {again} measures them again")
    return lines
