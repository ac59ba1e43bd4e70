"""Rehearse a sitting on a T4 with another GPU, told to be one: two cores, 15 GiB, no bfloat16 units.

``python tests/bench/rehearse_t4.py --data-dir HUB``: 01, 03 and 04 with Llama-3.2-1B's shape, 02 with SmolLM2
``python tests/bench/rehearse_t4.py --data-dir HUB --only 03 --cores 1``: one notebook, on one core

Each notebook is a command of its own, with its share of the sitting's minutes. A study that was cut goes on. The table
has minutes by the clock and the peak RAM (PSS) of a notebook's processes, which is held to 12 GiB.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

BENCH = Path(__file__).parent
MODELS = {"01": "shape:llama-3.2-1b", "02": "smollm2-135m", "03": "shape:llama-3.2-1b", "04": "shape:llama-3.2-1b"}
RAM_GIB = 12


def rehearse(notebook: str, options: argparse.Namespace) -> dict[str, object]:
    """Run a notebook as a T4's user would; return its row."""
    model, first = MODELS[notebook], options.first_core
    run = ["-m", "qnb", "run", "--only", notebook, "--profile", "colab", "-p", "model", model, "-p", "minutes",
           str(options.minutes), "-p", "data_dir", str(options.data_dir), "-p", "memory_mib", "15360",
           "--output", str(options.output / f"{model.replace(':', '-')}-{options.cores}-cores")]  # fmt: skip
    command = ["taskset", "-c", f"{first}-{first + options.cores - 1}", sys.executable, str(BENCH / "memory.py"),
               "--limit-gib", str(RAM_GIB), "--", sys.executable, *run]  # fmt: skip
    paths = [str(BENCH / "stand_in"), str(BENCH.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    options.output.mkdir(parents=True, exist_ok=True)
    log, started_s = options.output / f"{notebook}-{options.cores}-cores.log", time.monotonic()
    with log.open("w") as lines:
        code = subprocess.run(command, env=environment, stdout=lines, stderr=subprocess.STDOUT).returncode
    minutes, ram = (time.monotonic() - started_s) / 60, re.findall(r"peak PSS ([\d.]+)", log.read_text())
    return {"notebook": notebook, "model": model, "cores": options.cores, "minutes": round(minutes, 1),
            "peak_pss_gib": float(ram[-1]) if ram else None, "exit_code": code}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("outputs/t4-rehearsal"))
    parser.add_argument("--only", default=",".join(MODELS))
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--first-core", type=int, default=0, help="where several rehearsals run beside each other")
    options, rows = parser.parse_args(), []
    for notebook in options.only.split(","):
        rows.append(rehearse(notebook, options))
        pd.DataFrame(rows).to_csv(options.output / f"sitting-{options.cores}-cores.csv", index=False)
        print(pd.DataFrame(rows).to_string(index=False), flush=True)
    return max(int(row["exit_code"] != 0) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
