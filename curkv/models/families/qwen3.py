"""Qwen3, dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from curkv.models.config import ModelConfig, read_shape
from curkv.models.families.base import Family
from curkv.models.families.qwen2 import windowed

DEFAULT_HEAD_DIM = 128
"""What transformers assumes if config.json does not say."""


class Qwen3(Family):
    """Queries and keys are normalised per head; biases of attention if the configuration says so."""

    title = "Qwen3, with windows or without"
    model_type = "qwen3"
    architectures = ("Qwen3ForCausalLM", "Qwen3Model")
    gguf_architecture = "qwen3"

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        bias = bool(raw.get("attention_bias", False))
        config = read_shape(raw, self.architectures[0], DEFAULT_HEAD_DIM)
        return windowed(raw, replace(config, qkv_bias=bias, o_bias=bias, qk_norm=True))
