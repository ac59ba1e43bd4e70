"""Rehearse a sitting on a T4 with another GPU, told to be one: two cores, 15 GiB, no bfloat16 units.

``python tests/bench/rehearse_t4.py --data-dir HUB``: 01, 03 and 04 with Llama-3.2-1B's shape, 02 with SmolLM2
``python tests/bench/rehearse_t4.py --data-dir HUB --shards``: the same shape, read from a checkpoint of two shards
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
SHAPE, SHARD = "shape:llama-3.2-1b", "1300MB"
MODELS = {"01": SHAPE, "02": "smollm2-135m", "03": SHAPE, "04": SHAPE}
RAM_GIB = 12


def in_two_shards(folder: Path) -> Path:
    """Save the shape's random weights in two safetensors files, as a hub's larger models are; return the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qnb.quantize.sources import resolve

    if not (folder / "tokenizer.json").exists():
        path = resolve(SHAPE, "cpu").path
        AutoModelForCausalLM.from_pretrained(path, dtype="auto").save_pretrained(folder, max_shard_size=SHARD)
        AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    if (count := len(list(folder.glob("*.safetensors")))) != 2:
        raise SystemExit(f"{folder} has {count} shards, not 2; remove it and run this again")
    return folder


def rehearse(notebook: str, options: argparse.Namespace) -> dict[str, object]:
    """Run a notebook as a T4's user would; return its row."""
    model, first = options.models[notebook], options.first_core
    output = options.output / f"{MODELS[notebook].replace(':', '-')}-{options.cores}-cores{'-shards' * options.shards}"
    run = ["-m", "qnb", "run", "--only", notebook, "--profile", "colab", "-p", "model", model, "-p", "minutes",
           str(options.minutes), "-p", "data_dir", str(options.data_dir), "-p", "memory_mib", "15360",
           "--output", str(output)]  # fmt: skip
    command = ["taskset", "-c", f"{first}-{first + options.cores - 1}", sys.executable, str(BENCH / "memory.py"),
               "--limit-gib", str(RAM_GIB), "--", sys.executable, *run]  # fmt: skip
    paths = [str(BENCH / "stand_in"), str(BENCH.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    options.output.mkdir(parents=True, exist_ok=True)
    log, started_s = options.output / f"{notebook}-{options.cores}-cores.log", time.monotonic()
    with log.open("w") as lines:
        code = subprocess.run(command, env=environment, stdout=lines, stderr=subprocess.STDOUT).returncode
    minutes, ram = (time.monotonic() - started_s) / 60, re.findall(r"peak PSS ([\d.]+)", log.read_text())
    name = MODELS[notebook] + (", two shards" if model != MODELS[notebook] else "")
    return {"notebook": notebook, "model": name, "cores": options.cores, "minutes": round(minutes, 1),
            "peak_pss_gib": float(ram[-1]) if ram else None, "exit_code": code}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("outputs/t4-rehearsal"))
    parser.add_argument("--only", default=",".join(MODELS))
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--first-core", type=int, default=0, help="where several rehearsals run beside each other")
    parser.add_argument("--shards", action="store_true", help="read the shape from a checkpoint of two shards")
    options, rows = parser.parse_args(), []
    folder = in_two_shards(options.output / "two-shards").resolve() if options.shards else None
    options.models = {each: str(folder) if folder and model == SHAPE else model for each, model in MODELS.items()}
    for notebook in options.only.split(","):
        rows.append(rehearse(notebook, options))
        name = f"sitting-{options.cores}-cores{'-shards' * options.shards}.csv"
        pd.DataFrame(rows).to_csv(options.output / name, index=False)
        print(pd.DataFrame(rows).to_string(index=False), flush=True)
    return max(int(row["exit_code"] != 0) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
