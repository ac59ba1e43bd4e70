"""One model across precisions: the only thing a notebook holds.

The stages are `asking`'s and `timing`'s; here are the checkpoints they are measured on and what is made of the rows:
tables, figures, the report.
"""

from __future__ import annotations

from dataclasses import asdict
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm.auto import tqdm

from qnb.accuracy.evaluate import Asking
from qnb.errors import InputError
from qnb.ledger import FAILED
from qnb.precision import parse
from qnb.quantize import checkpoint as model
from qnb.quantize import hub
from qnb.report import tables as table
from qnb.report.results import TABLES, Results, medians, readings
from qnb.speed.stages import Timing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Study(Asking, Timing):
    """A model, precisions, and the folder in which everything measured of them lies; made as `Workbench` says."""

    def card(self) -> pd.DataFrame:
        """Return the study's card: what is measured, on what, with what, and what is done already."""
        here, done = self.device, self.ledger.stages()
        known = self._record or asdict(self.source)  # a study that was copied here shows without its model
        facts = {
            "model": f"{known['name']} ({known['why']})",
            "weights": f"fingerprint {known['fingerprint']}" + (", random" if known["random_weights"] else ""),
            "precisions": ", ".join(precision.name for precision in self.precisions),
            "device": f"{here.name}, {here.memory_mib / 1024:.1f} GiB"
            + (f", driver {here.driver}" if here.driver else ""),
            "bfloat16": here.bf16,
            "versions": ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            "output": str(self.folder),
            "already measured": ", ".join(f"{count} {stage} rows" for stage, count in done.items()) or "nothing",
        }
        return pd.DataFrame({"": facts})

    def quantize(self) -> pd.DataFrame:
        """Make, save, reload and prove every precision's checkpoint; return a row each.

        Raises
        ------
        InputError
            The model cannot be had.
        """
        with self._alone(), self._bar(len(self.precisions), "quantize") as bar:
            for precision in self.precisions:
                bar.set_postfix_str(precision.name)
                with self._failing(self._key("quantize", precision, {}), {}, f"{precision.name}'s checkpoint"):
                    self.checkpoint(precision)
                bar.update()
        return self._measured(self.frame("quantize"), "quantize")

    def push(self, push_to: str, private: bool = True, dry_run: bool = True) -> pd.DataFrame:
        """Upload every precision's checkpoint and model card to the hub, or show what would be; return a row each.

        The rows are kept in push.csv, each as soon as it is known; what cannot be made is said and left out.

        Parameters
        ----------
        push_to
            A hub name such as ``you/llama-3.2-1b``; each checkpoint goes to ``<push_to>-<precision>``. Empty: none.
        private
            Whether the repositories are private.
        dry_run
            Upload nothing; needs neither token nor network.

        Raises
        ------
        InputError
            The model cannot be had, or the push is refused.
        RuntimeError
            No checkpoint could be made: what stood against the last.
        """
        from qnb.report import model_card as modelcard

        rows = []
        columns = ["precision", *hub.Push.__slots__]
        if not push_to:
            return pd.DataFrame(columns=columns)
        hub.check_push(push_to, dry_run)
        with self._alone(), self._bar(len(self.precisions), "push") as bar:
            for precision in self.precisions:
                bar.set_postfix_str(precision.name)
                folder = None
                with self._failing(self._key("quantize", precision, {}), {}, f"{precision.name}'s checkpoint"):
                    folder = self.checkpoint(precision)
                if folder is not None:
                    card = modelcard.card(self.results(), precision)
                    sent = hub.push(folder, f"{push_to}-{precision.name}", private, dry_run, card)
                    rows.append({"precision": precision.name, **asdict(sent), "files": " ".join(sent.files)})
                    pd.DataFrame(rows, columns=columns).to_csv(self.folder / "push.csv", index=False)
                bar.update()
        return self._measured(pd.DataFrame(rows, columns=columns), "quantize")

    def continuation(self, prompt: str, precision: str, new_tokens: int = 24) -> list[str]:
        """Return what a precision's checkpoint writes after a prompt, greedily, token by token as text.

        Raises
        ------
        InputError
            The prompt is empty, the precision unknown, or `new_tokens` below 1.
        """
        from qnb.speed.engines import Eager

        (asked,) = parse(precision)
        self.count("new_tokens", new_tokens)
        ids = self.tokenizer(prompt, verbose=False)["input_ids"] if prompt.strip() else []
        if not ids:
            raise InputError("the prompt is empty; give some words to go on from")

        def generate(network: PreTrainedModel, _: float | None) -> list[int]:
            with model.quiet():
                return Eager(network).generate([ids], new_tokens)[0].tolist()  # (N,)

        with self._alone():  # what another process times meanwhile would notice
            made = self.on(asked, generate)
        # a character may take several tokens: a piece is what its token adds to the text
        texts = [str(self.tokenizer.decode(made[:count])).rstrip("\ufffd") for count in range(len(made) + 1)]
        return [now.removeprefix(before) for before, now in pairwise(texts)]

    def results(self) -> Results:
        """Return everything measured, as frames: what figures, panels and the report are made of."""
        size = self.ledger.path.stat().st_size if self.ledger.path.exists() else 0
        if self._read is None or self._read[0] != size:
            self._read = size, self._results()
        return self._read[1]

    def _results(self) -> Results:
        rows = tuple(row for row in self.ledger if not row["stage"].endswith(FAILED))
        runs = {setting: self.frame("perf", setting) for setting in ("bs1", "maxbatch")}
        timed = [row for frame in runs.values() if len(frame) for row in frame.sort_values("repeat", kind="stable")
                 .drop_duplicates(["precision", "engine"]).to_dict("records")]  # fmt: skip
        return Results(
            name=self.folder.name,
            model=self._record.get("name", self.model),
            device=rows[-1].get("device", "") if rows else "",
            tables={number: self.build(name) for number, name in TABLES.items()},
            scores=self.scores(),
            bs1=medians(runs["bs1"]),
            maxbatch=medians(runs["maxbatch"]),
            sweep=medians(table.with_spread(self.frame("sweep"))),
            samples=readings(self.folder, timed),
            checkpoints=self.frame("quantize"),
            divergence=table.divergence(self.frame("divergence")),
            rows=rows,
            failures=tuple(self.ledger.failures()),
        )

    def figures(self, pictures: bool = True) -> dict[str, Any]:
        """Draw every figure, save them below ``figures/``, and return them by name.

        Parameters
        ----------
        pictures
            Whether to save PNG and SVG beside HTML; that takes a browser and some seconds.
        """
        from qnb.report import export
        from qnb.report import figures as figure

        self._check_writable()
        results = self.results()
        drawn = figure.draw_all(results)
        export.pages(drawn, self.folder / "figures")
        if pictures and (problem := export.pictures(drawn, self.folder / "figures", of=results.of)):
            tqdm.write(problem)
        return drawn

    def report(self) -> Path:
        """Write ``report.html``, one page that needs no network, all tables and model cards; return the page."""
        from qnb.report import model_card as modelcard
        from qnb.report import page as report

        self._check_writable()
        results = self.results()
        ready = {TABLES[number]: frame for number, frame in results.tables.items()}
        for name in self._makers():
            self._keep(name, ready[name] if name in ready else self.build(name))
        path = self.folder / "report.html"
        draft = path.with_suffix(".draft")
        draft.write_text(report.page(results, self.ledger.path), encoding="utf-8")
        draft.replace(path)
        for precision in self.precisions:
            if precision.name in set(results.checkpoints.get("precision", ())):
                modelcard.write(results, precision, self.folder / "cards")
        return path


PARAMETERS = tuple(signature(Study).parameters)  # what every notebook gives to its study
