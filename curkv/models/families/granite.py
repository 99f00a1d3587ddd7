"""Granite 3: Llama with four multipliers, or experts besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from curkv.models.config import ModelConfig, read_mixture, read_number
from curkv.models.families.base import Piece
from curkv.models.families.experts import DOWN, GATE_UP, renamed, unstacked
from curkv.models.families.gguf_names import EXPERT_TENSORS
from curkv.models.families.llama import Llama

DEFAULTS_OF_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
"""What transformers assumes if config.json does not say."""


class Granite(Llama):
    """Biases if the configuration says so."""

    title = "Granite 3"
    model_type = "granite"
    architectures = ("GraniteForCausalLM", "GraniteModel")
    gguf_architecture: ClassVar[str | None] = "granite"
    prunable = False
    gguf_settings: ClassVar[Mapping[str, str]] = {
        "embedding_scale": "embedding_multiplier",
        "attention.scale": "attention_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        config = super().config(raw)
        return replace(
            config,
            embedding_scale=read_number(raw, "embedding_multiplier", 1.0),
            query_scale=read_number(raw, "attention_multiplier", 1.0) * config.head_dim**0.5,
            residual_scale=read_number(raw, "residual_multiplier", 1.0),
            logit_scale=1 / read_number(raw, "logits_scaling", 1.0),
        )


class GraniteMoe(Granite):
    """Experts, all of a layer in one tensor."""

    title = "Granite 3 with experts"
    model_type = "granitemoe"
    architectures = ("GraniteMoeForCausalLM", "GraniteMoeModel")
    gguf_architecture = "granitemoe"
    gguf_tensors = EXPERT_TENSORS
    gguf_settings: ClassVar[Mapping[str, str]] = {
        **Granite.gguf_settings,
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
    }

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        raw = DEFAULTS_OF_EXPERTS | dict(raw)
        return replace(super().config(raw), mixture=read_mixture(raw))

    def pieces(self, found: Mapping[str, tuple[int, ...]], config: ModelConfig) -> dict[str, Piece]:
        """See `Family.pieces`."""
        return (
            renamed(found, ".block_sparse_moe.router.layer.", ".mlp.gate.")
            | unstacked(found, ".block_sparse_moe.input_linear.weight", ".mlp", GATE_UP)
            | unstacked(found, ".block_sparse_moe.output_linear.weight", ".mlp", DOWN)
        )
