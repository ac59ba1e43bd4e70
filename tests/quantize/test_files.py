"""A checkpoint's files are whole, shared where they are equal, and take the disk that was said."""

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import TINY, save_tiny

from qnb.precision import PRECISIONS, STUDY
from qnb.quantize import checkpoint, files, sources

# as in Llama-3.2-1B, 21 % of the weights are embedding, which is the output head too
PROPORTIONS = {"vocab_size": 4010, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
               "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip


def convert(model, folder, *names, half="float16"):
    source, precisions = sources.resolve(str(model), "cpu"), [PRECISIONS[name].in_half(half) for name in names]
    return [checkpoint.convert(source, each, folder / each.checkpoint, "cpu") for each in precisions]


def disk_bytes(*folders):
    """What `du` says: a file with several names counts once."""
    stats = [path.stat() for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return sum({stat.st_ino: stat.st_size for stat in stats}.values())


def tensors(folder):
    """The tensors that transformers reads from a folder, by name."""
    return {name: each for file in files.weight_files(folder) for name, each in load_file(folder / file).items()}


@pytest.mark.parametrize(("half", "most"), [("float16", 1.9), ("bfloat16", 2.1), ("float32", 2.4)])
def test_five_formats_take_about_twice_the_released_weights(half, most, tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "model", transformers.LlamaConfig(**PROPORTIONS))
    source, precisions = sources.resolve(str(model), "cpu"), [PRECISIONS[name].in_half(half) for name in STUDY]
    made = convert(model, tmp_path / "made", *STUDY, half=half)
    assert made[0].file_mib == pytest.approx(made[1].file_mib, 0.001)  # each says its own size
    released_bytes = disk_bytes(model)
    taken_bytes = disk_bytes(model, tmp_path / "made") - released_bytes
    assert taken_bytes < most * released_bytes < 0.7 * 2**20 * sum(each.file_mib for each in made)
    for share in (0.85, 1.15):  # the card says that disk is short at 15 % less than what is taken
        monkeypatch.setattr(shutil, "disk_usage", lambda _, share=share: SimpleNamespace(free=share * taken_bytes))
        assert bool(files.disk_shortage(source, tmp_path / "other", precisions)) == (share < 1)
        assert not files.disk_shortage(source, tmp_path / "made", precisions)


def other_settings(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": "float32"}))


def other_tensors(change):
    def write(folder):
        changed = change(load_file(folder / "model.safetensors"))
        save_file(changed, folder / "model.safetensors", {"format": "pt"})

    return write


def move_to_blobs(folder):
    """Keep files as the hub's cache does."""
    (folder.parent / "blobs").mkdir()
    for path in folder.glob("*"):
        path.symlink_to(path.rename(folder.parent / "blobs" / path.name))


@pytest.mark.parametrize(("options", "change", "is_linked"), [
    ({}, None, True), ({"max_shard_size": "50KB"}, None, True), ({"max_shard_size": "50KB"}, move_to_blobs, True),
    ({}, other_settings, True),
    ({}, other_tensors(lambda each: {name: tensor.float() for name, tensor in each.items()}), False),
    ({}, other_tensors(lambda each: each | {"model.norm.weight": each["model.norm.weight"].float()}), False),
    ({}, other_tensors(lambda each: each | {"lm_head.weight": each["model.embed_tokens.weight"].clone()}), False),
    ({}, other_tensors(lambda each: each | {"rotary.inv_freq": torch.ones(8).bfloat16()}), False),
], ids=["file", "shards", "blobs", "settings", "float32", "mixed", "tied", "more"])  # fmt: skip
def test_what_a_source_has_as_it_would_be_saved_is_linked(options, change, is_linked, tmp_path):
    config = transformers.LlamaConfig(**TINY, tie_word_embeddings=True)
    model, made = save_tiny(tmp_path / "model", config, **options), tmp_path / "made" / "bf16"
    if change:
        change(model)
    convert(model, made.parent, "bf16")
    paths = [made / name for name in files.weight_files(made)]
    linked = [(model / path.name).exists() and path.samefile(model / path.name) for path in paths]
    assert linked == [is_linked] * len(paths) and not any(path.is_symlink() for path in made.iterdir())
    stock = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    stock.save_pretrained(tmp_path / "stock")
    ours, theirs = tensors(made), tensors(tmp_path / "stock")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {each.dtype for each in ours.values()} == {torch.bfloat16} and files.damage(made) == ""


def test_a_drive_without_links_gets_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EXDEV, "across devices")))
    model = save_tiny(tmp_path / "model")
    for name, made in zip(("bf16", "fp16", "nf4"), convert(model, tmp_path, "bf16", "fp16", "nf4"), strict=True):
        folder = tmp_path / PRECISIONS[name].in_half("float16").checkpoint
        assert files.damage(folder) == "" and {path.stat().st_nlink for path in folder.iterdir()} == {1}
        assert made.file_mib * 2**20 == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_damage_to_a_shared_file_is_found_in_each_checkpoint_and_mended_in_each(tmp_path):
    """An embedding and an output head are the same file in three formats."""
    names, model = ("fp16", "int8", "nf4"), save_tiny(tmp_path / "model")
    folders = [tmp_path / PRECISIONS[name].in_half("float16").checkpoint for name in names]
    for again in (names, ("nf4",)):  # to make one anew changes no other
        convert(model, tmp_path, *again)
        shared = [{path for path in folder.iterdir() if path.stat().st_nlink == 3} for folder in folders]
        assert [len(each) for each in shared] == [2, 2, 2] and not any(map(files.damage, folders))
    data = bytearray(min(shared[0]).read_bytes())
    data[-1] ^= 1
    min(shared[0]).write_bytes(data)
    assert all(files.damage(folder) == min(each).name for folder, each in zip(folders, shared, strict=True))
    for count, name in enumerate(names, 1):
        convert(model, tmp_path, name)
        assert [bool(files.damage(folder)) for folder in folders] == [False] * count + [True] * (3 - count)
    assert [sum(path.stat().st_nlink == 3 for path in folder.iterdir()) for folder in folders] == [2, 2, 2]


def test_an_interrupted_folder_leaves_the_one_before(tmp_path):
    folder = tmp_path / "made"
    for content in ("old", "half"):
        with suppress(KeyboardInterrupt), files.replacing(folder) as draft:
            assert list(draft.iterdir()) == []
            (draft / "file").write_text(content)
            if content == "half":
                raise KeyboardInterrupt
    assert (folder / "file").read_text() == "old" and files.damage(folder) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_damage_names_the_first_wrong_file(tmp_path):
    folder = tmp_path / "made"
    with files.replacing(folder) as draft:
        (draft / "below").mkdir()
        (draft / "below" / "template.jinja").write_text("{{ }}")
        (draft / "model.safetensors").write_bytes(b"whole")
    for name, content in (("model.safetensors", "wrong"), ("below/template.jinja", ""), ("manifest.json", "[")):
        (folder / name).write_text(content)
        assert files.damage(folder) == name
    shutil.rmtree(folder)
    assert files.damage(folder) == "manifest.json"
