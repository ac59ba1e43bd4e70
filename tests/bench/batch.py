"""The largest batch: the package's search against accelerate's and the true maximum, in one run.

``python tests/bench/batch.py --csv batch.csv``: Llama-3.2-1B's shape on a GPU, whole and held to 15 GiB
``python tests/bench/batch.py --device cpu --model smollm2-135m --memory-gib 0.6 --cap 48``: by a process's growth

A batch size that both searches try runs once: every run begins with the same emptied memory, so it would end the
same, and its seconds count for each search. The searches leave a bracket around the true maximum, which is halved to
one row; ``--within-rows 16`` saves most runs where they take long, on a whole card. Batches that may end the process
count as too large.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import torch
from accelerate.utils import find_executable_batch_size
from transformers import AutoConfig

from qnb.memory import MIB, limited, release
from qnb.precision import parse
from qnb.prompts import Workload
from qnb.quantize import checkpoint
from qnb.quantize.sources import SHAPE, resolve
from qnb.speed.batch_search import Probe, TryBatch, find_largest_batch, int32_rows
from qnb.speed.batch_trials import Trials
from qnb.speed.engines import FACTORIES, why_unavailable
from qnb.speed.monitor import used_memory_mib

START = 2048  # of accelerate's search; doubled where that much fits, as it only goes down


class Remembered:
    """A `TryBatch` that runs each batch size once."""

    def __init__(self, try_batch: TryBatch) -> None:
        self._try_batch = try_batch
        self.probes: dict[int, tuple[Probe, float]] = {}  # and the seconds that it took
        self.sizes: list[int] = []  # in the order of the search at work

    def __call__(self, batch_size: int) -> Probe:
        """Return what came of the batch, now or before."""
        self.sizes.append(batch_size)
        if batch_size not in self.probes:
            started_s = perf_counter()
            self.probes[batch_size] = self._try_batch(batch_size), perf_counter() - started_s
            print(*self.probes[batch_size], file=sys.stderr, flush=True)
        return self.probes[batch_size][0]


def ours(trials: Remembered, limit_mib: float, cap: int) -> int:
    """Search as a study does."""
    return find_largest_batch(trials, limit_mib, cap).batch_size


def accelerate(trials: Remembered, limit_mib: float, cap: int) -> int:
    """Search with accelerate's decorator: nine tenths of what did not fit, from a size that must not fit."""

    def attempt(batch_size: int) -> int:
        if not trials(batch_size).fits:
            raise RuntimeError("CUDA out of memory.")  # by which accelerate knows it
        return batch_size

    start = min(START, cap)
    while (largest := find_executable_batch_size(attempt, starting_batch_size=start)()) == start < cap:
        start = min(2 * start, cap)
    return int(largest)


SEARCHES: dict[str, Callable[[Remembered, float, int], int]] = {"ours": ours, "accelerate": accelerate}


def search(name: str, trials: Remembered, *limits: Any) -> dict[str, Any]:
    """Search once and return what the search found and cost."""
    trials.sizes = []
    largest = SEARCHES[name](trials, *limits)
    seconds = sum(trials.probes[size][1] for size in trials.sizes)
    return {"search": name, "largest_batch": largest, "probes": len(trials.sizes), "seconds": seconds}


def true_maximum(trials: Remembered, cap: int, rows: int) -> tuple[int, int]:
    """Return the largest batch that ran, and the most that could: less than `rows` apart."""
    fits = max((size for size, (probe, _) in trials.probes.items() if probe.fits), default=0)
    larger = [size for size, (probe, _) in trials.probes.items() if not probe.fits and size > fits]
    fails = min(larger, default=cap + 1)
    while fails - fits > rows:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if trials(middle).fits else (fits, middle)
    return fits, fails - 1


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for every memory, precision, engine and search."""
    device, cap = options.device, options.cap
    workload = Workload((tuple(range(10, 10 + options.prompt_tokens)),), options.new_tokens, "ramp")
    folder = resolve(options.model, device).path
    last_safe_int8 = int32_rows(AutoConfig.from_pretrained(folder), options.prompt_tokens)
    for memory_gib, precision, engine in product(options.memory_gib, parse(options.precisions), options.engines):
        about = {"precision": precision.name, "engine": engine, "memory_gib": memory_gib}
        print(about, file=sys.stderr)
        if why := why_unavailable(engine, device, precision.threshold):
            yield {**about, "note": why}
            continue
        whole_mib = torch.cuda.get_device_properties(0).total_memory / MIB if device == "cuda" else 0
        limit_mib = whole_mib if memory_gib == "whole" else 1024 * float(memory_gib)
        safe_cap = min(cap, last_safe_int8) if precision.eight_bit and engine == "eager" else cap
        with limited(whole_mib, limit_mib if device == "cuda" else 0), checkpoint.quiet():
            release(workspaces=True)
            baseline_mib = used_memory_mib(device)
            model = checkpoint.load(folder, precision, device)
            trials = Remembered(Trials(model, workload, limit_mib, engine, baseline_mib))
            rows = [search(name, trials, limit_mib, safe_cap) for name in SEARCHES]
            true, most = true_maximum(trials, safe_cap, options.within_rows)
            del model, trials
            release(workspaces=True)
        for row in rows:
            share_pct = 100 * row["largest_batch"] / most
            yield {**about, **row, "true_batch": true, "true_at_most": most, "share_pct": share_pct}


def main() -> None:
    """Print the table, and save it as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", default=SHAPE)
    parser.add_argument("--precisions", default="fp16,int8,int4,nf4")
    parser.add_argument("--engines", nargs="+", choices=FACTORIES, default=["eager"])
    parser.add_argument("--memory-gib", nargs="+", default=["15", "whole"])
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--cap", type=int, default=16_384)
    parser.add_argument("--within-rows", type=int, default=1, help="how closely the true maximum is known")
    parser.add_argument("--csv", type=Path, default=Path("batch.csv"))
    options, rows = parser.parse_args(), []
    for row in compare(options):
        rows.append(row)
        pd.DataFrame(rows).round(2).to_csv(options.csv, index=False)
    print(pd.DataFrame(rows).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
