"""One HTML page of a study, to send to somebody, and the README's pictures; nothing is fetched or measured.

plotly.js is in the page once. What came from a model, a data set or a parameter is text: the template escapes it,
Plotly's JSON escapes it in scripts, and the page forbids itself every address.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from qnb import __version__
from qnb.columns import flag_text, header
from qnb.ledger import file_sha256, write_atomic
from qnb.precision import BASELINE, PRECISIONS
from qnb.report import export, findings, model_card, paper, theme
from qnb.report.figures import FIGURES, draw_all
from qnb.report.results import Results, read_reference
from qnb.report.tables import SPEED_MAIN, TABLES, as_text, build, knees, save

TEMPLATE = Path(__file__).parents[1] / "data" / "report.html"
SHOWN = ("table1_accuracy", "table2_change", "divergence", "table3_bs1", "table4_maxbatch")
GALLERY = ("fig1_accuracy", "forest", "fig3_bs1_metrics", "fig5_maxbatch_metrics", "front_memory", "front_tpot",
           "sweep", "roofline", "token_time", "memory", "energy")  # fmt: skip
CARD = {"model": "model", "model_reason": "why this one", "device": "device", "bf16": "bfloat16"}


def gallery(folder: Path) -> tuple[list[Path], str]:
    """Draw the README's pictures of the studies kept in `folder`, into ``folder/gallery/<study>/``.

    Returns
    -------
    tuple
        The pictures that were drawn, and what kept others from being drawn.
    """
    paths, problems = [], []
    for name, results in read_reference(folder).items():
        figures = {key: FIGURES[key](results) for key in GALLERY}
        figures = {key: figure for key, figure in figures.items() if not theme.is_empty(figure)}
        problems.append(export.pictures(figures, folder / "gallery" / name, ("png",), results.label))
        if not problems[-1]:
            paths += [folder / "gallery" / name / f"{key}.png" for key in figures]
    return sorted(paths), next(filter(None, problems), "")


def write(results: Results) -> Path:
    """Write a study's tables, model cards and ``report.html`` into its folder; return the page's path."""
    assert results.folder is not None, "a study of kept tables has no folder"
    for name in TABLES:
        save(results, name)
    for name in results.checkpoints.get("precision", ()):
        model_card.write(results, PRECISIONS[name], results.folder / "cards")
    path = results.folder / "report.html"
    write_atomic(path, page(results))
    return path


def page(results: Results) -> str:
    """Return the report as one HTML text."""
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    return template.render(
        results=results,
        plotly=get_plotlyjs(),
        opening=findings.opening(results),
        findings=findings.findings(results),
        tables=_tables(results),
        figures=_figures(results),
        header=header,
        card=card(results),
        audit=paper.audit(),
        limits=limits(results),
    )


def _tables(results: Results) -> dict[str, pd.DataFrame]:
    """Return the page's tables as text, what people compare first, published values beside the same model only."""
    frames = {name: build(results, name) for name in SHOWN} | {"knees": knees(results.sweep)}
    if not paper.is_published_model(results.model):
        frames = {name: frame.filter(regex="^(?!published_)") for name, frame in frames.items()}
    for name in ("table3_bs1", "table4_maxbatch"):
        frames[name] = frames[name][sorted(frames[name], key=lambda column: column not in SPEED_MAIN)]
    return {name: as_text(frame) for name, frame in frames.items()}


def _figures(results: Results) -> dict[str, dict[str, str]]:
    """Return each figure's caption and, where it draws something, its HTML."""
    return {
        name: {
            "caption": theme.caption(figure),
            "html": "" if theme.is_empty(figure) else figure.to_html(
                include_plotlyjs=False, full_html=False, div_id=name, config={"responsive": True}
            ),
        }
        for name, figure in draw_all(results).items()
    }  # fmt: skip


def card(results: Results) -> dict[str, str]:
    """Return what was measured, on what and with what, and which file holds it, as the rows say."""
    rows = pd.DataFrame(results.rows, columns=["stage", "versions", "measured_at", *CARD])
    facts: dict[str, Iterable[str]] = {words: rows[name].dropna() for name, words in CARD.items()}
    facts["versions"] = rows.versions.dropna().map(lambda versions: ", ".join(map(" ".join, versions.items())))
    facts["measured"] = rows.measured_at.dropna().str[:10].sort_values()
    facts["rows"] = [f"{count} {stage}" for stage, count in rows.stage.value_counts(sort=False).items()]
    facts["checkpoints"] = results.checkpoints.get("fingerprint", [])
    facts["written by"] = [f"qnb {__version__}"]
    if results.folder and (ledger := results.folder / "ledger.jsonl").exists():
        facts["ledger"] = [f"{ledger.name}, sha256 {file_sha256(ledger)}"]
    texts = {words: "; ".join(dict.fromkeys(str(each) for each in values if each)) for words, values in facts.items()}
    return {words: text for words, text in texts.items() if text}


def limits(results: Results) -> list[str]:
    """Return what these numbers do not say: a line per kind of flag with its count, then what always holds."""
    speed, lines = results.speed, []
    for flag, count in Counter(flag for flags in speed["flags"] for flag in set(flags)).most_common():
        words = flag_text([flag])
        lines.append(f"{words[:1].upper()}{words[1:]}: {count} of {len(speed)} timed rows.")
    single = [words for name, words in findings.SETTINGS.items() if (results.timed(name).passes < 2).any()]
    if single:
        lines.append(f"One pass only, so no spread is known: {' and '.join(single)}.")
    if speed.peak_reserved_mib.isna().any():
        lines.append("Without a GPU's allocator, memory is how far the process grew: compare the weights instead.")
    lines += [f"Could not be measured: {what} ({reason})." for what, reason in _by_text(results.failures, "reason")]
    lines += [f"{what}: {note}." for what, note in _by_text(results.rows, "note")]
    return [*lines, *_accuracy_limits(results.scores)]


def _accuracy_limits(scores: pd.DataFrame) -> list[str]:
    if scores.empty:
        return ["No accuracy was measured, so nothing here says what quantization costs."]
    lines = ["LLM.int8 picks its outlier columns over a whole batch: its scores move a little with the batch size."]
    if BASELINE not in set(scores.precision):
        lines.append(f"{BASELINE} was not measured, so no change in accuracy is known; add it to the formats.")
    whole = scores[scores.task == scores.asked].drop_duplicates("task")
    part = whole[whole.n_items < whole.n_total.astype(float)]
    if len(part):
        lines.append(f"Accuracy is of a sample: {part.n_items.sum():,.0f} of {part.n_total.sum():,.0f} items.")
    return lines


def _by_text(rows: Iterable[Mapping[str, Any]], name: str) -> list[tuple[str, str]]:
    """Return each text in column `name` once, after what all its rows are about."""
    about: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.get(name):
            what = " ".join(str(row[key]) for key in ("precision", "engine", "setting", "task") if row.get(key))
            about.setdefault(str(row[name]), {})[what] = None
    return [(", ".join(names), text) for text, names in about.items()]
