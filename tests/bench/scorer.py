"""Shared contexts against stock lm-eval, in turn and in one process: seconds, their ratio, peak memory, equal picks.

Of three passes over drawn choices ours counts the fastest; its first, in which kernels are compiled, stands beside.

``python tests/bench/scorer.py synthetic``: choices and generation on Llama-3.2-1B's shape, 16 bit, 15 GiB of a GPU
``python tests/bench/scorer.py study --data-dir HUB --tasks T --precisions P --limit N``: real tasks, start to end
``python -m qnb run --only 02`` measures what a score owes to its batch (stage *drift*).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import lm_eval.evaluator  # at the top: neither side is charged for what both import
import pandas as pd
import torch
from lm_eval.models.huggingface import HFLM

from qnb import Study
from qnb.accuracy import tasks as accuracy
from qnb.accuracy.scorer import SharedContextLM
from qnb.device import MIB
from qnb.precision import PRECISIONS
from qnb.quantize import checkpoint as model

HELD_GIB = 15
# contexts, tokens of one, choices, tokens of a choice
SHAPES = {
    "HellaSwag-like": (1000, (60, 100), 4, (18, 28)),
    "ARC-like": (2000, (15, 45), 4, (2, 10)),
    "MMLU-like": (1000, (60, 400), 4, (1, 1)),
}


def requests(count: int, context: tuple[int, int], choices: int, choice: tuple[int, int]) -> list[Any]:
    """Draw (key, context ids, continuation ids) as lm-eval hands them to a model, the same in every run."""
    draw, made = random.Random(0), []
    for number in range(count):
        ids = draw.choices(range(10, 120_000), k=draw.randint(*context))
        for place in range(choices):
            made.append(((str(number), str(place)), ids, draw.choices(range(10, 120_000), k=draw.randint(*choice))))
    return made


Timed = tuple[Any, float, float, float]


def timed(work: Callable[[], Any], repeats: int = 1) -> Timed:
    """Return what `work` returned, its fastest and its first wall clock (s), and the allocator's peak (MiB)."""
    seconds, peak_mib = [], 0.0
    for _ in range(repeats):
        model.release()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = perf_counter()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak_mib = max(peak_mib, torch.cuda.max_memory_allocated() / MIB)
        seconds.append(perf_counter() - started)
    return result, min(seconds), seconds[0], peak_mib


def picks(answers: list[tuple[float, bool]], choices: int) -> list[int]:
    """Return the likeliest choice of each item."""
    values = [value for value, _ in answers]
    items = (values[at : at + choices] for at in range(0, len(values), choices))
    return [item.index(max(item)) for item in items]


def row(work: str, stock: Timed, ours: Timed, equal: float) -> dict[str, Any]:
    """Return one line of the table."""
    return {"work": work, "stock_s": stock[1], "ours_s": ours[1], "ours_first_s": ours[2],
            "ratio": stock[1] / ours[1], "stock_peak_mib": stock[3], "ours_peak_mib": ours[3],
            "equal_pct": 100 * equal}  # fmt: skip


def synthetic(names: tuple[str, ...], generated: int, generated_stock: int) -> Iterator[dict[str, Any]]:
    """Choices and greedy generation; stock finds its batch size itself (``auto``).

    Stock generation is slow: it may be given the first of the requests only, and then seconds are a request's.
    """
    source = model.resolve(model.SHAPE, "cuda")
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(HELD_GIB * 2**30 / whole)
    network = model.load(source.path, PRECISIONS["fp16"], "cuda")
    options: dict[str, Any] = {"pretrained": network, "tokenizer": model.load_tokenizer(source.path)}
    options["max_length"] = 2048  # stock looks for its batch at the full length, and 131,072 tokens fit no batch
    stock, ours = HFLM(batch_size="auto", **options), SharedContextLM(batch_size=8, compiled=True, **options)
    assert ours.shared
    for name, shape in ((name, SHAPES[name]) for name in names if name in SHAPES):
        asked = requests(*shape)
        for lm in (stock, ours):
            lm._loglikelihood_tokens(asked[:64], disable_tqdm=True)  # libraries load their kernels
        mine = timed(lambda asked=asked: ours._loglikelihood_tokens(asked, disable_tqdm=True), 3)
        theirs = timed(lambda asked=asked: stock._loglikelihood_tokens(asked, disable_tqdm=True))
        same = [a == b for a, b in zip(picks(mine[0], shape[2]), picks(theirs[0], shape[2]), strict=True)]
        yield row(f"{name}, {shape[0]} items", theirs, mine, sum(same) / len(same))
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ", k=draw.randint(800, 1000))) for _ in range(generated)]
    asked = [SimpleNamespace(args=(text, {"until": ["\n\n"], "max_gen_toks": 256})) for text in texts]
    if "GSM8K-like" not in names:
        return
    for lm in (stock, ours):
        lm.generate_until(
            [SimpleNamespace(args=(texts[0], {"until": ["\n\n"], "max_gen_toks": 2}))], disable_tqdm=True
        )
    mine = timed(lambda: ours.generate_until(asked, disable_tqdm=True))
    print(f"ours: {len(asked)} requests in {mine[1]:.1f} s", file=sys.stderr, flush=True)
    theirs = timed(lambda: stock.generate_until(asked[:generated_stock], disable_tqdm=True))
    same = [a == b for a, b in zip(mine[0], theirs[0], strict=False)]
    work = f"GSM8K-like, 256 new tokens, a request of {len(asked)} and {generated_stock}"
    a_request = [(answers, seconds / len(answers), first / len(answers), peak)
                 for answers, seconds, first, peak in (theirs, mine)]  # fmt: skip
    yield row(work, *a_request, sum(same) / len(same))


def study(data_dir: Path, tasks: str, names: str, limit: int | None) -> Iterator[dict[str, Any]]:
    """Score real tasks with the embedded model, start to end: stock builds its tasks anew for each precision."""
    with tempfile.TemporaryDirectory() as folder:
        made = Study(model.EMBEDDED, names, folder, data_dir)
        for precision in made.precisions:
            made.checkpoint(precision)
        import lm_eval.evaluator  # noqa: F401  # neither is charged for what both import

        evaluator, total = (
            accuracy.Evaluator(tasks, limit, 8, data_dir, requests=Path(folder) / "requests"),
            [0.0, 0.0],
        )
        for precision in made.precisions:
            network = model.load(made.checkpoint(precision), precision, made.device.kind)

            def score(network: Any = network) -> pd.DataFrame:
                return pd.concat(evaluator.evaluate(network, made.tokenizer, task).items for task in evaluator.tasks)

            mine = timed(score)
            drawn = {name: these for task in evaluator.tasks for name, these in (evaluator.drawn(task) or {}).items()}
            theirs = timed(lambda network=network, drawn=drawn: _stock(network, made.tokenizer, evaluator, drawn))
            keys = ["task", "doc_id", "filter"]
            both = mine[0].merge(theirs[0], on=keys, suffixes=("", "_stock"), validate="one_to_one")
            assert len(both) == len(mine[0]) == len(theirs[0])
            total = [total[0] + theirs[1], total[1] + mine[1]]
            yield row(f"{tasks}, {precision.name}", theirs, mine, float((both.picked == both.picked_stock).mean()))
            del network, score, mine, theirs
        yield {"work": f"{tasks}, all", "stock_s": total[0], "ours_s": total[1], "ratio": total[0] / total[1]}


def _stock(network: Any, tokenizer: Any, evaluator: accuracy.Evaluator, drawn: dict[str, list[int]]) -> pd.DataFrame:
    """Evaluate as ``lm_eval --model hf --batch_size auto`` does, on the items that `evaluator` draws."""
    with accuracy._hushed(), model.quiet(), accuracy._only_from(evaluator.data_dir):
        lm = HFLM(pretrained=network, tokenizer=tokenizer, batch_size="auto")
        results = lm_eval.simple_evaluate(lm, tasks=[*evaluator.tasks], samples=drawn or None, bootstrap_iters=0)
    return accuracy._items(results)


def main() -> None:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("synthetic", "study"))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tasks", default="arc_challenge,arc_easy,hellaswag,mmlu")
    parser.add_argument("--precisions", default="study")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--work", default=",".join((*SHAPES, "GSM8K-like")), help="of synthetic")
    parser.add_argument("--generated", type=int, default=512)
    parser.add_argument("--generated-stock", type=int, default=96)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    real = (options.data_dir, options.tasks, options.precisions, options.limit)
    drawn = (tuple(options.work.split(",")), options.generated, options.generated_stock)
    parts = synthetic(*drawn) if options.what == "synthetic" else study(*real)
    rows = []
    for made in parts:
        rows.append(made)
        print(", ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in made.items()), file=sys.stderr, flush=True)  # fmt: skip
        if options.csv:
            pd.DataFrame(rows).round(3).to_csv(options.csv, index=False)
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
