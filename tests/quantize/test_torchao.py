"""torchao's formats: saved and reloaded alike, measured as stock lm-eval does, joined exactly, refused or said to be
replaced where their kernels cannot run.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import random_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig

from qnb import InputError, Study, device, precision
from qnb.accuracy.scorer import SharedContextLM
from qnb.accuracy.tasks import Task
from qnb.device import Device
from qnb.quantize import checkpoint, runtime, sources
from qnb.speed.decode_work import count_work
from qnb.speed.engines import why_unavailable
from qnb.speed.layers import join, multiply_all, multiply_torchao

INT8 = precision.PRECISIONS["int8-dynamic"]
SMOLLM2_LINEAR = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
SMOLLM2_HEAD = 49152 * 576


def test_int8_dynamic_on_a_cpu_is_a_format_like_the_others(source, tmp_path):
    pytest.importorskip("torchao")
    study = Study(sources.EMBEDDED, "bf16,int8-dynamic", tmp_path / "study")
    study.divergence("sample", 64, 32)
    row = study.results().checkpoints.set_index("precision").loc["int8-dynamic"]
    assert row.reload_identical and row.ran_as == "torchao Int8Tensor" and row.quantized_parameters == SMOLLM2_LINEAR
    assert 8 < row.bits_per_quantized_weight < 8.1  # a scale and a zero point a row
    assert 0 < study.results().divergence.set_index("precision").kl_mean_nats["int8-dynamic"] < 0.2
    model = checkpoint.load(study.session.checkpoint(INT8), INT8, "cpu")
    work = count_work(model, 3, 8, 2)
    assert work.flops_by_type["int8"] == 3 * 2 * SMOLLM2_LINEAR
    assert work.flops_by_type["bfloat16"] >= 3 * 2 * SMOLLM2_HEAD
    assert SMOLLM2_LINEAR + 2 * SMOLLM2_HEAD < work.bytes_per_step < 1.02 * (SMOLLM2_LINEAR + 2 * SMOLLM2_HEAD)


def test_int8_dynamic_scores_as_stock_lm_eval_does_on_its_checkpoint(source, tmp_path):
    """A last digit gives inputs other codes, and a nat is soon lost: stock in another batch differs as much."""
    pytest.importorskip("torchao")
    checkpoint.convert(source, INT8.in_half("float32"), tmp_path / "made", "cpu")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "made"), checkpoint.load_tokenizer(source.path)
    ours, theirs = (
        Task("sample_easy").evaluate(scorer(pretrained=model, tokenizer=tokenizer, batch_size=4), 24).items
        for scorer in (SharedContextLM, HFLM)
    )
    assert (ours.picked == theirs.picked).mean() > 0.8
    apart = ours.loglikelihoods.map(np.mean) - theirs.loglikelihoods.map(np.mean)
    assert abs(apart.mean()) < 0.25


def layers(kind, sizes=(64, 32, 96), bias=False, inputs=128):
    """Linear layers of one input in a format, as a GPU would have them."""
    pytest.importorskip("torchao")
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow, quantize_
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    modules = [torch.nn.Linear(inputs, size, bias=bias).bfloat16().requires_grad_(False) for size in sizes]
    for module in modules:
        if kind == "fp8":  # torchao refuses a CPU, whose products are there
            quantized = QuantizeTensorToFloat8Kwargs(granularity=PerRow(), kernel_preference="torch")
            weight = Float8Tensor.from_hp(module.weight, granularity=PerRow(), mm_config=Float8MMConfig(),
                                          act_quant_kwargs=quantized, kernel_preference="torch")  # fmt: skip
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
        else:
            quantize_(torch.nn.Sequential(module), precision.PRECISIONS[kind].config().quant_type)
    return modules


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["int8-dynamic", "fp8"])
def test_joined_layers_give_each_layers_bits_and_hold_nothing_twice(kind, bias):
    modules, x = layers(kind, bias=bias), torch.randn(3, 128).bfloat16()
    expected = torch.cat([module(x) for module in modules], 1)
    (joined,) = join(modules)
    assert torch.equal(joined.multiply(x), expected)
    assert torch.equal(torch.cat([module(x) for module in modules], 1), expected)  # in joined memory
    rows = joined.weights[0].qdata
    assert modules[1].weight.qdata.data_ptr() == rows.data_ptr() + modules[0].weight.numel()
    alone = join([modules[0], torch.nn.Linear(128, 8, bias=bias)])
    assert len(alone) == 2 and torch.equal(alone[0].multiply(x), expected[:, :64])


@torch.no_grad()
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_checkpoints_of_older_torchao_settings_are_multiplied_by_torchao(config):
    quantization = pytest.importorskip("torchao.quantization")
    modules = [torch.nn.Linear(128, size, bias=False).bfloat16().requires_grad_(False) for size in (64, 32)]
    for module in modules:
        quantization.quantize_(torch.nn.Sequential(module), getattr(quantization, config)())
    products, x = join(modules), torch.randn(3, 128).bfloat16()
    assert torch.equal(multiply_all(products, x), torch.cat([module(x) for module in modules], 1))


def test_no_graph_captures_an_int8_step_that_is_not_fused(monkeypatch):
    config = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 300}
    for family, reason in ((LlamaConfig, ""), (GemmaConfig, "back to the host")):
        model = random_model(family(**config))
        model.model.layers[0].mlp.down_proj = layers("int8-dynamic", [128])[0]
        assert reason in (why := why_unavailable("cuda_graph", "cuda", model=model)) and bool(why) == bool(reason)
    monkeypatch.setattr(device, "is_before_ampere", lambda place: True)
    for dtype in (torch.float16, torch.bfloat16):
        model = random_model(LlamaConfig(**config)).to(dtype)
        model.model.layers[0].mlp.down_proj = layers("int8-dynamic", [128])[0]
        assert bool(why_unavailable("cuda_graph", "cuda", model=model)) == (dtype == torch.bfloat16)
    assert "back to the host" in why_unavailable("cuda_graph", "cuda", is_unfused_int8=True)  # before it is loaded


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8-dynamic", "fp8"])
def test_one_compiled_row_is_multiplied_as_in_a_batch(kind):
    """Compiled it is a reduction over the codes: as near the stored weights' own product."""
    torch.manual_seed(0)
    (joined,), x = join(layers(kind)), torch.randn(1, 128).bfloat16()
    truth = x.float() @ joined.weights[0].dequantize(torch.float32).T
    compiled = torch.compile(multiply_torchao, fullgraph=True)(x, *joined.weights)
    errors = [(out - truth).norm() for out in (compiled, joined.multiply(x.expand(40, -1))[:1])]
    assert 0 < errors[0] < 1.25 * errors[1] < 0.1 * truth.norm()


@pytest.mark.parametrize(("name", "capability", "package", "problem"), [
    ("fp8", (0, 0), True, "capability 8.9 or later, and a machine has none"),
    ("fp8", (8, 6), True, "capability 8.9 or later, and a machine has 8.6"),
    ("int4-hqq", (7, 5), True, "capability 8.0 or later"), ("int8-dynamic", (9, 0), False, "pip install torchao"),
    ("fp8", (8, 9), True, ""), ("int4-hqq", (8, 0), True, ""), ("int8-dynamic", (0, 0), True, ""),
])  # fmt: skip
def test_what_cannot_run_is_refused_by_what_it_needs(name, capability, package, problem, monkeypatch):
    monkeypatch.setattr(runtime, "find_spec", lambda library: package or None)
    machine = Device("cuda" if capability[0] else "cpu", "a machine", 16e3, "native", "", capability=capability)
    with pytest.raises(InputError, match=problem) if problem else nullcontext() as refused:
        runtime.check_runnable(precision.PRECISIONS[name], machine)
    assert "\n" not in str(refused.value if problem else "")


def test_nothing_is_made_where_one_format_is_refused(tmp_path):
    study = Study(sources.EMBEDDED, "bf16,fp8", tmp_path / "study", device="cpu")
    with pytest.raises(InputError, match="'fp8' needs"):
        study.quantize()
    assert not len(study.session.ledger) and not (study.folder / "checkpoints").exists()


def test_a_library_that_quantizes_nothing_makes_no_checkpoint():
    model = random_model(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1))
    with pytest.raises(RuntimeError, match="torchao quantized no layer of this model: they are float32"):
        runtime.ran_as(model, precision.PRECISIONS["int8-dynamic"])


@pytest.mark.parametrize(("name", "kernels", "expected"), [
    ("int8-dynamic", {"void cutlass::Kernel2<cutlass_80_tensorop_i16832gemm_s8_256x128>(int)": 1}, ""),
    ("int8-dynamic", {"sm90_xmma_gemm_i8i32_i8i32_i32_tn_n": 1, "ampere_sgemm_32x32_tn": 2}, ""),
    ("int8-dynamic", {"void at::native::copy<char>(int)": 2, "ampere_sgemm_32x32_tn": 3}, "ampere_sgemm_32x32_tn"),
    ("int8-dynamic", {"void gemvx::kernel<int, float>(float*)": 3}, "gemvx::kernel"),
    ("fp8", {"void cutlass::device_kernel<at::cuda::detail<cutlass::float_e4m3_t>>(int)": 1}, ""),
    ("fp8", {"nvjet_sm90_qqtst_128x32_64x4": 1}, ""), ("fp8", {"nvjet_tst_64x8_64x16": 1}, "nvjet_tst_64x8_64x16"),
    ("int4-hqq", {"void at::native::tinygemm_m16n8k16_chunk_kernel<int>(int)": 1}, ""),
    ("int4-hqq", {}, "no kernel"), ("nf4", {"ampere_sgemm_32x32_tn": 1}, ""),
])  # fmt: skip
def test_kernels_that_stand_in_are_named(name, kernels, expected):
    assert runtime.stand_in(precision.PRECISIONS[name].kernels, [*kernels.items()]) == expected


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize(("kind", "rows"), [("int4-hqq", 1), ("int4-hqq", 40), ("fp8", 40), ("fp8", 600)])
def test_joined_layers_on_a_gpu_are_as_near_as_each_layer(kind, rows):
    """Tiles give each layer's bits; few rows of float8 are scaled after the product, as near to the stored weights."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        modules, x = layers(kind, inputs=1024), torch.randn(rows, 1024, dtype=torch.bfloat16)
    expected = torch.cat([module(x) for module in modules], 1)
    (joined,) = join(modules)
    if kind == "int4-hqq":
        assert torch.equal(joined.multiply(x), expected)
    else:
        truth = x.float() @ joined.weights[0].dequantize(torch.float32).T
        errors = [(out - truth).norm() for out in (joined.multiply(x), expected)]
        assert 0 < errors[0] < 1.05 * errors[1] < 0.1 * truth.norm()
    assert torch.equal(torch.cat([module(x) for module in modules], 1), expected)  # in joined memory


@pytest.mark.gpu
@pytest.mark.parametrize("name", precision.TORCHAO)
def test_a_gpu_runs_each_format_and_says_by_which_kernels(name, source, tmp_path):
    """A row has a speed where its own kernels ran, and a note where others stood in."""
    pytest.importorskip("torchao")
    study = Study(sources.EMBEDDED, name, tmp_path / "study", device="cuda")
    study.perf_bs1(study.workload("bs1", 2, 16, 8, "sample"), 1)
    row = study.results().checkpoints.set_index("precision").loc[name]
    assert row.reload_identical and "64 sequences" in row.ran_as, row.ran_as
    timed = {each["engine"]: each for each in study.session.ledger.rows("perf")}
    has_own = "own kernels at 1" in row.ran_as
    assert ("tpot_s" in timed["eager"]) == has_own != ("no speed" in timed["eager"]["note"])
    assert timed["cuda_graph"]["tpot_s"] > 0 and timed["cuda_graph"]["note"] == ""
    assert timed["cuda_graph"]["bytes_per_step"] > 0
