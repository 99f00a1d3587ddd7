"""Mixtral: Mistral with experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from curkv.models.config import LayerKind, ModelConfig, read_mixture, read_shape, read_window
from curkv.models.families.base import Family, Piece
from curkv.models.families.experts import DOWN, GATE_UP, renamed, unstacked
from curkv.models.families.gguf_names import EXPERT_TENSORS

DEFAULTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
"""What transformers assumes if config.json does not say."""

PROJECTIONS = {".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
"""Of experts, by their names in files."""


class Mixtral(Family):
    """No biases. GGUF files of it call themselves llama."""

    title = "Mixtral: experts"
    model_type = "mixtral"
    architectures = ("MixtralForCausalLM", "MixtralModel")
    prunable = False
    gguf_architecture = "llama"
    gguf_experts = True
    gguf_tensors = EXPERT_TENSORS
    gguf_interleaved = True
    gguf_settings = {  # noqa: RUF012
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
    }

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        raw = DEFAULTS | dict(raw)
        config = read_shape(raw, self.architectures[0])
        layers = (LayerKind(config.rope, read_window(raw)),) * config.num_layers
        return replace(config, layers=layers, mixture=read_mixture(raw))

    def pieces(self, found: Mapping[str, tuple[int, ...]], config: ModelConfig) -> dict[str, Piece]:
        """See `Family.pieces`; transformers 5 may write stacks."""
        pieces = renamed(found, ".block_sparse_moe.", ".mlp.")
        for old, new in PROJECTIONS.items():
            pieces = {name.replace(old, new): piece for name, piece in pieces.items()}
        return (
            pieces
            | unstacked(found, ".mlp.experts.gate_up_proj", ".mlp", GATE_UP)
            | unstacked(found, ".mlp.experts.down_proj", ".mlp", DOWN)
        )
