"""Qwen2 and Qwen3 with experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from curkv.models.config import LayerKind, ModelConfig, read_mixture, read_shape, read_window, sliding_layers
from curkv.models.families.base import Family, Piece
from curkv.models.families.experts import DOWN, GATE_UP, unstacked
from curkv.models.families.gguf_names import EXPERT_SETTINGS, EXPERT_TENSORS, GGUF
from curkv.models.families.qwen2 import DEFAULT_FULL_LAYERS, DEFAULT_WINDOW
from curkv.models.families.qwen3 import Qwen3

QWEN2_DEFAULTS = {
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": DEFAULT_WINDOW,
}
QWEN3_DEFAULTS = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "sliding_window": DEFAULT_WINDOW,
}
"""What transformers assumes if config.json does not say."""


class QwenMoe(Family):
    """What both have in common: every which layer has experts, as said."""

    prunable = False
    gguf_tensors = EXPERT_TENSORS
    gguf_settings: ClassVar[Mapping[str, str]] = EXPERT_SETTINGS

    def pieces(self, found: Mapping[str, tuple[int, ...]], config: ModelConfig) -> dict[str, Piece]:
        """See `Family.pieces`; transformers 5 may write stacks."""
        return unstacked(found, ".mlp.experts.gate_up_proj", ".mlp", GATE_UP) | unstacked(
            found, ".mlp.experts.down_proj", ".mlp", DOWN
        )


class Qwen2Moe(QwenMoe):
    """Queries, keys and values have biases; every token runs through one expert more, behind a gate."""

    title = "Qwen1.5-MoE, Qwen2-MoE: experts, one shared"
    model_type = "qwen2_moe"
    architectures = ("Qwen2MoeForCausalLM", "Qwen2MoeModel")
    gguf_architecture = "qwen2moe"
    gguf_settings = EXPERT_SETTINGS | {
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    }

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`; unlike in Qwen2 the last layers have no window, nor has every second."""
        raw = QWEN2_DEFAULTS | dict(raw)
        config = replace(read_shape(raw, self.architectures[0]), qkv_bias=bool(raw.get("qkv_bias", True)))
        if raw.get("use_sliding_window"):
            window, most = read_window(raw), raw.get("max_window_layers", DEFAULT_FULL_LAYERS)
            sliding = sliding_layers(raw, config.num_layers, 2)
            if raw.get("layer_types") is None:
                sliding = [slides and index < most for index, slides in enumerate(sliding)]
            kinds = LayerKind(config.rope), LayerKind(config.rope, window)
            config = replace(config, layers=tuple(kinds[slides] for slides in sliding))
        return sparse(raw, config, int(raw["shared_expert_intermediate_size"]))


class Qwen3Moe(QwenMoe):
    """Queries and keys are normalised per head; windows are those of all layers."""

    title = "Qwen3-MoE: experts"
    model_type = "qwen3_moe"
    architectures = ("Qwen3MoeForCausalLM", "Qwen3MoeModel")
    gguf_architecture = "qwen3moe"

    def config_of_gguf(self, gguf: GGUF) -> dict[str, Any]:
        """See `Family.config_of_gguf`; files do not say that the chosen experts' weights sum to 1."""
        return super().config_of_gguf(gguf) | {"norm_topk_prob": True}

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        raw = QWEN3_DEFAULTS | dict(raw)
        raw["num_experts"] = (
            raw.get("num_local_experts") or raw["num_experts"]
        )  # transformers 5 writes the former
        config = replace(
            Qwen3().config(raw | {"use_sliding_window": False}), architecture=self.architectures[0]
        )
        if raw.get("use_sliding_window"):
            config = replace(config, layers=(LayerKind(config.rope, read_window(raw)),) * config.num_layers)
        return sparse(raw, config, 0)


def sparse(raw: Mapping[str, Any], config: ModelConfig, shared_size: int) -> ModelConfig:
    """Returns the configuration with its experts."""
    mixture = read_mixture(raw, "num_experts", "moe_intermediate_size")
    step, named = int(raw.get("decoder_sparse_step") or 1), raw.get("mlp_only_layers") or []
    dense = [i for i in range(config.num_layers) if i in named or (i + 1) % step]
    return replace(
        config,
        mixture=replace(
            mixture,
            normalised=bool(raw.get("norm_topk_prob", False)),
            shared_size=shared_size,
            dense_layers=frozenset(dense),
        ),
    )
