"""Mistral with full attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curkv.models.config import ModelConfig, read_shape
from curkv.models.errors import UnsupportedModel
from curkv.models.families.base import Family

DEFAULT_WINDOW = 4096
"""What transformers assumes if config.json does not say."""


class Mistral(Family):
    """No biases. GGUF files of it call themselves llama."""

    model_type = "mistral"
    architectures = ("MistralForCausalLM", "MistralModel")

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        config = read_shape(raw, self.architectures[0])
        window = raw.get("sliding_window", DEFAULT_WINDOW)
        if window is not None and window < config.max_positions:
            raise UnsupportedModel(
                f"sliding-window attention (sliding_window = {window}) is not supported; Mistral models "
                "with full attention (sliding_window: null, such as Mistral-7B-Instruct-v0.3) are"
            )
        return config
