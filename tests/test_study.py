"""A study remembers its model, chooses counts, and shows what was asked last."""

import json
import shutil
import weakref
from contextlib import nullcontext
from dataclasses import replace
from itertools import cycle
from math import inf
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from qnb import InputError, Study
from qnb import session as workbench
from qnb.device import Device
from qnb.ledger import checked, unchecked
from qnb.precision import PRECISIONS, parse
from qnb.quantize import checkpoint as model
from qnb.quantize import hub
from qnb.report.verify import verify
from qnb.speed import engines as decode
from qnb.speed.stages import Timing


@pytest.mark.parametrize("part", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_changed_in_place_is_noticed(part, source, tmp_path):
    local, output = tmp_path / "model", tmp_path / "study"
    shutil.copytree(source.path, local)
    assert Study(str(local), output=output).source.fingerprint == Study(str(local), output=output).source.fingerprint
    data = bytearray((local / part).read_bytes())
    if part.endswith(".json"):
        data += b"\n"  # still a file of its kind
    else:
        data[-1] ^= 1
    (local / part).write_bytes(data)
    with pytest.raises(InputError, match="changed since"):
        _ = Study(str(local), output=output).source


def test_a_study_from_before_configurations_counted_goes_on_where_it_was_moved_to(source, tmp_path):
    local, output = tmp_path / "model", tmp_path / "study"
    shutil.copytree(source.path, local)
    told = Study(str(local), output=output).source
    record = json.loads(unchecked((output / "study.json").read_bytes()))
    weights = model.digest(local, sealed=False, beside=False)
    assert weights != told.fingerprint
    (output / "study.json").write_bytes(checked(record | {"fingerprint": weights, "stamp": "of another disk"}))
    assert Study(str(local), output=output).source == told


def test_a_study_that_cannot_be_written_is_read_and_refused_where_it_would_be(studied, tmp_path, monkeypatch):
    folder = shutil.copytree(studied.folder, tmp_path / "study")
    monkeypatch.setattr(workbench.os, "access", lambda *_: False)
    kept = Study(precisions="all", output=folder)
    assert len(kept.results().tables[3]) == len(studied.results().tables[3])
    for write in (kept.report, kept.figures):
        with pytest.raises(InputError, match="cannot be written"):
            write()
    with pytest.raises(InputError, match="cannot be written"):
        Study(output=tmp_path / "new")


def test_counts(tmp_path):
    made = Study("smollm2-135m", output=tmp_path)
    made.device = Device("cpu", "a machine", 1024, "emulated", "")
    assert made.count("limit", "auto") == workbench.AUTO["cpu"]["limit"] and made.count("limit", "7") == 7
    for wrong in (0, -1, "many", 1.5, True):
        with pytest.raises(InputError, match="limit"):
            made.count("limit", wrong)


@pytest.fixture
def unloaded(monkeypatch):
    """Stages time what a test's own `run` returns: no model is loaded, no limit measured."""
    from qnb.speed import benchmark

    monkeypatch.setattr(Study, "on", lambda study, precision, measure: measure(None, 0.0))
    monkeypatch.setattr(Study, "_settle", lambda study, precision: None)
    monkeypatch.setattr(benchmark, "undisturbed_limits", lambda device: benchmark.Limits(1e9, {}, None))


def test_a_batch_that_runs_out_of_memory_when_timed_is_made_smaller(unloaded, source, tmp_path, monkeypatch):
    """The search is believed at first; the timed pass fails above 25 rows, and steps down are each twice the last."""
    from qnb.speed import batch_search as batch
    from qnb.speed import benchmark

    made = Study("smollm2-135m", "bf16", tmp_path)
    monkeypatch.setattr(benchmark, "largest_batch", lambda *rest: batch.Largest(32, 100.0, True, ()))

    def run(network, workload, batch_size, engine, base_mib, **_):
        if batch_size > 25:
            raise torch.cuda.OutOfMemoryError("simulated")
        from qnb.speed.monitor import Usage

        usage = Usage("process", 0, 1.0)
        return benchmark.Run(engine, batch_size, 32, 4, 2, 1.0, (1.0,), 1.0, 1.0, usage)

    monkeypatch.setattr(benchmark, "run", run)
    workload = made.workload("maxbatch", 32, 4, 2, "sample")
    (row,) = made.perf_maxbatch(workload, 32).to_dict("records")
    assert row["batch_size"] == 22 and not row["capped"]
    (found,) = made.frame("batch").to_dict("records")
    assert found["batch_size"] == 22
    assert [probe["batch_size"] for probe in found["probes"]] == [32, 31, 30, 29, 26]
    assert {(probe["fits"], probe["ended"]) for probe in found["probes"]} == {(False, "out of memory when timed")}


@pytest.mark.parametrize(
    "steady, overwrite, passes",
    [(False, False, 3), (True, False, 6), (False, True, 3)],
)
def test_a_batch_that_shrinks_in_a_later_pass_begins_anew(
    steady, overwrite, passes, unloaded, source, tmp_path, monkeypatch
):
    """int8's second pass fails at eight rows: its passes are of seven, bf16's stay, and nothing is left to do."""
    from qnb.speed import batch_search as batch
    from qnb.speed import benchmark
    from qnb.speed.monitor import Usage

    made, calls, failed = Study("smollm2-135m", "bf16,int8", tmp_path, overwrite=overwrite), [], []
    monkeypatch.setattr(benchmark, "largest_batch", lambda *rest: batch.Largest(8, 100.0, True, ()))
    timed = Study._time

    def time(self, network, base_mib, key, *rest):
        calls.append((key["precision"], key["repeat"], rest[1]))
        if calls.count(("int8", 1, 8)) == 1 and not failed:
            failed.append(True)
            raise torch.cuda.OutOfMemoryError("simulated")
        return timed(self, network, base_mib, key, *rest)

    def run(network, workload, batch_size, engine, base_mib, **_):
        took_s = 1.0 if steady else float(len(calls))  # which settles in three passes, or never
        return benchmark.Run(engine, batch_size, 8, 4, 2, took_s, (took_s,), 1.0, 1.0, Usage("process", 0, 1.0))

    monkeypatch.setattr(Study, "_time", time)
    monkeypatch.setattr(benchmark, "run", run)
    workload = made.workload("maxbatch", 8, 4, 2, "sample")
    rows = made.perf_maxbatch(workload, 8, repeats=passes)
    counts = [("bf16", place, 8) for place in range(3)] + [("int8", place, 7) for place in range(3)]
    assert list(zip(rows.precision, rows.repeat, rows.batch_size, strict=True)) == counts
    assert sorted(calls) == sorted([*counts, ("int8", 0, 8), ("int8", 1, 8)])
    last = made.table4().set_index("precision")
    assert set(last.stopped) == {"interval" if steady else "limit"} and set(last.repeats) == {3}
    assert len({(row["precision"], row["order"]) for row in rows.to_dict("records")}) == 6
    made = Study("smollm2-135m", "bf16,int8", tmp_path)
    assert len(made.perf_maxbatch(workload, 8, repeats=passes)) == 6 and len(calls) == 8


@pytest.fixture
def apart(source, tmp_path, monkeypatch):
    """A study of int8 that searches in a process of its own, by a trial that tests/falls.py begins there."""
    import falls

    from qnb.speed import benchmark
    from qnb.speed.monitor import Usage

    made, loaded = Study("smollm2-135m", "int8", tmp_path), []

    def run(network, workload, batch_size, engine, base_mib, **_):
        return benchmark.Run(engine, batch_size, 8, 4, 2, 8.0, (1.0,) * 8, None, None, Usage("process", 0, 1.0))

    def search(begin, cap=8):
        monkeypatch.setattr(benchmark, "trial_of", getattr(falls, begin))
        return made.perf_maxbatch(made.workload("maxbatch", 8, 4, 2, "sample"), cap)

    monkeypatch.setattr(Timing, "_counted", lambda self, precision, *_: 0 if precision.eight_bit else inf)
    monkeypatch.setattr(made, "on", lambda precision, measure: loaded.append(precision.name) or measure(None, 0.0))
    monkeypatch.setattr(made, "_settle", lambda precision: None)
    monkeypatch.setattr(benchmark, "run", run)
    monkeypatch.setattr(benchmark, "undisturbed_limits", lambda device: benchmark.Limits(1e9, {}, None))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").touch()
    shutil.copy(Path(source.path) / "config.json", checkpoint)
    monkeypatch.setattr(made, "checkpoint", lambda precision, say: checkpoint)
    return made, search, loaded


def test_a_batch_that_ends_its_process_costs_its_probe_alone(apart):
    made, search, loaded = apart
    (row,) = search("falls_above_five").to_dict("records")
    (found,) = made.frame("batch").to_dict("records")
    assert row["batch_size"] == found["batch_size"] == 5 and not found["capped"]
    assert loaded == ["int8"]  # to be timed; while it was searched nothing was loaded here
    ended = {probe["batch_size"]: probe["ended"] for probe in found["probes"]}
    assert ended[1] == ended[5] == "" and ended[6] == "its process died"


def test_what_is_raised_in_another_process_is_raised_here(apart):
    made, search, _ = apart
    with pytest.raises(InputError, match="context window"):
        search("cannot_ask")
    for begin, reason in (("holds_nothing", "out of memory"), ("ends_at_once", "its process died")):
        with pytest.raises(RuntimeError, match=reason):
            search(begin)
        (failed,) = made.ledger.failures()
        assert failed["stage"] == "batch.failed" and reason in failed["reason"]
    assert search("cannot_record").batch_size.tolist() == [1]  # timed as one; its row says why it cannot run


def test_int8_alone_is_searched_apart_on_a_gpu_where_its_kernels_may_end_the_process(tmp_path):
    made = Study("smollm2-135m", output=tmp_path)
    work = made.workload("maxbatch", 2, 4, 2, "sample")
    last = (2**31 - 1) // (4 * 1536)
    for kind, names in (("cuda", {"int8", "int8-no-outliers"}), ("cpu", set())):
        made.device = Device(kind, "a machine", 1024, "native", "")

        def apart(engine, most):
            return {name for name, precision in PRECISIONS.items() if most > made._counted(precision, engine, work)}

        assert apart("eager", last + 1) == names
        assert not apart("eager", last) and not apart("cuda_graph", last + 1)  # which reads prompts in parts


def test_passes_end_when_the_median_has_settled_or_at_the_limit(source, tmp_path, monkeypatch):
    """Steady passes need three, unsteady ones are made to the last; both are asked again without measuring.

    A turn's number is the same where another kernel goes on in the middle.
    """
    from qnb.speed import benchmark
    from qnb.speed.monitor import Usage

    measured = []
    monkeypatch.setattr(
        Study, "on", lambda _, precision, measure: measured.append(precision.name) or measure(None, 0.0)
    )
    monkeypatch.setattr(Study, "_settle", lambda *_: None)
    monkeypatch.setattr(benchmark, "undisturbed_limits", lambda device: benchmark.Limits(1e9, {}, None))

    def run(network, workload, batch_size, engine, base_mib, **_):
        spread = 0.5 if measured[-1] == "bf16" else 0.001
        times = (1 + spread * (measured.count(measured[-1]) % 3),) * 8  # alike in a pass, whatever passes are
        return benchmark.Run(engine, 1, 8, 4, 2, sum(times), times, None, None, Usage("process", 0, 1.0))

    monkeypatch.setattr(benchmark, "run", run)
    made = Study("smollm2-135m", "bf16,fp16", tmp_path)
    workload = made.workload("bs1", 8, 4, 2, "sample")
    for _ in range(2):
        rows = made.perf_bs1(workload, 4)
        assert rows.groupby("precision").stopped.agg(list).to_dict() == {
            "bf16": ["", "", "", "limit"],
            "fp16": ["", "", "interval"],
        }
    turns = ["bf16", "fp16", "fp16", "bf16", "bf16", "fp16", "bf16"]
    assert measured == turns and sorted(rows.order) == list(range(len(turns)))
    ledger = tmp_path / "ledger.jsonl"
    kept = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(kept[:-2]))  # killed before the last two passes
    again = Study("smollm2-135m", "bf16,fp16", tmp_path).perf_bs1(workload, 4)
    assert measured[7:] == ["fp16", "bf16"] and again.order.tolist() == rows.order.tolist()
    assert all((tmp_path / name).exists() for name in (*rows.samples, *rows.token_samples))


@pytest.mark.parametrize(("setting", "bought"), [("bs1", 22), ("maxbatch", 17)])
def test_a_time_buys_requests_the_same_for_every_precision(setting, bought, source, tmp_path, monkeypatch):
    """Of two minutes 4.5 s go to the pace. At 4.5 s a request of both, 25 are left, less three; or at 4.5 s for four,
    102, which six passes share.
    """
    from qnb.speed import benchmark

    made, asked = Study("smollm2-135m", "bf16,nf4,fp16", tmp_path), []

    def on(precision, measure):
        if precision.name == "fp16":
            raise RuntimeError("out of memory")
        asked.append(precision.name)
        return measure(None, 0.0)

    def run(network, workload, batch_size, engine, passes):
        assert len(workload.prompts) == batch_size and engine == "eager" and passes == ()
        return SimpleNamespace(total_s=1.5 if asked[-1] == "bf16" else 3.0)

    monkeypatch.setattr(made, "on", on)
    monkeypatch.setattr(benchmark, "run", run)
    for precisions in ("bf16,nf4,fp16", "int8,bf16"):
        made.precisions = parse(precisions)
        workload = made.workload(setting, "2 minutes", 8, 2, "sample")
        assert len(workload.prompts) == bought and asked == ["bf16", "nf4"]
    made.precisions, made.overwrite = parse("nf4"), True  # one measured anew gets what the others had
    assert len(made.workload(setting, "2 minutes", 8, 2, "sample").prompts) == bought and asked == ["bf16", "nf4"]
    made.overwrite = False
    assert len(made.workload(setting, "1 min", 8, 2, "sample").prompts) < bought


def test_more_tokens_than_the_model_has_places_for_are_refused_before_anything_is_measured(source, tmp_path):
    made = Study("smollm2-135m", "bf16", tmp_path)
    with pytest.raises(InputError, match=r"8 prompt and 9000 new tokens are more than .* 8192"):
        made.workload("bs1", 2, 8, 9000, "sample")
    assert not made.ledger.path.exists()


@pytest.mark.parametrize("none", ["0 minutes", "-1 minutes", "4 hours", "minutes", "many"])
def test_a_time_that_is_none_is_refused(none, tmp_path):
    with pytest.raises(InputError, match="workload is 4; give what study"):
        Study("smollm2-135m", output=tmp_path).perf_bs1(4)
    with pytest.raises(InputError, match="requests is"):
        Study(output=tmp_path).workload("bs1", none)


def test_what_is_timed_after_a_batch_shrank_has_a_first_pass_of_its_own(unloaded, source, tmp_path, monkeypatch):
    """Memory runs out in the second pass of 200 rows: what ran next to them has a first pass of its own."""
    from qnb.speed import benchmark
    from qnb.speed.batch_search import Largest, Probe
    from qnb.speed.monitor import Usage

    made, calls = Study("smollm2-135m", "bf16", tmp_path), []
    probes = Probe(199, False), Probe(198, True, 790.0), Probe(200, True, 800.0)
    monkeypatch.setattr(benchmark, "largest_batch", lambda *_: Largest(200, 900.0, False, probes))

    def run(network, workload, batch_size, engine, base_mib, limits, passes):
        calls.append((batch_size, passes))
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("simulated")
        memory_mib = 700.0 if passes else None
        return benchmark.Run(engine, batch_size, 2 * batch_size, 4, 2, len(calls), (len(calls) / 2,) * 2, None, None,
                             Usage("process", 0, 1.0, peak_memory_mib=memory_mib))  # fmt: skip

    monkeypatch.setattr(benchmark, "run", run)
    workload = made.workload("maxbatch", 3, 4, 2, "sample")
    made.perf_maxbatch(replace(workload, prompts=workload.prompts * 160), "auto", 900, 3, "eager")
    assert calls == [(200, benchmark.PASSES), (200, ()), (198, benchmark.PASSES), (198, ()), (198, ())]
    (row,) = made.table4().to_dict("records")
    assert (row["batch_size"], row["repeats"], row["memory_mib"]) == (198, 3, 700)


def test_a_sweep_ends_where_a_batch_does_not_fit_and_names_the_knee(unloaded, source, tmp_path, monkeypatch):
    from qnb.speed import benchmark
    from qnb.speed.monitor import Usage

    made, tried, room = Study("smollm2-135m", "bf16", tmp_path), [], []

    def run(network, workload, batch_size, engine, base_mib, **_):
        assert len(workload.prompts) == 3 * batch_size
        tried.append(batch_size)
        if (batch_size > 4 and not room) or tried == [1, 2]:
            raise torch.cuda.OutOfMemoryError("simulated")
        batch_s = {1: 1.0, 2: 1.0, 4: 1.9, 8: 3.9, 12: 6.0}[batch_size]
        times = (batch_s, batch_s, 1.25 * batch_s)
        return benchmark.Run(engine, batch_size, 3 * batch_size, 4, 2, sum(times), times, None, None,
                             Usage("process", 0, 1.0, throttle=("power cap",)))  # fmt: skip

    monkeypatch.setattr(benchmark, "run", run)
    workload = made.workload("maxbatch", 3, 4, 2, "sample")
    swept = made.sweep(workload, 12)
    assert swept.batch_size.tolist() == [1, 2, 4, 8, 12] and swept.knee.tolist() == [False, True, False, False, False]
    assert swept.note.tolist() == ["", "", "", "out of memory", "a smaller batch did not fit"]
    assert swept.throughput_spread_pct.round(6).tolist()[:3] == [25.0] * 3
    assert swept.requests.tolist()[:3] == [3, 6, 12]
    assert swept["flags"].tolist()[:3] == ["throttled: power cap"] * 3
    assert made.results().sweep.throughput_spread_pct.round(6).tolist() == [25.0] * 3
    assert tried == [1, 2, 2, 4, 8, 8]  # what memory ran out of once is tried again before it ends the row
    made.sweep(workload, 12)
    assert tried[6:] == [8, 8]  # and once more when it is asked for again: what took the memory may be gone
    room.append(True)
    swept = made.sweep(workload, 12)
    assert swept.note.tolist() == [""] * 5 and tried[8:] == [8, 12]
    other = Study("smollm2-135m", "bf16", tmp_path / "other")
    other.device = Device("cpu", "a machine", 1024, "native", "")
    assert other.sweep(workload).empty  # without a GPU none is made unless it is asked for
    other.device = replace(other.device, kind="cuda")
    monkeypatch.setattr(Device, "use", lambda _: None)
    other._append(other._key("batch", other.precisions[0], {}, engine="eager"), {}, {"batch_size": 4})
    assert other.sweep(workload, "auto", "eager").batch_size.tolist() == [1, 2, 4]


def test_an_engine_that_cannot_run_a_precision_leaves_a_row_that_says_why(unloaded, source, tmp_path, monkeypatch):
    from qnb.speed import benchmark
    from qnb.speed.monitor import Usage

    made = Study("smollm2-135m", "bf16", tmp_path)
    monkeypatch.setattr(decode, "parse", lambda names, device: ("eager", "cuda_graph"))

    def run(network, workload, batch_size, engine, base_mib, **_):
        return benchmark.Run(engine, 1, 8, 4, 2, 8.0, (1.0,) * 8, None, None, Usage("process", 0, 1.0))

    monkeypatch.setattr(benchmark, "run", run)
    made.perf_bs1(made.workload("bs1", 8, 4, 2, "sample"), 2)
    table = made.table3().set_index("engine")
    assert table.throughput_rps["eager"] == 1 and table.note["eager"] == ""
    assert "GPU" in table.note["cuda_graph"] and table.throughput_rps.isna()["cuda_graph"]


def test_a_model_that_keeps_not_every_key_leaves_a_row_that_says_so(source, tmp_path, monkeypatch):
    """Asked for both engines on a GPU, eager is measured for every precision."""
    from transformers import MistralConfig, MistralForCausalLM

    from qnb.speed import benchmark
    from qnb.speed.monitor import Usage

    shape = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    network = MistralForCausalLM(MistralConfig(**shape, sliding_window=5))
    made = Study("smollm2-135m", "bf16,fp16", tmp_path)
    workload = made.workload("bs1", 4, 4, 2, "sample")
    monkeypatch.setattr(Device, "use", lambda _: None)
    made.device = Device("cuda", "a machine", 1024, "native", "")
    monkeypatch.setattr(made, "on", lambda precision, measure: measure(network, 0.0))
    monkeypatch.setattr(benchmark, "undisturbed_limits", lambda device: benchmark.Limits(1e9, {}, None))
    monkeypatch.setattr(
        benchmark, "run", lambda network, workload, batch_size, engine, base_mib, **_: benchmark.Run(
            engine, 1, 4, 4, 2, 4.0, (1.0,) * 4, None, None, Usage("process", 0, 1.0))
    )  # fmt: skip
    made.perf_bs1(workload)
    table = made.table3().set_index(["engine", "precision"])
    assert table.throughput_rps["eager"].tolist() == [1, 1] and table.throughput_rps["cuda_graph"].isna().all()
    assert all("limited to the last 5 tokens" in note for note in table.note["cuda_graph"])


def test_plans_are_made_of_rows_alone(source, tmp_path):
    """Lengths are counted once; then the table needs neither prompts nor model."""
    made = Study("smollm2-135m", "bf16", tmp_path)
    assert made.examples("sample").empty and not (tmp_path / "tables").exists()
    probes = [{"batch_size": size, "fits": True, "memory_mib": 300.0 + 10 * size} for size in (1, 8)]
    made.ledger.append({"stage": "batch", "precision": "bf16", "engine": "eager", "probes": probes, "limit_mib": 600.0,
                        "prompt_tokens": 32, "new_tokens": 8})  # fmt: skip
    before = len(made.ledger.path.read_bytes())
    shown = made.examples("sample")
    assert len(made.ledger.path.read_bytes()) == before and shown.examples.unique().tolist() == [20, 24]
    assert shown.note.iloc[-1] == "sample has no more prompts; 2,000 and 5,000 were asked for"
    (row,) = made.ledger.frame("lengths").to_dict("records")
    assert row["window"] == 8192 and len(row["lengths"]) == 24 and max(row["lengths"]) == shown.longest_tokens.iloc[-1]
    again = Study("auto", "bf16", tmp_path).build("examples")
    assert again.equals(shown) and (tmp_path / "tables" / "examples.csv").read_text() == shown.to_csv(index=False)
    for wrong in ((0,), ("many",), (), 2000):
        with pytest.raises(InputError, match="examples"):
            made.examples("sample", wrong)


def test_idle_memory_is_read_without_what_the_model_before_left(source, tmp_path, monkeypatch):
    """Whatever torch's allocator still holds is what the next model is loaded into, and so no idle memory."""
    made, steps = Study("smollm2-135m", "bf16", tmp_path), []
    made.device = Device("cuda", "a card", 2**14, "native", "580.1")
    monkeypatch.setattr(made, "checkpoint", lambda precision, say: tmp_path)
    monkeypatch.setattr(decode, "give_back", lambda: steps.append("given back"))
    sense = SimpleNamespace(source="nvml", sample=lambda: {"memory_mib": 3000.0})
    monkeypatch.setattr(workbench, "sensor", lambda place: sense)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1000 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 200 * 2**20)
    monkeypatch.setattr(model, "load", lambda folder, precision, place: steps.append(place))
    assert made.on(made.precisions[0], lambda network, idle_mib: idle_mib) == 2200
    assert steps == ["given back", "cuda:0", "given back"]  # transformers takes "cuda" for the first GPU

    def lost():
        raise OSError("NVML answers no more")

    sense.sample = lost
    assert made.on(made.precisions[0], lambda network, idle_mib: idle_mib) is None


def test_a_failure_that_is_kept_holds_no_model(source, tmp_path, monkeypatch):
    """A notebook keeps its last traceback, whose frames would keep the model and its caches on the device."""
    made, held = Study("smollm2-135m", "bf16", tmp_path), []
    monkeypatch.setattr(made, "checkpoint", lambda precision, say: tmp_path)
    monkeypatch.setattr(model, "load", lambda *_: torch.nn.Linear(2, 2))

    def interrupted(network, idle_mib):
        cache = network.weight.clone()
        held.extend([weakref.ref(network), weakref.ref(cache)])
        try:
            raise RuntimeError("of a library")
        except RuntimeError:
            raise KeyboardInterrupt from None

    with pytest.raises(KeyboardInterrupt) as kept:
        made.on(made.precisions[0], interrupted)
    assert kept.value.__traceback__ and [one() for one in held] == [None, None]


def test_passes_that_an_overwriting_run_did_not_come_to_are_not_shown(unloaded, source, tmp_path, monkeypatch):
    from qnb.speed import benchmark
    from qnb.speed.monitor import Usage

    seconds = iter([1.0, 1.5, 2.0, 1.0, 1.5, 2.0, *3 * [0.1], *3 * [0.2]])

    def run(network, workload, batch_size, engine, base_mib, **_):
        batch_s = (next(seconds),) * 8
        return benchmark.Run(engine, 1, 8, 4, 2, sum(batch_s), batch_s, None, None, Usage("process", 0, 1.0))

    monkeypatch.setattr(benchmark, "run", run)
    for overwrite, passes, rate in ((False, 6, 1 / 1.5), (True, 3, 10)):
        made = Study("smollm2-135m", "bf16", tmp_path, overwrite=overwrite)
        made.perf_bs1(made.workload("bs1", 8, 4, 2, "sample"), 6)
        (row,) = made.table3().to_dict("records")
        assert (row["repeats"], row["throughput_rps"]) == (passes, pytest.approx(rate, rel=0.2))
        assert len(made.frame("perf", "bs1")) == passes
        sleep(1.1)  # rows tell seconds


def test_a_row_measured_anew_leaves_the_file_of_the_row_before_until_it_is_there(
    unloaded, source, tmp_path, monkeypatch
):
    from qnb.speed import benchmark
    from qnb.speed.monitor import Usage

    seconds = iter([1.0, 2.0])

    def run(network, workload, batch_size, engine, base_mib, **_):
        batch_s = (next(seconds),) * 8
        made = benchmark.Run(engine, 1, 8, 4, 2, sum(batch_s), batch_s, None, None, Usage("process", 0, 1.0))
        return replace(made, readings=({"t_s": batch_s[0]},))

    monkeypatch.setattr(benchmark, "run", run)
    made = Study("smollm2-135m", "bf16", tmp_path)
    workload = made.workload("bs1", 8, 4, 2, "sample")
    made.perf_bs1(workload)
    anew = Study("smollm2-135m", "bf16", tmp_path, overwrite=True)
    anew.limits()

    def killed(key, asked, values):
        raise KeyboardInterrupt

    monkeypatch.setattr(anew, "_append", killed)
    with pytest.raises(KeyboardInterrupt):
        anew.perf_bs1(workload)
    assert len(list(tmp_path.glob("samples/*.parquet"))) >= 3, "nothing was written before the row"
    files = [finding for finding in verify(tmp_path) if finding.part.startswith("samples/")]
    assert files and not [finding for finding in files if finding.wrong]


@pytest.mark.parametrize("broken", [False, True])
def test_passes_asked_for_again_are_all_shown(broken, unloaded, source, tmp_path, monkeypatch):
    """Whatever was asked between, and whichever of them had to be measured anew."""
    from qnb.speed import benchmark
    from qnb.speed.monitor import Usage

    seconds = cycle([1.0, 1.5, 2.0])

    def run(network, workload, batch_size, engine, base_mib, **_):
        batch_s = (next(seconds) if workload.new_tokens == 2 else 1.0,) * 8
        return benchmark.Run(engine, 1, 8, 4, 2, sum(batch_s), batch_s, None, None, Usage("process", 0, 1.0))

    monkeypatch.setattr(benchmark, "run", run)
    made = Study("smollm2-135m", "bf16", tmp_path)
    one, other = (made.workload("bs1", 8, 4, new_tokens, "sample") for new_tokens in (2, 3))
    assert len(made.perf_bs1(one, 6)) == 6
    sleep(1.1)
    if broken:
        path = tmp_path / "ledger.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        place = next(place for place, line in enumerate(lines) if b'"repeat": 0' in line and b'"perf"' in line)
        path.write_bytes(b"".join([*lines[:place], lines[place].replace(b"1.0", b"3.0", 1), *lines[place + 1 :]]))
        made = Study("smollm2-135m", "bf16", tmp_path)
    else:
        assert len(made.perf_bs1(other, 6)) == 3
    made.perf_bs1(one, 6)
    assert (made.table3().repeats.tolist(), made.table3().stopped.tolist()) == ([6], ["limit"])


def test_limits_are_measured_before_anything_is_loaded_or_held_to_less_memory(source, tmp_path, monkeypatch):
    from qnb.speed import batch_search as batch
    from qnb.speed import benchmark

    made, steps = Study("smollm2-135m", "bf16", tmp_path), []
    limits = benchmark.Limits(1e9, {}, None)
    monkeypatch.setattr(benchmark, "undisturbed_limits", lambda place: steps.append("limits") or limits)
    monkeypatch.setattr(made, "_limited", lambda allowed: steps.append("held") or nullcontext())
    monkeypatch.setattr(made, "on", lambda precision, measure: steps.append("loaded") or measure(None, 0.0))
    monkeypatch.setattr(made, "_settle", lambda precision: None)
    monkeypatch.setattr(benchmark, "largest_batch", lambda *rest: batch.Largest(2, 100.0, True, ()))
    monkeypatch.setattr(made, "_repeat", lambda *_: None)
    made.perf_maxbatch(made.workload("maxbatch", 2, 4, 2, "sample"), 2)
    assert steps == ["limits", "held", "loaded"]


def test_what_there_is_not_is_named_with_what_there_is(tmp_path):
    made = Study("smollm2-135m", "bf16", tmp_path)
    with pytest.raises(InputError, match=r"setting is 'bs2'; give 'bs1' or 'maxbatch'"):
        made.workload("bs2", 1, 4, 2, "sample")
    for ask in (made.causes, made.t4_estimate):
        with pytest.raises(InputError, match="number 5; give 3"):
            ask(5)
    for name, what in ((str(tmp_path / "none"), "is no folder"), (__file__, "is a file")):
        with pytest.raises(InputError, match=what):
            Study(name, output=tmp_path / "other")


def test_a_row_that_does_not_fit_is_told_with_what_there_was(tmp_path):
    made = Study("smollm2-135m", "bf16", tmp_path)
    with pytest.raises(
        InputError,
        match=r"memory_mib is 1: out of memory: one request takes [\d,]+ MiB where 1 MiB are allowed",
    ):
        made.perf_maxbatch(made.workload("maxbatch", 2, 4, 2, "sample"), 2, 1)


@pytest.mark.parametrize("setting", ["bs1", "maxbatch"])
def test_a_study_with_one_of_the_two_settings_is_drawn_all_the_same(setting, unloaded, tmp_path, monkeypatch):
    from qnb.speed import benchmark
    from qnb.speed.batch_search import Largest
    from qnb.speed.monitor import Usage

    def run(network, workload, batch_size, engine, base_mib, **_):
        return benchmark.Run(engine, batch_size, 2, 4, 2, 1.0, (1.0,), 1.0, 1.0, Usage("process", 0, 1.0))

    monkeypatch.setattr(benchmark, "run", run)
    monkeypatch.setattr(benchmark, "largest_batch", lambda *_: Largest(2, 100.0, True, ()))
    made = Study("smollm2-135m", "bf16", tmp_path)
    work = made.workload(setting, 2, 4, 2, "sample")
    assert len(made.perf_bs1(work) if setting == "bs1" else made.perf_maxbatch(work, 2)) == 1
    found = made.results()
    assert (len(found.bs1), len(found.maxbatch)) == ((1, 0) if setting == "bs1" else (0, 1))
    assert made.frame("perf", "maxbatch" if setting == "bs1" else "bs1").empty


def test_a_checkpoint_that_cannot_be_made_does_not_keep_others_from_the_hub(source, tmp_path, monkeypatch):
    made = Study("smollm2-135m", "bf16,int8,nf4", tmp_path)

    def checkpoint(precision, say=False):
        if precision.name == "int8":
            raise RuntimeError("no such kernel")
        return tmp_path / precision.name

    sent = hub.Push("me/x", True, ("a",), 5.0)
    monkeypatch.setattr(made, "checkpoint", checkpoint)
    monkeypatch.setattr(hub, "push", lambda folder, name, *_: replace(sent, repository=name))
    frame = made.push("me/x")
    assert list(frame.repository) == ["me/x-bf16", "me/x-nf4"]
    assert pd.read_csv(tmp_path / "push.csv").precision.tolist() == ["bf16", "nf4"]
    made.precisions = parse("int8")
    with pytest.raises(RuntimeError, match="no such kernel"):
        made.push("me/x")


@pytest.mark.gpu
def test_a_gpu_times_both_engines_alone_and_together(tmp_path, monkeypatch):
    """The stages of 03 and 04 as their notebooks run them."""
    monkeypatch.setattr(decode, "COMPILE", None)  # kernels have their own test, and each size takes half a minute
    made = Study(model.EMBEDDED, "bf16,int8,nf4", tmp_path / "study")
    work = made.workload("bs1", 4, 16, 12, "sample")
    alone = made.perf_bs1(work, 2)
    together = made.perf_maxbatch(work, 4)
    swept = made.sweep(work, 2)
    for frame in (alone, together):
        timed = frame.dropna(subset=["throughput_rps"])
        pairs = set(zip(timed.precision, timed.engine, strict=True))
        assert pairs == {(p, e) for p in ("bf16", "nf4") for e in ("eager", "cuda_graph")} | {("int8", "eager")}
        assert timed.peak_allocated_mib.notna().any()
        assert set(timed.bound.dropna()) <= {"launch", "bandwidth", "compute", "kernels"}
        missing = frame[frame.engine.eq("cuda_graph") & frame.precision.eq("int8")]
        assert missing.note.str.contains("outlier").all()
    assert (together.dropna(subset=["throughput_rps"]).batch_size == 4).all()
    idle_mib = [row["monitor_baseline_mib"] for row in made.ledger if row.get("monitor_baseline_mib")]
    later = idle_mib[len(alone.dropna(subset=["throughput_rps"])) :]  # kernels are loaded as they are met first
    assert max(later) - min(later) < 100 and max(idle_mib) - min(idle_mib) < 200  # no model stays: NF4's is 111
    assert torch.cuda.memory_reserved() < 2**26
    assert set(swept.batch_size) == {1, 2} and made.results().bs1.kernel_s_per_token.notna().any()
    assert not made.ledger.failures()
