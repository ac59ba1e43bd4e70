"""One decision per format, over all tasks: how much accuracy does it lose against the baseline?

The pooled change is the mean of the tasks' changes, each weighing the same. Tasks on which the baseline cannot be told
from guessing are left out: they cannot show a loss. With the 95 % interval (low, high) and a margin M, low > -M is
*within M points*, also where a small loss is real; high < -M *loses more than M*; anything else *cannot tell*.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from qnb.accuracy.statistics import detectable_pp, is_above_chance, pooled_change
from qnb.columns import format_number
from qnb.errors import InputError
from qnb.flags import Described
from qnb.options import is_number
from qnb.precision import BASELINE, PRECISIONS, title
from qnb.report.accuracy import MEAN, changes, headline
from qnb.report.results import Results, stack, task_name

POOLED = "pooled change"
FLIP_RATE = 0.1  # of items that a format is assumed to answer rightly where the baseline does not, or the reverse
CHANGE = ("change_pp", "low_pp", "high_pp")
FILED = ("weights_mib", "quantized_pct", "ran_as")  # what is known of a format's checkpoint
DIVERGED = ("perplexity_change_pct", "kl_mean_nats")
MOST_ITEMS = 1_000_000  # that are worth naming as enough to decide
LEAST_QUANTIZED_PCT = 50  # of the weights; a format that changed fewer says so in the verdict's place


class Verdict(Described):
    """What a study knows of a format's loss, with the sign that stands beside the words."""

    BASELINE = "baseline", "○"
    WITHIN = "within", "✓"
    LOSES = "loses", "✗"
    UNCLEAR = "unclear", "?"
    UNMEASURED = "unmeasured", "–"
    BARELY_QUANTIZED = "barely_quantized", "!"


def check_margin(margin_pp: float) -> None:
    """Refuse a margin that is no number of points above 0.

    Raises
    ------
    InputError
        `margin_pp` is no such number.
    """
    if not (is_number(margin_pp) and 0 < margin_pp < 100):
        raise InputError(f"margin_pp is {margin_pp!r}; give the loss in points that you accept, such as 1")


def tasks(results: Results) -> list[str]:
    """Return what a verdict can rest on: the mean over tasks first; none where no accuracy was measured."""
    shown = headline(results.scores)
    return [MEAN, *shown.asked[shown.task == shown.asked].unique()] if len(shown) else []


def at_chance(results: Results) -> list[str]:
    """Return the tasks on which the baseline cannot be told from guessing."""
    return [
        row.task for row in _answers(results).drop_duplicates("task").itertuples()
        if not is_above_chance(row.baseline_pct / 100, row.n_items, row.chance_pct / 100)
    ]  # fmt: skip


def accuracies(results: Results, task: str = MEAN) -> pd.DataFrame:
    """Return accuracy, items, and the change against the baseline with its 95 % interval; a row a format.

    Parameters
    ----------
    results
        A study's frames.
    task
        A task; `MEAN` is the mean over the tasks that count, each weighing the same.

    Returns
    -------
    pandas.DataFrame
        Made once a study. Do not write into it.
    """
    return results.once(f"accuracies of {task}", lambda: _accuracies(results, task))


def _accuracies(results: Results, task: str) -> pd.DataFrame:
    columns = ["accuracy_pct", "n_items", *CHANGE]
    if results.scores.empty:
        return pd.DataFrame(columns=columns, dtype=float)
    shown = headline(results.scores)
    shown = shown[(shown.asked if task == MEAN else shown.task) == task].drop_duplicates("precision")
    frame = shown.assign(accuracy_pct=100 * shown.value).set_index("precision").reindex(columns=columns)
    frame = _changes(results, task).combine_first(frame.astype(float))
    frame.loc[frame.index == BASELINE, list(CHANGE)] = 0.0
    return frame.reindex(columns=columns, index=[name for name in PRECISIONS if name in frame.index])


def _changes(results: Results, task: str) -> pd.DataFrame:
    """Return the pooled change of each format, with its accuracy and the baseline's on the same items."""
    rows: dict[str, dict[str, float]] = {}
    for name, answers in _counted(results, task).groupby("precision"):
        estimates = dict(zip(CHANGE, pooled_change(answers.gained, answers.lost, answers.n_items), strict=True))
        items = {"n_items": answers.n_items.sum()}
        rows[BASELINE] = {"accuracy_pct": answers.baseline_pct.mean(), **items}
        rows[str(name)] = {"accuracy_pct": answers.accuracy_pct.mean(), **items, **estimates}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["accuracy_pct", "n_items", *CHANGE], dtype=float)


def _answers(results: Results) -> pd.DataFrame:
    """Return Table 2's rows of tasks that were asked for and compared."""
    answers = changes(results).dropna(subset=["gained", "chance_pct"])
    return answers[answers.task.isin(tasks(results))]


def _counted(results: Results, task: str) -> pd.DataFrame:
    """Return Table 2's rows that the verdict rests on: one task, or all on which the baseline is above chance."""
    answers = _answers(results)
    return answers[answers.task == task] if task != MEAN else answers[~answers.task.isin(at_chance(results))]


def _missing(results: Results, precision: str) -> str:
    """Return why nothing of a format's accuracy is compared."""
    rows = changes(results)
    notes = [note for note in rows.note[rows.precision == precision] if str(note).startswith("not compared")]
    if notes:
        return str(notes[0])
    scored = set(results.scores.get("precision", ()))
    if precision in scored and BASELINE not in scored:
        return f"{BASELINE.upper()}'s accuracy was not measured"
    return f"{BASELINE.upper()} is at chance on every task" if precision in scored else "accuracy was not measured"


def with_pooled(results: Results) -> pd.DataFrame:
    """Return Table 2's rows that were compared, and the change that the verdict rests on in place of the means."""
    rows = changes(results).dropna(subset=["change_pp"])
    rows = rows[~rows.task.astype(str).str.startswith(MEAN)]
    pooled = accuracies(results).drop(index=BASELINE, errors="ignore").dropna(subset=["low_pp"])
    return stack([rows, pooled.rename_axis("precision").reset_index().assign(task=POOLED)])


def judge(results: Results) -> pd.DataFrame:
    """Return the decision on each format, a row a format that anything was measured of.

    Returns
    -------
    pandas.DataFrame
        Indexed by precision: what `accuracies` gives, `FILED` of its checkpoint, `DIVERGED`, `why` a change is
        missing, `verdict`, and `words` that say it with the margin.
    """
    frame = accuracies(results).reindex(results.precisions)
    for part, names in ((results.checkpoints, FILED), (results.divergence, DIVERGED)):
        frame = frame.join(part.reindex(columns=["precision", *names]).set_index("precision"))
    frame = frame.assign(why=[_missing(results, str(name)) for name in frame.index])
    decisions = [decide(str(name), row, results.margin_pp) for name, row in frame.iterrows()]
    return frame.assign(verdict=[verdict for verdict, _ in decisions], words=[words for _, words in decisions])


def decide(precision: str, row: Any, margin_pp: float) -> tuple[Verdict, str]:
    """Return a format's verdict and its words, from its change and the share of its weights that is quantized."""
    if precision == BASELINE:
        return Verdict.BASELINE, "the baseline"
    if PRECISIONS[precision].quantized and row["quantized_pct"] < LEAST_QUANTIZED_PCT:
        return Verdict.BARELY_QUANTIZED, f"only {row['quantized_pct']:.0f} % of its weights are quantized"
    points = in_points(margin_pp)
    if pd.isna(row["low_pp"]):
        return Verdict.UNCLEAR if pd.notna(row.get("accuracy_pct")) else Verdict.UNMEASURED, row["why"]
    if row["low_pp"] > -margin_pp:
        return Verdict.WITHIN, f"within {points}"
    if row["high_pp"] < -margin_pp:
        return Verdict.LOSES, f"loses more than {points}"
    items = items_needed(row, margin_pp)
    if items > MOST_ITEMS:
        return Verdict.UNCLEAR, "cannot tell; the change is too near the margin"
    digit = 10 ** math.floor(math.log10(items))  # one digit carries it, rounded up
    needed = format_number(math.ceil(items / digit) * digit)
    return Verdict.UNCLEAR, f"cannot tell; about {needed} items would decide"


def in_points(margin_pp: float) -> str:
    """Return a margin in words."""
    return f"{margin_pp:g} point{'s' * (margin_pp != 1)}"


def items_needed(row: Any, margin_pp: float) -> Any:
    """Return how many items would decide, if a change stays as it is: an interval shrinks as 1 / sqrt(items)."""
    distance_pp = np.maximum(abs(row["change_pp"] + margin_pp), 0.01)
    return row["n_items"] * ((row["high_pp"] - row["low_pp"]) / 2 / distance_pp) ** 2


def detectable(n_items: Sequence[int], flip_rate: float = FLIP_RATE) -> str:
    """Return in words which pooled change so many items of each task can detect, with 80 % power."""
    change = detectable_pp(n_items, flip_rate) if n_items else None
    items = f"{sum(n_items):,} items of {len(n_items)} task{'s' * (len(n_items) != 1)}"
    if change is None:
        return f"no change in accuracy ({items} are too few)"
    flips_pct = max(100 * flip_rate, change)  # a change takes as many flips at least
    about = f"{items} in all; {flips_pct:.0f} % gained or lost; power 80 %"
    return f"a pooled change in accuracy of {format_number(round(change, 1))} points or more ({about})"


def _types(results: Results) -> Iterator[str]:
    """Say where quantized formats have another type in bfloat16's place, and where bfloat16 is emulated."""
    rows = pd.DataFrame(results.rows, columns=["precision", "dtype", "bf16"]).dropna(subset=["precision"])
    quantized = [name for name, precision in PRECISIONS.items() if precision.quantized]
    types = rows[rows.precision.isin(quantized)].groupby("dtype").precision.unique()
    if set(types.index) - {"bfloat16"}:
        parts = [f"{dtype} in {', '.join(names).upper()}" for dtype, names in types.items()]
        yield f"The 16-bit type of quantized formats is {'; '.join(parts)}."
    if both := sorted(set.intersection(*map(set, types)) if len(types) > 1 else ()):
        yield f"{', '.join(both).upper()} overflowed in float16 and mixes both types: run the notebooks again."
    slow = rows.precision[rows.bf16.eq("emulated") & rows.dtype.eq("bfloat16")].unique()
    if len(slow):
        yield f"The device has no bfloat16 units: the speed of {', '.join(slow).upper()} is that of an emulation."


def notes(results: Results) -> list[str]:
    """Return what qualifies the verdicts."""
    lines = []
    if len(results.scores) and results.scores.precision.nunique() > 1:
        lines.append(f"The margin, the loss that is accepted, is {in_points(results.margin_pp)}.")
    if dropped := at_chance(results):
        names = ", ".join(map(task_name, dropped))
        lines.append(f"{BASELINE.upper()} cannot be told from guessing on {names}: left out of the verdict.")
    counted = _counted(results, MEAN)
    if len(counted):
        flip_rate = float((counted.gained + counted.lost).sum() / counted.n_items.sum())
        n_items = [int(n) for n in counted.drop_duplicates("task").n_items]
        lines.append(f"This study can detect {detectable(n_items, flip_rate)}.")
        judged, scores = judge(results), results.scores.drop_duplicates("task")
        needed = items_needed(judged[judged.verdict == Verdict.UNCLEAR], results.margin_pp)
        if (needed > (n_total := scores.n_total[scores.task.isin(counted.task)].sum())).any():
            lines.append(f"These tasks have {n_total:,.0f} items: to decide what takes more, ask more tasks.")
        for name, answers in counted.groupby("precision"):
            if absent := [task_name(task) for task in counted.task.unique() if task not in set(answers.task)]:
                lines.append(f"{title(str(name))}'s verdict lacks {', '.join(absent)}: it was not compared there.")
    return [*lines, *_types(results)]
