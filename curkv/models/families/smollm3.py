"""SmolLM3: Llama, and every fourth layer rotates nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from curkv.models.config import LayerKind, ModelConfig, read_window, sliding_layers
from curkv.models.errors import UnsupportedModel
from curkv.models.families.llama import Llama

DEFAULTS = {"rope_theta": 2e6, "tie_word_embeddings": True, "no_rope_layer_interval": 4}
"""What transformers assumes if config.json does not say."""


class SmolLM3(Llama):
    """Biases if the configuration says so."""

    title = "SmolLM3"
    model_type = "smollm3"
    architectures = ("SmolLM3ForCausalLM", "SmolLM3Model")
    gguf_architecture = "smollm3"

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        raw = DEFAULTS | dict(raw)
        config = super().config(raw)
        window = read_window(raw) if raw.get("use_sliding_window") else None
        sliding = sliding_layers(raw, config.num_layers, None)
        kinds = zip(rotated_layers(raw, config.num_layers), sliding, strict=True)
        layers = (
            LayerKind(config.rope if turns else None, window if slides else None) for turns, slides in kinds
        )
        return replace(config, layers=tuple(layers))


def rotated_layers(raw: Mapping[str, Any], num_layers: int) -> list[bool]:
    """Tells which layers rotate queries and keys: those with a 1 in `no_rope_layers`."""
    named = raw.get("no_rope_layers")
    if named is None:
        return [(index + 1) % raw["no_rope_layer_interval"] != 0 for index in range(num_layers)]
    if not isinstance(named, list) or len(named) != num_layers:
        raise UnsupportedModel(f"no_rope_layers = {named!r} has no number for each of {num_layers} layers")
    return [bool(number) for number in named]
