"""Milliseconds a token by precision and engine, with the ratio to eager and to the device's limit, taken in one run.

``python tests/bench/decode.py``: nine precisions of Llama-3.2-1B's shape at batch size 1, six minutes on an H100
``python tests/bench/decode.py --engines cuda_graph --precisions fp16,nf4 --compile none,fused,descent,combo,default``:
what torch.compile is asked for; the variants differ in batches of up to eight rows
``python tests/bench/decode.py --engines cuda_graph --precisions fp16,nf4 --compile default,unled,written,stock``:
builds of the same step, with kernels chosen by this project's timing, by parts of it and by torch.compile's own
``python tests/bench/decode.py --model smollm2-135m --precisions bf16 --prompt-tokens 16 --new-tokens 4``: on a CPU
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch._inductor.utils import fresh_cache

from qnb.precision import Precision, parse
from qnb.prompts import load
from qnb.quantize import checkpoint as model
from qnb.speed import benchmark
from qnb.speed import decode_step as step
from qnb.speed import engines as decode
from qnb.speed.autotune import kernel_ms, steadily

# name: what torch.compile is given for the lean step
VARIANTS: dict[str, dict[str, Any] | None] = {
    "default": decode.COMPILE,
    "none": None,
    "fused": {},
    "descent": {"options": {"coordinate_descent_tuning": True}},  # products of one row as reductions of our own
    "combo": {"options": {"combo_kernels": True}},  # kernels that do not depend on each other in one launch
    "autotune": {"mode": "max-autotune-no-cudagraphs"},
}
# "default" with kernels chosen by another timing
TIMINGS = {
    "unled": partial(steadily, partial(kernel_ms, leads_cycles=[0])),  # the GPU may wait for a launch
    "written": partial(steadily, partial(kernel_ms, fill=torch.Tensor.zero_)),  # the cache is filled by writing
    "stock": nullcontext,  # torch.compile's own
}
COLUMNS = (
    "precision", "engine", "compile", "batch_size", "ttft_ms", "tpot_ms", "kernel_ms", "kernels", "limit_ms",
    "limit_pct", "vs_eager", "throughput_rps", "peak_allocated_mib", "bound", "compared_tokens", "first_difference",
    "difference_margin", "note",
)  # fmt: skip


def measure(
    source: model.Source, precision: Precision, options: argparse.Namespace, limits: benchmark.Limits
) -> Iterator[dict[str, Any]]:
    """Load a precision once and time each engine, variant and batch size with it."""
    network = model.load(source.path, precision, options.device)
    tokenizer = model.load_tokenizer(source.path)
    for size in options.batch_sizes:
        eager_ms = None
        kind = torch.device(options.device).type
        for engine in sorted(decode.parse(options.engines, kind), key=lambda name: name != "eager"):
            for variant in options.compile if engine == "cuda_graph" else [""]:
                row: dict[str, Any] = {"precision": precision.name, "engine": engine, "batch_size": size}
                if why := decode.absent(engine, kind, network, options.prompt_tokens + options.new_tokens):
                    yield {**row, "note": why}
                    continue
                if variant:
                    decode.COMPILE = VARIANTS["default" if variant in TIMINGS else variant]
                    step.steadily = TIMINGS.get(variant, steadily)
                    decode.forget(network)  # the step built for another variant
                requests = size * (options.requests if engine == "eager" else 4 * options.requests)
                work = load(tokenizer, "sample", requests, options.prompt_tokens, options.new_tokens)
                passes = ("memory", "trace", "agreement") if size > 1 else ("trace", "agreement")
                with fresh_cache() if variant else nullcontext():  # what was chosen before is chosen again
                    timed = benchmark.run(network, work, size, engine, limits=limits, passes=passes)
                kept = timed.row()
                step_ms, trace = 1000 * (timed.tpot_s or 0), timed.trace
                eager_ms = step_ms if engine == "eager" else eager_ms
                limit_ms = 1000 * kept["bytes_per_step"] / limits.copy_bytes_per_s
                yield {
                    **kept,
                    **row,
                    "compile": variant,
                    "ttft_ms": 1000 * (timed.ttft_s or 0),
                    "tpot_ms": step_ms,
                    "kernel_ms": trace and 1000 * trace.kernel_s,
                    "kernels": trace and trace.kernels,
                    "limit_ms": limit_ms,
                    "limit_pct": 100 * limit_ms / step_ms if step_ms else None,
                    "vs_eager": eager_ms / step_ms if eager_ms and step_ms else None,
                }
                model.release()


def variants(text: str) -> list[str]:
    """Return the names of what torch.compile is asked for; argparse refuses others."""
    names = text.split(",")
    if unknown := set(names) - {*VARIANTS, *TIMINGS}:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join([*VARIANTS, *TIMINGS])}")
    return names


def main() -> None:
    """Measure, print and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=model.SHAPE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precisions", default="all")
    parser.add_argument("--engines", default="auto")
    parser.add_argument("--compile", default=["default"], type=variants)
    parser.add_argument("--batch-sizes", default=[1], type=lambda text: [int(size) for size in text.split(",")])
    parser.add_argument("--requests", default=2, type=int, help="batches timed with eager; cuda_graph gets four times")
    parser.add_argument("--prompt-tokens", default=128, type=int)
    parser.add_argument("--new-tokens", default=100, type=int)
    parser.add_argument("--output", default=Path("decode.csv"), type=Path)
    options = parser.parse_args()
    source = model.resolve(options.model, torch.device(options.device).type)
    limits = benchmark.measure_limits(options.device)
    print(limits)
    rows = []
    for precision in parse(options.precisions):
        for row in measure(source, precision, options, limits):
            rows.append(row)
            shown = {name: row.get(name) for name in COLUMNS if row.get(name) not in (None, "")}
            print(", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                            for name, value in shown.items()), flush=True)  # fmt: skip
            pd.DataFrame(rows).reindex(columns=COLUMNS).to_csv(options.output, index=False)  # kept if it is cut off
        model.release()
    with pd.option_context("display.width", 200, "display.max_columns", None):
        print(pd.DataFrame(rows).reindex(columns=COLUMNS[:12]).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
