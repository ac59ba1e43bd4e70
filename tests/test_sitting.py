"""A whole sitting on a simulated T4: the real stages plan and measure, by a clock that a model of the card moves.

Steps take what the T4's datasheet allows. What the host does takes as long as was measured elsewhere, times a factor.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from weakref import WeakSet

import pandas as pd
import pytest

from qnb import Study, budget, device, memory, prompts
from qnb.accuracy import evaluate, perplexity
from qnb.accuracy.tasks import SIZES, Score, TaskResult
from qnb.device import Device
from qnb.precision import Precision
from qnb.provenance import ROOT
from qnb.quantize import checkpoint, files
from qnb.quantize.sources import Source
from qnb.report.page import limits
from qnb.session import Session
from qnb.speed import batch_trials, benchmark, device_peaks, engines, passes, stages
from qnb.speed.batch_search import Probe
from qnb.speed.benchmark import Run, Timed

KEPT = ROOT / "outputs" / "reference" / "t4-rehearsal" / "plan.csv"
PARAMETERS = 1_235_814_400  # of Llama-3.2-1B
WEIGHTS_MIB = {"bf16": 2357, "fp16": 2357, "int8": 1434, "int4": 1016, "nf4": 1016}
KV_MIB_PER_TOKEN = 1 / 32
LOGITS_BYTES = 2 * 128_256  # of a token
MEMORY_MIB = 15360
# NVIDIA T4 datasheet (DS-09120): GDDR6 320+ GB/s; FP16 65 TFLOP/s, FP32 8.1, INT8 130 TOPS. Turing has no bfloat16
# units: such products are done in 32 bit.
T4_BYTES_PER_S = 320e9
T4_FLOP_PER_S = {"float16": 65e12, "float32": 8.1e12, "bfloat16": 8.1e12, "int8": 130e12}
# seconds of the host, measured on two cores: a checkpoint made, one loaded, a step compiled, MMLU's 57 tasks built,
# kernels traced, a notebook begun; and of the network, assumed: packages installed, MMLU's data and 2.5 GB of weights
# fetched
CONVERT_S, LOAD_S, COMPILE_S, BUILD_S, TRACE_S, BEGIN_S = 8.6, 4.0, 20.0, 10.0, 3.0, 10.0
INSTALL_S, FETCH_S, FETCH_WEIGHTS_S = 60.0, 60.0, 30.0
# of stand_in.log: a token's launches; a step captured whose kernels are there; a size of a sweep, beside its requests
LAUNCH_S = {"bf16": 0.016, "fp16": 0.020, "int8": 0.065, "int4": 0.028, "nf4": 0.025}
CAPTURE_S, SIZE_S = 6.0, 2.0
UNFUSED_S = 0.003  # of a captured step's small kernels where none is fused, measured on an H200
DEQUANTIZED_MIB = {"int4": 7424, "nf4": 3712}  # written and read again where weights serve more than one token
ITEM_TOKENS = {"arc_challenge": 90, "arc_easy": 80, "hellaswag": 180, "mmlu": 150, "gsm8k": 1000, "gsm8k_cot": 65}
PREFIX_TOKENS = {"gsm8k": 0, "gsm8k_cot": 730}  # which all items share: read once, and kept for each
CHOICE_TOKENS = sum(SIZES[task][0] * tokens for task, tokens in ITEM_TOKENS.items() if not task.startswith("gsm8k"))
NEW_TOKENS = 256  # of a generated answer; its batches hold at most so many items
GENERATED_ROWS = 64
REPEATED = 9  # times that a step which is not captured moves the KV cache, as it copies it for each query's head


@dataclass(frozen=True, eq=False)
class FakeModel:
    """What stands for a loaded checkpoint."""

    precision: Precision


class SimulatedT4:
    """A clock, and what each part of a study takes on it."""

    device = Device("cuda", "Tesla T4", MEMORY_MIB, "emulated", "570")
    bytes_per_s, flop_per_s, launch_s = T4_BYTES_PER_S, T4_FLOP_PER_S, LAUNCH_S

    def __init__(self, slowness):
        self.now_s, self.slowness, self.models = 0.0, slowness, WeakSet()

    def host(self, seconds):
        self.now_s += self.slowness * seconds

    def load(self, folder, precision, place):
        self.host(LOAD_S)
        model = FakeModel(precision)
        self.models.add(model)
        return model

    def free_bytes(self, _):
        return memory.MIB * (self.device.memory_mib - sum(WEIGHTS_MIB[model.precision.name] for model in self.models))

    def step_s(self, precision, tokens, kv_tokens=0):
        """Return the seconds of one forward over so many tokens, of a cache of so many."""
        rate = self.flop_per_s[precision.compute_dtype]
        read_mib = WEIGHTS_MIB[precision.name] + KV_MIB_PER_TOKEN * kv_tokens
        read_mib += DEQUANTIZED_MIB.get(precision.name, 0) * (tokens > 1)
        return max(2 * PARAMETERS * tokens / rate, 2**20 * read_mib / self.bytes_per_s)

    def generate(self, precision, rows, prompt_tokens, new_tokens, engine="eager"):
        """Take the time of a batch; return it."""
        before_s = self.now_s
        self.now_s += self.step_s(precision, rows * prompt_tokens)
        step_s = self.step_s(precision, rows, rows * (prompt_tokens + new_tokens))
        if engine == "eager":
            step_s = max(step_s, self.launch_s[precision.name] * self.slowness)
        elif precision.name == "bf16":
            step_s += UNFUSED_S
        self.now_s += new_tokens * step_s
        return self.now_s - before_s

    def build(self, precision, rows, engine, is_first):
        """Take the time of what a timing takes beside its requests: a step built and captured, kernels traced."""
        self.host(TRACE_S * is_first)
        if engine == "cuda_graph":
            is_new = is_first if rows == 1 else rows == 2 and not is_first
            is_compiled = is_new and precision.name != "bf16"  # for which a T4 has no units
            self.host(COMPILE_S * is_compiled + (CAPTURE_S * (rows > 1) if is_first else SIZE_S))

    def warm_up(self, precision, rows, prompt_tokens, new_tokens, engine):
        """Take the time of a model's check, which is one for both engines, and of warming up."""
        checked = min(rows, benchmark.CHECKED_PROMPTS)
        for _ in range(0, benchmark.CHECKED_PROMPTS * (engine == "eager"), checked):
            self.generate(precision, checked, prompt_tokens, benchmark.CHECKED_TOKENS)
        self.generate(precision, 1, prompt_tokens, 2 * benchmark.WARM_UP_TOKENS, engine)
        if rows > 1:
            self.generate(precision, rows, prompt_tokens, new_tokens, engine)

    def trials(self, precision, workload, limit_mib, engine, baseline_mib):
        """Return a function that tries a batch of so many rows."""
        tokens, idle_mib = (len(workload.longest), workload.new_tokens), WEIGHTS_MIB[precision.name]
        if engine == "cuda_graph":  # there are no units for bfloat16: such a step is not compiled
            self.host(CAPTURE_S if precision.name == "bf16" else COMPILE_S)

        def try_batch(rows):
            mib = idle_mib + KV_MIB_PER_TOKEN * rows * sum(tokens)
            self.generate(precision, rows, *tokens, engine) if mib <= limit_mib else self.host(1.0)
            return Probe(rows, mib <= limit_mib, mib, mib, idle_mib=idle_mib)

        return try_batch

    def answer(self, precision, rows, task):
        """Take the time of generated answers: steps are captured, unless outliers are read back to the host."""
        prefix, prompt, name = PREFIX_TOKENS[task], ITEM_TOKENS[task], precision.name
        self.now_s += self.step_s(precision, rows * prompt) + self.step_s(precision, prefix + 1)
        kv_tokens = rows * (prefix + prompt + NEW_TOKENS)
        if precision.threshold:
            step_s = max(self.step_s(precision, rows, REPEATED * kv_tokens), self.slowness * self.launch_s[name])
        else:
            self.host(4 * self.launch_s[name])  # steps before and while one is captured
            step_s = self.step_s(precision, rows, kv_tokens) + UNFUSED_S
        self.now_s += NEW_TOKENS * step_s


class SimulatedH200(SimulatedT4):
    """An H200. All choices of five formats take 86 s, LLM.int8's first answers 57, with a host of slowness 0.5."""

    device = Device("cuda", "NVIDIA H200", 143_771, "native", "570")
    bytes_per_s, launch_s = 4.8e12, LAUNCH_S | {"int8": 57 / NEW_TOKENS}
    flop_per_s = dict.fromkeys(T4_FLOP_PER_S, 5 * 2 * PARAMETERS * CHOICE_TOKENS / 86)


class FakeTask:
    """A task of the paper's, without data."""

    is_multiple_choice = property(lambda self: not self.is_generated)

    def __init__(self, name, card):
        self.name, self.groups, self.is_generated = name, {}, name.startswith("gsm8k")
        self.new_tokens = NEW_TOKENS * self.is_generated
        card.host(BUILD_S if name == "mmlu" else 1.0)
        card.now_s += FETCH_S if name == "mmlu" else 0.0
        total, parts = SIZES[name]
        self.sizes = {f"{name}_{part}" if parts > 1 else name: total // parts for part in range(parts)}

    def n_items(self, limit):
        return sum(min(limit or size, size) for size in self.sizes.values())

    def data_sha256(self, limit):
        return f"{self.name} {limit}"


@pytest.fixture
def sitting(tmp_path, tiny, monkeypatch):
    """Returns a function that makes a study on the simulated card."""

    def make(slowness, minutes=25.0, simulated=SimulatedT4):
        card = simulated(slowness)
        patch = monkeypatch.setattr
        patch(budget, "time", SimpleNamespace(perf_counter=lambda: card.now_s))
        patch(Device, "use", lambda _: None)
        patch(device, "detect", lambda _: card.device)
        patch(Source, "parameters", PARAMETERS)

        def convert(source, precision, folder, device):
            card.now_s += 0 if folder.parent.exists() else FETCH_WEIGHTS_S
            card.host(CONVERT_S)
            folder.mkdir(parents=True)
            (folder / files.MANIFEST).write_text("{}")
            kinds = {name: 0 for name in checkpoint.Weights.__slots__ if name != "left_out"}
            return checkpoint.Checkpoint(**kinds, left_out={}, file_mib=0, quantize_s=0, load_s=0)

        patch(checkpoint, "convert", convert)
        patch(checkpoint, "load", card.load)
        patch(memory, "free_bytes", card.free_bytes)
        _simulate_accuracy(card, patch)
        _simulate_speed(card, patch)
        study = Study("shape:llama-3.2-1b", "study", tmp_path / "study", minutes=minutes)
        session = study.session
        session.source = Source("meta-llama/Llama-3.2-1B", "named", str(tmp_path), "0" * 16)
        session.tokenizer, session.config = tiny[1], tiny[0].config
        return study, card

    return make


def _simulate_accuracy(card, patch):
    def evaluate_task(self, task, model, tokenizer, answers_path=None):
        items, precision, started_s = task.n_items(self.limits[task.name]), model.precision, card.now_s
        is_kept = self.in_rounds and answers_path.exists()
        kept = json.loads(answers_path.read_text()) if is_kept else {"seconds": 0.0, "items": 0}
        new = items - kept["items"]
        if task.is_generated:
            for start in range(0, new, GENERATED_ROWS):
                card.answer(precision, min(GENERATED_ROWS, new - start), task.name)
        else:
            read_s = card.step_s(precision, new * ITEM_TOKENS[task.name])
            card.now_s += max(read_s, card.launch_s[precision.name] * card.slowness)
        if self.alone:  # stock scoring runs each of four choices by itself
            card.host(card.launch_s[precision.name] * items * (4 if self.scorer == "hf" else 1))
        answer_s = kept["seconds"] + card.now_s - started_s
        if self.in_rounds:
            assert not precision.threshold, "its answers depend on what shares a batch"
            answers_path.parent.mkdir(exist_ok=True)
            answers_path.write_text(json.dumps({"requests": [], "answers": [], "seconds": answer_s, "items": items}))
        card.host(0.01 * len(task.sizes))
        score = Score(task.name, "acc", "none", 0.4, 0.1, items, task.n_items(None), 0, False)
        return TaskResult((score,), pd.DataFrame({"task": task.name, "doc_id": range(items)}), answer_s=answer_s)

    def distances(model, baseline, ids, context, stride, remembered):
        tokens = 2 * len(ids)  # windows overlap by half
        card.now_s += card.step_s(model.precision, tokens)
        card.now_s += card.step_s(baseline.precision, tokens * (1 - len(remembered) / len(ids)))
        room = (card.free_bytes(None) - perplexity.ROOM_BYTES) // LOGITS_BYTES
        remembered.update(dict.fromkeys(range(min(len(ids), room))))
        return pd.DataFrame({"nll": [1.0] * 4, "window": [0, 0, 1, 1], "kl": [0.1] * 4})

    sample = prompts.paragraphs("sample")
    patch(prompts, "paragraphs", lambda *_: sample * 10)  # as long as WikiText-2's, for what is read of it
    patch(Session, "check_weights", lambda _: None)
    patch(evaluate, "Task", lambda name, data_dir, window: FakeTask(name, card))
    patch(evaluate, "check", evaluate.names)
    patch(evaluate, "_window", lambda _: 8192)
    patch(evaluate.Evaluation, "evaluate", evaluate_task)
    patch(evaluate, "compare_items", lambda usual, _: {"n_items": len(usual)})
    patch(perplexity, "distances", distances)
    patch(perplexity, "summarize", lambda _: {})
    patch(perplexity, "rows_per_batch", lambda *_: 2)


def _simulate_speed(card, patch):
    def measure_peaks(place):
        card.host(5.0)
        return device_peaks.DevicePeaks(card.bytes_per_s, dict(card.flop_per_s))

    def with_model(session, precision, measure):
        session.checkpoint(precision)
        card.host(LOAD_S)
        return measure(passes.Loaded(session.pinned(precision), 0.0))

    def run(precision, workload, batch_size, engine="eager", baseline_mib=0.0, peaks=None, kernels=""):
        card.build(precision, batch_size, engine, kernels is not None)
        batches = benchmark.full_batches(workload.prompts, batch_size)
        shape = {"prompt_tokens": len(workload.longest), "new_tokens": workload.new_tokens}
        rows, tokens = len(batches[0]), (len(workload.longest), workload.new_tokens)
        card.warm_up(precision, rows, *tokens, engine)
        times_s = [card.generate(precision, rows, *tokens, engine) for _ in batches]
        values = {"batch_s": tuple(times_s), "total_s": sum(times_s), "duration_s": sum(times_s), "ttft_s": 0.1}
        requests = sum(map(len, batches))
        row = Run(**shape, **values, batch_size=rows, requests=requests, monitor="process")
        return Timed(row, [{"t_s": 0.0}], [[0.5, 1.0]])

    def why_unavailable(engine, device_kind, int8_threshold=0.0, model=None, *_):
        threshold = model.threshold if model else int8_threshold
        return "it cannot be captured" if engine == "cuda_graph" and threshold else ""

    patch(device_peaks, "measure_peaks", measure_peaks)
    patch(benchmark, "run", run)
    patch(batch_trials, "Trials", card.trials)
    patch(engines, "why_unavailable", why_unavailable)
    patch(passes.Series, "last_safe_batch", 10**9)
    patch(stages.memory, "limited", lambda *_: nullcontext())
    patch(passes.memory, "release", lambda **_: None)
    patch(passes, "with_model", with_model)


def reopened(study, precisions="study", minutes=0.0, overwrite=False):
    """The study in a new process, or with other minutes."""
    again = Study("shape:llama-3.2-1b", precisions, study.folder, minutes=minutes, overwrite=overwrite)
    for name in ("source", "tokenizer", "config", "tasks"):
        setattr(again.session, name, getattr(study.session, name))
    return again


def run_all(study, card):
    """Call what the notebooks call, with their own parameters."""
    card.now_s += INSTALL_S
    card.host(5 * BEGIN_S)
    study.quantize()
    with memory.models_kept():
        study.batch_sensitivity()
        study.divergence()
        study.accuracy()
    study.device_peaks()
    study.perf_bs1(study.workload("bs1"), repeats=3)
    work = study.workload("maxbatch")
    study.perf_maxbatch(work)
    study.sweep(work)


def described(study, card):
    """What a sitting took and bought, as a row of the kept table."""
    ledger, tasks = study.session.ledger, sorted(SIZES.keys() & ITEM_TOKENS.keys())
    items = {(row["precision"], row["task"]): row["scores"][0]["n_items"] for row in ledger.rows("accuracy")}
    (same,) = {tuple(items[name, task] for task in tasks) for name in WEIGHTS_MIB}  # for every format
    timed = [row for row in ledger.rows("perf") if row.get("requests")]
    full = {f"{row['precision']} with {row['engine']}" for row in timed if row["setting"] == "maxbatch"}
    return {
        "host_slowness": card.slowness,
        "minutes": round(card.now_s / 60, 1),
        **{f"notebook_{row['setting']}_min": round(row["taken_s"] / 60, 1) for row in ledger.rows("sitting")},
        **{f"{task}_items": count for task, count in zip(tasks, same, strict=True)},
        "bs1_new_tokens": timed[0]["new_tokens"],
        "bs1_requests": min(row["requests"] for row in timed if row["setting"] == "bs1"),
        "largest_batches": ", ".join(sorted(full)),
        "sizes_swept": sum("requests" in row for row in ledger.rows("sweep")),
    }


@pytest.mark.parametrize("slowness", [1, 2, 3])
def test_a_sitting_ends_in_time_and_buys_what_matters_first(slowness, sitting, capsys):
    """Each format gets an accuracy, and a speed with each engine; what is left out is named."""
    study, card = sitting(slowness)
    run_all(study, card)
    ledger = study.session.ledger
    assert card.now_s <= 60 * 25 and not ledger.failures()
    assert not list((study.folder / "items").glob("*.answers"))
    row = described(study, card)
    kept = pd.read_csv(KEPT, keep_default_na=False).set_index("host_slowness", drop=False)
    assert row == kept.loc[slowness, list(row)].to_dict()
    assert all(row[f"{task}_items"] >= 500 for task in ("arc_challenge", "arc_easy", "hellaswag"))
    assert row["mmlu_items"] >= 1000 and min(row["gsm8k_items"], row["gsm8k_cot_items"]) >= 40
    assert {each["tokens"] for each in ledger.rows("divergence")} == {16384}
    assert [each["setting"] for each in ledger.rows("batch_sensitivity")] == ["qnb"] * 5
    # every format and engine is timed once before any is timed again
    timed = [each for each in ledger.rows("perf") if each["setting"] == "bs1" and each.get("requests")]
    assert len({(each["precision"], each["engine"]) for each in timed}) == 9 and row["bs1_requests"] >= 3
    assert [each["repeat"] for each in timed] == sorted(each["repeat"] for each in timed)
    # the largest batches are full ones, and what there is no time for is named
    assert all(each["batch_size"] == 512 for each in ledger.rows("batch"))
    (note,) = [each["note"] for each in ledger.rows("left_out") if each["setting"] == "largest batches"]
    assert f"largest batches: {note}" in capsys.readouterr().out and f"{note}." in "".join(limits(study.results()))
    (left_out,) = [each["names"] for each in ledger.rows("left_out") if each["setting"] == "largest batches"]
    names = {f"{each['precision']} with {each['engine']}" for each in timed}
    assert names - set(row["largest_batches"].split(", ")) == set(left_out) and ", ".join(left_out) in note
    # it is taken back for the formats that get time
    for precisions, left in (("bf16,fp16", {name for name in left_out if name.split()[0] not in ("bf16", "fp16")}),
                             ("study", set())):  # fmt: skip
        again = reopened(study, precisions)
        own = [each.name for each in again.session.precisions]
        is_left_out = {name: False for name in names if name.split()[0] in own}
        budget.name_left_out(again.session, "largest batches", is_left_out)
        rows = again.session.ledger.rows("left_out")
        assert left == {name for each in rows if each["setting"] == "largest batches" for name in each["names"]}


def test_spent_minutes_buy_a_first_pass_and_more_minutes_go_on_from_there(sitting):
    study, card = sitting(1, minutes=5)
    study.accuracy()
    card.now_s += 600
    first = {(row["task"], row["precision"]): row["limit"] for row in study.session.ledger.rows("accuracy")}
    study.perf_bs1(study.workload("bs1"), repeats=3)
    rows = [row for row in study.session.ledger.rows("perf") if row.get("requests")]
    assert len(rows) == 9 and {row["repeat"] for row in rows} == {0}
    again = reopened(study, minutes=60)
    before_s = card.now_s
    again.accuracy()
    more = {(row["task"], row["precision"]): row["limit"] for row in again.session.ledger.rows("accuracy")}
    assert all(more[name] >= first[name] for name in first) and sum(more.values()) > 3 * sum(first.values())
    assert 0.5 * 60 * 60 * budget.SHARES["02"] < card.now_s - before_s < 60 * 60 * budget.SHARES["02"]


def test_overwriting_every_format_plans_for_the_minutes_of_now(sitting):
    study, card = sitting(1, minutes=120)
    study.accuracy()
    before_s, again = card.now_s, reopened(study, minutes=10, overwrite=True)
    again.accuracy()
    assert card.now_s - before_s < 60 * 10 * budget.SHARES["02"] * 1.1


def test_answers_that_take_too_long_to_generate_leave_their_time_to_choices_and_are_named(sitting, capsys):
    """Of 90 s on an H200 their share is 36, and they would take more. More minutes add them."""
    study, card = sitting(0.5, 0, SimulatedH200)
    study.quantize()
    for task in ITEM_TOKENS:
        evaluate.build(study.session, task)
    for seconds, names in ((90, ["gsm8k", "gsm8k_cot"]), (360, [])):
        again, before_s = reopened(study, minutes=seconds / 60 / budget.SHARES["02"]), card.now_s
        with memory.models_kept():
            again.accuracy()
        assert card.now_s - before_s <= seconds
        ledger = again.session.ledger
        items = {row["task"]: row["scores"][0]["n_items"] for row in ledger.rows("accuracy")}
        for task, share in {"arc_challenge": 1, "arc_easy": 1, "hellaswag": 0.5, "mmlu": 0.5}.items():
            assert items[task] >= share * SIZES[task][0]
        (row,) = [each for each in ledger.rows("left_out") if each["setting"] == "generated answers"]
        assert row["names"] == names and items.keys() == ITEM_TOKENS.keys() - set(names)
        line = f"generated answers: {row['note']}"
        assert bool(names) == (line in capsys.readouterr().out) == (f"{line}." in limits(again.results()))


def test_formats_added_later_count_for_generated_answers_which_a_run_without_minutes_takes_back(sitting):
    study, _ = sitting(0.5, 0, SimulatedH200)
    study.quantize()
    for task in ITEM_TOKENS:
        evaluate.build(study.session, task)
    for precisions, seconds in (("bf16", 2.4), ("study", 90)):
        with memory.models_kept():
            reopened(study, precisions, minutes=seconds / 60 / budget.SHARES["02"]).accuracy()
    (row,) = [each for each in study.session.ledger.rows("left_out") if each["names"]]
    assert row["names"] == ["gsm8k", "gsm8k_cot"]
    reopened(study, minutes=0).accuracy("gsm8k", limit=8)
    (row,) = study.session.ledger.rows("left_out")
    assert row["names"] == ["gsm8k_cot"] and row["note"].endswith("3.48837 minutes do not suffice; more add it")
