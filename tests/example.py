"""A study that was never measured, with the shape of one that was: for what reads a ledger and measures nothing.

The numbers follow from a made-up device (2.0 TB/s, 200 TFLOP/s) and a made-up model of 1,000 million parameters, so
that figures have something to bend around; they say nothing about any real one.
"""

from __future__ import annotations

import math
import random

import pandas as pd

from qnb.ledger import Ledger, checked
from qnb.quantize.checkpoint import file_sha256, stamp

DEVICE, BYTES_S, FLOP_S = "Example GPU", 2.0e12, 2.0e14
WEIGHTS_MIB = {"bf16": 1907.0, "fp16": 1907.0, "int8": 1050.0, "int4": 640.0, "nf4": 640.0}
SLOWER = {"bf16": 1.0, "fp16": 1.0, "int8": 1.4, "int4": 1.25, "nf4": 1.1}  # kernel time over that of its bytes
LAUNCH_S = {"bf16": 0.013, "fp16": 0.0128, "int8": 0.031, "int4": 0.019, "nf4": 0.0165}  # eager: Python, a token
# task: items, BF16's share of right answers, and of answers that each precision turns wrong and right
TASKS = {"arc_easy": (400, 0.55), "arc_challenge": (300, 0.32), "hellaswag": (500, 0.45)}
FLIPS = {"bf16": (0, 0), "fp16": (0.004, 0.004), "int8": (0.02, 0.018), "int4": (0.22, 0.06), "nf4": (0.06, 0.045)}


def write(folder, model="example/one-billion", precisions=tuple(WEIGHTS_MIB), engines=("eager", "cuda_graph")):
    """Write the study into `folder` and return it; `model` may be any text."""
    source = folder / "source"
    source.mkdir(parents=True)
    (source / "model.safetensors").write_bytes(b"no weights")
    about = {"asked": model, "name": model, "why": "named", "path": str(source), "fingerprint": "0" * 16,
             "random_weights": False, "stamp": stamp(source)}  # fmt: skip
    (folder / "study.json").write_bytes(checked(about))
    ledger = Ledger(folder)
    common = {"model": model, "picked": "named", "device": DEVICE, "bf16": "native", "versions": {"torch": "2.11.0"}}
    for precision in precisions:
        _quantize(ledger, precision, common)
        for task in TASKS:
            _accuracy(ledger, folder, precision, task, common)
        for engine in engines:
            _speed(ledger, folder, precision, engine, common)
    ledger.append({"stage": "lengths", "fingerprint": "l", "prompts": "sample", "examples": [2, 9], "window": 512,
                   "lengths": [30, 128, 700, 10], **common})  # fmt: skip
    return folder


def _quantize(ledger, precision, common):
    weights_mib = WEIGHTS_MIB[precision]
    ledger.append(
        {"stage": "quantize", "precision": precision, "fingerprint": f"q{precision}", "weights_mib": weights_mib,
         "file_mib": weights_mib + 1, "bits": 16.0, "proved": True, "quantize_s": 4.0, "save_s": 1.0, "load_s": 2.0,
         **common}
    )  # fmt: skip


def _accuracy(ledger, folder, precision, task, common):
    count, share = TASKS[task]
    base, flip = random.Random(task), random.Random(task + precision)
    lost, gained = FLIPS[precision]
    right = [base.random() < share for _ in range(count)]
    right = [flip.random() >= lost if was else flip.random() < gained for was in right]
    fingerprint = f"a{precision}"
    path = folder / "items" / f"{task}.{precision}.{fingerprint}.parquet"
    path.parent.mkdir(exist_ok=True)
    pd.DataFrame(
        {"task": task, "doc_id": range(count), "filter": "none", "correct": right}
    ).to_parquet(path)  # fmt: skip
    value = sum(right) / count
    score = {"task": task, "metric": "acc", "filter": "none", "value": value, "items": count, "shots": 0,
             "stderr": math.sqrt(value * (1 - value) / count), "group": False}  # fmt: skip
    ledger.append(
        {"stage": "accuracy", "precision": precision, "task": task, "fingerprint": fingerprint, "limit": "all",
         "scores": [score], "items_sha256": file_sha256(path), **common}
    )  # fmt: skip


def _speed(ledger, folder, precision, engine, common):
    largest = 256 if precision in ("bf16", "fp16") else 384
    for stage, setting, batch, repeats in (
        ("perf", "bs1", 1, 3), *(("sweep", str(size), size, 1) for size in (1, 4, 16, 64)),
        ("perf", "maxbatch", largest, 3),
    ):  # fmt: skip
        for repeat in range(repeats):
            row = _run(precision, engine, batch, repeat)
            key = {"stage": stage, "setting": setting, "precision": precision, "engine": engine, "repeat": repeat}
            if stage == "perf" and repeat == 0:
                row["samples"] = _samples(folder, f"{precision}.{engine}.{setting}", row)
            ledger.append(
                {**key, "fingerprint": f"p{precision}", "workload": "w", "prompts": "sample", **row, **common}
            )
    probes = [{"batch_size": size, "fits": True, "memory_mib": WEIGHTS_MIB[precision] + 60 + 17.5 * size}
              for size in (1, largest)]  # fmt: skip
    ledger.append(
        {"stage": "batch", "precision": precision, "engine": engine, "fingerprint": f"b{precision}", "probes": probes,
         "prompt_tokens": 128, "new_tokens": 100, "batch_size": largest, "limit_mib": 15360.0, "capped": False,
         **common}
    )  # fmt: skip


def _run(precision, engine, batch, repeat):
    """Return one timed pass, from its bytes, its arithmetic and its launches."""
    noise = 1 + 0.01 * random.Random(f"{precision}{engine}{batch}{repeat}").random()
    weights = WEIGHTS_MIB[precision] * 2**20
    cache_mib = batch * 14.0
    bytes_step, flops_step = weights + cache_mib * 2**20, 2e9 * batch
    kernel_s = SLOWER[precision] * max(bytes_step / BYTES_S, flops_step / FLOP_S) * 2.2
    launch_s = LAUNCH_S[precision] if engine == "eager" else 0.0002
    step_s = max(kernel_s, launch_s) * noise
    new_tokens, requests = 100, max(20, 2 * batch)
    batch_s = step_s * new_tokens + 0.02
    total_s = batch_s * requests / batch
    allocated = WEIGHTS_MIB[precision] + cache_mib + 60 + 3.5 * batch
    power_w = 130 + 400 * min(1.0, kernel_s / step_s) * min(1.0, 0.2 + batch / 256)
    energy_j = power_w * total_s / (requests * new_tokens)
    return {
        "batch_size": batch, "requests": requests, "prompt_tokens": 128, "new_tokens": new_tokens, "total_s": total_s,
        "batch_s": [batch_s] * (requests // batch), "throughput_rps": requests / total_s,
        "throughput_tps": requests * new_tokens / total_s, "seconds_per_request": total_s / requests,
        "batch_latency_s": batch_s, "ttft_s": 0.02, "tpot_s": step_s, "itl_p50_s": step_s, "itl_p95_s": step_s * 1.1,
        "kernel_s_per_token": kernel_s, "kernels_per_token": 700.0,
        "bytes_per_step": bytes_step, "flops_per_step": flops_step, "achieved_bytes_per_s": bytes_step / step_s,
        "achieved_flop_per_s": flops_step / step_s, "limit_bytes_per_s": BYTES_S, "limit_flop_per_s": FLOP_S,
        "bound": "launch" if kernel_s < 0.5 * step_s else "bandwidth" if batch < 100 else "compute",
        "weights_mib": WEIGHTS_MIB[precision], "peak_allocated_mib": allocated, "peak_reserved_mib": allocated * 1.06,
        "cache_mib": cache_mib, "memory_mib": allocated, "monitor_source": "nvml", "monitor_samples": 40,
        "utilization_pct": 100 * min(1.0, kernel_s / step_s), "power_w": power_w,
        "energy_j_per_token": energy_j, "energy_above_idle_j_per_token": energy_j * (power_w - 70) / power_w,
        "flags": ["throttled"] if (precision, batch) == ("int4", 384) else [],
    }  # fmt: skip


def _samples(folder, name, row):
    path = folder / "samples" / f"{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    jitter = random.Random(name)
    frame = pd.DataFrame({"t_s": [0.1 * step for step in range(40)]})
    frame["utilization_pct"] = [row["utilization_pct"] * jitter.uniform(0.9, 1) for _ in frame.t_s]
    frame["memory_mib"] = [row["memory_mib"] * min(1, 0.5 + step / 20) for step in range(40)]
    frame["power_w"] = [row["power_w"] * jitter.uniform(0.95, 1.05) for _ in frame.t_s]
    frame["clock_mhz"] = 1755.0
    frame.to_parquet(path)
    return f"samples/{path.name}"
