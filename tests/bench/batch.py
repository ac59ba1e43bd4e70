"""The largest batch: ours against accelerate's and Lightning's searches and the true maximum, in one run.

``python tests/bench/batch.py --csv batch.csv``: Llama-3.2-1B's shape on a GPU, whole and held to 15 GiB
``python tests/bench/batch.py --device simulated``: its allocations served by an outline of torch's allocator, no GPU
``python tests/bench/batch.py --device cpu --model smollm2-135m --memory-gib 0.6 --cap 48``: by a process's growth

A batch size that several searches ask for is run once: every run begins from the same emptied memory, so it would end
the same, and its seconds count for each of them. The searches leave a bracket around the true maximum; it is halved
to one row, and then the next even sizes are tried, as they may fit where an odd one did not. Where a run takes long,
on a whole card, ``--within-rows 16 --searches ours,accelerate`` saves most of them.
Runs are made in a process of their own, which a batch may end; a search of a peer ends with it, as it would there.
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

from qnb.device import MIB
from qnb.precision import parse
from qnb.prompts import Workload
from qnb.quantize import checkpoint as model
from qnb.speed.batch_search import DIED, Apart, Probe, largest
from qnb.speed.benchmark import PROBES, counted, trial_of
from qnb.speed.engines import unrecordable

START = 2048  # of accelerate's search; doubled where that much fits, as it only goes down


class Trials:
    """Every batch size tried on one precision, engine and memory, run once."""

    def __init__(self, try_batch: Callable[[int], Probe], engine: str = "eager") -> None:
        self._try = try_batch
        self.engine = engine
        self.seen: dict[int, Probe] = {}
        self.asked: list[int] = []

    def __call__(self, batch_size: int) -> Probe:
        """Return what came of the batch, now or before."""
        self.asked.append(batch_size)
        if batch_size not in self.seen:
            self.seen[batch_size] = probe = self._try(batch_size)
            end = probe.ended or f"{probe.memory_mib or 0:,.0f} MiB{', squeezed' * probe.squeezed}"
            print(f"  {batch_size}: {end}, {probe.took_s or 0:.1f} s", file=sys.stderr, flush=True)
        return self.seen[batch_size]

    def run(self, batch_size: int) -> None:
        """Run the batch as a peer sees it: an error where it does not fit."""
        probe = self(batch_size)
        if probe.ended == DIED:
            raise ProcessLookupError(DIED)
        if not probe.fits:
            raise RuntimeError("CUDA out of memory. The batch does not fit.")

    @property
    def good(self) -> int:
        """The largest batch that fitted."""
        return max((size for size, probe in self.seen.items() if probe.fits), default=0)


def ours(trials: Trials, limit_mib: float, cap: int, cliff: int) -> int:
    """Search as `benchmark.largest_batch_apart` does."""
    return largest(trials, limit_mib, cap, cliff, most_probes=PROBES[trials.engine]).batch_size


def accelerate(trials: Trials, limit_mib: float, cap: int, cliff: int) -> int:
    """Search with accelerate's decorator: nine tenths of what did not fit, from a size that must not fit."""
    from accelerate.utils import find_executable_batch_size

    def attempt(batch_size: int) -> int:
        trials.run(batch_size)
        return batch_size

    start = min(START, cap)
    while (found := find_executable_batch_size(attempt, starting_batch_size=start)()) == start and start < cap:
        start = min(2 * start, cap)
    return found


def lightning(mode: str, trials: Trials, limit_mib: float, cap: int, cliff: int) -> int:
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


SEARCHES: dict[str, Callable[[Trials, float, int, int], int]] = {
    "ours": ours,
    "accelerate": accelerate,
    "lightning power": partial(lightning, "power"),
    "lightning binsearch": partial(lightning, "binsearch"),
}


def true_maximum(trials: Trials, cap: int, rows: int) -> tuple[int, int]:
    """Return the largest batch that ran, and the most that could: `rows` apart at most, less one.

    What the searches left open is halved; down to one row, the next larger multiples of 2, 4 and 8 are tried too.
    """
    while True:
        good = trials.good
        bad = min((size for size, probe in trials.seen.items() if not probe.fits and size > good), default=cap + 1)
        while bad - good > rows:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if trials(middle).fits else (good, middle)
        even = {good + step - good % step for step in (2, 4, 8)} if rows == 1 else set()
        if not any([trials(size).fits for size in sorted(even) if size <= cap]):
            return good, bad - 1


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for every memory, precision, engine and search."""
    if options.device != "cuda" and options.engines != "eager":
        raise SystemExit(f"--engines {options.engines} needs a GPU; --device {options.device} has eager alone")
    workload = Workload((tuple(range(10, 10 + options.prompt_tokens)),), options.new_tokens, "ramp")
    folder = "" if options.device == "simulated" else model.resolve(options.model, options.device).path
    for memory_gib in options.memory_gib.split(","):
        for precision, engine in product(parse(options.precisions), options.engines.split(",")):
            if engine == "cuda_graph" and (why := unrecordable(precision.threshold)):
                print(f"{precision.name}, {engine}: {why}", file=sys.stderr)
                continue
            limit_mib, cliff = _limit_mib(memory_gib, options.device), 0
            if options.device == "simulated":
                from allocator import device

                close, begin = None, device(options.prompt_tokens, options.new_tokens, limit_mib, precision.bits)
            else:
                cliff = counted(AutoConfig.from_pretrained(folder), options.prompt_tokens)
                close = begin = Apart(trial_of, folder, precision, options.device, workload, limit_mib, engine)
            trials, rows = Trials(begin, engine), []
            for name in options.searches.split(","):
                print(f"{precision.name}, {engine}, {memory_gib} GiB, {name}", file=sys.stderr, flush=True)
                trials.asked, found, note = [], 0, ""
                try:
                    found = SEARCHES[name](trials, limit_mib, options.cap, cliff)
                except ProcessLookupError as error:
                    note = str(error)
                except ImportError as error:  # a peer that is not installed costs its own row
                    note = f"{error.name} is not installed"
                took_s = sum(trials.seen[size].took_s or 0 for size in trials.asked)
                numbers = {"largest_batch": found, "probes": len(trials.asked), "seconds": took_s}
                rows.append({"search": name, **numbers, "note": note})
            true, most = true_maximum(trials, options.cap, options.within_rows)
            if close:
                close.close()
            for row in rows:
                share_pct = 100 * row["largest_batch"] / most
                head = {"precision": precision.name, "engine": engine, "memory_gib": round(limit_mib / 1024, 1)}
                yield {**head, **row, "true_batch": true, "true_at_most": most, "share_pct": share_pct}


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
    parser.add_argument("--device", choices=("cuda", "cpu", "simulated"), default="cuda")
    parser.add_argument("--model", default=model.SHAPE)
    parser.add_argument("--precisions", default="fp16,int8,int4,nf4")
    parser.add_argument("--engines", default="eager", help="cuda_graph too, with precisions that can be recorded")
    parser.add_argument("--memory-gib", default="15,whole")
    parser.add_argument("--searches", default=",".join(SEARCHES))
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--cap", type=int, default=16_384)
    parser.add_argument("--within-rows", type=int, default=1, help="how closely the true maximum is told")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    if unknown := set(options.searches.split(",")) - set(SEARCHES):
        parser.error(f"searches {', '.join(sorted(unknown))} are unknown; choose from {', '.join(SEARCHES)}")
    if unknown := set(options.engines.split(",")) - set(PROBES):
        parser.error(f"engines {', '.join(sorted(unknown))} are unknown; choose from {', '.join(PROBES)}")
    rows = []
    for row in compare(options):
        rows.append(row)
        if options.csv:
            pd.DataFrame(rows).round(2).to_csv(options.csv, index=False)
    print(pd.DataFrame(rows).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
