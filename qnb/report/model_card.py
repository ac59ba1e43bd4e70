"""A checkpoint's README for the hub: what it is and what it scored, with the results that the hub reads.

Cards lie beside the checkpoints, never in them. Whoever pushes a checkpoint uploads its card as README.md.
"""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from qnb import __version__
from qnb.columns import format_value
from qnb.precision import BASELINE, Precision
from qnb.report.accuracy import headline
from qnb.report.findings import about
from qnb.report.results import Results, task_name
from qnb.report.tables import build, markdown
from qnb.report.verdicts import judge

TEMPLATE = Path(__file__).parents[1] / "data" / "model_card.md"
BASES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # the embedded model's name on the hub
DATASETS = {  # task: the hub's data set and configuration that lm-eval asks
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"), "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "hellaswag": ("Rowan/hellaswag", None), "mmlu": ("cais/mmlu", "all"),
    "gsm8k": ("openai/gsm8k", "main"), "gsm8k_cot": ("openai/gsm8k", "main"),
}  # fmt: skip
COLUMNS = ["task", "n_items", "baseline_pct", "accuracy_pct", "change_pp", "low_pp", "high_pp", "p_holm"]


def card(results: Results, precision: Precision) -> str:
    """Return a format's card as Markdown with its YAML head."""
    model, _, revision = BASES.get(results.model, results.model).partition("@")
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model, re.ASCII) is not None
    rows, verdicts = results.checkpoints.to_dict("records"), judge(results).words
    stored = next((row for row in rows if row["precision"] == precision.name), None) or {}
    precision = precision.in_half(stored.get("dtype", precision.dtype))
    title = f"{model.rsplit('/', 1)[-1]}-{precision.checkpoint}"
    head = ModelCardData(
        model_name=title, base_model=model if is_hub_name else None, library_name="transformers",
        pipeline_tag="text-generation", tags=["qnb", precision.name, *([precision.library] * precision.quantized)],
        eval_results=_scores(results, precision.name) or None,
    )  # fmt: skip
    changes = build(results, "table2_change")
    changes = changes[changes.precision == precision.name].dropna(subset=["change_pp"])
    return str(
        ModelCard.from_template(
            head, str(TEMPLATE), title=title, model=model, revision=revision, precision=precision, version=__version__,
            baseline=BASELINE, device=results.device, verdict=verdicts.get(precision.name), shown=format_value,
            stored=stored, sentences=about(results, precision.name),
            accuracy=markdown(changes[COLUMNS]) if len(changes) else "",
        )
    )  # fmt: skip


def _scores(results: Results, precision: str) -> list[EvalResult]:
    """Return a format's scores as the hub's evaluation results."""
    scores = []
    for row in headline(results.scores).to_dict("records"):
        if row["precision"] == precision and row["task"] == row["asked"] and row["metric"] != "mean":
            name, (dataset, config) = task_name(row["task"]), DATASETS.get(row["task"], (row["task"], None))
            scores.append(
                EvalResult(
                    "text-generation", dataset, name, row["metric"], round(row["value"], 6), task_name=name,
                    dataset_config=config, metric_name=f"{row['metric']}, {row['n_items']:,.0f} items",
                )
            )  # fmt: skip
    return scores
