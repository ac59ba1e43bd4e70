"""A checkpoint's README for the hub: what it is, what it scored, with a ``model-index`` that the hub reads.

Cards lie beside the checkpoints, never in them: a checkpoint is sealed by its manifest. Whoever pushes one uploads
its card as the repository's README.md.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from qnb import __version__
from qnb.precision import BASELINE, Precision
from qnb.quantize.checkpoint import EMBEDDED, SHAPE
from qnb.report import findings as summary
from qnb.report import theme as look
from qnb.report.results import Results
from qnb.report.tables import headline, markdown

BASES = {EMBEDDED: "HuggingFaceTB/SmolLM2-135M-Instruct"}
# task: the hub's data set, configuration, split that lm-eval asks
DATASETS = {
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "mmlu": ("cais/mmlu", "all", "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "gsm8k_cot": ("openai/gsm8k", "main", "test"),
}
CARD = """# {title}

{model} converted to **{precision}** with [bitsandbytes](https://github.com/bitsandbytes-foundation/bitsandbytes):
{meaning}; {bits} stored bits a quantized weight.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

repository = "this repository's name"
model = AutoModelForCausalLM.from_pretrained(repository, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(repository)
```

## What it costs, and what it gives

{finding}

{accuracy}
## How it was measured

On {device}, with qnb {version} and lm-evaluation-harness. Accuracy is `acc`, or strict `exact_match`, at each task's
default shots; changes are paired item by item with a bootstrap interval of 95 % and McNemar's exact test, corrected
after Holm. Speeds hold for that device and those library versions.
"""


def write(results: Results, precision: Precision, folder: Path) -> Path:
    """Write a precision's card to ``folder/<precision>/README.md`` and return its path."""
    path = folder / precision.name / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(card(results, precision), encoding="utf-8")
    return path


def card(results: Results, precision: Precision) -> str:
    """Return a precision's card as Markdown with its YAML head."""
    from huggingface_hub import ModelCardData

    base = BASES.get(results.model, results.model)
    fetched = re.fullmatch(r"([\w.-]+/[\w.-]+)@(.+)", base, re.ASCII)  # as a model of the hub is called
    base, revision = fetched.groups() if fetched else (base, "")
    title = f"{base.rsplit('/', 1)[-1]}-{precision.name}"
    told = f"{base} (commit {revision})" if revision else base
    if results.model == SHAPE:
        told += ", which has random weights and is for speed and memory alone,"
    head = ModelCardData(
        model_name=title,
        base_model=base if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base, re.ASCII) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["qnb", precision.name, *(["bitsandbytes"] if precision.quantized else [])],
        eval_results=_scores(results, precision) or None,
    )
    finding = " ".join(summary.about(results, precision.name))
    if precision.name == BASELINE:
        finding = "It is the baseline the others are compared with."
    body = CARD.format(
        title=escape(title),
        model=escape(told),
        precision=precision.name,
        meaning=precision.meaning,
        bits=precision.bits,
        finding=escape(finding, quote=False) or "Nothing was measured yet.",
        accuracy=_table(results, precision),
        device=escape(results.device) or "a device that was not recorded",
        version=__version__,
    )
    return f"---\n{head.to_yaml()}\n---\n\n{body}"


def _scores(results: Results, precision: Precision) -> list:
    """Return a precision's scores as the hub's evaluation results."""
    from huggingface_hub import EvalResult

    if results.scores.empty:
        return []
    frame = headline(results.scores)
    frame = frame[(frame.precision == precision.name) & (frame.task == frame.asked) & (frame.metric != "mean")]
    found = []
    for row in frame.to_dict("records"):
        dataset, config, split = DATASETS.get(row["task"], (row["task"], None, None))
        found.append(
            EvalResult(
                task_type="text-generation", task_name=look.name(row["task"]), dataset_name=look.name(row["task"]),
                dataset_type=dataset, dataset_config=config, dataset_split=split, metric_type=row["metric"],
                metric_name=f"{row['metric']}, {row['items']:,} items", metric_value=round(float(row["value"]), 6),
            )
        )  # fmt: skip
    return found


def _table(results: Results, precision: Precision) -> str:
    """Return accuracy with BF16's beside it; empty where none was measured."""
    rows = results.tables[2]
    if rows.empty or "change_pp" not in rows or precision.name == BASELINE:
        return ""
    rows = rows[rows.precision == precision.name].dropna(subset=["change_pp"])
    wanted = ["task", "items", "baseline_pct", "accuracy_pct", "change_pp", "low_pp", "high_pp", "p_holm"]
    named = {"baseline_pct": f"{BASELINE}_pct", "accuracy_pct": f"{precision.name}_pct"}
    return markdown(rows[[name for name in wanted if name in rows]].rename(columns=named)) + "\n"
