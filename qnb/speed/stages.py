"""How every precision is timed: one request at a time, the largest batch, and the batches between.

Precisions and engines take turns within a repeat, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import count, cycle, islice
from math import inf
from statistics import median
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm.auto import tqdm

from qnb.errors import InputError
from qnb.ledger import fingerprint
from qnb.precision import PRECISIONS, Precision
from qnb.prompts import Workload
from qnb.prompts import lengths as load_lengths
from qnb.prompts import load as load_workload
from qnb.quantize import checkpoint as model
from qnb.report import ablations as cause
from qnb.report import tables as table
from qnb.session import AUTO, FAILED, Count, Workbench
from qnb.speed.batch_search import is_out_of_memory
from qnb.speed.batch_search import sweep as batch_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qnb.speed.benchmark import Limits, Run


PACE_ROWS = {"bs1": {"cuda": 1, "cpu": 1}, "maxbatch": {"cuda": 32, "cpu": 4}}  # of the batch a pace is learnt from
# what a setting runs beside its timed passes: so many times its requests, and so many more. One by one: kernels
# traced, memory read, tokens compared. In the largest batch: three probes of its size, memory read, kernels traced.
COST = {"bs1": (0, 3), "maxbatch": (5, 0)}
SWEPT = 3  # batches of each size in a sweep
NO_ROOM = "out of memory: one request"  # how a search fails that had too little memory for one row
FULL = ("out of memory", "a smaller batch did not fit")  # sizes of a sweep that are tried again the next time
WHEN_TIMED = "out of memory when timed"  # why a batch that ran in the search is not the largest


def minutes_of(requests: Count) -> float | None:
    """Return the minutes in a text such as ``"4 minutes"``; None where it is a number of requests or ``"auto"``.

    Raises
    ------
    InputError
        The time is none.
    """
    found = re.fullmatch(r"(\d{1,4}(?:\.\d{1,3})?) ?min(?:ute)?s?", str(requests).strip())
    if found and not float(found[1]):
        raise InputError(f"requests is {requests!r}; give a time above 0, such as '4 minutes'")
    return float(found[1]) if found else None


class Timing(Workbench):
    """The stages of performance: the device's limits, batch size 1, the largest batch and its plans, a sweep."""

    def workload(
        self,
        setting: str,
        requests: Count = "auto",
        prompt_tokens: Count = "auto",
        new_tokens: Count = "auto",
        prompts: str = "auto",
        engines: str | Iterable[str] = "auto",
        repeats: int = 1,
    ) -> Workload:
        """Return the prompts every precision gets.

        Parameters
        ----------
        setting
            ``"bs1"`` or ``"maxbatch"``, for the number of requests that suits it.
        requests
            How many prompts; or a time such as ``"4 minutes"``, for as many as it buys (see `pace`).
        prompt_tokens, new_tokens
            Of at most how many tokens each, and the new tokens asked of each.
        prompts
            ``"wikitext"``, ``"sample"``, or ``"auto"``: WikiText-2 where there is a GPU or a `data_dir`.
        engines, repeats
            That a time is for, as for `perf_bs1`.

        Raises
        ------
        InputError
            A count is not positive, an engine is unknown or cannot run here, the prompts cannot be had, or their most
            tokens with the new ones are more than the model's context window.
        """
        from qnb.speed.engines import check_window

        if setting not in PACE_ROWS:
            raise InputError(f"setting is {setting!r}; give {' or '.join(map(repr, PACE_ROWS))}")
        tokens = self.count("prompt_tokens", prompt_tokens), self.count("new_tokens", new_tokens)
        check_window(self.config, *tokens)
        minutes = minutes_of(requests)
        if minutes is None:
            count = self.count("requests", requests, f"{setting}_requests")
        else:
            count = self.pace(setting, minutes, *tokens, prompts, engines, repeats)
        return load_workload(self.tokenizer, self._prompts(prompts), count, *tokens, self.data_dir, self.seed)

    def pace(
        self,
        setting: str,
        minutes: float,
        prompt_tokens: int,
        new_tokens: int,
        prompts: str = "auto",
        engines: str | Iterable[str] = "auto",
        repeats: int = 1,
    ) -> int:
        """Return how many requests a time buys, for all precisions and engines together.

        One batch of each precision is timed with `eager`, and every engine is taken to be as slow. A setting costs
        more than its timed requests: what else it runs is counted in (`COST`). The number is kept, also for precisions
        that are added later: all get the same prompts.

        Parameters
        ----------
        setting, prompts, engines, repeats
            As for `workload`; all repeats are reckoned with.
        minutes
            The time, the batches timed here included; loading and compiling come on top.
        prompt_tokens, new_tokens
            Of one request.

        Raises
        ------
        InputError
            The prompts cannot be had, or an engine is unknown or cannot run here.
        """
        from qnb.speed.benchmark import run

        source, rows, names = self._prompts(prompts), PACE_ROWS[setting][self.device.kind], self._engines(engines)
        asked = {
            "minutes": minutes,
            "prompts": source,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "engines": sorted(names),
            "repeats": self.count("repeats", repeats),
        }
        key = self._shared_key("pace", asked, setting=setting)
        with self._alone():
            if found := self._decided(key):
                return int(found["requests"])
            batch = self.workload(setting, rows, prompt_tokens, new_tokens, prompts)
            self.limits()  # before anything is loaded
            seconds = {}
            for precision in self.precisions:
                with suppress(RuntimeError, MemoryError):  # kept as failed where it is measured
                    seconds[precision.name] = self.on(
                        precision, lambda network, _: run(network, batch, rows, "eager", passes=()).total_s
                    )
            a_request_s = len(names) * sum(seconds.values()) / rows
            times, more = COST[setting]
            left_s = 60 * minutes - sum(seconds.values())
            bought = (
                int((left_s / a_request_s - more) / (times + repeats))
                if seconds
                else AUTO["cpu"][f"{setting}_requests"]
            )
            return int(self._append(key, asked, {"requests": max(1, bought), "seconds": seconds})["requests"])

    def limits(self) -> pd.DataFrame:
        """Measure the device's bandwidth and products once; return a row a limit.

        Every performance row is held against these.
        """
        found = self._limits
        rows = [("copy", found.copy_bytes_per_s / 1e9, "GB/s")]
        rows += [(f"product in {name}", rate / 1e12, "Top/s" if name == "int8" else "TFLOP/s")
                 for name, rate in found.matmul_flop_per_s.items()]  # fmt: skip
        if found.idle_power_w is not None:
            rows.append(("power when idle", found.idle_power_w, "W"))
        return pd.DataFrame(rows, columns=["limit", "measured", "unit"])

    @cached_property
    def _limits(self) -> Limits:
        from qnb.speed.benchmark import Limits, undisturbed_limits

        parts = {"device": self.device.name, "versions": self.versions}
        key = {"stage": "limits", "fingerprint": fingerprint(parts)}
        with self._alone():
            row = self._find(key)
            if row is None:
                row = self._append(key, {}, asdict(undisturbed_limits(self.device.place)))
                if row["flags"]:
                    tqdm.write(
                        f"the device's limits were measured while {'; '.join(row['flags'])}: what bounds a row may be "
                        "named wrong; overwrite=True measures them again"
                    )
        return Limits(**{name: row[name] for name in Limits.__slots__})

    def perf_bs1(self, workload: Workload, repeats: int = 1, engines: str | Iterable[str] = "auto") -> pd.DataFrame:
        """Time the workload one request at a time; return a row a precision, engine and repeat (Table 3).

        Parameters
        ----------
        workload
            The requests.
        repeats
            The most passes; what has settled, after three at the earliest, is not repeated (`qnb.speed.benchmark.settled`).
        engines
            Names in `qnb.speed.engines.FACTORIES`, or ``"auto"``: eager, and cuda_graph where there is a GPU.

        Raises
        ------
        InputError
            `repeats` is below 1, or an engine is unknown or cannot run here.
        """
        self.count("repeats", repeats)
        asked = {"workload": _given(workload).fingerprint, "prompts": workload.source}
        names = self._engines(engines)
        with self._alone(), self._bar(repeats * len(self.precisions), "batch size 1") as bar:
            self._repeat(_Asked("bs1", workload, repeats, lambda *_: (1, asked)), names, bar)
        return self._measured(self.frame("perf", "bs1"), "perf")

    def perf_maxbatch(
        self,
        workload: Workload,
        max_batch: Count = "auto",
        memory_mib: Count = "auto",
        repeats: int = 1,
        engines: str | Iterable[str] = "auto",
    ) -> pd.DataFrame:
        """Find the largest batch of each precision and engine, then time the workload at it (Table 4).

        Parameters
        ----------
        workload
            The requests; the search takes the longest of them with all its new tokens.
        max_batch
            The largest batch worth trying.
        memory_mib
            The memory allowed; ``"auto"`` is a whole GPU. On a CPU it is how much the process may grow.
        repeats, engines
            As for `perf_bs1`.

        Raises
        ------
        InputError
            A count is not positive, an engine is unknown or cannot run here, or `memory_mib` is too little for even
            one request in any precision.
        RuntimeError
            Nothing could be measured: what stood against it.
        """
        self.count("repeats", repeats)
        names = self._engines(engines)
        allowed_mib = self.count("memory_mib", memory_mib)
        limit_mib = float(allowed_mib or self.device.memory_mib)
        cap = min(self.count("max_batch", max_batch), len(_given(workload).prompts))
        wanted = {
            "workload": workload.fingerprint,
            "prompts": workload.source,
            "memory_limit_mib": limit_mib,
            "cap": cap,
        }
        searched: dict[tuple[str, str], Mapping[str, Any]] = {}

        def size(precision: Precision, engine: str) -> tuple[int, dict[str, Any]] | None:
            found = searched.get((precision.name, engine))
            if found is None:
                return None
            return found["batch_size"], {**wanted, "batch_size": found["batch_size"], "capped": found["capped"]}

        def smaller(precision: Precision, engine: str) -> bool:
            found = searched[precision.name, engine]
            if found["batch_size"] == 1:
                return False
            key = self._key("batch", precision, wanted, engine=engine)
            searched[precision.name, engine] = self._append(key, wanted, _smaller(found))
            return True

        steps = (1 + repeats) * len(self.precisions)
        self.limits()  # before anything is loaded or held to less memory, and power while nothing runs
        with self._alone(), self._bar(steps, "largest batch") as bar, self._limited(allowed_mib):
            for precision in self.precisions:
                bar.set_postfix_str(f"search {precision.name}")
                for engine in names:
                    key = self._key("batch", precision, wanted, engine=engine)
                    with self._failing(key, wanted, f"{precision.name}'s largest batch with engine {engine}"):
                        row = self._find(key) or self._search(precision, key, workload, wanted)
                        searched[precision.name, engine] = row
                bar.update()
            if not searched:
                mine = {precision.name for precision in self.precisions}
                failed = [row["reason"] for row in self.ledger.failures() if row["stage"] == "batch" + FAILED
                          and row["precision"] in mine and wanted.items() <= row.items()]  # fmt: skip
                if str(memory_mib) != "auto" and failed and all(NO_ROOM in reason for reason in failed):
                    raise InputError(f"memory_mib is {allowed_mib}: {failed[-1]}")
                self._measured(pd.DataFrame(), "batch")
            self._repeat(_Asked("maxbatch", workload, repeats, size, smaller), names, bar)
        return self._measured(self.frame("perf", "maxbatch"), "perf")

    def _search(
        self, precision: Precision, key: dict[str, Any], workload: Workload, wanted: dict[str, Any]
    ) -> Mapping[str, Any]:
        """Search the largest batch and return its row; where the engine cannot run there is none, and it is 1."""
        from qnb.speed.benchmark import largest_batch, largest_batch_apart
        from qnb.speed.engines import Absent, give_back, unrecordable

        asked = workload, wanted["memory_limit_mib"], wanted["cap"], key["engine"]
        none = {"batch_size": 1, "capped": False}
        if key["engine"] == "cuda_graph" and unrecordable(precision.threshold):
            return none  # nothing need be loaded to know
        self._settle(precision)
        try:
            # a process of its own has less of a whole GPU, as this one holds a context beside it
            if wanted["cap"] > self._counted(precision, key["engine"], workload):
                folder = self.checkpoint(precision, say=True)
                give_back()
                found = largest_batch_apart(folder, precision, self.device.place, *asked)
            else:
                found = self.on(precision, lambda network, base_mib: largest_batch(network, *asked, base_mib))
        except Absent:
            return none
        told = {"prompt_tokens": len(workload.longest), "new_tokens": workload.new_tokens}
        return self._append(key, wanted, {**asdict(found), **told})

    def _counted(self, precision: Precision, engine: str, workload: Workload) -> float:
        """Return how many prompts at once a process is known to live through; 0 where that is not known.

        bitsandbytes' INT8 kernels end it where `eager` reads more; `cuda_graph` reads them in parts.
        """
        from qnb.speed.benchmark import counted

        ends = self.device.kind == "cuda" and precision.eight_bit and engine == "eager"
        return counted(self.config, len(workload.longest)) if ends else inf

    def sweep(self, workload: Workload, most: Count = "auto", engines: str | Iterable[str] = "auto") -> pd.DataFrame:
        """Time batches of 1, 2, 4 … requests, three of each; return a row a precision, engine and size.

        A size that does not fit ends its precision's and engine's row of sizes, with a note; it is tried again the
        next time.

        Parameters
        ----------
        workload
            Its prompts are gone round as often as the batches need.
        most
            The largest batch; 0 is no sweep. ``"auto"`` sweeps where there is a GPU: as far as the largest batch that
            `perf_maxbatch` found for the precision and engine, or 256 where it found none.
        engines
            As for `perf_bs1`.

        Raises
        ------
        InputError
            `most` is no whole number, or an engine is unknown or cannot run here.
        """
        names, largest = self._engines(engines), 0 if str(most) == "0" else self.count("sweep_batch", most)
        asked = {"workload": _given(workload).fingerprint, "prompts": workload.source}
        if not largest:
            return self.build("sweep")
        found = self._largest() if most == "auto" else {}
        with self._alone(), self._bar(len(self.precisions), "batch sizes") as bar:
            self.limits()
            for precision in self.precisions:
                bar.set_postfix_str(precision.name)
                keys = [
                    self._key("sweep", precision, asked, engine=engine, setting=str(size))
                    for engine in names
                    for size in batch_sizes(found.get((precision.name, engine), largest))
                ]
                if missing := [key for key in keys if (self._find(key) or {"note": FULL[0]}).get("note") in FULL]:
                    with self._failing(missing[0], asked, f"{precision.name}'s batch sizes"):
                        self.on(precision, partial(self._sweep, missing, workload, asked))
                bar.update()
        return self._save("sweep")

    def _largest(self) -> dict[tuple[str, str], int]:
        """Return the largest batch last found of each precision and engine."""
        return {(row["precision"], row["engine"]): row["batch_size"] for row in self.ledger if row["stage"] == "batch"}

    def _sweep(
        self,
        keys: Sequence[dict[str, Any]],
        workload: Workload,
        asked: dict[str, Any],
        network: PreTrainedModel,
        base_mib: float | None,
    ) -> None:
        """Time a batch of each key's size with a loaded precision, and keep the rows."""
        from qnb.speed.benchmark import twice

        full: set[str] = set()
        for key in keys:
            size = int(key["setting"])
            if 0 < self._counted(PRECISIONS[key["precision"]], key["engine"], workload) < size:
                note = "not tried: bitsandbytes counts an INT8 layer's outputs in 32 bits, and ends the process beyond"
                self._append(key, asked, {"batch_size": size, "note": note})
                continue
            batch = replace(workload, prompts=tuple(islice(cycle(workload.prompts), SWEPT * size)))
            values: dict[str, Any] = {"note": FULL[1]}
            with self._failing(key, asked, f"{key['precision']}'s batch of {size} with engine {key['engine']}"):
                try:
                    if key["engine"] not in full:
                        values = twice(partial(self._time, network, base_mib, key, batch, size, ("memory",)))
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    full.add(key["engine"])
                    values = {"note": FULL[0]}
                self._append(key, asked, {"batch_size": size, **values})
            model.release()

    def examples(self, prompts: str = "auto", counts: Sequence[int] = (20, 2000, 5000)) -> pd.DataFrame:
        """Plan the batches of so many prompts in three orders; return a row a precision, engine, count and order.

        Computed, not run: a search's probes say what a token of a row takes (`qnb.speed.batch_search.fit`), the prompts' lengths
        the rest (`qnb.speed.batch_search.plans`). Prompts are whole paragraphs, not cut to the length that the workloads have,
        since what is asked is what their lengths do; only the model's context window cuts them.

        Parameters
        ----------
        prompts
            As for `workload`; of WikiText-2 every split is drawn from.
        counts
            Numbers of prompts, the smaller ones the beginning of the larger.

        Raises
        ------
        InputError
            There is no count, one is not positive, or the prompts cannot be had.
        """
        from qnb.speed.engines import window

        if not isinstance(counts, list | tuple) or not counts:
            raise InputError(f"examples is {counts!r}; give numbers of prompts, such as (2000, 5000)")
        sizes = sorted({self.count("examples", count) for count in counts})
        source = self._prompts(prompts)
        asked = {
            "prompts": source,
            "examples": sizes,
            "lengths": load_lengths(self.tokenizer, source, max(sizes), self.data_dir, self.seed),
            "window": window(self.config),
        }
        key = {"stage": "lengths", "fingerprint": fingerprint({"weights": self.source.fingerprint, **asked})}
        with self._alone():
            if not self._find(key):
                self._append(key, asked, {})
        return self._save("examples")

    def _engines(self, names: str | Iterable[str]) -> tuple[str, ...]:
        from qnb.speed.engines import parse as parse_engines

        return parse_engines(names, self.device.kind)

    def _repeat(self, asked: _Asked, engines: Sequence[str], bar: tqdm) -> None:
        """Time precisions and engines in turn, each until it has settled or has all its passes.

        A batch that shrinks in a later pass begins with its first again, at its new size.
        """
        self.limits()
        rows: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        order = count()

        def due(precision: Precision) -> dict[str, list[dict[str, Any]]]:
            sizes = {engine: asked.size(precision, engine) for engine in engines}
            before = {engine: _of_size(found[0], rows[precision.name, engine])
                      for engine, found in sizes.items() if found}  # fmt: skip
            return {engine: had for engine, had in before.items() if len(had) < asked.repeats and not _settled(had)}

        for turn in count():
            worked = False
            for precision in self._in_turn(turn):
                bar.set_postfix_str(precision.name)
                if mine := due(precision):
                    worked, places = True, {engine: next(order) for engine in mine}
                    for engine, row in self._turn(asked, precision, mine, places).items():
                        rows[precision.name, engine].append(row)
                bar.update(turn < asked.repeats)
            if not worked:
                return

    def _turn(
        self,
        asked: _Asked,
        precision: Precision,
        before: Mapping[str, Sequence[dict[str, Any]]],
        places: Mapping[str, int],
    ) -> dict[str, dict[str, Any]]:
        """Return one pass of a precision with each engine of `before`, measured now where the ledger has none.

        `places` number the turns, those that the ledger has counted in: a study that was interrupted numbers its rows
        as one that was not.
        """
        from qnb.speed.benchmark import PASSES

        def sized(engine: str) -> tuple[int, dict[str, Any], dict[str, Any]]:
            found = asked.size(precision, engine)
            assert found is not None
            repeat = len(_of_size(found[0], before[engine]))
            key = self._key("perf", precision, found[1], engine=engine, setting=asked.setting, repeat=repeat)
            return *found, key

        def fit(engine: str, network: PreTrainedModel, base_mib: float | None) -> dict[str, Any]:
            while True:
                batch_size, wanted, key = sized(engine)
                earlier = [row["batch_s"] for row in _of_size(batch_size, before[engine])]
                passes = () if earlier else PASSES
                try:
                    values = self._time(network, base_mib, key, asked.workload, batch_size, passes)
                    break
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or not asked.smaller(precision, engine):
                        raise
                model.release()
            stopped = asked.stopped(earlier, values)
            return self._append(key, wanted, {**values, "order": places[engine], "stopped": stopped})

        def measure(network: PreTrainedModel, base_mib: float | None) -> None:
            for engine in missing:
                _, wanted, key = sized(engine)
                with self._failing(key, wanted, f"{precision.name} with engine {engine}"):
                    rows[engine] = fit(engine, network, base_mib)
                model.release()

        found = {engine: self._find(sized(engine)[2]) for engine in before}
        rows = {engine: row for engine, row in found.items() if row}
        missing = [engine for engine in found if engine not in rows]
        if missing:
            _, wanted, key = sized(missing[0])
            with self._failing(key, wanted, precision.name):
                self._settle(precision)
                self.on(precision, measure)
        return {engine: rows.get(engine, {"batch_size": sized(engine)[0], "stopped": "failed"}) for engine in before}

    def _time(
        self,
        network: PreTrainedModel,
        base_mib: float | None,
        key: dict[str, Any],
        workload: Workload,
        batch_size: int,
        passes: Sequence[str],
    ) -> dict[str, Any]:
        """Run the workload once and return the row's values; where the engine cannot run, why not."""
        from qnb.speed.benchmark import run
        from qnb.speed.engines import absent

        engine = key["engine"]
        if why := absent(engine, self.device.kind, network, len(workload.longest) + workload.new_tokens):
            return {"batch_size": batch_size, "note": why}
        timed = run(network, workload, batch_size, engine, base_mib, limits=self._limits, passes=passes)
        return {**timed.row(), **self._keep_samples(key, timed)}

    def _keep_samples(self, key: Mapping[str, Any], timed: Run) -> dict[str, Any]:
        """Write what a row was counted from, the monitor's readings and each token's time; return the files' names."""
        parts = [key["stage"], key["setting"], key["precision"], key["engine"], key.get("repeat", 0)]
        stem, kept = f"samples/{'.'.join(map(str, [*parts, key['fingerprint']]))}", {}
        for field, part, rows in (("samples", "", timed.readings), ("token_samples", ".tokens", timed.tokens())):
            kept[field], kept[f"{field}_sha256"] = self._write(stem + part, pd.DataFrame(rows))
        return kept

    def _in_turn(self, turn: int) -> tuple[Precision, ...]:
        """Return the precisions in their order, each turn beginning with another one."""
        first = turn % len(self.precisions)
        return (*self.precisions[first:], *self.precisions[:first])

    @contextmanager
    def _limited(self, allowed_mib: int) -> Iterator[None]:
        """Hold a GPU's allocator to `allowed_mib` for a while; 0 leaves it the whole device."""
        if self.device.kind != "cuda" or not allowed_mib:
            yield
            return
        import torch

        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed_mib / self.device.memory_mib))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def table3(self) -> pd.DataFrame:
        """Performance at batch size 1, and the published values beside."""
        return self._save("table3_bs1")

    def table4(self) -> pd.DataFrame:
        """Performance at the largest batch, and the published values beside."""
        return self._save("table4_maxbatch")

    def causes(self, number: int) -> pd.DataFrame:
        """Set rows of Table 3 or 4 that differ in one choice of the harness against each other."""
        return self._save(f"table{_of_speed(number)}_causes")

    def t4_estimate(self, number: int) -> pd.DataFrame:
        """Estimate from its datasheet the least time that a T4 needs for the work of Table 3 or 4."""
        return self._save(f"table{_of_speed(number)}_t4_estimate")

    def _makers(self) -> dict[str, Callable[[], pd.DataFrame]]:
        return {
            **super()._makers(),
            "table3_bs1": lambda: table.performance(self.frame("perf", "bs1"), 3),
            "table3_causes": lambda: cause.causes(self.frame("perf", "bs1"), 3),
            "table3_t4_estimate": lambda: cause.t4(self.frame("perf", "bs1"), 3),
            "table4_maxbatch": lambda: table.performance(self.frame("perf", "maxbatch"), 4),
            "table4_causes": lambda: cause.causes(self.frame("perf", "maxbatch"), 4),
            "table4_t4_estimate": lambda: cause.t4(self.frame("perf", "maxbatch"), 4),
            "sweep": lambda: table.sweep(self.frame("sweep")),
            "examples": lambda: table.examples(self.frame("batch"), self.ledger.frame("lengths")),
        }


def _given(workload: Workload) -> Workload:
    if not isinstance(workload, Workload):
        raise InputError(f"workload is {workload!r}; give what study.workload('bs1') or ('maxbatch') returns")
    return workload


def _of_speed(number: int) -> int:
    if number not in (3, 4):
        raise InputError(f"the table of speeds is number {number!r}; give 3 (batch size 1) or 4 (largest batch)")
    return number


def _smaller(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a search's result after its batch ran out of memory when timed: a smaller one, no longer capped.

    By a hundredth at first, and by twice as much each time: a process beside this one may have taken much.
    """
    from qnb.speed.batch_search import smaller

    size, probes = found["batch_size"], found["probes"]
    failed = {"batch_size": size, "fits": False, "memory_mib": None, "ended": WHEN_TIMED}
    part = 0.01 * 2 ** sum(one.get("ended") == WHEN_TIMED for one in probes)
    return {
        "batch_size": smaller(size, (one["batch_size"] for one in probes if one["fits"]), min(part, 0.5)),
        "limit_mib": found["limit_mib"],
        "capped": False,
        "prompt_tokens": found.get("prompt_tokens"),
        "new_tokens": found.get("new_tokens"),
        "probes": [*probes, failed],
    }


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is timed in turn: the batch size of a precision and engine, and what makes it less when memory runs out."""

    setting: str
    workload: Workload
    repeats: int
    size: Callable[[Precision, str], tuple[int, dict[str, Any]] | None]  # None where none was found
    smaller: Callable[[Precision, str], bool] = lambda *_: False

    def stopped(self, earlier: Sequence[list[float]], values: Mapping[str, Any]) -> str:
        """Return why a pass is the last: the time has settled, or the limit of passes is hit; "" where it is not."""
        from qnb.speed.benchmark import settled

        if "batch_s" not in values:
            return "limit"  # what cannot run need not be tried again
        if settled([median(batch_s) for batch_s in (*earlier, values["batch_s"])]):
            return "interval"
        return "limit" if len(earlier) + 1 == self.repeats else ""


def _of_size(batch_size: int, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["batch_size"] == batch_size]


def _settled(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether passes of one precision and engine need no further one."""
    return any(row["stopped"] == "interval" or "batch_s" not in row for row in rows)
