"""Llama 1 to 3, SmolLM, and whatever else is saved as Llama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from tokenizers import pre_tokenizers

from curkv.models.config import ModelConfig, read_shape
from curkv.models.families.base import Family, PreTokenizer
from curkv.models.families.pre_tokenizers import digits_and_bytes, words_and_bytes


class Llama(Family):
    """Biases if the configuration says so."""

    title = "Llama 1 to 3, SmolLM"
    model_type = "llama"
    architectures = ("LlamaForCausalLM", "LlamaModel")
    gguf_architecture: ClassVar[str | None] = "llama"
    gguf_interleaved = True
    pre_tokenizers = {  # noqa: RUF012
        "smollm": PreTokenizer(digits_and_bytes),
        "gpt-2": PreTokenizer(lambda: pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "llama-bpe": PreTokenizer(lambda: words_and_bytes("{1,3}"), adds_bos=True, whole_words=True),
    }

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        bias = bool(raw.get("attention_bias", False))
        return replace(
            read_shape(raw, self.architectures[0]),
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=bool(raw.get("mlp_bias", False)),
        )
