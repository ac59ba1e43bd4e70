"""The speed stages: what is timed, in which order, until when, and what a failure costs. Only the search is real."""

import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from qnb.device import Device
from qnb.errors import InputError
from qnb.flags import Flag, flag_text
from qnb.precision import PRECISIONS
from qnb.report import page, tables
from qnb.report.results import Results
from qnb.session import Session
from qnb.speed import batch_search, batch_trials, benchmark, device_peaks, engines, passes, plan, stages
from qnb.speed.batch_search import LargestBatch, Probe
from qnb.speed.benchmark import Run, Timed
from qnb.speed.stages import TimingOptions, WorkloadOptions, perf_bs1, perf_maxbatch, sweep


class Lab:
    """A session whose timings, models and searches are a test's own; what it loads and times is listed."""

    def __init__(self, monkeypatch, folder, source, tokenizer):
        self.monkeypatch, self.folder, self.source, self.tokenizer = monkeypatch, folder, source, tokenizer
        self.loaded, self.timed, self.model = [], [], None
        self.seconds, self.stand_in = lambda call: 1.0, ""
        monkeypatch.setattr(device_peaks, "measure_peaks", lambda place: device_peaks.DevicePeaks(1e9, {}))
        monkeypatch.setattr(benchmark, "run", self._run)
        monkeypatch.setattr(passes.memory, "release", lambda **_: None)
        monkeypatch.setattr(passes, "with_model", self._with_model)

    def open(self, precisions="bf16", **options):
        session = Session("smollm2-135m", precisions, self.folder, **options)
        session.source, session.tokenizer = self.source, self.tokenizer  # not read anew for each
        return session

    def search_finds(self, *found):
        """Let a search tell what `found` does, without a model."""
        self.monkeypatch.setattr(batch_trials, "Trials", lambda *_: None)
        self.monkeypatch.setattr(batch_search, "find_largest_batch", lambda *_: LargestBatch(*found))

    def _with_model(self, session, precision, measure):
        self.loaded.append(precision.name)
        return measure(passes.Loaded(self.model, 0.0))

    def _run(self, model, workload, batch_size, engine="eager", baseline_mib=0.0, peaks=None, kernels=""):
        self.timed.append((self.loaded[-1], batch_size, kernels is not None))
        batch_s = self.seconds(len(self.timed))
        batch_s = batch_s if isinstance(batch_s, tuple) else (batch_s,) * 2
        shape = {"batch_size": batch_size, "prompt_tokens": 4, "new_tokens": 2, "requests": len(workload.prompts)}
        times_s = {"duration_s": 1.0, "total_s": sum(batch_s), "ttft_s": 1.0, "batch_s": batch_s}
        run = Run(**shape, **times_s, monitor="process", stand_in=self.stand_in)
        return Timed(run, [{"t_s": 0.0}], [[0.5, 1.0]] * 2)


@pytest.fixture
def lab(source, tiny, monkeypatch, tmp_path):
    return Lab(monkeypatch, tmp_path, source, tiny[1])


def workload(session, setting="bs1", requests=8):
    return stages.workload(session, WorkloadOptions(setting, requests, 4, 2, "sample"))


def rows(session, stage="perf"):
    return session.ledger.rows(stage)


out_of_memory = Mock(side_effect=torch.cuda.OutOfMemoryError("simulated"))


def test_passes_have_settled_when_students_interval_is_narrow():
    """Of 1, 1.01 and 1.02 the standard error is 0.01 / sqrt(3), and t is 4.303: a width of 0.0497."""
    assert passes.is_settled([1.0, 1.01, 1.02])
    assert not passes.is_settled([1.0, 1.0105, 1.021]) and not passes.is_settled([1.0, 1.0])


def test_formats_take_turns_until_each_has_settled_and_a_killed_study_goes_on(lab):
    """bf16's passes never settle, fp16's do after three; each turn begins with another format."""
    seen = Counter()

    def seconds(_):
        seen[lab.loaded[-1]] += 1
        return 1 + (0.5 if lab.loaded[-1] == "bf16" else 0.001) * (seen[lab.loaded[-1]] % 3)

    lab.seconds, session = seconds, lab.open("bf16,fp16")
    work = workload(session)
    for _ in range(2):  # the second time nothing is left to do
        perf_bs1(session, TimingOptions(work, repeats=4))
        reasons = {name: [row["stop_reason"] for row in rows(session) if row["precision"] == name] for name in seen}
        assert reasons == {"bf16": ["", "", "", "limit"], "fp16": ["", "", "interval"]}
    assert lab.loaded == ["bf16", "fp16", "fp16", "bf16", "bf16", "fp16", "bf16"]
    assert all((lab.folder / row[name]).exists() for row in rows(session) for name in ("samples_file", "tokens_file"))
    ledger = lab.folder / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-2]))  # killed before two passes
    again = lab.open("bf16,fp16")
    perf_bs1(again, TimingOptions(work, repeats=4))
    assert lab.loaded[7:] == ["fp16", "bf16"] and len(rows(again)) == 7
    perf_bs1(lab.open("fp16", overwrite=True), TimingOptions(work, repeats=4))
    assert lab.loaded[9:] == ["fp16"] * 3


def test_what_fails_costs_its_format_alone_and_is_tried_again(lab):
    """INT8's search runs out of memory, and NF4's first pass fails."""
    lab.search_finds(2, 100.0, True, ())
    lab.seconds = lambda call: 1 // 0 if lab.loaded[-1] == "nf4" else 1.0
    find, session = batch_search.find_largest_batch, lab.open("bf16,int8,nf4")
    options = TimingOptions(workload(session, "maxbatch", 2), repeats=3)
    with lab.monkeypatch.context() as patch:
        fails_for_int8 = lambda *_: out_of_memory() if lab.loaded[-1] == "int8" else find()  # noqa: E731
        patch.setattr(batch_search, "find_largest_batch", fails_for_int8)
        perf_maxbatch(session, options)
    failures = {(row["stage"], row["precision"]): (row["error"], row["reason"]) for row in session.ledger.failures()}
    assert failures["batch.failed", "int8"] == ("OutOfMemoryError", "out of memory")
    assert failures["perf.failed", "nf4"][0] == "ZeroDivisionError" and len(failures) == 2
    assert [row["precision"] for row in rows(session)] == ["bf16"] * 3
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        perf_maxbatch(lab.open("nf4"), options)
    lab.seconds = lambda call: 1.0
    perf_maxbatch(lab.open("bf16,int8,nf4"), options)
    assert session.ledger.failures() == [] and Counter(lab.loaded) == {"bf16": 3, "int8": 4, "nf4": 5}


def test_an_engine_that_cannot_run_is_not_searched_for_and_leaves_a_row_that_says_why(lab, monkeypatch):
    """No GPU is there for one engine; the other cannot run NF4's model once that is loaded."""
    monkeypatch.setattr(engines, "parse", lambda names, kind: ("eager", "cuda_graph"))
    own = passes.Series.why_unavailable

    def why_unavailable(series, model=None):
        return "not NF4's" if model and series.precision.name == "nf4" else own(series)

    monkeypatch.setattr(passes.Series, "why_unavailable", why_unavailable)
    lab.search_finds(2, 100.0, True, ())
    lab.model, session = object(), lab.open("bf16,nf4")
    perf_maxbatch(session, TimingOptions(workload(session, "maxbatch", 8), repeats=1))
    notes = {(row["precision"], row["engine"]): row.get("note") for row in rows(session) if "total_s" not in row}
    assert notes.pop(("nf4", "eager")) == "not NF4's" and len(notes) == 2
    assert all("no NVIDIA GPU" in note for note in notes.values())
    for found in (rows(session, "batch"), [row for row in rows(session) if "total_s" in row]):
        assert [row["precision"] for row in found] == ["bf16"]


def test_other_kernels_that_stand_in_leave_a_row_without_speed(lab):
    lab.stand_in, session = "ampere_sgemm", lab.open()
    perf_bs1(session, TimingOptions(workload(session), repeats=3))
    (row,) = rows(session)
    assert "ampere_sgemm" in row["note"] and "total_s" not in row and len(lab.timed) == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_batch_that_shrinks_in_a_later_pass_begins_again_alone(overwrite, lab):
    """int8's second pass does not fit 200 rows; 198 ran in the search. bf16's passes stay, and none is left to do."""
    probes = (Probe(199, False), Probe(198, True, 790.0), Probe(200, True, 800.0))
    lab.search_finds(200, 900.0, False, probes)
    lab.seconds = lambda call: out_of_memory() if lab.timed[-1] == ("int8", 200, False) else float(call)
    session = lab.open("bf16,int8", overwrite=overwrite)
    options = TimingOptions(workload(session, "maxbatch", 200), repeats=3)
    perf_maxbatch(session, options)
    counts = [(("bf16", 200, True), 1), (("bf16", 200, False), 2), (("int8", 200, True), 1), (("int8", 200, False), 1),
              (("int8", 198, True), 1), (("int8", 198, False), 2)]  # fmt: skip
    assert Counter(lab.timed) == dict(counts)
    assert rows(session, "batch")[-1]["probes"][-1]["ended"] == "out of memory when timed"
    newest = {(row["precision"], row["repeat"]): row for row in rows(session)}
    assert {(name, row["batch_size"]) for (name, _), row in newest.items()} == {("bf16", 200), ("int8", 198)}
    assert [newest["int8", repeat]["stop_reason"] for repeat in range(3)] == ["", "", "limit"]
    perf_maxbatch(lab.open("bf16,int8"), options)
    assert len(lab.timed) == 8


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (MemoryError("7 MiB are allowed"), "memory_mib is 7: .*7 MiB"),
        (InputError("too long"), "too long"),
        (ArithmeticError(), "ArithmeticError"),
    ],
)
def test_a_search_that_fails_for_all_is_told_whatever_failed_before(error, named, lab, monkeypatch):
    monkeypatch.setattr(batch_trials, "Trials", Mock(side_effect=error))
    session = lab.open("int8")
    for old in ("fp32", "int8"):  # of another format, and of this one with another engine
        with session.failing(session.key("batch", PRECISIONS[old], {}, engine="cuda_graph"), "an old search"):
            out_of_memory()
    expected = RuntimeError if isinstance(error, ArithmeticError) else InputError
    with pytest.raises(expected, match=named):
        perf_maxbatch(session, TimingOptions(workload(session, "maxbatch", 8), memory_mib=7))


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_no_batch_is_tried_that_may_end_its_process_as_eager_int8s_may_on_a_gpu(kind, lab, monkeypatch):
    """A search ends before it; a sweep has a note for the first size that was left out."""
    monkeypatch.setattr(batch_search, "int32_rows", lambda config, tokens: 5 if tokens == 4 else 0)
    monkeypatch.setattr(batch_trials, "Trials", lambda *_: lambda batch_size: Probe(batch_size, True, 1.0))
    monkeypatch.setattr(engines, "why_unavailable", lambda *_, **__: "")
    monkeypatch.setattr(stages.memory, "limited", lambda *_: nullcontext())
    monkeypatch.setattr(Device, "use", lambda _: None)
    session = lab.open("nf4,int8,int8-no-outliers")
    session.device = Device(kind, "a machine", 1024, "native", "")
    ledgers = []
    for _ in range(2):  # the second time nothing is left to do
        sweep(session, TimingOptions(workload(session, "maxbatch", 3), sweep_batch=12))
        ledgers.append(session.ledger.path.read_bytes())
    assert ledgers[0] == ledgers[1]
    perf_maxbatch(session, TimingOptions(workload(session, "maxbatch", 8), repeats=1))
    for row in rows(session, "batch"):
        of = row["engine"], row["precision"]
        swept = [each for each in rows(session, "sweep") if (each["engine"], each["precision"]) == of]
        notes, is_unsafe = {each["batch_size"]: each["note"] for each in swept}, row["batch_size"] == 5
        assert is_unsafe == (kind == "cuda" and of[0] == "eager" and of[1] != "nf4") == (row["capped"] is False)
        assert notes == dict.fromkeys([1, 2, 4], "") | ({5: "", 8: stages.UNSAFE} if is_unsafe else {8: "", 12: ""})
        assert (stages.UNSAFE in row.get("note", "")) == is_unsafe
    results, note = Results.read(session.ledger), f"larger batches were {stages.UNSAFE}"
    assert (note in tables.labelled(results.batches, tables.SEARCHES).to_string()) == (kind == "cuda")
    assert (f"int8 eager, int8-no-outliers eager: {note}." in page.limits(results)) == (kind == "cuda")


def test_a_sweep_ends_where_a_batch_does_not_fit_and_tries_it_again(lab, monkeypatch):
    """Memory is given back before a size is tried a second time: two rows then fit, eight do not."""
    room, released = 4, []
    monkeypatch.setattr(passes.memory, "release", lambda **_: released.append(len(lab.timed)))
    lab.seconds = lambda call: out_of_memory() if call == 2 or lab.timed[-1][1] > room else (1.0, 1.0, 1.25)
    session = lab.open()
    options = TimingOptions(workload(session, "maxbatch", 3), sweep_batch=12)
    sweep(session, options)
    notes = {row["batch_size"]: row.get("note") for row in rows(session, "sweep")}
    assert notes == {1: "", 2: "", 4: "", 8: "out of memory"} and 2 in released
    assert [row["requests"] for row in rows(session, "sweep")[:3]] == [3, 6, 12]
    assert set(Results.read(session.ledger).sweep.batch_size) == {1, 2, 4}
    room = 12
    sweep(session, options)
    assert [size for _, size, _ in lab.timed] == [1, 2, 2, 4, 8, 8, 8, 12] and len(rows(session, "sweep")) == 5


def test_a_sweep_goes_to_the_largest_batch_found_on_a_gpu_and_is_left_out_elsewhere(lab, monkeypatch):
    monkeypatch.setattr(Device, "use", lambda _: None)
    session = lab.open()
    options = TimingOptions(workload(session, "maxbatch", 3), "eager")
    sweep(session, options)
    assert not rows(session, "sweep")
    session.device = Device("cuda", "a card", 1024, "native", "")
    session.append(session.key("batch", session.precisions[0], {}, engine="eager"), {"batch_size": 4})
    sweep(session, options)
    assert [row["batch_size"] for row in rows(session, "sweep")] == [1, 2, 4]


def test_a_budget_takes_fewer_requests_or_new_tokens_the_same_for_formats_added_later(lab, source, monkeypatch):
    """At a copy of 1 GB/s a request of 2 tokens takes 80 s: three are the least. Each setting keeps its first plan."""
    monkeypatch.setattr(plan, "batch_s", lambda session, precision, peaks, shape: 2 * shape.new_tokens)
    for precisions in ("bf16,nf4", "int8"):
        session = lab.open(precisions, minutes=25)
        monkeypatch.setattr(type(session.source), "parameters", 20_000_000_000)
        assert len(stages.workload(session, WorkloadOptions("bs1", "auto", 4, 2, "sample")).prompts) == 3
        large = stages.workload(session, WorkloadOptions("maxbatch", 20, 4, 100, "sample"))
        assert len(large.prompts) == 20 and large.new_tokens == 25  # 600 s for both formats, of 300


def test_peaks_are_measured_before_anything_is_loaded_or_held_to_less_memory(lab, monkeypatch):
    steps = []
    monkeypatch.setattr(device_peaks, "measure_peaks", lambda _: steps.append("peaks") or device_peaks.DevicePeaks(1))
    monkeypatch.setattr(stages.memory, "limited", lambda *_: nullcontext(steps.append("limited")))
    lab.search_finds(2, 100.0, True, ())
    lab.seconds = lambda call: steps.append("timed") or 1.0
    session = lab.open()
    perf_maxbatch(session, TimingOptions(workload(session, "maxbatch", 2)))
    assert steps == ["peaks", "limited", "timed"]


@pytest.mark.parametrize(("busy", "tries"), [(9, 3), (1, 2)])
def test_disturbed_peaks_are_measured_again_then_kept_and_said_to_be(busy, tries, lab, monkeypatch, capsys):
    flags, peaks = [[Flag.CPU_SHARED]] * busy + [[]], device_peaks.DevicePeaks(2.0, {"float32": 5.0})
    monkeypatch.setattr(device_peaks, "measure_peaks", lambda place: replace(peaks, flags=flags.pop(0)))
    for is_told in (busy > tries, False):  # the second time nothing is left to do
        expected = [Flag.CPU_SHARED] if busy > tries else []
        assert stages.device_peaks(lab.open()) == replace(peaks, flags=expected)
        assert (f"({flag_text(expected)}); overwrite" in capsys.readouterr().out) == is_told
    assert len(flags) == busy + 1 - tries


def test_peaks_and_samples_that_fail_cost_their_columns_alone(lab, monkeypatch):
    monkeypatch.setattr(device_peaks, "measure_peaks", lambda place: 1 // 0)
    monkeypatch.setattr(passes, "write_parquet", lambda *_: 1 // 0)
    session = lab.open()
    perf_bs1(session, TimingOptions(workload(session), repeats=1))
    (row,) = rows(session)
    assert row["total_s"] == 2 and "samples_file" not in row
    assert stages.device_peaks(session) == device_peaks.DevicePeaks()
    assert {row["error"] for row in session.ledger.failures()} == {"ZeroDivisionError"}


def test_a_model_is_loaded_into_released_memory_and_no_failure_holds_it(source, tmp_path, monkeypatch):
    """A notebook keeps its last traceback, whose frames would keep the model on the device."""
    session, steps, held = Session("smollm2-135m", "bf16", tmp_path), [], []
    monkeypatch.setattr(passes, "_is_warmed_up", True)
    monkeypatch.setattr(session, "checkpoint", lambda precision: tmp_path)
    monkeypatch.setattr(passes.memory, "release", lambda **options: steps.append("released"))
    monkeypatch.setattr("qnb.speed.monitor.used_memory_mib", lambda place: steps.append("read") or 7.0)
    monkeypatch.setattr("qnb.quantize.checkpoint.load", lambda *_: steps.append("loaded") or torch.nn.Linear(2, 2))
    precision = session.precisions[0]
    assert passes.with_model(session, precision, lambda loaded: loaded.baseline_mib) == 7
    assert steps[:2] == ["released", "read"] and "loaded" in steps

    def interrupted(loaded):
        model, cache = loaded.model, loaded.model.weight.clone()
        held.extend([weakref.ref(model), weakref.ref(cache)])
        try:
            raise RuntimeError("of a library")
        except RuntimeError:
            raise KeyboardInterrupt from None

    with pytest.raises(KeyboardInterrupt) as caught:
        passes.with_model(session, precision, interrupted)
    assert caught.value.__traceback__ and [each() for each in held] == [None, None]


def test_lengths_of_prompts_are_recorded_once(lab):
    session = lab.open()
    for _ in range(2):
        stages.prompt_lengths(session, "sample", (2000, 20))
    (row,) = rows(session, "lengths")
    assert row["counts"] == [20, 2000] and row["window"] == 8192 and len(row["lengths"]) == 24


def test_a_continuation_is_told_token_by_token(source, tmp_path):
    session = Session("smollm2-135m", "bf16", tmp_path)
    pieces = stages.continuation(session, "The capital of France is", "bf16", 4)
    assert len(pieces) == 4 and "Paris" in "".join(pieces)
    with pytest.raises(InputError, match="prompt is empty"):
        stages.continuation(session, " ", "bf16")


def test_what_cannot_be_asked_is_refused_before_anything_is_measured(lab):
    session = lab.open()
    for ask, message in (
        (lambda: WorkloadOptions("bs2"), "setting is 'bs2'; give 'bs1' or 'maxbatch'"),
        (lambda: WorkloadOptions("bs1", "0 minutes"), "requests is"),
        (lambda: TimingOptions(4), "workload is 4; give what study"),
        (lambda: stages.prompt_lengths(session, "sample", ()), "counts"),
        (lambda: stages.prompt_lengths(session, "sample", (0,)), "counts"),
        (lambda: stages.workload(session, WorkloadOptions("bs1", 2, 8, 9000, "sample")), "8 prompt and 9000 .* 8192"),
    ):
        with pytest.raises(InputError, match=message):
            ask()
    assert not session.ledger.path.exists()
