"""The largest batch: ours against accelerate's and Lightning's searches and the true maximum, in one run.

``python tests/bench/batch.py --csv batch.csv``: Llama-3.2-1B's shape on a GPU, whole and held to 15 GiB
``python tests/bench/batch.py --device cpu --model smollm2-135m --memory-gib 0.6 --cap 48``: by a process's growth

A batch size that several searches try runs once: every run begins with the same emptied memory, so it would end the
same, and its seconds count for each search. The searches leave a bracket around the true maximum, which is halved to
one row. Then the next even sizes are tried, as they may fit where an odd one did not. ``--within-rows 16 --searches
ours,accelerate`` saves most runs where they take long, on a whole card.
Runs are made in a child process, which a batch may end. A peer's search then ends too, as it would in its own process.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import AutoConfig

from qnb.memory import MIB
from qnb.precision import parse
from qnb.prompts import Workload
from qnb.quantize.sources import SHAPE, resolve
from qnb.speed.batch_search import DIED, ChildTrials, Probe, TryBatch, find_largest_batch, int32_rows
from qnb.speed.batch_trials import load_trials
from qnb.speed.engines import FACTORIES, why_unavailable

START = 2048  # of accelerate's search; doubled where that much fits, as it only goes down


class Remembered:
    """A `TryBatch` that runs each batch size once."""

    def __init__(self, try_batch: TryBatch) -> None:
        self._try_batch = try_batch
        self.probes: dict[int, Probe] = {}
        self.sizes: list[int] = []  # in the order of the search at work

    def __call__(self, batch_size: int) -> Probe:
        """Return what came of the batch, now or before."""
        self.sizes.append(batch_size)
        if batch_size not in self.probes:
            self.probes[batch_size] = probe = self._try_batch(batch_size)
            end = probe.ended or f"{probe.reserved_mib or 0:,.0f} MiB{', squeezed' * probe.squeezed}"
            print(f"  {batch_size}: {end}, {probe.took_s or 0:.1f} s", file=sys.stderr, flush=True)
        return self.probes[batch_size]

    def run(self, batch_size: int) -> None:
        """Run the batch as a peer sees it: an error where it does not fit."""
        probe = self(batch_size)
        if probe.ended == DIED:
            raise ProcessLookupError(DIED)
        if not probe.fits:
            raise RuntimeError("CUDA out of memory. The batch does not fit.")

    @property
    def largest(self) -> int:
        """The largest batch that fitted."""
        return max((size for size, probe in self.probes.items() if probe.fits), default=0)


def ours(trials: Remembered, limit_mib: float, cap: int, last_safe: int) -> int:
    """Search as a study does."""
    return find_largest_batch(trials, limit_mib, cap, last_safe).batch_size


def accelerate(trials: Remembered, limit_mib: float, cap: int, last_safe: int) -> int:
    """Search with accelerate's decorator: nine tenths of what did not fit, from a size that must not fit."""
    from accelerate.utils import find_executable_batch_size

    def attempt(batch_size: int) -> int:
        trials.run(batch_size)
        return batch_size

    start = min(START, cap)
    while (largest := find_executable_batch_size(attempt, starting_batch_size=start)()) == start and start < cap:
        start = min(2 * start, cap)
    return largest


def lightning(mode: str, trials: Remembered, limit_mib: float, cap: int, last_safe: int) -> int:
    """Search with Lightning's `Tuner`: one step a trial where its default is three, no margin taken off at the end."""
    import pytorch_lightning
    import torch
    from pytorch_lightning.tuner import Tuner

    class Module(pytorch_lightning.LightningModule):
        """A step of validation, which Lightning alone limits in number, is a trial."""

        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 2

        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(range(cap + 1), batch_size=self.batch_size)

        def validation_step(self, batch: torch.Tensor, place: int) -> None:
            trials.run(len(batch))

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pytorch_lightning.Trainer(accelerator="cpu", default_root_dir=folder, **quiet)
        options = {"mode": mode, "steps_per_trial": 1, "margin": 0.0, "max_val": cap}
        return Tuner(trainer).scale_batch_size(Module(), method="validate", **options) or 0


SEARCHES: dict[str, Callable[[Remembered, float, int, int], int]] = {
    "ours": ours,
    "accelerate": accelerate,
    "lightning power": partial(lightning, "power"),
    "lightning binsearch": partial(lightning, "binsearch"),
}


def true_maximum(trials: Remembered, cap: int, rows: int) -> tuple[int, int]:
    """Return the largest batch that ran, and the most that could: `rows` apart at most, less one.

    What the searches left open is halved; down to one row, the next larger multiples of 2, 4 and 8 are tried too.
    """
    while True:
        fits = trials.largest
        fails = min((size for size, probe in trials.probes.items() if not probe.fits and size > fits), default=cap + 1)
        while fails - fits > rows:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if trials(middle).fits else (fits, middle)
        even = {fits + step - fits % step for step in (2, 4, 8)} if rows == 1 else set()
        if not any([trials(size).fits for size in sorted(even) if size <= cap]):
            return fits, fails - 1


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for every memory, precision, engine and search."""
    if options.device != "cuda" and options.engines != "eager":
        raise SystemExit(f"--engines {options.engines} needs a GPU; --device {options.device} has eager alone")
    workload = Workload((tuple(range(10, 10 + options.prompt_tokens)),), options.new_tokens, "ramp")
    folder = resolve(options.model, options.device).path
    last_safe_int8 = int32_rows(AutoConfig.from_pretrained(folder), options.prompt_tokens)
    formats = product(options.memory_gib.split(","), parse(options.precisions), options.engines.split(","))
    for memory_gib, precision, engine in formats:
        if why := why_unavailable(engine, options.device, precision.threshold):
            print(f"{precision.name}, {engine}: {why}", file=sys.stderr)
            continue
        limit_mib = _limit_mib(memory_gib, options.device)
        last_safe = last_safe_int8 if precision.eight_bit and engine == "eager" else 0
        about = {"precision": precision.name, "engine": engine, "memory_gib": round(limit_mib / 1024, 1)}
        print(about, file=sys.stderr, flush=True)
        with ChildTrials(load_trials, folder, precision, options.device, workload, limit_mib, engine) as try_batch:
            trials = Remembered(try_batch)
            rows = [search(name, trials, limit_mib, options.cap, last_safe) for name in options.searches.split(",")]
            true, most = true_maximum(trials, options.cap, options.within_rows)
        for row in rows:
            share_pct = 100 * row["largest_batch"] / most
            yield {**about, **row, "true_batch": true, "true_at_most": most, "share_pct": share_pct}


def search(name: str, trials: Remembered, limit_mib: float, cap: int, last_safe: int) -> dict[str, Any]:
    """Search once and return what the search found and cost."""
    trials.sizes, largest, note = [], 0, ""
    try:
        largest = SEARCHES[name](trials, limit_mib, cap, last_safe)
    except ProcessLookupError as error:
        note = str(error)
    except ImportError as error:  # a peer that is not installed costs its own row
        note = f"{error.name} is not installed"
    seconds = sum(trials.probes[size].took_s or 0 for size in trials.sizes)
    return {"search": name, "largest_batch": largest, "probes": len(trials.sizes), "seconds": seconds, "note": note}


def _limit_mib(memory_gib: str, device: str) -> float:
    if memory_gib != "whole":
        return 1024 * float(memory_gib)
    if device != "cuda":
        raise SystemExit("--memory-gib whole needs a GPU; give a number")
    import torch

    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / MIB


def main() -> None:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", default=SHAPE)
    parser.add_argument("--precisions", default="fp16,int8,int4,nf4")
    parser.add_argument("--engines", default="eager", help="cuda_graph too, with formats that can be captured")
    parser.add_argument("--memory-gib", default="15,whole")
    parser.add_argument("--searches", default=",".join(SEARCHES))
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--cap", type=int, default=16_384)
    parser.add_argument("--within-rows", type=int, default=1, help="how closely the true maximum is known")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    if unknown := set(options.searches.split(",")) - set(SEARCHES):
        parser.error(f"searches {', '.join(sorted(unknown))} are unknown; choose from {', '.join(SEARCHES)}")
    if unknown := set(options.engines.split(",")) - set(FACTORIES):
        parser.error(f"engines {', '.join(sorted(unknown))} are unknown; choose from {', '.join(FACTORIES)}")
    rows = []
    for row in compare(options):
        rows.append(row)
        if options.csv:
            pd.DataFrame(rows).round(2).to_csv(options.csv, index=False)
    print(pd.DataFrame(rows).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
