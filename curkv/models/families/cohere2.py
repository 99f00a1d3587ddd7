"""Cohere 2 (Command R7B, Command A): attention and MLP read one norm and are added together.

The norm subtracts the mean. Whatever is added to the residual stream is stored without its mean, so that the
stream has none, and the norm is an RMS norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from curkv.models.blocks import Feed, LayerWeights, Mlp, MlpWeights, Packer
from curkv.models.config import (
    LayerKind,
    ModelConfig,
    read_number,
    read_shape,
    read_window,
    sliding_layers,
)
from curkv.models.families.base import Family, Norms, Read

DEFAULTS = {
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
}
EVERY_WHICH_IS_FULL = 4
"""What transformers assumes if config.json does not say."""


class Cohere2(Family):
    """Layers with a window rotate neighbouring channels, the others rotate nothing."""

    title = "Command R7B, Command A: windows"
    model_type = "cohere2"
    architectures = ("Cohere2ForCausalLM", "Cohere2Model")
    gguf_architecture = "cohere2"
    gguf_settings = {"logit_scale": "logit_scale", "attention.layer_norm_epsilon": "layer_norm_eps"}  # noqa: RUF012
    gguf_windows = True
    gguf_norm = "attention.layer_norm_epsilon"
    prunable = False
    norms = Norms(mlp="input_layernorm")

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        raw = DEFAULTS | dict(raw)
        config = read_shape(raw | {"rms_norm_eps": raw["layer_norm_eps"]}, self.architectures[0])
        bias, window = bool(raw.get("attention_bias", False)), read_window(raw)
        sliding = sliding_layers(raw, config.num_layers, EVERY_WHICH_IS_FULL)
        return replace(
            config,
            qkv_bias=bias,
            o_bias=bias,
            rope_interleaved=True,
            logit_scale=read_number(raw, "logit_scale"),
            layers=tuple(LayerKind(config.rope, window) if slides else LayerKind(None) for slides in sliding),
        )

    def embedding(self, read: Read, config: ModelConfig) -> Tensor:
        """See `Family.embedding`."""
        rows = super().embedding(read, config)
        return rows - rows.mean(1, keepdim=True)

    def embedding_of_head(self, config: ModelConfig) -> float | None:
        """See `Family.embedding_of_head`: the head's rows have their mean."""
        return None

    def out(self, read: Read, config: ModelConfig, name: str, *columns: int) -> Tensor:
        """See `Family.out`."""
        channels = super().out(read, config, name, *columns)
        return channels - channels.mean(0, keepdim=True)

    def feed_block(self, config: ModelConfig, weights: LayerWeights, pack: Packer) -> Feed:
        """See `Family.feed_block`."""
        return ParallelMlp(config, weights.mlp, pack)


class ParallelMlp(Mlp):
    """An MLP that does not see what attention adds."""

    def __init__(self, config: ModelConfig, weights: MlpWeights, pack: Packer):
        super().__init__(config, weights, pack)
        assert weights.norm is not None
        self._norm, self._eps = pack.keep("norm", weights.norm), config.rms_norm_eps
        self._rms_norm = pack.kernels.rms_norm

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Runs the block on the residual alone, and adds x to it."""
        assert residual is not None
        gate_up, _ = self.gate_up(residual, None)
        _, total = self._rms_norm(x, self._norm, self._eps, residual)  # for its sum, which can be recorded
        return self._down(gate_up), total
