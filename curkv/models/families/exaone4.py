"""EXAONE 4: norms behind the blocks and of heads; with windows, only the layers that have one rotate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from curkv.models.config import LayerKind, ModelConfig, read_shape, read_window, sliding_layers
from curkv.models.families.base import Family, Norms
from curkv.models.families.gguf_names import POST_NORM_TENSORS

DEFAULTS = {"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4}
"""What transformers assumes if config.json does not say."""


class Exaone4(Family):
    """No biases."""

    title = "EXAONE 4, with windows or without"
    model_type = "exaone4"
    architectures = ("Exaone4ForCausalLM", "Exaone4Model")
    gguf_architecture = "exaone4"
    gguf_tensors = POST_NORM_TENSORS
    gguf_windows = True
    prunable = False
    norms = Norms(None, None, "post_attention_layernorm", "post_feedforward_layernorm")

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        raw = DEFAULTS | dict(raw)
        config = replace(read_shape(raw, self.architectures[0]), qk_norm=True)
        if raw["sliding_window"] is None:
            return config
        window = read_window(raw)
        sliding = sliding_layers(raw, config.num_layers, None)
        layers = (LayerKind(config.rope, window) if slides else LayerKind(None) for slides in sliding)
        return replace(config, layers=tuple(layers))
