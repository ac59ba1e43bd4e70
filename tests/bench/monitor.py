"""What the monitor costs: the same generation with it and without, in turn; and its own time a reading.

``python tests/bench/monitor.py``: the device's sensor where there is a GPU, else the process's
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from contextlib import nullcontext
from statistics import median
from time import perf_counter, thread_time

import torch

from qnb.precision import PRECISIONS
from qnb.prompts import load
from qnb.quantize import checkpoint as model
from qnb.speed import engines as decode
from qnb.speed.monitor import Window, sensor

ALLOWED_PCT = 0.5


def median_interval(values: Iterable[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the median from order statistics, whatever the distribution.

    None below six values, where even the extremes do not hold it so surely (Conover 1999, section 3.2).
    """
    ranked = sorted(values)
    count, chance, outside = len(ranked), 0.0, -1
    while chance <= 0.025 and outside < count // 2:
        outside += 1
        chance += math.comb(count, outside) * 0.5**count
    return (ranked[outside - 1], ranked[-outside]) if outside >= 1 else None


def reading_s(sense: object, count: int = 200) -> float:
    """Return the median processor seconds that one reading takes from its thread."""
    seconds = []
    for _ in range(count):
        before = thread_time()
        sense.sample()
        seconds.append(thread_time() - before)
    return median(seconds)


def main() -> None:
    """Print both costs and whether they are within what is allowed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=model.EMBEDDED)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--engine", default="")
    parser.add_argument("--pairs", default=30, type=int)
    parser.add_argument("--new-tokens", type=int, help="a pass is to last several readings")
    parser.add_argument("--period", default=0.1, type=float, help="seconds between two readings")
    options = parser.parse_args()
    device = torch.device(options.device)
    engine = options.engine or decode.parse("auto", device.type)[-1]
    new_tokens = options.new_tokens or (1000 if engine == "cuda_graph" else 100)
    source = model.resolve(options.model, device.type)
    with model.quiet():
        network = model.load(source.path, PRECISIONS["bf16"], options.device)
        prompts = load(model.load_tokenizer(source.path), "sample", 1, 32, new_tokens).prompts
        made, sense = decode.FACTORIES[engine](network, 1, 32, new_tokens), sensor(device)
        for _ in range(2):
            made.generate(prompts, new_tokens)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        readings = 0
        for pair in range(options.pairs):
            for on in (True, False) if pair % 2 else (False, True):
                with Window(sense.sample, sense.source, options.period) if on else nullcontext() as window:
                    started = perf_counter()
                    made.generate(prompts, new_tokens)
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    seconds[on].append(perf_counter() - started)
                readings += len(window.readings) if on else 0
    ratios = [100 * (on / off - 1) for on, off in zip(seconds[True], seconds[False], strict=True)]
    low, high = median_interval(ratios) or (float("nan"), float("nan"))
    one_s = reading_s(sense)
    print(f"{engine} on {device}, source {sense.source}, {options.pairs} pairs of {median(seconds[False]):.2f} s, "
          f"{readings / options.pairs:.1f} readings each")  # fmt: skip
    print(f"on against off: {median(ratios):+.2f} % (95 % interval {low:+.2f} to {high:+.2f})")
    print(f"a reading takes {1e6 * one_s:.0f} us of its own thread, {one_s / options.period:.2%} of a core")
    verdict = "within" if high <= ALLOWED_PCT else "ABOVE" if low > ALLOWED_PCT else "too noisy to be told from"
    print(verdict, f"the {ALLOWED_PCT} % allowed")


if __name__ == "__main__":
    main()
