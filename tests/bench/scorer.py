"""Shared contexts against stock lm-eval, in one process: seconds, their ratio, peak memory, equal picks.

``python tests/bench/scorer.py synthetic``: choices and generation on Llama-3.2-1B's shape, fp16, 15 GiB of a GPU
``python tests/bench/scorer.py study --data-dir HUB --tasks T --precisions P``: real tasks from start to end

Both need a GPU. Of three passes over drawn choices the fastest counts. The first one, which compiles kernels, stands
beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import lm_eval.evaluator  # at the top: neither side is charged for what both import
import pandas as pd
import torch
from lm_eval.models.huggingface import HFLM

from qnb.accuracy import backbone
from qnb.accuracy.evaluate import AccuracyOptions, accuracy
from qnb.accuracy.scorer import SharedContextLM
from qnb.memory import MIB, release
from qnb.precision import PRECISIONS
from qnb.quantize import checkpoint, sources
from qnb.session import Session

HELD_GIB = 15
# contexts, tokens of one, choices, tokens of a choice
SHAPES = {
    "HellaSwag-like": (1000, (60, 100), 4, (18, 28)),
    "ARC-like": (2000, (15, 45), 4, (2, 10)),
    "MMLU-like": (1000, (60, 400), 4, (1, 1)),
}
GENERATED, GENERATED_STOCK = 512, 96  # prompts; stock is slow, and gets the first ones only


def draw_requests(count: int, context: tuple[int, int], choices: int, choice: tuple[int, int]) -> list[Any]:
    """Draw (key, context ids, continuation ids) as lm-eval hands them to a model, the same in every run."""
    draw, requests = random.Random(0), []

    def ids(length: tuple[int, int]) -> list[int]:
        return draw.choices(range(10, 120_000), k=draw.randint(*length))

    for number in range(count):
        shared = ids(context)
        requests += [((str(number), str(place)), shared, ids(choice)) for place in range(choices)]
    return requests


def timed(work: Callable[[], Any], repeats: int = 1) -> tuple[Any, dict[str, float]]:
    """Return what `work` returns, and its fastest and first wall clock (s) and the allocator's peak (MiB)."""
    seconds = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        release()
        started = perf_counter()
        result = work()
        torch.cuda.synchronize()
        seconds.append(perf_counter() - started)
    peak_mib = torch.cuda.max_memory_allocated() / MIB
    return result, {"s": min(seconds), "first_s": seconds[0], "peak_mib": peak_mib}


def row(work: str, stock: dict[str, float], ours: dict[str, float], equal: float) -> dict[str, Any]:
    """Return one line of the table."""
    stock_columns = {f"stock_{name}": value for name, value in stock.items() if name != "first_s"}
    ours_columns = {f"ours_{name}": value for name, value in ours.items()}
    ratio = {"ratio": stock["s"] / ours["s"], "equal_pct": 100 * equal}
    return {"work": work, **stock_columns, **ours_columns, **ratio}


def share_equal(one: Iterable[Any], other: Iterable[Any]) -> float:
    """Return the share of equal entries, of as many as both have."""
    pairs = list(zip(one, other, strict=False))
    return sum(a == b for a, b in pairs) / len(pairs)


def synthetic(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time choices, with and without compiled layers, and greedy generation. Stock looks for its batch size itself."""
    source = sources.resolve(sources.SHAPE, "cuda")
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(HELD_GIB * 2**30 / whole)
    model = checkpoint.load(source.path, PRECISIONS["fp16"], "cuda")
    # stock looks for its batch at the full length, and no batch of 131,072 tokens fits
    shared = {"pretrained": model, "tokenizer": checkpoint.load_tokenizer(source.path), "max_length": 2048}
    stock, ours = HFLM(batch_size="auto", **shared), SharedContextLM(batch_size=8, **shared)
    assert ours.shared
    for name, (count, context, choices, choice) in SHAPES.items():
        requests = draw_requests(count, context, choices, choice)
        stock._loglikelihood_tokens(requests[:64], disable_tqdm=True)  # libraries load their kernels
        theirs, stock_times = timed(partial(stock._loglikelihood_tokens, requests, disable_tqdm=True))
        for compiled, work in (("plain", float("inf")), ("compiled", 0)):
            backbone.MIN_COMPILED_WORK["cuda"] = work
            mine, times = timed(partial(ours._loglikelihood_tokens, requests), 3)
            both = (torch.tensor(answers)[:, 0].view(-1, choices).argmax(1).tolist() for answers in (mine, theirs))
            yield row(f"{name}, {count} items, {compiled}", stock_times, times, share_equal(*both))
    yield generation(stock, ours)


def generation(stock: HFLM, ours: HFLM) -> dict[str, Any]:
    """Time greedy generation, in seconds a request."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ", k=draw.randint(800, 1000))) for _ in range(GENERATED)]

    def generate(lm: HFLM, count: int, new_tokens: int) -> list[str]:
        settings = {"until": ["\n\n"], "max_gen_toks": new_tokens}
        return lm.generate_until([SimpleNamespace(args=(text, dict(settings))) for text in texts[:count]], True)

    results = []
    for lm, count in ((ours, GENERATED), (stock, GENERATED_STOCK)):
        generate(lm, 1, 2)  # libraries load their kernels
        answers, times = timed(partial(generate, lm, count, 256))
        results.append((answers, {name: value / (1 if "mib" in name else count) for name, value in times.items()}))
    (mine, times), (theirs, stock_times) = results
    work = f"GSM8K-like, 256 new tokens, a request of {GENERATED} and {GENERATED_STOCK}"
    return row(work, stock_times, times, share_equal(mine, theirs))


class NotedSession(Session):
    """Notes when the last row of each format was recorded."""

    def append(self, key: Any, *values: Any) -> Any:
        self.ended_s[key.get("precision")] = perf_counter()
        return super().append(key, *values)


def study(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Score real tasks with the embedded model. Stock builds its tasks anew for each format, ours for the first."""
    with tempfile.TemporaryDirectory() as folder:
        session = NotedSession(sources.EMBEDDED, options.precisions, folder, options.data_dir)
        session.ended_s = {}
        for precision in session.precisions:
            session.checkpoint(precision)
        asked, begun_s = AccuracyOptions(options.tasks, options.limit or "all"), perf_counter()
        _, times = timed(partial(accuracy, session, asked))
        for precision in session.precisions:
            times |= {"s": session.ended_s[precision.name] - begun_s, "first_s": None}
            begun_s = session.ended_s[precision.name]
            if options.compared and precision.name not in options.compared.split(","):
                continue
            rows = [row for row in session.ledger.rows("accuracy") if row["precision"] == precision.name]
            mine = pd.concat(pd.read_parquet(session.folder / row["items_file"]) for row in rows)
            model = checkpoint.load(session.checkpoint(precision), session.pinned(precision), session.device.kind)
            drawn = {task: sorted(set(items.doc_id)) for task, items in mine.groupby("task")}
            theirs, stock_times = timed(partial(_stock, model, session.tokenizer, options, drawn))
            both = mine.merge(theirs, on=["task", "doc_id"], suffixes=("", "_stock"))
            assert len(both) == len(mine) == len(theirs)
            equal = float((both.picked == both.picked_stock).mean())
            yield row(f"{options.tasks}, {precision.name}, {len(mine)} items", stock_times, times, equal)
            del model


def _stock(model: Any, tokenizer: Any, options: argparse.Namespace, drawn: dict[str, Any]) -> pd.DataFrame:
    """Evaluate as ``lm_eval --model hf --batch_size auto`` does; `datasets` finds the data by their folders' names."""
    with contextlib.chdir(options.data_dir):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size="auto")
        results = lm_eval.simple_evaluate(lm, tasks=options.tasks.split(","), samples=drawn, bootstrap_iters=0)
    rows = []
    for task, samples in results["samples"].items():
        for sample in samples:
            values = [float(response[0]) for response in sample["filtered_resps"]]
            rows.append({"task": task, "doc_id": sample["doc_id"], "picked": str(values.index(max(values)))})
    return pd.DataFrame(rows)


def main() -> None:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("synthetic", "study"))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tasks", default="arc_challenge,arc_easy,hellaswag,mmlu")
    parser.add_argument("--precisions", default="study")
    parser.add_argument("--compared", default="", help="formats that stock scores too; all where none is named")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows = []
    for line in synthetic(options) if options.what == "synthetic" else study(options):
        rows.append(line)
        print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False), file=sys.stderr, flush=True)
        if options.csv:
            pd.DataFrame(rows).round(3).to_csv(options.csv, index=False)
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
