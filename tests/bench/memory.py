"""The RAM of a run: the largest proportional set size (PSS) of its process tree, held to a limit.

``python tests/bench/memory.py --limit-gib 12 -- python -m qnb run --only 01 -p model shape:llama-3.2-1b``

PSS counts a page that processes share once. The exit code is that of the run, or 1 where it took more than the limit.
"""

from __future__ import annotations

import argparse
import sys
import time
from subprocess import Popen

import psutil

EVERY_S = 0.2


def pss_bytes(process: psutil.Process) -> int:
    """Return a process's PSS; 0 where it has just ended."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-gib", type=float, default=12)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    run = Popen(options.command)
    peak_bytes, started_s = 0, time.monotonic()
    while run.poll() is None:
        tree = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        peak_bytes = max(peak_bytes, sum(map(pss_bytes, tree)))
        time.sleep(EVERY_S)
    seconds, peak_gib = time.monotonic() - started_s, peak_bytes / 2**30
    print(f"peak PSS {peak_gib:.2f} GiB of {options.limit_gib:g} allowed, in {seconds:.0f} s")
    return run.returncode or int(peak_gib > options.limit_gib)


if __name__ == "__main__":
    sys.exit(main())
