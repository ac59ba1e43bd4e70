"""Study: everything a notebook holds. It composes the stages and turns their rows into tables and figures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from qnb.accuracy import evaluate, perplexity
from qnb.errors import InputError, check_choice
from qnb.options import Count, Names
from qnb.prompts import Workload
from qnb.quantize import stages as checkpoints
from qnb.report import recommend, tables, verdicts
from qnb.report.results import MARGIN_PP, Results
from qnb.session import Session
from qnb.speed import stages as speed


class Study:
    """One model in several formats, and the folder in which everything measured of it is kept.

    The parameters are those of `qnb.session.Session`, and `margin_pp`, the loss of accuracy in points that you accept.
    Each method measures what is missing in the ledger, then returns a frame of what the rows say.
    """

    def __init__(
        self,
        model: str = "auto",
        precisions: Names = "study",
        output: str | Path = "outputs/study",
        data_dir: str | Path = "",
        seed: int = 0,
        overwrite: bool = False,
        minutes: float | str = 0,
        device: str = "auto",
        half: str = "auto",
        margin_pp: float = MARGIN_PP,
    ) -> None:
        verdicts.check_margin(margin_pp)
        self.session = Session(model, precisions, output, data_dir, seed, overwrite, minutes, device, half)
        self.folder, self.precisions = self.session.folder, self.session.precisions
        self.margin_pp = margin_pp
        self._results: tuple[tuple[int, int], Results] | None = None

    def _measure(self, stage: Callable[..., Any], options: Callable[..., Any] | None = None, *values: Any) -> None:
        """Run a stage with its options, unless this study shows what was measured elsewhere."""
        if not self.session.replays:
            self.session.measure(stage, *([options(*values)] if options else []))

    # What was measured

    def results(self) -> Results:
        """Return everything measured, as frames: what tables, figures, panels and the report are made of."""
        revision = self.session.ledger.revision
        if self._results is None or self._results[0] != revision:
            self._results = revision, Results.read(self.session.ledger, self.margin_pp)
        return self._results[1]

    def table(self, name: str) -> pd.DataFrame:
        """Make one of `qnb.report.tables.TABLES` from the rows, and save it below ``tables/``."""
        check_choice("table", name, tables.TABLES)
        return tables.save(self.results(), name)

    def show(self, name: str, of: str = "") -> Styler:
        """Return what people compare in one of `qnb.report.tables.TABLES` for display; save the whole table."""
        self.table(name)
        return tables.styled(tables.compact(self.results(), name, of))

    def recommend(
        self, peak_memory_mib: float | None = None, tpot_ms: float | None = None, margin_pp: float | None = None
    ) -> pd.DataFrame:
        """Return every format and engine with its verdict and reasons, the best that fits first."""
        return recommend.ranked(self.results(), peak_memory_mib, tpot_ms, margin_pp)

    def summary(self) -> pd.DataFrame:
        """Return the answer in one table: a row a format with its memory, speeds, loss and verdict."""
        return recommend.summary(self.results())

    def card(self, tasks: Names = "", limit: Count = "auto") -> Styler:
        """Return the study's card: what is measured, on what, with what, and what is done already.

        With tasks, and no budget that decides how many items are asked, it says as well which change in accuracy so
        many can detect.
        """
        facts = self.session.facts()
        options = evaluate.AccuracyOptions(tasks or "auto", limit)
        is_open = tasks and not (self.session.replays or self.session.minutes)
        if is_open and (n_items := evaluate.planned_items(self.session, options)):
            facts["can detect"] = verdicts.detectable(n_items)
        return tables.styled(pd.DataFrame(facts.items())).hide(axis="columns")

    # 01: checkpoints

    def quantize(self) -> pd.DataFrame:
        """Make, save, reload and prove the checkpoint of every format; one row per format."""
        self._measure(checkpoints.quantize)
        return self.results().checkpoints

    def push(self, push_to: str, private: bool = True, dry_run: bool = True) -> pd.DataFrame:
        """Upload checkpoints and model cards to the hub, or show what would be uploaded; one row per format."""
        from qnb.report import model_card

        options = checkpoints.PushOptions(push_to, private, dry_run)
        rows = checkpoints.push(self.session, options, lambda each: model_card.card(self.results(), each))
        return pd.DataFrame(rows)

    def continuation(self, prompt: str, precision: str, new_tokens: int = 24) -> list[str]:
        """Return what a format writes after a prompt, greedily, token by token as text."""
        if self.session.replays:
            raise InputError("this notebook shows what was measured elsewhere; open it with your own output to try it")
        return speed.continuation(self.session, prompt, precision, new_tokens)

    # 02: accuracy

    def accuracy(
        self, tasks: Names = "auto", limit: Count = "auto", batch_size: Count = "auto", scorer: str = "qnb"
    ) -> pd.DataFrame:
        """Evaluate every format on every task; one row per task, metric and format."""
        self._measure(evaluate.accuracy, evaluate.AccuracyOptions, tasks, limit, batch_size, scorer)
        return self.results().scores

    def batch_sensitivity(self, tasks: Names = "auto", limit: Count = "auto", scorer: str = "qnb") -> pd.DataFrame:
        """Measure how far a score depends on what shares its batch; one row per format.

        Without a budget of minutes it is one per format and scorer.
        """
        self._measure(evaluate.batch_sensitivity, evaluate.AccuracyOptions, tasks, limit, "auto", scorer)
        return self.table("batch_sensitivity")

    def divergence(
        self, prompt_source: str = "auto", ppl_tokens: Count = "auto", ppl_context: Count = "auto"
    ) -> pd.DataFrame:
        """Measure perplexity on running text, and KL divergence from BF16; one row per format."""
        self._measure(perplexity.divergence, perplexity.DivergenceOptions, prompt_source, ppl_tokens, ppl_context)
        return self.table("divergence")

    def choice_probabilities(self, item: int = 0) -> pd.DataFrame:
        """Return the probability that each format gives to each choice of one item: the paper's p(y_i)."""
        return tables.choice_probabilities(self.results(), item)

    # 03 and 04: speed

    def workload(
        self,
        setting: str,
        requests: Count = "auto",
        prompt_tokens: Count = "auto",
        new_tokens: Count = "auto",
        prompt_source: str = "auto",
    ) -> Workload:
        """Return the prompts that every format gets; `setting` is ``"bs1"`` or ``"maxbatch"``."""
        options = speed.WorkloadOptions(setting, requests, prompt_tokens, new_tokens, prompt_source)
        if self.session.replays:
            return Workload((), 0, prompt_source)
        return speed.workload(self.session, options)

    def device_peaks(self) -> pd.DataFrame:
        """Measure the device's bandwidth and matrix products once; one row per peak."""
        self._measure(speed.device_peaks)
        return tables.device_peaks(self.results())

    def perf_bs1(self, workload: Workload, repeats: int = 1, engines: Names = "auto") -> pd.DataFrame:
        """Time the workload one request at a time; one row per format, engine and pass (Table 3)."""
        self._measure(speed.perf_bs1, speed.TimingOptions, workload, engines, repeats)
        return self.results().passes.query("setting == 'bs1'")

    def perf_maxbatch(
        self, workload: Workload, memory_mib: Count = "auto", repeats: int = 1, engines: Names = "auto"
    ) -> pd.DataFrame:
        """Find the largest batch of each format and engine, then time the workload at it (Table 4)."""
        self._measure(speed.perf_maxbatch, speed.TimingOptions, workload, engines, repeats, memory_mib)
        return self.results().passes.query("setting == 'maxbatch'")

    def sweep(self, workload: Workload, largest: Count = "auto", engines: Names = "auto") -> pd.DataFrame:
        """Time batches of 1, 2, 4 ... requests; one row per format, engine and batch size."""
        self._measure(speed.sweep, speed.TimingOptions, workload, engines, 1, "auto", largest)
        return self.table("sweep")

    def batch_plans(self, prompt_source: str = "auto", counts: Sequence[int] = (20, 2000, 5000)) -> pd.DataFrame:
        """Plan the batches of so many prompts in three orders; computed from the searches, not run."""
        self._measure(lambda session: speed.prompt_lengths(session, prompt_source, counts))
        return self.table("batch_plans")

    def sensor(self) -> Callable[[], dict[str, float]]:
        """Return what reads the device now, for a live monitor."""
        from qnb.speed import monitor

        return monitor.Sensor(*self.session.device.places).sample

    # 05: figures and report

    def figures(self, pictures: bool = True) -> dict[str, Any]:
        """Draw every figure and save it below ``figures/``; `pictures` adds PNG and SVG, which take a browser."""
        from qnb.report import export

        self.session.check_writable()
        return export.save_figures(self.results(), self.folder / "figures", pictures)

    def report(self) -> Path:
        """Write ``report.html``, one page that needs no network, all tables and model cards; return the page."""
        from qnb.report import page

        self.session.check_writable()
        return page.write(self.results())
