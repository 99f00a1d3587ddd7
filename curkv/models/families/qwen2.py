"""Qwen2 and Qwen2.5, dense, with full attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tokenizers import normalizers

from curkv.models.config import ModelConfig, read_shape
from curkv.models.errors import UnsupportedModel
from curkv.models.families.base import Family, PreTokenizer
from curkv.models.families.pre_tokenizers import words_and_bytes

DEFAULT_WINDOW, DEFAULT_FULL_LAYERS = 4096, 28
"""What transformers assumes if config.json does not say."""


class Qwen2(Family):
    """Queries, keys and values have biases."""

    model_type = "qwen2"
    architectures = ("Qwen2ForCausalLM", "Qwen2Model")
    gguf_architecture = "qwen2"
    pre_tokenizers = {"qwen2": PreTokenizer(lambda: words_and_bytes(""), normalizers.NFC)}  # noqa: RUF012

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        config = replace(read_shape(raw, self.architectures[0]), qkv_bias=True)
        refuse_windows(raw, config)
        return config


def refuse_windows(raw: Mapping[str, Any], config: ModelConfig) -> None:
    """Raises UnsupportedModel if a layer attends to less than everything; the first ones never do."""
    full_layers = raw.get("max_window_layers", DEFAULT_FULL_LAYERS)
    window = raw.get("sliding_window") or DEFAULT_WINDOW
    if raw.get("use_sliding_window") and full_layers < config.num_layers and window < config.max_positions:
        raise UnsupportedModel(
            "sliding-window attention (use_sliding_window = true) is not supported; full attention is"
        )
