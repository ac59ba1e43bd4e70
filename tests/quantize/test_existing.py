"""Checkpoints made elsewhere: a row like any other, what really ran, and one line where one cannot be used."""

import json
import os
import re
import shutil
from functools import cache, partial
from unittest.mock import patch

import gguf
import pandas as pd
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

from qnb import InputError, Study, precision
from qnb.accuracy.tasks import Task
from qnb.quantize import checkpoint, existing, hub, sources
from qnb.report import recommend
from qnb.speed import device_peaks

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}


@pytest.fixture(autouse=True)
def only_the_formats(monkeypatch):
    """Each test begins without labels of another one, and measures no peaks, which takes seconds."""
    monkeypatch.setattr(device_peaks, "measure_peaks", lambda _: device_peaks.DevicePeaks(1e9))
    monkeypatch.setattr(precision, "PRECISIONS", precision.PRECISIONS)
    with patch.dict(precision.PRECISIONS):
        yield


@pytest.fixture(scope="module")
def released(tiny, tmp_path_factory):
    """A small model as it was released, in float32."""
    folder = tmp_path_factory.mktemp("released") / "small"
    for part in tiny:
        part.save_pretrained(folder)
    return folder


def save_nf4(released, folder, **more):
    config = BitsAndBytesConfig(**NF4, **more)
    options = {"dtype": torch.float32, "quantization_config": config, "device_map": "cpu"}
    AutoModelForCausalLM.from_pretrained(released, **options).save_pretrained(folder)


@pytest.fixture(scope="module")
def quantized(released):
    """The same model in NF4, as plain transformers saves it."""
    folder = released.parent / "small-nf4"
    save_nf4(released, folder)
    for path in released.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def assert_scores_as_stock(study, path):
    """Hold the row `theirs` to stock lm-eval's log-likelihoods on the same checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(path, device_map="cpu")
    stock = HFLM(pretrained=model, tokenizer=study.session.tokenizer, batch_size=4)
    theirs = Task("sample_easy").evaluate(stock, 4).items
    (mine,) = [each for each in study.session.ledger.rows("accuracy") if each["precision"] == "theirs"]
    ours = pd.read_parquet(study.folder / mine["items_file"])
    for one, other in zip(ours.loglikelihoods, theirs.loglikelihoods, strict=True):
        assert one == pytest.approx(other, abs=2e-2)


def test_a_checkpoint_is_a_row_of_every_table_with_stock_lm_evals_accuracy(released, quantized, tmp_path):
    label = f"theirs=checkpoint:{quantized}"
    study = Study(str(released), f"fp32,bf16,{label}", tmp_path / "study")
    work = study.workload("bs1", 1, 4, 2, "sample")
    study.quantize()
    study.accuracy("sample_easy", 4)
    study.divergence("sample", 64, 32)
    study.perf_bs1(work, 1)
    row = study.results().checkpoints.set_index("precision").loc["theirs"]
    assert row.ran_as == "4-bit, bitsandbytes Linear4bit" and not row.is_unpacked
    assert 4 < row.bits_per_quantized_weight < 9 and row.file_mib > 0
    assert_scores_as_stock(study, quantized)
    # every table, and a study opened anew, by the same label and colour
    assert "theirs_pct" in study.table("table1_accuracy")
    for name in ("table2_change", "table3_bs1", "divergence"):
        assert "theirs" in set(study.table(name).precision)
    summary = recommend.summary(study.results()).set_index("precision")
    assert summary.tpot_eager_s["theirs"] > 0 and summary.ran_as["theirs"] == row.ran_as
    color = precision.PRECISIONS["theirs"].color
    precision.PRECISIONS.pop("theirs")
    precision.parse("other=checkpoint:x")  # takes the first colour
    again = Study(str(released), f"bf16,{label}", study.folder)
    before = len(again.session.ledger)
    again.quantize()
    assert precision.PRECISIONS["theirs"].color == color and len(again.session.ledger) == before
    assert "theirs" in again.report().read_text() and not (study.folder / "cards" / "theirs").exists()


def save_rounded(released, folder, layout):
    """Round to the nearest of 4 bits in groups of 32, and save as AutoRound does, in its own layout or another's."""
    from auto_round import AutoRound

    model, tokenizer = (Auto.from_pretrained(released) for Auto in (AutoModelForCausalLM, AutoTokenizer))
    rounding = AutoRound(model, tokenizer, bits=4, group_size=32, iters=0, disable_opt_rtn=True, device_map="cpu")
    rounding.quantize_and_save(str(folder), format=layout)
    return next(folder.iterdir())


def save_compressed(released, folder):
    """Save in 8 bit with one scale per row, by compressed-tensors' own package."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    weights = {"num_bits": 8, "strategy": "channel", "symmetric": True}
    groups = {"all": {"targets": ["Linear"], "weights": weights}}
    model = AutoModelForCausalLM.from_pretrained(released)
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            layer.weight_scale.data = layer.weight.abs().amax(-1, keepdim=True) / 127
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


def save_torchao(released, folder):
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(released, quantization_config=config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("package", "ran_as", "save"), [
    ("auto_round", "4-bit, auto_round_extension QuantLinear", partial(save_rounded, layout="auto_round")),
    ("gptqmodel", r"4-bit, gptqmodel \w+Linear", partial(save_rounded, layout="auto_gptq")),
    ("gptqmodel", r"4-bit, gptqmodel \w+AwqLinear", partial(save_rounded, layout="auto_awq")),
    ("compressed_tensors", r"unpacked to float32 \(compressed-tensors\)", save_compressed),
    ("torchao", "torchao Int8Tensor", save_torchao),
], ids=["auto-round", "gptq", "awq", "compressed-tensors", "torchao"])  # fmt: skip
def test_a_checkpoint_of_each_library_scores_as_in_stock_lm_eval(package, ran_as, save, released, tmp_path):
    for name in ("auto_round", package) if isinstance(save, partial) else (package,):
        pytest.importorskip(name)
    with checkpoint.quiet():
        folder = save(released, tmp_path / "made")
    study = Study(str(released), f"fp32,bf16,theirs=checkpoint:{folder}", tmp_path / "study")
    study.quantize()
    study.accuracy("sample_easy", 4)
    study.perf_bs1(study.workload("bs1", 1, 4, 2, "sample"), 1)
    row = study.results().checkpoints.set_index("precision").loc["theirs"]
    assert re.fullmatch(ran_as, row.ran_as) and row.is_unpacked == ("unpacked" in ran_as)
    assert row.is_unpacked or 4 < row.bits_per_quantized_weight < 9
    assert_scores_as_stock(study, folder)
    (timed,) = [each for each in study.session.ledger.rows("perf") if each["precision"] == "theirs"]
    assert ("tpot_s" in timed) != row.is_unpacked


def test_an_unpacked_checkpoint_has_an_accuracy_and_a_size_and_no_speed(source, tmp_path, monkeypatch):
    """The embedded model was unpacked from this file, so nothing may differ."""
    for each in ("GGUFReader", "get_tensor_name_map"):  # they read a vocabulary, or name tensors, for seconds
        monkeypatch.setattr(gguf, each, cache(getattr(gguf, each)))
    file = sources.fetch_gguf(tmp_path)
    study = Study(sources.EMBEDDED, f"bf16,gguf=checkpoint:{file}", tmp_path / "study")
    study.divergence("sample", 64, 32)
    study.perf_bs1(study.workload("bs1", 1, 4, 2, "sample"), 1)
    row = study.results().checkpoints.set_index("precision").loc["gguf"]
    assert row.ran_as == "unpacked to bfloat16 (gguf)" and row.is_unpacked and pd.isna(row.weights_mib)
    assert row.file_mib == pytest.approx(file.stat().st_size / 2**20)
    assert study.results().divergence.set_index("precision").kl_mean_nats["gguf"] == 0
    (timed,) = [each for each in study.session.ledger.rows("perf") if each["precision"] == "gguf"]
    assert "unpacked to bfloat16" in timed["note"] and "tpot_s" not in timed
    assert "its file takes 93.8 MiB" in study.report().read_text()


@pytest.mark.parametrize(("names", "problem"), [
    ("bf16,checkpoint:", "names no checkpoint"),
    ("bf16,mine=./x", "mine=checkpoint:PATH"),
    ("a=checkpoint:./my models/x", "in a list where PATH has a space or comma"),
    ("Study=checkpoint:./x", "name of a format"),
    ("a=checkpoint:./x,A=checkpoint:./x", "two checkpoints are called 'A'"),
    (["bf16", "ä=checkpoint:./x"], "has no label"),
])  # fmt: skip
def test_a_label_that_cannot_be_one_is_refused(names, problem):
    with pytest.raises(InputError, match=problem):
        precision.parse(names)


def test_labels_come_from_the_name_and_the_same_checkpoint_is_taken_once():
    parsed = precision.parse(["bf16", "checkpoint:you/model-AWQ@main", *["checkpoint:./m.q4.gguf"] * 2])
    assert [each.name for each in parsed] == ["bf16", "model-AWQ", "m.q4"]
    assert len({each.color for each in parsed}) == 3 == len({each.marker for each in parsed})


def test_a_label_has_its_colour_in_its_study_whatever_other_studies_named():
    precision.parse("y=checkpoint:./y")
    rows = [{"precision": "x", "origin": "./x", "style": 0}, {"precision": "bf16", "origin": "./z", "style": 1}]
    x, y = precision.parse("x=checkpoint:./x,y=checkpoint:./y", rows)
    (again,) = precision.parse("y")
    assert (x.style, y.style, again.name) == (0, 2, "y") and x.color != y.color
    assert [*precision.PRECISIONS][-2:] == ["x", "y"] and not precision.PRECISIONS["bf16"].origin
    with pytest.raises(InputError, match="unknown"):
        precision.parse("typo=checkpoint:./t,nothing")
    assert "typo" not in precision.PRECISIONS
    assert [each.name for each in precision.parse("GPT=checkpoint:./g,study")][:2] == ["GPT", "bf16"]
    assert precision.parse("GPT")[0].origin == "./g"
    many = precision.parse([f"m{n}=checkpoint:./{n}" for n in range(12)])
    assert len({(each.color, each.marker) for each in many}) == 12


def test_a_label_stands_for_one_checkpoint_in_a_study(released, quantized, tmp_path):
    Study(str(released), f"a=checkpoint:{quantized}", tmp_path / "study").quantize()
    moved = shutil.copytree(quantized, tmp_path / "moved")
    study = Study(str(released), f"a=checkpoint:{moved}", tmp_path / "study")
    study.quantize()
    assert len(study.session.ledger) == 1  # the same, wherever it lies
    other = damaged(quantized, tmp_path / "other", quantization_config={**NF4, "llm_int8_skip_modules": ["x"]})
    study = Study(str(released), f"a=checkpoint:{other}", tmp_path / "study", overwrite=True)
    with pytest.raises(InputError, match="label 'a' stands for another checkpoint"):
        study.quantize()


def test_some_packed_layers_are_enough_to_run_packed_and_none_may_be_missing(released, tmp_path):
    partly = tmp_path / "partly"
    save_nf4(released, partly, llm_int8_skip_modules=["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"])
    facts = existing.describe(partly, checkpoint.load_tokenizer(released), "cpu")
    assert facts.ran_as == "4-bit, bitsandbytes Linear4bit" and not facts.is_unpacked
    holes = shutil.copytree(released, tmp_path / "holes")
    tensors = load_file(holes / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(kept, holes / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="tensors are missing or of another shape"):
        existing.load(holes, "cpu")


def test_a_checkpoint_comes_from_the_hub_at_one_commit_or_as_one_file(quantized, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda name, patterns: asked.append((name, [*patterns])) or quantized)
    assert sources.existing("you/model-AWQ@v1").path == str(quantized)
    assert [name for name, _ in asked] == ["you/model-AWQ@v1", *[f"you/model-AWQ@{quantized.name}"] * 2]
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(hub, "fetch", lambda name, patterns: asked.append((name, [*patterns])) or tmp_path)
    assert sources.existing("you/model-GGUF/q4.gguf").path == str(tmp_path / "q4.gguf")
    assert asked[-1] == ("you/model-GGUF", ["q4.gguf"])
    with pytest.raises(InputError, match="is no GGUF file"):
        sources.existing("you/model-GGUF/q5.gguf")


def damaged(quantized, folder, **changes):
    """A copy of a checkpoint with other settings."""
    shutil.copytree(quantized, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    return folder


def test_what_cannot_be_a_row_is_refused_in_one_line(released, quantized, tmp_path):
    cases = {
        "of another model": damaged(quantized, tmp_path / "layers", num_hidden_layers=3),
        "could not be loaded": damaged(quantized, tmp_path / "method", quantization_config={"quant_method": "magic"}),
        "code of a model's own is never run": damaged(quantized, tmp_path / "code", model_type="own",
                                                      auto_map={"AutoConfig": "own.Own"}),
        "is no folder, GGUF file or hub id": tmp_path / "nothing",
        "is not whole": damaged(quantized, tmp_path / "half"),
        "is no GGUF file": tmp_path / "notes.txt",
        "pip install gptqmodel.*all other formats work without": damaged(
            quantized, tmp_path / "gptq", quantization_config={"quant_method": "gptq", "bits": 4}),
        "could not be loaded.*": damaged(quantized, tmp_path / "torn"),
        "another vocabulary": damaged(quantized, tmp_path / "words"),
    }  # fmt: skip
    (tmp_path / "half" / "model.safetensors").unlink()
    (tmp_path / "notes.txt").write_text("no model")
    os.truncate(tmp_path / "torn" / "model.safetensors", 9000)
    words = tmp_path / "words" / "tokenizer.json"
    settings = json.loads(words.read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["!"], vocabulary["?"] = vocabulary["?"], vocabulary["!"]
    words.write_text(json.dumps(settings))
    for problem, path in cases.items():
        study = Study(str(released), f"bf16,it=checkpoint:{path}", tmp_path / "study")
        with pytest.raises(InputError, match=problem) as refused:
            study.quantize()
        assert "\n" not in str(refused.value)
    assert {row["precision"] for row in study.session.ledger.rows("quantize")} == {"bf16"}  # nothing is lost
