"""Quantize a model into a format's checkpoint, save it with a manifest, load it for every measurement, and compare.

A checkpoint is written beside its final place and renamed when it is whole. It counts only when the reloaded model
gives the logits that the model gave before it was saved, bit for bit.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from qnb.errors import InputError, refusing
from qnb.finite import check_finite
from qnb.ledger import write_atomic
from qnb.memory import MIB, release
from qnb.precision import CONFIGS, Precision
from qnb.quantize import runtime
from qnb.quantize.files import CONFIG, link_weights, read_json, replacing

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from qnb.device import Device
    from qnb.quantize.sources import Source

RELEASED_FILES = (  # those beside weights and configuration, which a checkpoint has as they were released
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "*.tiktoken", "tekken.json", "chat_template*", "additional_chat_templates/*.jinja",
)  # fmt: skip
CONVERTED = ("dtype", "torch_dtype", "quantization_config")  # settings that a format has of its own
# settings of a model's own that would change what is timed, or how its outputs are read
OVERRIDDEN = {"_attn_implementation": None, "use_cache": True, "return_dict": True, "output_attentions": False,
              "output_hidden_states": False}  # fmt: skip
TEXT_HALF = {  # how a multimodal model's files name the tensors of its text half, and how a text model names them
    r"^(model\.)?language_model\.model\.": "model.",
    r"^model\.(language|text)_model\.": "model.",
    r"^language_model\.lm_head": "lm_head",
}
TEXT = "The quick brown fox jumps over the lazy dog while seven wizards count to twelve."


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars of transformers, and warnings of transformers and of what quantizes, within the block."""
    from transformers.utils import logging as bars

    with ExitStack() as restore:
        for logger in map(logging.getLogger, ("transformers", "torch.utils._pytree", *CONFIGS)):
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if bars.is_progress_bar_enabled():
            restore.callback(bars.enable_progress_bar)
            bars.disable_progress_bar()
        yield


# Models and tokenizers


def load_tokenizer(folder: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer as batches need it: padded on the left, with the end of sequence as pad token if there is one.

    Raises
    ------
    InputError
        There is no tokenizer in `folder`.
    """
    from transformers import AutoTokenizer

    with refusing(f"{folder} has no tokenizer that transformers can load; save one beside the model"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **options)
        if not tokenizer("a word")["input_ids"]:  # without files, some classes make a tokenizer without tokens
            raise ValueError("it makes no tokens")
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def read_config(folder: str | Path, name: str = "", **options: Any) -> PretrainedConfig:
    """Read a causal language model's configuration, for measuring; of a multimodal model, that of its text half.

    Parameters
    ----------
    folder
        Where config.json is.
    name
        What an error calls the model; empty takes the folder.
    **options
        Of transformers, such as the name of a GGUF file in the folder.

    Raises
    ------
    InputError
        transformers has no causal language model of that kind.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    with quiet():
        whole = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, **options)
    text = getattr(whole, "text_config", whole)
    others = [part for part in whole.sub_configs if re.search("vision|image|vq|audio", part)]
    is_causal = type(text) in MODEL_FOR_CAUSAL_LM_MAPPING and "MaskedLM" not in str(whole.architectures)
    if not is_causal or getattr(text, "is_encoder_decoder", False) or (others and text is whole):
        kind = f"is multimodal ({', '.join(others)})" if others else "is no causal language model"
        lacks = f"transformers has no text model of {type(text).__name__}"
        raise InputError(f"{name or folder} {kind}: {lacks}; give a model that is text alone")
    if type(whole) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # its files say by the whole's rule which tensors are one
        text.tie_word_embeddings = getattr(whole, "tie_word_embeddings", text.tie_word_embeddings)
    for setting, value in OVERRIDDEN.items():
        setattr(text, setting, value)
    return text


def load(folder: str | Path, precision: Precision, device: str | Device) -> PreTrainedModel:
    """Load a causal language model for inference; of a multimodal model, its text half.

    Parameters
    ----------
    folder
        A source, converted to `precision` on the way, or a checkpoint of that format.
    precision
        The format.
    device
        Where to put the model, as torch names it, or a device that may spread it.

    Raises
    ------
    InputError
        The tensors are not those that the configuration describes.
    """
    if precision.origin:
        from qnb.quantize import existing

        return existing.load(Path(folder), device if isinstance(device, str) else device.place)
    place, placed = (device, {"device_map": device}) if isinstance(device, str) else (device.place, device.device_map)
    options: dict[str, Any] = {"dtype": precision.torch_dtype, **placed}
    config = read_config(folder)
    if precision.quantized and not getattr(config, "quantization_config", None):
        with quiet():  # a library may warn when it is imported
            options["quantization_config"] = precision.config(_skipped_modules(config, precision, place))
    if _is_half(folder, config):
        options["key_mapping"] = TEXT_HALF
    model, absent, left_over = load_tensors(str(folder), config=config, use_safetensors=True, **options)
    if place != "cpu" and {"cpu", "disk"} & {*map(str, getattr(model, "hf_device_map", {}).values())}:
        raise MemoryError(f"the weights in {folder} are more than all their GPUs may hold")
    stacks = {_stack(name) for name, _ in model.named_parameters()} - {""}
    wrong = absent | {key for key in left_over if _stack(key) in stacks}
    if wrong:  # of those left over, transformers would say nothing
        what = f"{len(wrong)} tensors are missing, left over or of another shape, such as {min(wrong)}"
        raise InputError(f"in {folder} {what}; save {CONFIG} and safetensors from one model that is text alone")
    return model.eval()


def load_tensors(folder: str, **options: Any) -> tuple[PreTrainedModel, set[str], set[str]]:
    """Load a causal language model as transformers does.

    Returns
    -------
    tuple
        The model, the tensors that were drawn at random, as they are missing or of another shape, and those left over.
    """
    from transformers import AutoModelForCausalLM

    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
        )
    model, report = loaded
    mismatched = (key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])
    return model, {*report["missing_keys"], *mismatched}, {*report["unexpected_keys"]}


def _skipped_modules(config: PretrainedConfig, precision: Precision, device: str) -> list[str] | None:
    """Return the modules that stay as they are where a library cannot multiply by all; None: transformers chooses.

    On CPUs with bfloat16 units a 4-bit layer of bitsandbytes must have a multiple of 32 outputs and of 64 inputs.
    torchao's int8 kernels of a GPU take multiples of 8. Mamba multiplies by some weights itself.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    with quiet():
        from bitsandbytes.functional import has_avx512bf16  # importing it warns
    with torch.device("meta"), quiet():
        model: Any = AutoModelForCausalLM.from_config(config)
    default = get_keys_to_not_convert(model)
    is_packed = device == "cpu" and has_avx512bf16() and "load_in_4bit" in precision.quantization
    output_step, input_step = (32, 64) if is_packed else precision.multiples
    own = {"mamba": "dt_proj"}.get(config.model_type, "-")
    impossible = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and name not in default:
            outputs, inputs = module.weight.shape[:: -1 if isinstance(module, Conv1D) else 1]
            if name.endswith(own) or outputs % output_step or inputs % input_step:
                impossible.append(name)
    return [*default, *impossible] if impossible else None


def _is_half(folder: str | Path, config: PretrainedConfig) -> bool:
    """Return whether a folder holds more than the text model that `config` describes."""
    return read_json(Path(folder) / CONFIG).get("model_type", config.model_type) != config.model_type


def _stack(name: str) -> str:
    """Return what stands before the layer's number in a tensor's name; empty without one."""
    match = re.match(r"(.*?)\.\d+\.", name)
    return match[1] if match else ""


def logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the model's logits over `TEXT` on the CPU, shape (tokens, vocabulary).

    Raises
    ------
    NotFiniteError
        Some are infinite or undefined.
    """
    import torch

    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"].to(model.device)  # (1, T)
    with torch.inference_mode(), quiet():
        outputs = model(ids).logits[0].cpu()  # (T, V)
    check_finite(outputs, "logits of a short text", model)
    return outputs


@dataclass(frozen=True, slots=True)
class Weights:
    """What a model's loaded tensors take, by kind. A tied output head counts as the embedding."""

    parameters: int
    embedding_bytes: int
    linear_bytes: int  # all other matrices, with their quantization constants
    other_bytes: int  # norms and biases
    quantized_parameters: int
    quantized_bytes: int  # with their quantization constants
    left_out: dict[str, int]  # parameters that a quantized format left as they were, by the reason; sums to the rest

    @property
    def total_mib(self) -> float:
        """All weights in MiB."""
        return (self.embedding_bytes + self.linear_bytes + self.other_bytes) / MIB


class LoadedTensor(NamedTuple):
    """A tensor of a loaded model, and what it stores."""

    name: str
    module: torch.nn.Module  # that holds it
    tensor: torch.Tensor
    parameters: int  # two in an element in 4 bit
    bytes: int  # with quantization constants
    is_quantized: bool


def loaded_tensors(model: PreTrainedModel) -> Iterator[LoadedTensor]:
    """Yield a model's tensors, a tied one once, whatever class their modules have."""
    import torch

    for name, tensor in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        state = getattr(tensor, "quant_state", None)  # of a tensor in 4 bit, which packs two weights into a byte
        scale = getattr(tensor, "SCB", None)  # of one in 8 bit
        if scale is None and tensor.dtype == torch.int8:  # the first product moves it
            scale = getattr(getattr(module, "state", None), "SCB", None)
        constants = [scale] if state is None else state.as_dict(packed=False).values()
        parameters = tensor.numel() if state is None else state.shape.numel()
        parts = [tensor, *constants]
        if is_wrapper := hasattr(tensor, "__tensor_flatten__"):  # it holds what torchao packed
            parts = [getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]]
            tensor = max(parts, key=lambda part: part.nbytes)  # which kernels read
        size = sum(each.nbytes for each in parts if isinstance(each, torch.Tensor))
        is_quantized = is_wrapper or state is not None or tensor.dtype == torch.int8
        yield LoadedTensor(name, module, tensor, parameters, size, is_quantized)


def count_weights(model: PreTrainedModel) -> Weights:
    """Count a model's parameters and bytes from its tensors, whatever class their modules have."""
    import torch

    count: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for each in loaded_tensors(model):
        is_embedding = isinstance(each.module, torch.nn.Embedding)
        kind = "embedding" if is_embedding else "linear" if each.tensor.dim() > 1 else "other"
        count.update({"parameters": each.parameters, f"{kind}_bytes": each.bytes})
        if each.is_quantized:
            count.update({"quantized_parameters": each.parameters, "quantized_bytes": each.bytes})
        elif getattr(model, "hf_quantizer", None):
            left_out[_why_left_out(each.module, each.tensor, model)] += each.parameters
    return Weights(**{name: count[name] for name in Weights.__slots__ if name != "left_out"}, left_out=dict(left_out))


def _why_left_out(module: torch.nn.Module, tensor: torch.Tensor, model: PreTrainedModel) -> str:
    """Return why a tensor was not quantized: only the matrices of linear layers are, but not the output head's."""
    import torch

    if isinstance(module, torch.nn.Embedding):
        return "embeddings"
    if tensor.dim() < 2:
        return "norms, biases and other vectors"
    if module is model.get_output_embeddings():
        return "output head"
    if isinstance(module, torch.nn.Linear):
        return "linear layers that transformers or its library skips"
    return f"{type(module).__name__} is no linear layer"


# Conversion


@dataclass(frozen=True, slots=True)
class Checkpoint(Weights):
    """What a checkpoint takes, and how long it took to make. Bytes are None where it was unpacked."""

    file_mib: float  # of its files, which other checkpoints may share
    load_s: float  # loading the checkpoint
    ran_as: str | None = None  # such as "4-bit, MarlinLinear"; of a format whose library may do otherwise than asked
    is_unpacked: bool = False  # to weights that are not quantized
    # and of one that is made here
    quantize_s: float | None = None  # loading from the source, conversion included
    reload_identical: bool | None = None  # the logits equal those before saving, bit for bit; else it is not kept


def convert(source: Source, precision: Precision, folder: Path, device: str | Device) -> Checkpoint:
    """Make a source's checkpoint in a format at `folder`, reload it, and compare the logits.

    Raises
    ------
    RuntimeError
        The reloaded model's logits differ from those before saving, or no layer was quantized; `folder` is left as
        it was.
    NotFiniteError
        Some logits are infinite or undefined.
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
        _save(model, Path(source.path), draft)
        before = logits(model, tokenizer)
        del model
        release()
        # 3) reload and compare
        started = perf_counter()
        reloaded = load(draft, precision, device)
        load_s = perf_counter() - started
        if not torch.equal(before, logits(reloaded, load_tokenizer(draft))):
            raise RuntimeError(f"{precision.name}: the reloaded checkpoint's logits differ from those before saving")
        ran_as = runtime.ran_as(reloaded, precision) if precision.weight else None
        file_mib = sum(path.stat().st_size for path in draft.glob("*.safetensors")) / MIB
    return Checkpoint(**asdict(weights), file_mib=file_mib, load_s=load_s, ran_as=ran_as, quantize_s=quantize_s,
                      reload_identical=True)  # fmt: skip


def _save(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Save a model, with its tokenizer and all settings as they were released.

    The embedding, and an output head of its own, get a file each: other formats have the same.
    """
    from transformers import GenerationConfig

    is_half = _is_half(source, model.config)
    size_bytes = sum(each.bytes for each in loaded_tensors(model))
    model.generation_config = GenerationConfig()  # transformers refuses to save some that were released
    with quiet():
        if not is_half and link_weights(source, folder, model.dtype, size_bytes):
            model.config.save_pretrained(folder)
        else:  # what is above the limit gets a file of its own; that of a small embedding would make too many files
            embedding: Any = model.get_input_embeddings()
            limit = max(embedding.weight.nbytes - 1, size_bytes // 20)
            model.save_pretrained(folder, max_shard_size=limit, save_original_format=not is_half)
            (folder / "generation_config.json").unlink()
    for path in (path for pattern in RELEASED_FILES for path in source.glob(pattern) if path.is_file()):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    saved, released = read_json(folder / CONFIG), read_json(source / CONFIG)
    if is_half:
        settings = saved | {name: value for name, value in released["text_config"].items() if name in OVERRIDDEN}
    else:
        settings = {name: value for name, value in released.items() if name not in CONVERTED}
        settings |= {name: saved[name] for name in CONVERTED if name in saved}
    write_atomic(folder / CONFIG, json.dumps(settings, indent=2))
