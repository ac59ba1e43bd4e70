"""A format's checkpoint: converted from its source, saved with a manifest, reloaded, and compared.

A checkpoint is written beside its final place and renamed when it is whole. It counts only when the reloaded model
gives the logits that the model gave before it was saved, bit for bit.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from qnb.errors import InputError
from qnb.ledger import file_sha256, write_atomic
from qnb.memory import MIB, release
from qnb.precision import Precision

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qnb.quantize.sources import Source

MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
RELEASED_FILES = (  # those beside weights and configuration, which a checkpoint has as they were released
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "chat_template*", "additional_chat_templates/*.jinja",
)  # fmt: skip
TEXT = "The quick brown fox jumps over the lazy dog while seven wizards count to twelve."


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars of transformers, and warnings of transformers and bitsandbytes, within the block."""
    from transformers.utils import logging as bars

    with ExitStack() as restore:
        for logger in map(logging.getLogger, ("transformers", "bitsandbytes")):
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if bars.is_progress_bar_enabled():
            restore.callback(bars.enable_progress_bar)
            bars.disable_progress_bar()
        yield


# Folders that are whole or not there


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; when the block ends well, add a manifest and put the folder in `folder`'s place.

    A block that fails leaves `folder` as it was. The caller keeps other processes from the same folder.
    """
    draft = folder.parent / f".{folder.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        manifest = {
            path.relative_to(draft).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(draft.rglob("*")) if path.is_file()
        }  # fmt: skip
        write_atomic(draft / MANIFEST, json.dumps(manifest, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def damage(folder: Path, manifest_sha256: str = "") -> str:
    """Return the first file of a folder of `replacing` that is not as its manifest says; empty where all are.

    Every byte is read: about a second a GiB. With `manifest_sha256` the manifest has to be that one.
    """
    name = MANIFEST
    try:
        if manifest_sha256 and file_sha256(folder / MANIFEST) != manifest_sha256:
            return MANIFEST
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in manifest.items():
            if file_sha256(folder / name) != entry["sha256"]:
                return str(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return str(name)
    return ""


# Models and tokenizers


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer as batches need it: padded on the left, with the end of sequence as pad token.

    Raises
    ------
    InputError
        There is no tokenizer in `folder`.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        if not tokenizer("a word")["input_ids"]:  # without files, some classes make a tokenizer without tokens
            raise ValueError("it makes no tokens")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} has no tokenizer that transformers can load; save one beside the model") from error
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(folder: str | Path, precision: Precision, device: str) -> PreTrainedModel:
    """Load a causal language model for inference.

    Parameters
    ----------
    folder
        A source, converted to `precision` on the way, or a checkpoint of that format.
    precision
        The format.
    device
        Where to put the model, as torch names it.

    Raises
    ------
    InputError
        The tensors are not those that the configuration describes.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": precision.torch_dtype, "device_map": device}
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    if precision.quantized and "quantization_config" not in config:
        options["quantization_config"] = precision.config()
    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False,
            use_safetensors=True, **options,
        )  # fmt: skip
    model, report = loaded
    wrong = {str(key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind]}
    wrong |= {key for key in report["unexpected_keys"] if ".layers." in key}
    if wrong:  # transformers would draw the missing ones at random and pass over the others
        raise InputError(
            f"{folder} has a config.json and safetensors that do not belong together: {len(wrong)} tensors are "
            f"missing, left over or of another shape, such as {min(wrong)}; save both from one model"
        )
    return model.eval()


def logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the model's logits over `TEXT` on the CPU, shape (tokens, vocabulary)."""
    import torch

    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"].to(model.device)  # (1, T)
    with torch.inference_mode(), quiet():
        return model(ids).logits[0].cpu()  # (T, V)


@dataclass(frozen=True, slots=True)
class Weights:
    """What a model's loaded tensors take, by kind. A tied output head counts as the embedding."""

    parameters: int
    embedding_bytes: int
    linear_bytes: int  # all other matrices, with their quantization constants
    other_bytes: int  # norms and biases
    quantized_parameters: int
    quantized_bytes: int  # with their quantization constants

    @property
    def total_mib(self) -> float:
        """All weights in MiB."""
        return (self.embedding_bytes + self.linear_bytes + self.other_bytes) / MIB


def count_weights(model: PreTrainedModel) -> Weights:
    """Count a model's parameters and bytes from its tensors, whatever class their modules have."""
    import torch

    count: Counter[str] = Counter()
    for name, tensor in model.named_parameters():  # a tied one comes once
        module = model.get_submodule(name.rpartition(".")[0])
        state = getattr(tensor, "quant_state", None)  # of a tensor in 4 bit, which packs two weights into a byte
        scale = getattr(tensor, "SCB", None)  # of one in 8 bit
        if scale is None and tensor.dtype == torch.int8:  # the first forward moves it
            scale = getattr(getattr(module, "state", None), "SCB", None)
        constants = [scale] if state is None else state.as_dict(packed=False).values()
        parameters = tensor.numel() if state is None else state.shape.numel()
        size = sum(each.nbytes for each in (tensor, *constants) if isinstance(each, torch.Tensor))
        is_embedding = isinstance(module, torch.nn.Embedding)
        kind = "embedding" if is_embedding else "linear" if tensor.dim() > 1 else "other"
        count.update({"parameters": parameters, f"{kind}_bytes": size})
        if state is not None or tensor.dtype == torch.int8:
            count.update({"quantized_parameters": parameters, "quantized_bytes": size})
    return Weights(**{name: count[name] for name in Weights.__slots__})


# Conversion


@dataclass(frozen=True, slots=True)
class Checkpoint(Weights):
    """What a checkpoint takes, and how long it took to make."""

    file_mib: float  # safetensors on disk
    quantize_s: float  # loading from the source, conversion included
    save_s: float
    load_s: float  # loading the checkpoint
    reload_identical: bool = True  # the logits equal those before saving, bit for bit; else there is no checkpoint


def convert(source: Source, precision: Precision, folder: Path, device: str) -> Checkpoint:
    """Make a source's checkpoint in a format at `folder`, reload it, and compare the logits.

    Raises
    ------
    RuntimeError
        The reloaded model's logits differ from those before saving; `folder` is left as it was.
    """
    import torch

    # 1) load and convert
    tokenizer = load_tokenizer(source.path)
    started = perf_counter()
    model = load(source.path, precision, device)
    quantize_s = perf_counter() - started
    weights = count_weights(model)
    with replacing(folder) as draft:
        # 2) save before the first product: on CPUs with bfloat16 units bitsandbytes then lays 4-bit weights out anew
        # and rounds their block maxima to bfloat16, so that what is saved afterwards is another model
        started = perf_counter()
        _save(model, Path(source.path), draft)
        save_s = perf_counter() - started
        before = logits(model, tokenizer)
        del model
        release()
        # 3) reload and compare
        started = perf_counter()
        reloaded = load(draft, precision, device)
        load_s = perf_counter() - started
        if not torch.equal(before, logits(reloaded, load_tokenizer(draft))):
            raise RuntimeError(f"{precision.name}: the reloaded checkpoint's logits differ from those before saving")
        file_mib = sum(path.stat().st_size for path in draft.glob("*.safetensors")) / MIB
    return Checkpoint(**asdict(weights), file_mib=file_mib, quantize_s=quantize_s, save_s=save_s, load_s=load_s)


def _save(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Save a model, with the tokenizer and the generation settings as they were released."""
    with quiet():
        model.save_pretrained(folder)
    for path in (path for pattern in RELEASED_FILES for path in source.glob(pattern) if path.is_file()):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
