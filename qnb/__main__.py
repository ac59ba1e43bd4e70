"""``qnb run | report | verify | audit | doctor``: the five notebooks without a browser, and what follows.

Exit codes: 0 done, 1 something failed on the way, 2 the input cannot be used, 130 interrupted or told to end.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from qnb.errors import InputError, expand_path, never_fail_to_print, scrub
from qnb.provenance import NOTEBOOKS


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"qnb: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qnb", description="What does quantizing this model cost, and what does it give?")
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | report | verify | audit | doctor")
    run = commands.add_parser("run", help="execute the notebooks, in order, into one study")
    profiles = ", ".join(sorted(path.stem for path in (NOTEBOOKS / "profiles").glob("*.yaml"))).replace("%", "%%")
    run.add_argument("--profile", default="demo", help=f"{profiles}, of notebooks/profiles (default: demo)")
    run.add_argument("--output", help="the study's folder (default: the profile's)")
    run.add_argument("--only", help="numbers of notebooks, such as 02,03")
    run.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set a notebook's parameter, in place of the profile's, such as -p precisions bf16,nf4; may be repeated",
    )  # fmt: skip
    run.add_argument("--workers", help="measure on several GPUs by Ray: a number, or auto (default: 1, without Ray)")
    run.add_argument("--ray-address", metavar="HOST:PORT", help="a running Ray cluster ($RAY_ADDRESS with --workers)")
    run.add_argument("--gpus-per-model", default="auto", help="GPUs that one model is spread over (default: auto)")
    run.add_argument("--dry-run", action="store_true", help="with Ray: print what workers would measure, in order")
    page = commands.add_parser("report", help="write a study's report, tables and figures from its ledger")
    page.add_argument("folder", metavar="DIR", help="the study's folder, such as outputs/demo")
    page.add_argument("--notebooks", action="store_true", help="execute the notebooks over the ledger, with pictures")
    page.add_argument("--margin-pp", type=float, default=1.0, metavar="POINTS", help="the loss of accuracy you accept")
    check = commands.add_parser("verify", help="recompute a study's tables and compare every file with its hash")
    check.add_argument("folder", metavar="DIR", help="the study's folder, such as outputs/demo")
    commands.add_parser("audit", help="check the paper's own arithmetic")
    commands.add_parser("doctor", help="say what this machine can run")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    if arguments is None and sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"  # notebooks hold paths as UTF-8, whatever the locale
        os.execv(sys.executable, [sys.executable, "-m", "qnb", *sys.argv[1:]])  # noqa: S606
    never_fail_to_print()
    options = _parser().parse_args(arguments)
    try:
        return _dispatch(options)
    except InputError as error:
        print(f"qnb: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"qnb: {error.name} is not installed; pip install -r requirements.txt", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        logging.disable(logging.CRITICAL)  # asyncio would tell of the tasks that are freed now
        print("qnb: interrupted; what was measured is kept, the same command goes on from there", file=sys.stderr)
        return 130
    except Exception as error:  # the last resort: no traceback is shown, and nothing measured is lost
        text = f"{type(error).__name__}: {scrub(' '.join(str(error).split()))}".rstrip(": ")
        print(f"qnb: {text}; what was measured is kept", file=sys.stderr)
        return 1


def _dispatch(options: argparse.Namespace) -> int:
    if options.command == "run":
        from qnb.run import run

        for name in ("output", "only"):
            if getattr(options, name) is not None and not getattr(options, name).strip():  # a variable that is not set
                raise InputError(f"--{name} is empty; give a value, or leave it out")

        workers = None
        is_shared = options.workers not in (None, "1") or options.gpus_per_model != "auto"
        if options.ray_address or options.dry_run or is_shared:
            from qnb.cluster.driver import ClusterOptions

            address = options.ray_address or (os.environ.get("RAY_ADDRESS", "") if options.workers else "")
            count = options.workers or ("auto" if address else "1")  # a plain run has one
            workers = ClusterOptions(count, address, options.gpus_per_model, options.dry_run)
        return run(options.profile, options.output, options.only, options.parameters, workers)
    if options.command == "doctor":
        from qnb.doctor import doctor

        return doctor()
    if options.command == "audit":
        return audit()
    if options.command == "verify":
        return verify(options.folder)
    return report(options.folder, options.margin_pp, options.notebooks)


def report(folder: str, margin_pp: float = 1.0, with_notebooks: bool = False) -> int:
    """Write a study's report, tables and figures from its ledger, and notebooks if wanted; say where they are.

    Raises
    ------
    InputError
        `folder` holds no study, or one without a row, or the margin is no number of points.
    """
    from qnb.run import check_measured, show, summary
    from qnb.study import Study

    study = Study(precisions="all", output=expand_path(folder).resolve(), margin_pp=margin_pp)
    check_measured(study)
    study.figures()
    study.report()
    if with_notebooks:
        show(study)
    print("\n".join(summary(study)))
    return 0


def verify(folder: str) -> int:
    """Print what is no longer as it was measured; return 1 where anything is."""
    from qnb.report import verify as checks

    findings = list(checks.verify(folder))
    problems = [finding for finding in findings if finding.problem]
    for finding in problems:
        print(f"FAILS  {finding.part}: {finding.problem}")
    print(f"{len(findings) - len(problems)} of {len(findings)} parts are as they were measured")
    return 1 if problems else 0


def audit() -> int:
    """Print what the paper claims, what its own numbers say, and whether the two agree."""
    import textwrap

    from qnb.report import paper

    for finding in paper.audit():
        print(f"{'holds' if finding.holds else 'FAILS'}  {finding.claim}  [{finding.source}]")
        print(textwrap.indent(textwrap.fill(finding.computed, 100), "       "))
    return 0


if __name__ == "__main__":
    sys.exit(main())
