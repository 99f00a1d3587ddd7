"""GLM-4: neighbouring channels rotate together, half of them not at all; gate and up are fused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from curkv.models.config import ModelConfig, read_shape
from curkv.models.families.base import Family, Norms, Read
from curkv.models.families.gguf_names import FUSED_TENSORS

DEFAULTS = {"rms_norm_eps": 1.5625e-07, "partial_rotary_factor": 0.5}
DEFAULT_HEAD_DIM = 128
"""What transformers assumes if config.json does not say."""


class Glm(Family):
    """GLM-4-9B of 2024. Biases of queries, keys and values if the configuration says so."""

    title = "GLM-4 of 2024"
    model_type = "glm"
    architectures = ("GlmForCausalLM", "GlmModel")

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        config = read_shape(DEFAULTS | dict(raw), self.architectures[0], DEFAULT_HEAD_DIM, partial=True)
        return replace(config, qkv_bias=bool(raw.get("attention_bias", True)), rope_interleaved=True)

    def gate_up(self, read: Read, config: ModelConfig, name: str, *columns: int) -> Tensor:
        """See `Family.gate_up`."""
        size = config.intermediate_size
        return read(name.format("gate_up_proj"), 2 * size, *columns, parts=(size, size))


class Glm4(Glm):
    """GLM-4-0414: norms before and behind the blocks."""

    title = "GLM-4-0414"
    model_type = "glm4"
    architectures = ("Glm4ForCausalLM", "Glm4Model")
    gguf_architecture = "glm4"
    gguf_tensors = FUSED_TENSORS | {
        "post_attention_norm": "post_self_attn_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
    }
    norms = Norms(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
