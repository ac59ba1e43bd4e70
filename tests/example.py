"""A study that was never measured, with the shape of one that was: for what reads a ledger and measures nothing.

The numbers follow from a made-up device (2.0 TB/s, 200 TFLOP/s) and a made-up model of 1,000 million parameters, so
that figures have something to bend around; they say nothing about any real one.
"""

import json
import math
import random

import pandas as pd

from qnb.ledger import Ledger, write_parquet

DEVICE, BYTES_S, FLOP_S, IDLE_W = "Example GPU", 2.0e12, 2.0e14, 70.0
FORMATS = pd.DataFrame(
    {"weights_mib": [1907.0, 1907.0, 1050.0, 640.0, 640.0],
     "slower": [1.0, 1.0, 1.4, 1.25, 1.1],  # kernel time over that of its bytes
     "launch_s": [0.013, 0.0128, 0.031, 0.019, 0.0165],  # a token's, eager: Python
     "lost": [0, 0.004, 0.02, 0.22, 0.06], "gained": [0, 0.004, 0.018, 0.06, 0.045]},  # share of items that flip
    index=["bf16", "fp16", "int8", "int4", "nf4"],
)  # fmt: skip
TASKS = {"arc_easy": (400, 0.55), "arc_challenge": (300, 0.32), "hellaswag": (500, 0.45)}  # items, BF16's accuracy


def write(folder, model="example/one-billion", precisions=tuple(FORMATS.index), engines=("eager", "cuda_graph")):
    """Write the study into `folder` and return it; `model` may be any text."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"asked": model, "name": model, "reason": "named", "path": str(folder), "fingerprint": "0" * 16}
    (folder / "study.json").write_text(json.dumps(record))
    ledger = Ledger(folder)
    context = {"model": model, "model_reason": "named", "weights": "0" * 16, "device": DEVICE, "driver": "580.1",
               "bf16": "native", "versions": {"torch": "2.11.0"}, "seed": 0, "command": "qnb run"}  # fmt: skip

    def append(stage, values, **key):
        ledger.append({"stage": stage, "fingerprint": stage + key.get("precision", ""), **key, **values, **context})

    for precision in precisions:
        append("quantize", _checkpoint(precision), precision=precision)
        for task in TASKS:
            append("accuracy", _accuracy(folder, precision, task), precision=precision, task=task)
        append("divergence", _divergence(precision), precision=precision)
        shift = {"n_items": 100, "n_choices": 400, "mean_abs_logprob_diff": 0.004, "max_abs_logprob_diff": 0.06,
                 "answers_changed": 1, "accuracy_change_pp": 0.0}  # fmt: skip
        append("batch_sensitivity", shift, precision=precision, setting="qnb", task="arc_easy")
        for engine in engines:
            _speed(append, folder, precision, engine)
    append("lengths", {"prompt_source": "sample", "counts": [2, 9], "window": 512, "lengths": [30, 128, 700, 10]})
    return folder


def _checkpoint(precision):
    quantized = 0 if precision in ("bf16", "fp16") else 800_000_000
    linear_bytes = int(FORMATS.weights_mib[precision] * 2**20) - 400_000_000
    return {"parameters": 1_000_000_000, "embedding_bytes": 390_000_000, "linear_bytes": linear_bytes,
            "other_bytes": 10_000_000, "quantized_parameters": quantized,
            "quantized_bytes": linear_bytes if quantized else 0,
            "left_out": {"embeddings": 200_000_000} if quantized else {}, "file_mib": 1.0, "quantize_s": 4.0,
            "load_s": 2.0, "reload_identical": True, "manifest_sha256": "0" * 64}  # fmt: skip


def _accuracy(folder, precision, task):
    n_items, share = TASKS[task]
    base, flip, row = random.Random(task), random.Random(task + precision), FORMATS.loc[precision]
    correct = [base.random() < share for _ in range(n_items)]
    correct = [flip.random() >= row.lost if was else flip.random() < row.gained for was in correct]
    probabilities = [[0.7, 0.1, 0.1, 0.1] if was else [0.2, 0.5, 0.2, 0.1] for was in correct]
    items = pd.DataFrame({"task": task, "doc_id": range(n_items), "filter": "none", "gold": 0,
                          "picked": [0 if was else 1 for was in correct], "correct": correct,
                          "loglikelihoods": [list(map(math.log, row)) for row in probabilities],
                          "p_correct": [row[0] for row in probabilities]})  # fmt: skip
    items_file, items_sha256 = write_parquet(folder, f"items/{task}.{precision}", items)
    value = sum(correct) / n_items
    score = {"task": task, "metric": "acc", "filter": "none", "value": value, "n_items": n_items, "n_total": n_items,
             "shots": 0, "stderr": math.sqrt(value * (1 - value) / n_items), "group": False}  # fmt: skip
    return {"limit": "all", "scorer": "qnb", "scores": [score], "items_file": items_file, "items_sha256": items_sha256,
            "data_sha256": task, "groups": {}}  # fmt: skip


def _divergence(precision):
    bits_lost = 1 - FORMATS.weights_mib[precision] / FORMATS.weights_mib["bf16"]
    values = {"perplexity": 20 + 2 * bits_lost, "perplexity_change_pct": 10 * bits_lost, "kl_mean_nats": bits_lost,
              "kl_p99_nats": bits_lost, "same_top1_pct": 100 - 9 * bits_lost}  # fmt: skip
    values |= {f"{name}_{end}": share * value for name, value in values.items()
               for end, share in (("low", 0.9), ("high", 1.1))}  # fmt: skip
    row = {"prompt_source": "sample", "text_sha256": "0" * 16, "tokens": 1024, "context": 128, "stride": 64}
    return {**row, "perplexity": 20.0} if precision == "bf16" else {**row, **values}


def _speed(append, folder, precision, engine):
    largest, about = 256 if precision in ("bf16", "fp16") else 384, {"precision": precision, "engine": engine}
    asked = {"workload": "w", "prompt_source": "sample", "memory_limit_mib": 15360, "cap": 512}
    for size in (1, 4, 16, 64):
        append("sweep", {**asked, **_run(precision, engine, size, 0)}, setting=str(size), repeat=0, **about)
    for setting, size in (("bs1", 1), ("maxbatch", largest)):
        for repeat in range(3):
            row = {**asked, **_run(precision, engine, size, repeat), "stop_reason": "limit" if repeat == 2 else ""}
            files = {} if repeat else _samples(folder, f"samples/{precision}.{engine}.{setting}", row)
            append("perf", {**row, **files}, setting=setting, repeat=repeat, **about)
    weights_mib = FORMATS.weights_mib[precision]
    probes = [{"batch_size": size, "fits": True, "reserved_mib": weights_mib + 60 + 17.5 * size, "live_mib": None,
               "squeezed": False, "idle_mib": weights_mib, "room_mib": None, "took_s": 1.0, "ended": ""}
              for size in (1, largest)]  # fmt: skip
    search = {"batch_size": largest, "limit_mib": 15360.0, "capped": False, "probes": probes, "prompt_tokens": 128,
              "new_tokens": 100, "note": ""}  # fmt: skip
    append("batch", {**asked, **search}, **about)


def _run(precision, engine, batch_size, repeat):
    """Return one timed pass, from its bytes, its arithmetic and its launches."""
    noise = 1 + 0.01 * random.Random(f"{precision}{engine}{batch_size}{repeat}").random()
    row, new_tokens, requests, kv_cache_mib = FORMATS.loc[precision], 100, max(20, 2 * batch_size), batch_size * 14.0
    bytes_per_step, flops = (row.weights_mib + kv_cache_mib) * 2**20, 2e9 * batch_size
    kernel_s = float(row.slower * max(bytes_per_step / BYTES_S, flops / FLOP_S) * 2.2)
    step_s = max(kernel_s, row.launch_s if engine == "eager" else 0.0002) * noise
    batches, latency_s = requests // batch_size, step_s * new_tokens + 0.02
    allocated_mib, busy = row.weights_mib + kv_cache_mib + 60 + 3.5 * batch_size, min(1.0, kernel_s / step_s)
    power_w = 130 + 400 * busy * min(1.0, 0.2 + batch_size / 256)
    return {
        "batch_size": batch_size, "requests": requests, "prompt_tokens": 128, "new_tokens": new_tokens,
        "total_s": latency_s * batches, "batch_s": [latency_s] * batches, "ttft_s": 0.02, "tpot_s": step_s,
        "itl_p99_s": step_s * 1.2, "weights_mib": row.weights_mib,
        "kv_cache_mib": kv_cache_mib, "bytes_per_step": bytes_per_step, "flops_by_type": {"bfloat16": flops},
        "kernel_s_per_token": None if repeat else kernel_s, "kernels_per_token": None if repeat else 700.0,
        "peak_allocated_mib": allocated_mib, "peak_reserved_mib": allocated_mib * 1.06, "monitor": "nvml",
        "utilization_pct": 100 * busy, "used_memory_mib": allocated_mib, "peak_used_memory_mib": allocated_mib + 200,
        "power_w": power_w, "clock_mhz": 1755.0, "energy_j": power_w * latency_s * batches,
        "energy_s": latency_s * batches, "peak_bytes_per_s": BYTES_S, "peak_flop_per_s": FLOP_S,
        "idle_power_w": IDLE_W, "flags": ["throttled"] if (precision, batch_size) == ("int4", 384) else [], "note": "",
    }  # fmt: skip


def _samples(folder, stem, row):
    jitter = random.Random(stem)
    readings = [{"t_s": 0.1 * step, "utilization_pct": row["utilization_pct"] * jitter.uniform(0.9, 1),
                 "memory_mib": row["used_memory_mib"] * min(1, 0.5 + step / 20),
                 "power_w": row["power_w"] * jitter.uniform(0.95, 1.05), "clock_mhz": 1755.0}
                for step in range(40)]  # fmt: skip
    name, sha256 = write_parquet(folder, stem, pd.DataFrame(readings))
    return {"samples_file": name, "samples_sha256": sha256}


def score(task, value=0.5, metric="acc", **fields):
    """Return one metric of a task, as an accuracy row has it."""
    return {"task": task, "metric": metric, "filter": "none", "value": value, "stderr": 0.1, "n_items": 4,
            "n_total": 4, "shots": 0, "group": False, **fields}  # fmt: skip


def answers(task, correct, kind="none", **columns):
    """Return the items of a task, from whether each is right."""
    frame = {"task": task, "doc_id": range(len(correct)), "filter": kind, "correct": correct, **columns}
    return pd.DataFrame(frame).astype({"correct": object if None in correct else bool})
