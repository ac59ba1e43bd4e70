"""One HTML page of a study, to send to somebody, and what it found as Markdown; nothing is fetched or measured.

plotly.js is in the page once. What came from a model, a data set or a parameter is text: the template escapes it,
Plotly's JSON escapes it in scripts, and the page forbids itself every address.
"""

from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs

from qnb import __version__
from qnb.columns import header
from qnb.flags import flag_text
from qnb.ledger import PLANS, file_sha256, write_atomic
from qnb.precision import BASELINE, PRECISIONS, title
from qnb.report import findings, model_card, paper, recommend, theme, verdicts
from qnb.report.figures import SIGNS, draw_all
from qnb.report.findings import SETTINGS
from qnb.report.results import Results, task_name
from qnb.report.tables import CHECKPOINTS, TABLES, as_text, build, compact, knees, labelled, markdown, members, save

CARD = {"model": "model", "model_reason": "why this one", "device": "device", "bf16": "bfloat16"}


def write(results: Results) -> Path:
    """Write a study's tables, model cards, FINDINGS.md and ``report.html`` into its folder; return the page's path."""
    assert results.folder is not None, "a study that was read has a folder"
    for name in TABLES:
        save(results, name)
    for precision in (PRECISIONS[name] for name in results.checkpoints.get("precision", ())):
        if not precision.origin:
            path = results.folder / "cards" / precision.name / "README.md"
            write_atomic(path, model_card.card(results, precision))
    write_atomic(results.folder / "FINDINGS.md", text(results))
    path = results.folder / "report.html"
    write_atomic(path, page(results))
    return path


def text(results: Results) -> str:
    """Return the answer and every finding as Markdown."""
    notes = [f"- {note}" for note in (*verdicts.notes(results), *limits(results))]
    formats = [
        "\n".join([f"## {title(name)}\n", *(f"- {line}" for line in lines)])
        for name, lines in findings.findings(results).items()
    ]
    answer = markdown(_summary(recommend.summary(results)))
    said = filter(None, (recommend.sentence(results), recommend.advice(results)))
    opening = [f"# {results.label}", *said, answer, "\n".join(notes)]
    commands = dict.fromkeys(row["command"] for row in results.rows if row.get("command"))
    source = [f"Computed from {_ledger(results)}. Measured by", "\n".join(f"- `{each}`" for each in commands)]
    return "\n\n".join([*opening, *formats, *source]) + "\n"


def page(results: Results) -> str:
    """Return the report as one HTML text."""
    templates = Environment(loader=PackageLoader("qnb", "data"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    summary, swept = recommend.summary(results), knees(results.sweep)
    return templates.get_template("report.html").render(
        results=results, baseline=BASELINE, formats=PRECISIONS, plotly=get_plotlyjs(), caption=theme.caption,
        config=theme.CONFIG, sentence=recommend.sentence(results), advice=recommend.advice(results),
        summary=_summary(summary), verdicts=list(summary.verdict), ran_as=dict(_ran_as(results.checkpoints)),
        notes=verdicts.notes(results), findings=findings.findings(results), figures=draw_all(results),
        knees=labelled(swept.drop(columns="flags")), build=build, compact=compact,
        groups={task_name(task): task for task in members(results)}, b64encode=b64encode, card=card(results),
        all_columns=all_columns, audit=paper.audit(), limits=limits(results), checkpoints=checkpoints(results),
    )  # fmt: skip


def _summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the answer as text: a change with its interval, a verdict with its sign; no column that is empty."""
    rows = list(frame.itertuples())
    change = [f"{row.change_pp:+.1f} [{row.low_pp:+.2f}, {row.high_pp:+.2f}]" for row in rows]
    has_change = frame.change_pp.notna() & (frame.precision != BASELINE)
    decided = has_change.any() and not frame.verdict.eq(verdicts.Verdict.UNCLEAR).any()
    spare = {"weights_mib": frame.peak_memory_mib.notna().any(), "kl_mean_nats": decided}  # another column tells it
    frame = frame.assign(
        change_pp=pd.Series(change, dtype=object).where(has_change),
        words=[f"{SIGNS[row.verdict]} {row.words}" for row in rows],
    )  # fmt: skip
    hidden = {"low_pp", "high_pp", "verdict", "words", "ran_as", *(name for name in spare if spare[name])}
    text = labelled(frame[[*(name for name in frame if name not in hidden), "words"]])
    return text.rename(columns={header("throughput_rps"): f"{header('throughput_rps')} at {SETTINGS['maxbatch']}"})


def _ran_as(frame: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Yield how each format ran whose library decides; of a checkpoint that was unpacked, what its file takes."""
    frame = frame.reindex(columns=["precision", "ran_as", "is_unpacked", "file_mib"]).dropna(subset="ran_as")
    for row in frame.itertuples():
        speed = f", so it has no speed of its own; its file takes {row.file_mib:,.1f} MiB"
        yield row.precision, row.ran_as + speed * (row.is_unpacked is True)


def checkpoints(results: Results) -> pd.DataFrame:
    """Return what each checkpoint holds, and the share of the weights that was left out of quantization by reason."""
    frame = results.checkpoints
    if frame.empty:
        return frame
    left_out = [
        [f"{why} {100 * count / row['parameters']:.0f} %" for why, count in (row.get("left_out") or {}).items()]
        for row in frame.to_dict("records")
    ]
    return labelled(frame.assign(left_out=left_out), [*CHECKPOINTS, "dtype", "left_out"])


def all_columns(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return all columns by engine or task, with formats across and quantities down; Table 1 as it is."""
    if "precision" not in frame:
        return {"": as_text(frame).rename(columns=header)}
    by = [name for name in ("engine", "task") if name in frame]
    parts = frame.groupby(by[0], sort=False) if by else [("", frame)] * (len(frame) > 0)
    texts = {task_name(str(title)): as_text(rows.drop(columns=by)).set_index("precision").T for title, rows in parts}
    return {title: text.rename(index=header).rename_axis(None).reset_index(names="") for title, text in texts.items()}


def card(results: Results) -> dict[str, str]:
    """Return what was measured, on what and with what, and which file holds it, as the rows say."""
    rows = pd.DataFrame(results.rows, columns=["stage", "versions", "measured_at", *CARD])
    facts: dict[str, Iterable[str]] = {words: rows[name].dropna() for name, words in CARD.items()}
    facts["versions"] = [", ".join(map(" ".join, versions.items())) for versions in rows.versions.dropna()]
    facts["measured"] = sorted(when[:10] for when in rows.measured_at.dropna())
    facts["rows"] = [f"{count} {stage}" for stage, count in Counter(rows.stage).items() if stage not in PLANS]
    facts["checkpoints"] = results.checkpoints.get("fingerprint", [])
    facts["made elsewhere"] = [
        f"{name}: {PRECISIONS[name].origin}" for name in results.precisions if PRECISIONS[name].origin
    ]
    facts["written by"] = [f"qnb {__version__}"]
    facts["ledger"] = [_ledger(results)]
    texts = {words: "; ".join(dict.fromkeys(str(each) for each in values if each)) for words, values in facts.items()}
    return {words: text for words, text in texts.items() if text}


def _ledger(results: Results) -> str:
    ledger = results.folder / "ledger.jsonl" if results.folder else None
    return f"{ledger.name}, sha256 {file_sha256(ledger)}" if ledger and ledger.exists() else ""


def limits(results: Results) -> list[str]:
    """Return what these numbers do not say: flags with their counts, samples, and what could not be measured."""
    speed, scores, lines = results.speed, results.scores, []
    for flag, count in Counter(flag for flags in speed["flags"] for flag in dict.fromkeys(flags)).most_common():
        words = flag_text([flag])
        lines.append(f"{words[:1].upper()}{words[1:]}: {count} of {len(speed)} timed rows.")
    for name, words in SETTINGS.items():
        timed = results.timed(name)
        if single := int((timed.passes < 2).sum()):
            lines.append(f"One pass only, so no range is known: {single} of {len(timed)} rows at {words}.")
    if len(scores):
        whole = scores[scores.task == scores.asked].drop_duplicates("task")
        part = whole[whole.n_items < whole.n_total.astype(float)]
        asked = [f"{task_name(row.task)} {row.n_items:,.0f} of {row.n_total:,.0f}" for row in part.itertuples()]
        lines += [f"Only a sample of the items was asked: {', '.join(asked)}."] if asked else []
    for row in results.rows:
        if row.get("bad_items"):
            what = f"{title(row['precision'])} on {task_name(row['task'])}: {row['bad_items']}"
            lines.append(f"Items left out of the score, since they could not be asked or judged: {what}.")
    lines += [f"Could not be measured: {what} ({reason})." for what, reason in _by_text(results.failures, "reason")]
    return lines + [f"{what}: {note}." for what, note in _by_text(results.rows, "note")]


def _by_text(rows: Iterable[Mapping[str, Any]], name: str) -> list[tuple[str, str]]:
    """Return each text in column `name` once, after what all its rows are about."""
    about: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.get(name):
            what = " ".join(str(row[key]) for key in ("precision", "engine", "setting", "task") if row.get(key))
            about.setdefault(str(row[name]), {})[what] = None
    return [(", ".join(names), text) for text, names in about.items()]
