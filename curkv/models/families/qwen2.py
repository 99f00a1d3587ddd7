"""Qwen2 and Qwen2.5, dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from curkv.models.config import LayerKind, ModelConfig, read_shape, read_window, sliding_layers
from curkv.models.families.base import Family

DEFAULT_WINDOW, DEFAULT_FULL_LAYERS = 4096, 28
"""What transformers assumes if config.json does not say."""


class Qwen2(Family):
    """Queries, keys and values have biases."""

    title = "Qwen2, Qwen2.5, with windows or without"
    model_type = "qwen2"
    architectures = ("Qwen2ForCausalLM", "Qwen2Model")
    gguf_architecture = "qwen2"

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        return windowed(raw, replace(read_shape(raw, self.architectures[0]), qkv_bias=True))


def windowed(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """Returns the configuration with its windows; the first layers never have one."""
    if not raw.get("use_sliding_window"):
        return config
    window = read_window({"sliding_window": DEFAULT_WINDOW} | dict(raw))
    full = raw.get("max_window_layers", DEFAULT_FULL_LAYERS)
    sliding = sliding_layers(raw, config.num_layers, None)
    if raw.get("layer_types") is None:
        sliding = [index >= full for index in range(config.num_layers)]
    return replace(
        config, layers=tuple(LayerKind(config.rope, window if slides else None) for slides in sliding)
    )
