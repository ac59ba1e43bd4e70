"""One HTML page of a study, to send to somebody, and the README's pictures; nothing is fetched or measured.

plotly.js is in it once. What came from a model, a data set or a parameter is text: the template escapes it, Plotly's
JSON escapes it in scripts, and the page forbids itself every address.
"""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from qnb import __version__
from qnb.precision import BASELINE
from qnb.report import export, paper
from qnb.report import figures as figure
from qnb.report import findings as summary
from qnb.report import theme as look
from qnb.report.results import Results, reference
from qnb.report.tables import MAIN, grid, knees

TEMPLATE = Path(__file__).parents[1] / "data" / "report.html"
# section: title, words, tables (the paper's by number) with their captions, figures with how to read them
SECTIONS: dict[str, tuple[str, str, dict[int | str, str], dict[str, str]]] = {
    "accuracy": (
        "Accuracy",
        "What the lost bits cost. A change is real when the same questions, put to both precisions, show it.",
        {
            1: "Table 1: accuracy in percent, with one standard error in points",
            2: "Table 2: change against BF16",
            "divergence": "Perplexity, and how far the next token's probabilities are from BF16's (95 % intervals)",
        },
        {
            "fig1_accuracy": "Bars are one standard error of each precision alone. For differences see the next one.",
            "forest": "Left of the line is a loss. An interval that crosses it is no proof of a change, nor of none.",
            "fig2_change": "The paper's way to show a change: relative to BF16's accuracy, without an interval.",
        },
    ),
    "bs1": (
        "One request at a time",
        "What they buy for a single user. Each token waits until all weights are read, or Python launched the step.",
        {3: "Table 3: batch size 1"},
        {
            "fig3_bs1_metrics": "Each panel has its own unit. Published bars are a T4's.",
            "fig4_bs1_heatmap": "Shades compare precisions within a column; the numbers are the values.",
            "token_time": "A long hatched part is a GPU that waits: the ranking is then the harness's.",
        },
    ),
    "maxbatch": (
        "The largest batch",
        "What the freed memory buys, where rows share the reading of the weights.",
        {
            4: "Table 4: largest batch",
            "knees": "The sweep: where throughput a second of latency is most, and what the largest size gives",
        },
        {
            "fig5_maxbatch_metrics": "Each panel has its own unit. Published bars are a T4's.",
            "fig6_maxbatch_heatmap": "Shades compare precisions within a column; the numbers are the values.",
            "sweep": "Where a line bends, at its ring, rows stop being free. A line without one had not bent yet.",
        },
    ),
    "tradeoff": (
        "What is lost against what is gained",
        "A precision on the dotted line is beaten by no other in both. Overlapping intervals leave that open.",
        {},
        {
            "front_memory": "Up and left is better.",
            "front_tpot": "Up and left is better; one engine's points are compared with its own first.",
        },
    ),
    "cost": (
        "Where memory, time and energy go",
        "Bytes, arithmetic and joules of a step, beside what the device can do.",
        {},
        {
            "roofline": "Far below both lines a step waits for something that is neither memory nor arithmetic.",
            "memory": "Quantization shrinks the first part only; the cache stays in 16 bit.",
            "energy": "The idle share is what the device would have drawn anyway in that time.",
            "timeline_bs1": "Utilization counts moments with any kernel running, not how much of the device worked.",
            "timeline_maxbatch": "The same at the largest batch; a line ends with its engine's marker.",
        },
    ),
}
GALLERY = ("fig1_accuracy", "forest", "fig3_bs1_metrics", "fig5_maxbatch_metrics", "front_memory", "front_tpot",
           "sweep", "roofline", "token_time", "memory", "energy")  # fmt: skip
MOST_NAMED = 12  # rows of a flag
LIMITS = (
    "The published columns are Llama-3.2-1B's, on the paper's own hardware.",
    "LLM.int8 picks its outlier columns over a whole batch, so its scores move a little with the batch size.",
    "Speeds are of this device, these library versions and these prompts.",
)


def gallery(folder: Path) -> tuple[list[Path], str]:
    """Draw the README's pictures from the tables kept in `folder`, into ``folder/gallery/<study>/``.

    Returns
    -------
    tuple
        The pictures that are there, and what kept others from being drawn.
    """
    made, problems = [], []
    for name, kept in reference(folder).items():
        drawn = figure.draw_all(kept)
        wanted = {key: drawn[key] for key in GALLERY if not look.is_empty(drawn[key])}
        problems.append(export.pictures(wanted, folder / "gallery" / name, ("png",), of=kept.of))
        if not problems[-1]:
            made += [folder / "gallery" / name / f"{key}.png" for key in wanted]
    return sorted(made), next(filter(None, problems), "")


def page(results: Results, ledger: Path | None = None) -> str:
    """Return the report as one HTML text.

    Parameters
    ----------
    results
        A study's frames.
    ledger
        The file they were read from, for the provenance.
    """
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    drawn = figure.draw_all(results)
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    stamps = sorted(str(row["measured_at"])[:10] for row in results.rows if row.get("measured_at"))
    return template.render(
        results=results,
        plotly=get_plotlyjs(),
        measured=" to ".join(dict.fromkeys((stamps[0], stamps[-1]))) if stamps else "",
        opening=summary.opening(results),
        summary=summary.findings(results),
        sections=[_section(name, results, drawn) for name in SECTIONS],
        card=card(results),
        findings=paper.audit(),
        provenance=_provenance(results, ledger),
        limits=limits(results),
    )


def _section(name: str, results: Results, drawn: dict[str, go.Figure]) -> dict[str, Any]:
    title, words, tables, figures = SECTIONS[name]
    shown = [key for key in figures if not look.is_empty(drawn[key])]
    frames: dict[Any, pd.DataFrame] = {
        **results.tables,
        "divergence": results.divergence,
        "knees": knees(results.sweep),
    }
    for number in (3, 4):  # results before settings: a table is wider than most windows
        frame = frames[number]
        frames[number] = pd.concat([frame.filter(MAIN), frame.drop(columns=list(MAIN), errors="ignore")], axis=1)
    return {
        "id": name,
        "title": title,
        "words": words,
        "tables": [grid(frames[key], text) for key, text in tables.items() if len(frames[key])],
        "figures": [
            {"html": _html(drawn[key], key), "title": look.title(drawn[key]), "how": figures[key]} for key in shown
        ],
        "missing": list(dict.fromkeys(look.title(drawn[key]) for key in figures if key not in shown)),
    }


def _html(drawn: go.Figure, name: str) -> str:
    return drawn.to_html(include_plotlyjs=False, full_html=False, div_id=name, config={"responsive": True})


def card(results: Results) -> dict[str, str]:
    """Return what was measured, on what and with what, as the rows say it."""
    facts: dict[str, Counter[str]] = {}
    for row in results.rows:
        known = {
            "model": row.get("model"),
            "why this one": row.get("picked"),
            "device": row.get("device"),
            "bfloat16": row.get("bf16"),
            "versions": ", ".join(f"{name} {version}" for name, version in (row.get("versions") or {}).items()),
        }
        for name, value in known.items():
            if value:
                facts.setdefault(name, Counter())[str(value)] += 1
    shown = {name: "; ".join(f"{value}" for value, _ in values.most_common()) for name, values in facts.items()}
    stages = Counter(str(row["stage"]) for row in results.rows)
    return {**shown, "measured": ", ".join(f"{count} {stage} rows" for stage, count in stages.items()) or "nothing"}


def _provenance(results: Results, ledger: Path | None) -> dict[str, str]:
    stamps = sorted(str(row["measured_at"]) for row in results.rows if row.get("measured_at"))
    weights = results.checkpoints.get("fingerprint", pd.Series(dtype=str))
    facts = {
        "rows": f"{len(results.rows)}, the newest of each key",
        "measured": f"{stamps[0]} to {stamps[-1]}" if stamps else "",
        "checkpoint rows": ", ".join(map(str, weights)),
        "written by": f"qnb {__version__}",
    }
    if ledger is not None and ledger.exists():
        facts["ledger"] = f"{ledger.name}, sha256 {sha256(ledger.read_bytes()).hexdigest()}"
    return {name: fact for name, fact in facts.items() if fact}


def limits(results: Results) -> list[str]:
    """Return what these numbers do not say: what the rows themselves flag, then what always holds."""
    found = []
    speed = results.speed
    if "repeats" in speed and (once := speed[(speed.repeats < 2) & (speed.setting != "sweep")]).size:
        names = sorted({summary.SETTINGS[name] for name in once.setting})
        found.append(f"One pass only, so no spread is known: {', '.join(names)}.")
    if len(swept := results.sweep) and (apart := (swept.throughput_spread_pct > 20).sum()):
        found.append(
            f"In {apart} of the sweep's {len(swept)} rows its fastest batch was over 20 % faster than its slowest."
        )
    if len(speed) and ("peak_reserved_mib" not in speed or speed.peak_reserved_mib.isna().any()):
        found.append(
            "Memory is how far a process grew, which hangs on what it ran before: trust the weights' or a GPU's."
        )
    flagged: dict[str, dict[str, None]] = {}  # a set in order: batch size 1 and the largest may be in a sweep too
    for row in speed.to_dict("records"):
        for flag in row["flags"] if isinstance(row.get("flags"), list) else ():
            name = f"{row['precision']}, {row['engine']}, batch {row['batch_size']}"
            flagged.setdefault(str(flag), {})[name] = None
    for flag, rows in flagged.items():
        more = f"; and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else ""
        found.append(f"{'; '.join(list(rows)[:MOST_NAMED])}{more}: {flag}.")
    for row in results.failures:
        what = ", ".join(str(row[key]) for key in ("precision", "engine", "setting", "task") if row.get(key))
        found.append(f"Could not be measured: {what} ({row['reason']}).")
    notes = dict.fromkeys(
        f"{row.get('precision')}, {row.get('engine')}: {row['note']}." for row in results.rows if row.get("note")
    )
    capped = [str(row["precision"]) for row in results.rows if row["stage"] == "batch" and row.get("capped")]
    if capped:
        found.append(
            f"The search for the largest batch ended at its cap, not at the memory's end: {', '.join(capped)}."
        )
    if any(row.get("bf16") == "emulated" for row in results.rows):
        found.append("BF16 was emulated: the device has no units for it, and runs it slower than it would with them.")
    if len(results.scores) and BASELINE not in set(results.scores.precision):
        found.append(f"{BASELINE} was not asked, so there is no change in accuracy to show; add it to the precisions.")
    if len(results.scores):
        asked = results.scores[results.scores.task == results.scores.asked].drop_duplicates(["task", "items"])
        part = asked[asked["items"] < asked["of"].astype(float)]
        told = [f"{row.task} {row['items']:,} of {row['of']:,.0f}" for _, row in part.iterrows()]
        if told:
            found.append(f"Accuracy is of a sample of the items: {', '.join(told)}.")
    devices = {row.get("device") for row in results.rows if row.get("device")}
    if len(devices) > 1:
        found.append(f"Rows come from {len(devices)} devices; speeds are comparable only within one.")
    if results.scores.empty:
        found.append("No accuracy was measured, so nothing here says what quantization costs.")
    return [*found, *notes, *LIMITS]
