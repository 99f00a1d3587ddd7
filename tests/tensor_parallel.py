"""A small random Llama on disk, for one process and for two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 320


def write_model(directory: Path, **settings: Any) -> Path:
    """Two layers, 4 query and 2 KV heads of 64; the first weights are wide, so that attention is sharp."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "attention_bias": True,
        "mlp_bias": True,
    }
    LlamaForCausalLM(LlamaConfig(**shape | settings)).save_pretrained(directory)
    words = WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    Tokenizer(words).save(str(directory / "tokenizer.json"))
    return directory


def prompt(length: int, seed: int) -> list[int]:
    """Random token ids."""
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
