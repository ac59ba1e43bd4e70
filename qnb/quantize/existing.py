"""Checkpoints that were made elsewhere: loaded, compared with the study's model, and described as they really run.

Some run packed, with kernels of their library. Others are unpacked when they are loaded or first used. Those have an
accuracy and the size of their file. Their speed and memory would be those of unpacked weights, so they have none.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from qnb.errors import InputError, refusing
from qnb.ledger import Row
from qnb.memory import MIB, is_out_of_memory, released
from qnb.precision import ORIGIN, Precision
from qnb.quantize import checkpoint, sources
from qnb.quantize.checkpoint import Checkpoint, count_weights, load_tensors, load_tokenizer, read_config
from qnb.quantize.runtime import PLAIN, check_runnable, linear_layers, main_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qnb.quantize.sources import Source
    from qnb.session import Session

SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads")  # fmt: skip
PACKAGES = {"gptq": "gptqmodel optimum", "awq": "gptqmodel", "auto-round": "auto-round",
            "compressed-tensors": "compressed-tensors", "torchao": "torchao", "quanto": "optimum-quanto",
            "gguf": "gguf"}  # fmt: skip


def check(session: Session) -> None:
    """Refuse, before anything is measured, what cannot be a row of the study.

    Raises
    ------
    InputError
        A checkpoint is not there, or it is of another model; a format cannot run here.
    """
    for precision in session.precisions:
        check_runnable(precision, session.device)
    for precision in session.precisions:  # after all others, for it may fetch one
        if precision.origin:
            find(session, precision)


def find(session: Session, precision: Precision) -> Source:
    """Return the checkpoint of a format that was made elsewhere, once it was found to be of the study's model."""
    if precision.name in session.existing:
        return session.existing[precision.name]
    source = sources.existing(precision.origin)
    for row in session.ledger.rows("quantize"):
        if row["precision"] == precision.name and row["checkpoint_fingerprint"] != source.fingerprint:
            stands = f"label {precision.name!r} stands for another checkpoint in {session.folder}: {row['origin']}"
            raise InputError(f"{stands}, as it was then; give another label before '=', or another output")
    with refusing(_unreadable(source.path)):  # whatever a library says of a damaged file
        check_same_model(Path(source.path), session.source, session.tokenizer)
    session.existing[precision.name] = source
    return source


def content(session: Session, precision: Precision) -> dict[str, Any]:
    """Return what makes a format's rows: its settings or its files, and a package that not every study has."""
    if precision.origin:
        source = find(session, precision)
        return {"checkpoint_fingerprint": source.fingerprint, "library": _library(method(Path(source.path)))}
    version = _library(precision.library)  # empty of what every study names
    return precision.quantization | ({"library": version} if version else {})


def _library(how: str) -> str:
    """Return the packages that run a kind of checkpoint, with their versions; empty of what every study names."""
    with suppress(metadata.PackageNotFoundError):
        return " ".join(f"{package} {metadata.version(package)}" for package in PACKAGES.get(how, "").split())
    return ""


def _unreadable(path: str | Path) -> str:
    return f"{ORIGIN}{path} could not be loaded; fetch or save it again"


def row(session: Session, precision: Precision) -> Row:
    """Return the row that describes a checkpoint made elsewhere; it is loaded for that once."""
    key, source = session.key("quantize", precision), find(session, precision)
    if measured := session.find(key):
        return measured
    with released():
        facts = describe(Path(source.path), session.tokenizer, session.device.place)
    named = {"origin": precision.origin, "style": precision.style, "checkpoint": source.name}
    return session.append(key, asdict(facts), content(session, precision), named)


def method(path: Path) -> str:
    """Return how a checkpoint says it was quantized, such as "gptq" or "gguf"; empty where it says nothing."""
    if path.is_file():
        return "gguf"
    settings = getattr(read_config(path), "quantization_config", None) or {}
    return str(settings.get("quant_method", ""))


def load(path: Path, device: str) -> PreTrainedModel:
    """Load a checkpoint as transformers does, for inference.

    Raises
    ------
    InputError
        A library is missing, or transformers cannot load it on this device.
    """
    if path.is_file():
        folder, options = path.parent, sources.unpacking(path)
    else:
        folder, options = path, {"config": read_config(path), "dtype": "auto", "use_safetensors": True}
    try:
        model, absent, _ = load_tensors(str(folder), device_map=device, **options)
        if absent:
            raise ValueError(f"{len(absent)} tensors are missing or of another shape, such as {min(absent)}")
    except Exception as error:  # whatever its library raises
        if is_out_of_memory(error):
            raise
        package = PACKAGES.get(method(path))
        library = f"`pip install {package}`" if package else "a library that is not installed"
        needs = f"{ORIGIN}{path} needs {library}; all other formats work without"
        with refusing(_unreadable(path)), refusing(needs, ImportError):
            raise
    return model.eval()


def check_same_model(path: Path, source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a checkpoint of another model than the study's: other shapes, or another vocabulary.

    Raises
    ------
    InputError
        They differ; what differs is named.
    """
    folder, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    theirs, ours = read_config(folder, **options), read_config(source.path)
    values = {name: (getattr(theirs, name, None), getattr(ours, name, None)) for name in SAME}
    others = [f"its {name} is {their}, not {our}" for name, (their, our) in values.items() if their != our]
    # one that brings no tokenizer takes the study's
    if not others and (options or [*path.glob("tokenizer*"), *path.glob("vocab*"), *path.glob("*.model")]):
        own = load_tokenizer(folder, **options)
        if words := set(own.get_vocab().items()) ^ set(tokenizer.get_vocab().items()):
            others = [f"another vocabulary, in {len(words)} entries such as {min(words)[0]!r}"]
    if others:
        raise InputError(f"{ORIGIN}{path} is of another model than {source.name}: {others[0]}; give one made of it")


def describe(path: Path, tokenizer: PreTrainedTokenizerBase, device: str) -> Checkpoint:
    """Load a checkpoint, let it read a short text, and describe it.

    Raises
    ------
    InputError
        It cannot be loaded here.
    NotFiniteError
        Some of its logits are infinite or undefined.
    """
    started = perf_counter()
    model = load(path, device)
    load_s = perf_counter() - started
    weights = asdict(count_weights(model)) | _packed(model)
    checkpoint.logits(model, tokenizer)  # some unpack at the first product
    kind, how = main_kind(model), method(path)
    is_unpacked = bool(how) and kind in PLAIN
    if is_unpacked:
        unknown = dict.fromkeys((*(name for name in weights if name.endswith("_bytes")), "quantized_parameters"))
        weights = asdict(count_weights(model)) | unknown | {"left_out": {}}
    files = [path] if path.is_file() else path.glob("*.safetensors")
    file_mib = sum(file.stat().st_size for file in files) / MIB
    ran_as = f"unpacked to {kind} ({how})" if is_unpacked else kind
    return Checkpoint(**weights, file_mib=file_mib, load_s=load_s, ran_as=ran_as, is_unpacked=is_unpacked)


def _parameters(layer: Any) -> int:
    """Return the size of a layer's matrix; AutoRound's own layers write its sides in one word."""
    sides = ("in_features", "out_features") if hasattr(layer, "in_features") else ("infeatures", "outfeatures")
    return math.prod(getattr(layer, side) for side in sides)


def _packed(model: PreTrainedModel) -> dict[str, int]:
    """Return counts in place of `count_weights`' where a library packs matrices into tensors of other shapes."""
    layers: list[Any] = [layer for layer in linear_layers(model) if not hasattr(layer, "weight")]
    if not layers:
        return {}
    whole = count_weights(model)
    own = [tensor for layer in layers for tensor in layer.parameters() if tensor.dim() > 1]  # which it has counted
    sizes = {id(tensor): tensor.nbytes for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    quantized, packed_bytes = sum(map(_parameters, layers)), sum(sizes.values())
    return {
        "parameters": whole.parameters - sum(tensor.numel() for tensor in own) + quantized,
        "linear_bytes": whole.linear_bytes - sum(tensor.nbytes for tensor in own) + packed_bytes,
        "quantized_parameters": quantized,
        "quantized_bytes": packed_bytes,
    }
