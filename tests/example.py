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
WEIGHTS_MIB = {"bf16": 1907.0, "fp16": 1907.0, "int8": 1050.0, "int4": 640.0, "nf4": 640.0}
SLOWER = {"bf16": 1.0, "fp16": 1.0, "int8": 1.4, "int4": 1.25, "nf4": 1.1}  # kernel time over that of its bytes
LAUNCH_S = {"bf16": 0.013, "fp16": 0.0128, "int8": 0.031, "int4": 0.019, "nf4": 0.0165}  # eager: Python, a token
TASKS = {"arc_easy": (400, 0.55), "arc_challenge": (300, 0.32), "hellaswag": (500, 0.45)}  # items, BF16's accuracy
FLIPS = {"bf16": (0, 0), "fp16": (0.004, 0.004), "int8": (0.02, 0.018), "int4": (0.22, 0.06), "nf4": (0.06, 0.045)}


def write(folder, model="example/one-billion", precisions=tuple(WEIGHTS_MIB), engines=("eager", "cuda_graph")):
    """Write the study into `folder` and return it; `model` may be any text."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"asked": model, "name": model, "reason": "named", "path": str(folder), "fingerprint": "0" * 16,
              "random_weights": False}  # fmt: skip
    (folder / "study.json").write_text(json.dumps(record))
    ledger = Ledger(folder)

    def append(stage, *values, **fields):
        context = {"model": model, "model_reason": "named", "weights": "0" * 16, "device": DEVICE, "driver": "580.1",
                   "bf16": "native", "versions": {"torch": "2.11.0"}, "seed": 0, "command": "qnb run"}  # fmt: skip
        key = {"stage": stage, "fingerprint": stage + fields.get("precision", "")}
        ledger.append({**key, **fields, **{name: value for part in values for name, value in part.items()}, **context})

    append("peaks", {"copy_bytes_per_s": BYTES_S, "matmul_flop_per_s": {"bfloat16": FLOP_S}, "idle_power_w": IDLE_W,
                     "flags": []})  # fmt: skip
    for precision in precisions:
        append("quantize", _checkpoint(precision), precision=precision)
        for task in TASKS:
            append("accuracy", _accuracy(folder, precision, task), precision=precision, task=task)
        append("divergence", _divergence(precision), precision=precision)
        append("batch_sensitivity", _sensitivity(precision), precision=precision, setting="qnb", task="arc_easy")
        for engine in engines:
            _speed(append, folder, precision, engine)
    append("lengths", {"prompt_source": "sample", "counts": [2, 9], "window": 512, "lengths": [30, 128, 700, 10]})
    return folder


def _checkpoint(precision):
    quantized = 0 if precision in ("bf16", "fp16") else 800_000_000
    linear_bytes = int(WEIGHTS_MIB[precision] * 2**20) - 400_000_000
    return {"parameters": 1_000_000_000, "embedding_bytes": 390_000_000, "linear_bytes": linear_bytes,
            "other_bytes": 10_000_000, "quantized_parameters": quantized,
            "quantized_bytes": linear_bytes if quantized else 0, "file_mib": WEIGHTS_MIB[precision] + 1,
            "quantize_s": 4.0, "save_s": 1.0, "load_s": 2.0, "reload_identical": True,
            "manifest_sha256": "0" * 64}  # fmt: skip


def _accuracy(folder, precision, task):
    n_items, share = TASKS[task]
    base, flip = random.Random(task), random.Random(task + precision)
    lost, gained = FLIPS[precision]
    correct = [base.random() < share for _ in range(n_items)]
    correct = [flip.random() >= lost if was else flip.random() < gained for was in correct]
    probabilities = [[0.7, 0.1, 0.1, 0.1] if was else [0.2, 0.5, 0.2, 0.1] for was in correct]
    items = pd.DataFrame({"task": task, "doc_id": range(n_items), "filter": "none", "gold": 0,
                          "picked": [0 if was else 1 for was in correct], "correct": correct,
                          "probabilities": probabilities, "p_correct": [row[0] for row in probabilities]})  # fmt: skip
    items_file, items_sha256 = write_parquet(folder, f"items/{task}.{precision}", items)
    value = sum(correct) / n_items
    score = {"task": task, "metric": "acc", "filter": "none", "value": value, "n_items": n_items, "n_total": n_items,
             "shots": 0, "stderr": math.sqrt(value * (1 - value) / n_items), "group": False}  # fmt: skip
    return {"limit": "all", "scorer": "qnb", "batch_size": None, "scores": [score], "items_file": items_file,
            "items_sha256": items_sha256, "data_sha256": task, "groups": {}, "evaluate_s": 3.0}  # fmt: skip


def _divergence(precision):
    row = {"prompt_source": "sample", "text_sha256": "0" * 16, "tokens": 1024, "context": 128, "stride": 64}
    bits_lost = 1 - WEIGHTS_MIB[precision] / WEIGHTS_MIB["bf16"]
    values = {"perplexity": 20 + 2 * bits_lost, "perplexity_change_pct": 10 * bits_lost, "kl_mean_nats": bits_lost,
              "kl_p99_nats": bits_lost, "same_top1_pct": 100 - 9 * bits_lost}  # fmt: skip
    for name, value in values.items():
        value = value if name == "perplexity" or precision != "bf16" else None
        row |= {name: value, f"{name}_low": value and 0.9 * value, f"{name}_high": value and 1.1 * value}
    return row


def _sensitivity(precision):
    return {"n_items": 100, "n_choices": 400, "mean_abs_logprob_diff": 0.004, "max_abs_logprob_diff": 0.06,
            "answers_changed": int(precision == "int8"), "accuracy_change_pp": 0.0}  # fmt: skip


def _speed(append, folder, precision, engine):
    largest = 256 if precision in ("bf16", "fp16") else 384
    settings = (("perf", "bs1", 1, 3), *(("sweep", str(size), size, 1) for size in (1, 4, 16, 64)),
                ("perf", "maxbatch", largest, 3))  # fmt: skip
    asked = {"workload": "w", "prompt_source": "sample", "memory_limit_mib": 15360, "cap": 512}
    for stage, setting, batch_size, passes in settings:
        for repeat in range(passes):
            row = {**asked, **_run(precision, engine, batch_size, repeat)}
            if stage == "perf":
                row["stop_reason"] = "limit" if repeat == passes - 1 else ""
            if stage == "perf" and repeat == 0:
                row |= _samples(folder, f"samples/{precision}.{engine}.{setting}", row)
            append(stage, row, precision=precision, engine=engine, setting=setting, repeat=repeat)
    probes = [{"batch_size": size, "fits": True, "reserved_mib": WEIGHTS_MIB[precision] + 60 + 17.5 * size,
               "live_mib": None, "squeezed": False, "idle_mib": WEIGHTS_MIB[precision], "room_mib": None,
               "took_s": 1.0, "ended": ""} for size in (1, largest)]  # fmt: skip
    search = {"batch_size": largest, "limit_mib": 15360.0, "capped": False, "probes": probes, "prompt_tokens": 128,
              "new_tokens": 100}  # fmt: skip
    append("batch", asked, search, precision=precision, engine=engine)


def _run(precision, engine, batch_size, repeat):
    """Return one timed pass, from its bytes, its arithmetic and its launches."""
    noise = 1 + 0.01 * random.Random(f"{precision}{engine}{batch_size}{repeat}").random()
    weights_mib, kv_cache_mib = WEIGHTS_MIB[precision], batch_size * 14.0
    bytes_per_step, flops = (weights_mib + kv_cache_mib) * 2**20, 2e9 * batch_size
    kernel_s = SLOWER[precision] * max(bytes_per_step / BYTES_S, flops / FLOP_S) * 2.2
    step_s = max(kernel_s, LAUNCH_S[precision] if engine == "eager" else 0.0002) * noise
    new_tokens, requests = 100, max(20, 2 * batch_size)
    batches, latency_s = requests // batch_size, step_s * new_tokens + 0.02
    allocated_mib, busy = weights_mib + kv_cache_mib + 60 + 3.5 * batch_size, min(1.0, kernel_s / step_s)
    power_w = 130 + 400 * busy * min(1.0, 0.2 + batch_size / 256)
    return {
        "batch_size": batch_size, "requests": requests, "prompt_tokens": 128, "new_tokens": new_tokens,
        "total_s": latency_s * batches, "batch_s": [latency_s] * batches, "ttft_s": 0.02, "tpot_s": step_s,
        **{f"itl_{part}_s": step_s * slower for part, slower in (("p50", 1.0), ("p95", 1.1), ("p99", 1.2))},
        **{f"latency_{part}_s": latency_s for part in ("p50", "p95", "p99")},
        "weights_mib": weights_mib, "kv_cache_mib": kv_cache_mib, "bytes_per_step": bytes_per_step,
        "flops_by_type": {"bfloat16": flops}, "kernel_s_per_token": kernel_s if repeat == 0 else None,
        "kernels_per_token": 700.0 if repeat == 0 else None,
        "peak_allocated_mib": allocated_mib, "peak_reserved_mib": allocated_mib * 1.06, "monitor": "nvml",
        "samples": 40, "duration_s": 4.0, "utilization_pct": 100 * busy, "used_memory_mib": allocated_mib,
        "peak_used_memory_mib": allocated_mib + 200, "baseline_mib": 500.0, "power_w": power_w, "clock_mhz": 1755.0,
        "energy_j": power_w * latency_s * batches, "energy_s": latency_s * batches, "throttle": [],
        "gpu_processes": 1, "others_cpu_pct": 2.0, "failed_readings": 0, "missing_readings": {},
        "peak_bytes_per_s": BYTES_S, "peak_flop_per_s": FLOP_S, "idle_power_w": IDLE_W, "note": "",
        "flags": ["throttled"] if (precision, batch_size) == ("int4", 384) else [],
    }  # fmt: skip


def _samples(folder, stem, row):
    jitter = random.Random(stem)
    frame = pd.DataFrame({"t_s": [0.1 * step for step in range(40)]})
    frame["utilization_pct"] = [row["utilization_pct"] * jitter.uniform(0.9, 1) for _ in frame.t_s]
    frame["memory_mib"] = [row["used_memory_mib"] * min(1, 0.5 + step / 20) for step in range(40)]
    frame["power_w"] = [row["power_w"] * jitter.uniform(0.95, 1.05) for _ in frame.t_s]
    frame["clock_mhz"] = 1755.0
    name, sha256 = write_parquet(folder, stem, frame)
    return {"samples_file": name, "samples_sha256": sha256}
