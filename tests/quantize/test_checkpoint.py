"""Quantizing, saving, reloading: against analytic bytes and the libraries' own results."""

import errno
import json
import shutil
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
import transformers
from tiny_models import TINY, save_tiny

from qnb.errors import InputError
from qnb.precision import PRECISIONS, STUDY
from qnb.quantize import checkpoint, files, sources

# SmolLM2-135M: 30 layers of hidden 576, intermediate 1536, 9 heads of 64 with 3 for keys and values, vocabulary 49152
LINEAR = 30 * (576 * 576 * 2 + 2 * 576 * 192 + 3 * 576 * 1536)
EMBEDDING, NORMS = 49152 * 576, 61 * 576
INT8_ROWS = 30 * (2 * 576 + 2 * 192 + 2 * 1536 + 576)  # a float32 scale for each output row


@pytest.fixture
def tiny_folder(tmp_path):
    """A folder with a tiny model of three layers, as its user saved it."""
    return save_tiny(tmp_path / "model")


def convert(model, name, folder):
    return checkpoint.convert(sources.resolve(str(model), "cpu"), PRECISIONS[name], folder / name, "cpu")


@pytest.mark.parametrize("name", STUDY)
def test_a_checkpoint_weighs_what_its_layout_says(request, name):
    folder, made = request.getfixturevalue("checkpoint")(name)
    # half a byte a weight, a float32 a 64 weights, and a table of 16 float32 for each of 210 matrices
    four_bit = LINEAR // 2 + LINEAR // 64 * 4 + 210 * 16 * 4
    expected = {"bf16": LINEAR * 2, "fp16": LINEAR * 2, "int8": LINEAR + 4 * INT8_ROWS}.get(name, four_bit)
    assert made.reload_identical and made.parameters == LINEAR + EMBEDDING + NORMS
    assert (made.embedding_bytes, made.linear_bytes, made.other_bytes) == (EMBEDDING * 2, expected, NORMS * 2)
    quantized = (LINEAR, expected) if PRECISIONS[name].quantized else (0, 0)
    assert (made.quantized_parameters, made.quantized_bytes) == quantized
    assert made.total_mib < made.file_mib < made.total_mib + 0.5 and files.damage(folder) == ""


VECTORS = "norms, biases and other vectors"
ATTENTION = 2 * 64 * 64 + 2 * 64 * 32  # of a layer of TINY, whose 4 heads share 2 of keys and values


@pytest.mark.parametrize(
    ("config", "quantized", "left_out"),
    [
        (transformers.MixtralConfig(**TINY, num_local_experts=4), 3 * ATTENTION,
         {"embeddings": 256 * 64, "output head": 256 * 64, VECTORS: 7 * 64, "MixtralTopKRouter": 3 * 4 * 64,
          "MixtralExperts": 3 * 4 * 3 * 64 * 128}),
        # transposed layers, of another class: attention 4 x 64 x 64 and two matrices of 64 x 256
        (transformers.GPT2Config(vocab_size=256, n_embd=64, n_layer=3, n_head=4), 3 * (4 * 64 * 64 + 2 * 64 * 256),
         {"embeddings": (256 + 1024) * 64, VECTORS: 3 * (192 + 64 + 256 + 64 + 4 * 64) + 2 * 64}),
        # no attention: 128 inner values with a state of 14, steps of rank 4, a convolution over 4 tokens
        (transformers.MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=3, state_size=14),
         3 * (64 * 256 + 128 * 32 + 128 * 64),
         {"embeddings": 256 * 64, VECTORS: 3 * (64 + 3 * 128) + 64, "Conv1d": 3 * 4 * 128, "MambaMixer": 3 * 128 * 14,
          "linear layers that transformers or its library skips": 3 * 4 * 128}),
    ],
    ids=["mixtral", "gpt2", "mamba"],
)  # fmt: skip
def test_what_is_quantized_and_what_is_not_is_counted_from_the_tensors(config, quantized, left_out, tmp_path):
    folder = save_tiny(tmp_path, config)
    for name, bits in (("bf16", 0), ("nf4", 4.5), ("int8", 8)):
        model = checkpoint.load(folder, PRECISIONS[name], "cpu")
        counts = checkpoint.count_weights(model)
        assert counts.quantized_parameters == (quantized if bits else 0)
        assert 0 <= 8 * counts.quantized_bytes - bits * counts.quantized_parameters <= 0.8 * quantized
        reasons = {reason.removesuffix(" is no linear layer"): count for reason, count in counts.left_out.items()}
        assert reasons == (left_out if bits else {})
        assert counts.parameters == quantized + sum(left_out.values())
        model(torch.tensor([[1, 2, 3]]))  # bitsandbytes moves INT8's scales here
        assert checkpoint.count_weights(model) == counts


@pytest.mark.parametrize(
    ("sizes", "odd"), [({"intermediate_size": 100}, 3 * 64 * 100), ({"head_dim": 4}, 2 * 64 * 16 + 2 * 64 * 8)]
)
def test_layers_that_this_cpu_cannot_multiply_by_stay_and_are_counted(sizes, odd, tmp_path):
    """Those of the feed-forward part have 100 inputs or outputs, those of the attention 8 or 16."""
    from bitsandbytes.functional import has_avx512bf16

    made = convert(save_tiny(tmp_path / "model", transformers.LlamaConfig(**{**TINY, **sizes})), "nf4", tmp_path)
    left = made.left_out.get("linear layers that transformers or its library skips", 0)
    assert left == (3 * odd if has_avx512bf16() else 0)
    assert made.quantized_parameters == made.parameters - sum(made.left_out.values()) > 0


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip


AUDIO = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_mel_bins": 16}  # fmt: skip
MULTIMODAL = {
    "gemma3": {"vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 1},
    "idefics3": {"vision_config": VISION, "image_token_id": 1},
    "internvl": {"vision_config": {**VISION, "image_size": [28, 28]}, "image_token_id": 1},
    "voxtral": {"audio_config": AUDIO, "audio_token_id": 1},
}


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_multimodal_models_text_half_is_loaded_and_saved_as_a_text_model(kind, tmp_path):
    """Its logits are those of transformers' whole model over text; its checkpoint is one that transformers loads."""
    text, folder = {**TINY, "head_dim": 16}, tmp_path / "whole"
    config = transformers.AutoConfig.for_model(kind, text_config=text, **MULTIMODAL[kind])
    torch.manual_seed(0)
    whole = transformers.AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16).eval()
    whole.save_pretrained(folder)
    sources.save_byte_tokenizer(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    half = checkpoint.load(folder, PRECISIONS["bf16"], "cpu")
    expected = whole(ids).logits
    assert torch.equal(half(ids).logits, expected)
    assert checkpoint.count_weights(half).parameters < sum(each.numel() for each in whole.parameters())
    for name in ("bf16", "nf4"):
        convert(folder, name, tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    assert torch.equal(stock(ids).logits, expected)


@pytest.mark.parametrize("released", [
    {"use_cache": False, "attn_implementation": "eager", "temperature": 0.7, "max_length": 9, "note": "modèle"},
    {"attn_implementation": "flash_attention_2", "repetition_penalty": 1.3, "num_beams": 3},
    {"return_dict": False, "output_hidden_states": True, "output_attentions": True, "quantization_config": None},
])  # fmt: skip
def test_a_models_own_settings_stay_and_change_nothing(released, tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "config.json").read_text()) | released
    (tiny_folder / "generation_config.json").unlink()
    before = checkpoint.load(tiny_folder, PRECISIONS["fp32"], "cpu")
    (tiny_folder / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    ids = torch.tensor([[5, 6, 7, 8]])
    after = checkpoint.load(tiny_folder, PRECISIONS["fp32"], "cpu")
    outputs = after(ids)
    assert after.config._attn_implementation == "sdpa" and torch.equal(before(ids).logits, outputs.logits)
    assert outputs.past_key_values is not None and outputs.hidden_states is outputs.attentions is None
    convert(tiny_folder, "nf4", tmp_path)
    saved = json.loads((tmp_path / "nf4" / "config.json").read_text(encoding="utf-8"))
    assert saved.pop("quantization_config")["bnb_4bit_quant_type"] == "nf4"
    config.pop("quantization_config", None)
    assert saved == config and not (tmp_path / "nf4" / "generation_config.json").exists()


@pytest.mark.parametrize("name", ["bf16", "nf4", "int8-no-outliers"])
def test_a_model_whose_inputs_overflow_in_8_bit_alone_is_told_to_take_another_format(name, tiny_folder, tmp_path):
    network = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    network.model.layers[0].input_layernorm.weight.data.fill_(1e5)  # float16 holds 65504 at most
    network.save_pretrained(tiny_folder)
    fails = pytest.raises(ArithmeticError, match=r"FP16 inputs of 8-bit layers .* another format")
    with fails if name == "int8-no-outliers" else nullcontext():
        convert(tiny_folder, name, tmp_path)


def test_tokenizer_and_generation_settings_are_saved_as_released(tiny_folder, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder, padding_side="right", pad_token="!")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "T{{ messages }}"}
    tokenizer.save_pretrained(tiny_folder)
    for name in ("tekken.json", "qwen.tiktoken", "vocab.txt", "spiece.model"):
        (tiny_folder / name).write_text("{}")
    (tiny_folder / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 7, "num_beams": 0}')  # invalid
    convert(tiny_folder, "nf4", tmp_path)
    converted = {tiny_folder / "model.safetensors", tiny_folder / "config.json"}
    released = {path for path in tiny_folder.rglob("*") if path.is_file()} - converted
    assert len(released) >= 9
    for path in released:
        assert (tmp_path / "nf4" / path.relative_to(tiny_folder)).read_bytes() == path.read_bytes(), path
    used = checkpoint.load_tokenizer(tmp_path / "nf4")
    batch = used(["one two three", "one"], padding=True)["input_ids"]
    assert batch[1][0] == used.eos_token_id != batch[1][-1], "padded on the left with the end of sequence"


def test_a_model_that_changes_on_reload_is_no_checkpoint(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "logits", lambda *_: torch.rand(3))
    with pytest.raises(RuntimeError, match="logits differ"):
        convert(tiny_folder, "bf16", tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


def test_a_drive_that_renames_no_folder_gets_a_whole_checkpoint(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.rename", Mock(side_effect=OSError(errno.EXDEV, "across devices")))
    convert(tiny_folder, "bf16", tmp_path)
    assert files.damage(tmp_path / "bf16") == "" and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_hidden_layers": 5}, "18 tensors are missing, left over or of another shape, such as model.layers.3"),
        ({"num_hidden_layers": 2}, "9 tensors are missing, left over or of another shape, such as model.layers.2"),
        ({"vocab_size": 60}, "2 tensors are missing, left over or of another shape"),
    ],
)
def test_weights_that_are_not_their_configurations_are_refused(change, expected, tiny_folder):
    """Transformers alone would draw them at random, or leave them out."""
    config = tiny_folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    for name in ("bf16", "int8"):
        with pytest.raises(InputError, match=expected):
            checkpoint.load(tiny_folder, PRECISIONS[name], "cpu")


def test_a_tokenizer_that_makes_no_tokens_or_brings_code_is_refused(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    shutil.rmtree(tmp_path / "model")
    transformers.Qwen2Config(**TINY).save_pretrained(tmp_path / "model")  # its tokenizer's class needs no files
    with pytest.raises(InputError, match="has no tokenizer"):
        checkpoint.load_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(own))
    with pytest.raises(InputError, match="has no tokenizer"):
        checkpoint.load_tokenizer(tmp_path / "model")
    assert not (tmp_path / "ran").exists()
