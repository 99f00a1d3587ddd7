"""Granite 3, dense: Llama with four multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from curkv.models.config import ModelConfig, read_number
from curkv.models.families.llama import Llama


class Granite(Llama):
    """Biases if the configuration says so."""

    model_type = "granite"
    architectures = ("GraniteForCausalLM", "GraniteModel")
    gguf_architecture = "granite"
    prunable = False
    gguf_settings = {  # noqa: RUF012
        "embedding_scale": "embedding_multiplier",
        "attention.scale": "attention_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
    pre_tokenizers = {}  # noqa: RUF012

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
