"""Milliseconds a token by format and engine, beside the time of reading a step's bytes, in one run.

``python tests/bench/decode.py``: nine formats of Llama-3.2-1B's shape at batch size 1, six minutes on an H100
``python tests/bench/decode.py --engines cuda_graph --precisions fp16,nf4 --batch-sizes 1,64``: the captured step
``... --engines static,cuda_graph --precisions bf16,nf4,int4-hqq``: beside ``generate`` with a static cache
``... --stock-autotuning``: its kernels chosen by torch.compile's own timing, to compare with `qnb.patches`
``PYTHONPATH=tests/bench/stand_in python ... --precisions fp16,nf4 --batch-sizes 64,256``: as if the card were a T4
``python tests/bench/decode.py --model smollm2-135m --precisions bf16 --prompt-tokens 16 --new-tokens 4``: on a CPU

The kernels chosen stay in torch.compile's cache: give ``TORCHINDUCTOR_CACHE_DIR`` an empty folder to choose anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from qnb.memory import release
from qnb.precision import Precision, parse
from qnb.prompts import load as load_prompts
from qnb.quantize.checkpoint import load, load_tokenizer
from qnb.quantize.sources import SHAPE, Source, resolve
from qnb.speed import decode_step, engines
from qnb.speed.benchmark import run
from qnb.speed.device_peaks import DevicePeaks, measure_peaks
from qnb.speed.roofline import derived

COLUMNS = (
    "precision", "engine", "batch_size", "ttft_ms", "tpot_ms", "kernel_ms", "kernels_per_token", "read_ms", "mbu_pct",
    "mfu_pct", "gpu_busy_pct", "bound", "throughput_rps", "peak_allocated_mib", "stand_in", "note",
)  # fmt: skip


class Static(engines.Eager):
    """transformers' ``generate`` with a static KV cache, for which it compiles and captures the model's forward."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._model.generation_config.cache_implementation = "static"


def measure(
    source: Source, precision: Precision, options: argparse.Namespace, peaks: DevicePeaks
) -> Iterator[dict[str, Any]]:
    """Load a format once and time each batch size with each engine, eager first."""
    model, tokenizer = load(source.path, precision, options.device), load_tokenizer(source.path)
    tokens, kind = options.prompt_tokens + options.new_tokens, model.device.type
    for size in map(int, options.batch_sizes.split(",")):
        for engine in options.engines.split(","):
            row: dict[str, Any] = {"precision": precision.name, "engine": engine, "batch_size": size}
            if why := engines.why_unavailable(engine, kind, model=model, tokens=tokens):
                yield {**row, "note": why}
                continue
            requests = size * options.batches * (1 if engine == "eager" else 4)
            workload = load_prompts(tokenizer, "sample", requests, options.prompt_tokens, options.new_tokens)
            row |= asdict(run(model, workload, size, engine, peaks=peaks, kernels=precision.kernels).run)
            for name in ("ttft_s", "tpot_s", "kernel_s_per_token"):
                row[f"{name.split('_')[0]}_ms"] = row[name] and 1000 * row[name]
            row["read_ms"] = 1000 * row["bytes_per_step"] / peaks.copy_bytes_per_s
            yield row | derived(row)
            release()


def main() -> None:
    """Measure, print and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHAPE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precisions", default="all")
    parser.add_argument("--engines", default="eager,cuda_graph" if torch.cuda.is_available() else "eager")
    parser.add_argument("--stock-autotuning", action="store_true")
    parser.add_argument("--batch-sizes", default="1")
    parser.add_argument("--batches", default=2, type=int, help="timed with eager; cuda_graph gets four times as many")
    parser.add_argument("--prompt-tokens", default=128, type=int)
    parser.add_argument("--new-tokens", default=100, type=int)
    parser.add_argument("--output", default=Path("decode.csv"), type=Path)
    options, rows = parser.parse_args(), []
    engines.FACTORIES["static"] = lambda model, *_: Static(model)
    if options.stock_autotuning:
        decode_step.steady_autotuning = nullcontext
    source, peaks = resolve(options.model, torch.device(options.device).type), measure_peaks(options.device)
    print(peaks)
    for precision in parse(options.precisions):
        for row in measure(source, precision, options, peaks):
            rows.append(row)
            table = pd.DataFrame(rows).reindex(columns=COLUMNS)
            table.to_csv(options.output, index=False)  # stays if the run is cut off
            print(table.tail(1).dropna(axis=1).round(4).to_string(index=False), flush=True)
        release(workspaces=True)


if __name__ == "__main__":
    main()
