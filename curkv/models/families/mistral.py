"""Mistral, with windows or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from curkv.models.config import LayerKind, ModelConfig, read_shape, read_window
from curkv.models.families.base import Family

DEFAULT_WINDOW = 4096
"""What transformers assumes if config.json does not say."""


class Mistral(Family):
    """No biases. GGUF files of it call themselves llama."""

    title = "Mistral, with windows or without"
    model_type = "mistral"
    architectures = ("MistralForCausalLM", "MistralModel")

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        config = read_shape(raw, self.architectures[0])
        window = read_window({"sliding_window": DEFAULT_WINDOW} | dict(raw))
        return replace(config, layers=(LayerKind(config.rope, window),) * config.num_layers)
