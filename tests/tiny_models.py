"""Random models that are saved in a moment."""

import torch
import transformers

from qnb.quantize import checkpoint, sources

TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


def save_tiny(folder, config=None, **options):
    """Save a model in bfloat16, a Llama of three layers if nothing else is wanted, with a tokenizer of bytes."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config or transformers.LlamaConfig(**TINY), dtype="bfloat16")
    with checkpoint.quiet():
        model.save_pretrained(folder, **options)
        sources.save_byte_tokenizer(folder)
    return folder
