"""Every quantity once: its name, label, unit, which direction is better, and how it is printed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Column:
    """How a quantity is shown."""

    name: str
    label: str
    unit: str = ""
    better: str = ""  # "more", "less", or "" where neither is
    scale: float = 1.0  # from the stored unit to the one shown, such as 1000 from seconds to milliseconds


_COLUMNS = (  # whose label, unit and direction their names do not say
    Column("precision", "format"),
    Column("n_total", "of"),
    Column("repeat", "pass"),
    # accuracy
    Column("baseline_pct", "baseline accuracy", "%", "more"),
    Column("change_pp", "change in accuracy", "points", "more"),
    Column("low_pp", "95 % low", "points", "more"),
    Column("high_pp", "95 % high", "points", "more"),
    Column("change_pct", "relative change", "%", "more"),
    Column("chance_pct", "accuracy by guessing", "%"),
    Column("recovery_pct", "recovery", "%", "more"),
    Column("recovery_low_pct", "recovery, 95 % low", "%", "more"),
    Column("recovery_high_pct", "recovery, 95 % high", "%", "more"),
    Column("p_correct_change_pp", "change in p(correct)", "points", "more"),
    Column("p_correct_low_pp", "p(correct), 95 % low", "points", "more"),
    Column("p_correct_high_pp", "p(correct), 95 % high", "points", "more"),
    Column("words", "verdict"),
    Column("p_mcnemar", "McNemar p"),
    Column("p_holm", "p after Holm"),
    Column("significant", "significant after Holm"),
    Column("context", "context, tokens"),
    Column("perplexity_change_pct", "change in perplexity", "%", "less"),
    Column("kl_mean_nats", "mean KL divergence", "nats", "less"),
    Column("kl_median_nats", "median KL divergence", "nats", "less"),
    Column("kl_p99_nats", "KL divergence, p99", "nats", "less"),
    Column("kl_p999_nats", "KL divergence, p99.9", "nats", "less"),
    Column("noise_floor_nats", "noise floor of KL divergence", "nats", "less"),
    Column("same_top1_pct", "same likeliest token", "%", "more"),
    Column("mean_abs_logprob_diff", "mean |difference| of log-probabilities", "nats", "less"),
    Column("max_abs_logprob_diff", "largest |difference| of log-probabilities", "nats", "less"),
    # checkpoints
    Column("left_out", "weights left out of quantization"),
    Column("dtype", "type of what is not quantized"),
    Column("quantized_pct", "weights quantized", "%"),
    # speed
    Column("capped", "batch ended by the requests"),
    Column("total_s", "total time", "s", "less"),
    Column("throughput_rps", "throughput", "requests/s", "more"),
    Column("throughput_tps", "throughput", "tokens/s", "more"),
    Column("throughput_spread_pct", "range of throughput", "%", "less"),
    Column("seconds_per_request", "seconds per request", "s", "less"),
    Column("ttft_s", "time to first token (TTFT)", "ms", "less", 1000),
    Column("tpot_s", "time per output token (TPOT)", "ms", "less", 1000),
    Column("tpot_eager_s", "time per token, eager", "ms", "less", 1000),
    Column("tpot_captured_s", "time per token, cuda_graph", "ms", "less", 1000),
    *(Column(f"itl_p{each}_s", f"inter-token latency (ITL), p{each}", "ms", "less", 1000) for each in (50, 95, 99)),
    *(Column(f"latency_p{each}_s", f"batch latency, p{each}", "s", "less") for each in (50, 95, 99)),
    Column("batch_spread_pct", "range of batch latency", "%", "less"),
    Column("kernel_s_per_token", "kernel time per token", "ms", "less", 1000),
    Column("gpu_busy_pct", "GPU busy", "%", "more"),
    Column("mbu_pct", "bandwidth utilization (MBU)", "%", "more"),
    Column("mfu_pct", "arithmetic utilization (MFU)", "%", "more"),
    Column("bound", "bound by"),
    Column("speedup", "speed-up over BF16", "x", "more"),
    Column("engine_speedup", "speed-up over eager", "x", "more"),
    # memory and energy
    Column("peak_memory_mib", "peak memory", "MiB", "less"),
    Column("peak_used_memory_mib", "memory in use above the start", "MiB", "less"),
    Column("peak_reserved_mib", "memory reserved", "MiB", "less"),
    Column("memory_mib", "GPU memory in use", "MiB", "less"),
    Column("kv_cache_mib", "KV cache", "MiB", "less"),
    Column("vram_mib", "VRAM", "MiB", "less"),
    Column("limit_mib", "memory limit", "MiB"),
)
COLUMNS = {column.name: column for column in _COLUMNS}
UNITS = {"j": "J", "mhz": "MHz", "mib": "MiB", "ms": "ms", "pct": "%", "pp": "points", "rps": "requests/s", "s": "s",
         "w": "W"}  # fmt: skip
NAME = re.compile(rf"(.*?)(?:_({'|'.join(UNITS)}))?(_per_[a-z]+)?$")  # what, its unit, and what it is a share of


def column(name: str) -> Column:
    """Return a quantity's column; one that is not registered is labelled by its name, as energy_j_per_token is.

    The end of an interval and a published value are labelled after the quantity that they are of.
    """
    if name in COLUMNS:
        return COLUMNS[name]
    quantity, _, end = name.rpartition("_")
    if end in ("low", "high"):
        return replace(column(quantity), name=name, label=f"{column(quantity).label}, 95 % {end}")
    if name.startswith("published_"):
        whole = column(name.removeprefix("published_"))
        return replace(whole, name=name, label=f"published {whole.label}")
    words, unit, per = NAME.findall(name.removeprefix("n_"))[0]
    return Column(name, (words + per).replace("_", " ").replace("stderr", "standard error"), UNITS.get(unit, ""))


def header(name: str) -> str:
    """Return a quantity's label with its unit, as an axis or a column's head says it; a label as it is."""
    return name if " " in name else ", ".join(filter(None, (column(name).label, column(name).unit)))


def format_number(value: float, digits: int = 4) -> str:
    """Return a number with so many significant digits, or all those before the point, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def format_value(name: str, value: Any) -> str:
    """Return a value as text, in the unit of `header`; empty where it is missing."""
    if value is None or str(value) in ("nan", "NaT", "<NA>"):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return "; ".join(map(str, value))
    if not isinstance(value, (int, float)):
        return str(value)
    if name in ("p_mcnemar", "p_holm") and value < 1e-6:
        return "< 0.000001"
    value *= column(name).scale
    if name.endswith(("_pct", "_pp")):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else format_number(value)
