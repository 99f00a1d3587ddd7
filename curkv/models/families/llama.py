"""Llama 1 to 3, SmolLM, and whatever else is saved as Llama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from curkv.models.config import ModelConfig, read_shape
from curkv.models.families.base import Family


class Llama(Family):
    """Biases if the configuration says so."""

    title = "Llama 1 to 3, SmolLM"
    model_type = "llama"
    architectures = ("LlamaForCausalLM", "LlamaModel")
    gguf_architecture: ClassVar[str | None] = "llama"
    gguf_interleaved = True

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        bias = bool(raw.get("attention_bias", False))
        return replace(
            read_shape(raw, self.architectures[0]),
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=bool(raw.get("mlp_bias", False)),
        )
