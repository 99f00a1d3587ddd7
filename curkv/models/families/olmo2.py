"""OLMo 2 and 3: norms behind the blocks and none before; queries and keys normalised over all heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from curkv.models.config import LayerKind, ModelConfig, read_shape, read_window, sliding_layers
from curkv.models.families.base import Family, Norms
from curkv.models.families.gguf_names import POST_NORM_TENSORS

DEFAULT_EPS, DEFAULT_WINDOW, EVERY_WHICH_IS_FULL = 1e-5, 4096, 4
"""What transformers assumes if config.json does not say; the last two for OLMo 3."""


class Olmo2(Family):
    """Biases of attention if the configuration says so."""

    title = "OLMo 2"
    model_type = "olmo2"
    architectures = ("Olmo2ForCausalLM", "Olmo2Model")
    gguf_architecture: ClassVar[str | None] = "olmo2"
    gguf_tensors = POST_NORM_TENSORS
    prunable = False
    norms = Norms(None, None, "post_attention_layernorm", "post_feedforward_layernorm")

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        bias = bool(raw.get("attention_bias", False))
        config = read_shape({"rms_norm_eps": DEFAULT_EPS} | dict(raw), self.architectures[0])
        return replace(config, qkv_bias=bias, o_bias=bias, qk_norm=True, qk_norm_whole=True)


class Olmo3(Olmo2):
    """Three of four layers have a window."""

    title = "OLMo 3, windows"
    model_type = "olmo3"
    architectures = ("Olmo3ForCausalLM", "Olmo3Model")
    gguf_architecture = None

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        config = super().config(raw)
        window = read_window({"sliding_window": DEFAULT_WINDOW} | dict(raw))
        sliding = sliding_layers(raw, config.num_layers, EVERY_WHICH_IS_FULL)
        layers = tuple(LayerKind(config.rope, window if slides else None) for slides in sliding)
        return replace(config, layers=layers)
