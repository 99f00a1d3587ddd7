"""Gemma and Gemma 3's text models: scaled embeddings, norms stored less one, tanh-approximated GELU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from curkv.models.blocks import Attention, Layer, LayerWeights, Mlp, Packer
from curkv.models.config import (
    LayerKind,
    ModelConfig,
    read_number,
    read_rope,
    read_shape,
    read_window,
    sliding_layers,
)
from curkv.models.errors import UnsupportedModel
from curkv.models.families.base import Family, Norms, Read
from curkv.models.families.gguf_names import GGUF, TENSOR_NAMES
from curkv.models.rope_scaling import Rope

ACTIVATION = "gelu_pytorch_tanh"
DEFAULT_HEAD_DIM, EVERY_WHICH_IS_FULL = 256, 6
DEFAULTS = {"tie_word_embeddings": True, "sliding_window": 4096, "query_pre_attn_scalar": 256}
DEFAULT_THETA, DEFAULT_LOCAL_THETA = 1e6, 1e4
"""What transformers assumes if config.json does not say."""

LAYERS_OF_27B = 62
"""Of the one Gemma 3 whose queries are scaled by something else than the width of a head."""


class Gemma(Family):
    """Biases of attention if the configuration says so."""

    model_type = "gemma"
    architectures = ("GemmaForCausalLM", "GemmaModel")
    gguf_architecture = "gemma"
    prunable = False

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
            if raw.get(key):
                raise UnsupportedModel(f"{key} = {raw[key]!r} is not supported")
        raw = DEFAULTS | dict(raw)
        raw["hidden_act"] = raw.get("hidden_activation") or raw.get("hidden_act") or ACTIVATION
        config = read_shape(raw, self.architectures[0], DEFAULT_HEAD_DIM, ACTIVATION)
        bias = bool(raw.get("attention_bias", False))
        return replace(config, qkv_bias=bias, o_bias=bias, embedding_scale=config.hidden_size**0.5)

    def norm(self, read: Read, name: str, size: int) -> Tensor:
        """See `Family.norm`."""
        return super().norm(read, name, size) + 1

    def layer_blocks(self, config: ModelConfig, index: int, weights: LayerWeights, pack: Packer) -> Layer:
        """See `Family.layer_blocks`."""
        return Layer(Attention(config, index, weights.attention, pack), GeluMlp(config, weights.mlp, pack))

    def values_of_gguf(
        self, name: str, values: npt.NDArray[np.float32], config: ModelConfig
    ) -> npt.NDArray[np.float32]:
        """See `Family.values_of_gguf`; norms have the one added there."""
        return values - 1 if "norm" in name else values

    def config_of_gguf(self, gguf: GGUF) -> dict[str, Any]:
        """See `Family.config_of_gguf`."""
        return super().config_of_gguf(gguf) | {"hidden_act": ACTIVATION}


class Gemma3(Gemma):
    """Norms before and behind the blocks and of heads; five of six layers have a window and rotate faster."""

    model_type = "gemma3_text"
    architectures = ("Gemma3ForCausalLM", "Gemma3TextModel")
    gguf_architecture = "gemma3"
    gguf_windows = True
    gguf_tensors = TENSOR_NAMES | {
        "ffn_norm": "pre_feedforward_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    norms = Norms(
        "input_layernorm",
        "pre_feedforward_layernorm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    )

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        raw = DEFAULTS | dict(raw)
        ropes = raw.pop("rope_parameters", None) or {}
        full = {"rope_theta": raw.pop("rope_theta", None) or DEFAULT_THETA}
        local = {"rope_theta": raw.pop("rope_local_base_freq", None) or DEFAULT_LOCAL_THETA}
        full |= raw.pop("rope_scaling", None) or {}
        full |= ropes.get("full_attention") or {}
        local |= ropes.get("sliding_attention") or {}
        config = super().config(raw | {"rope_parameters": full})
        theta, scaling, _ = read_rope(raw | {"rope_parameters": local})
        window = read_window(raw)
        sliding = sliding_layers(raw, config.num_layers, EVERY_WHICH_IS_FULL)
        kinds = LayerKind(Rope(theta, scaling), window), LayerKind(config.rope)
        return replace(
            config,
            qk_norm=True,
            query_scale=(config.head_dim / read_number(raw, "query_pre_attn_scalar")) ** 0.5,
            layers=tuple(kinds[0] if slides else kinds[1] for slides in sliding),
        )

    def config_of_gguf(self, gguf: GGUF) -> dict[str, Any]:
        """See `Family.config_of_gguf`."""
        config = super().config_of_gguf(gguf)
        scalar = config["head_dim"]
        if config["num_hidden_layers"] == LAYERS_OF_27B:
            scalar = config["hidden_size"] // config["num_attention_heads"]
        return config | {"query_pre_attn_scalar": scalar}


class GeluMlp(Mlp):
    """An MLP gated by GELU. Torch computes it, so that decode steps over it are not recorded."""

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Runs the block; see `Attention.__call__`."""
        gate_up, residual = self.gate_up(x, residual)
        gate, up = gate_up.chunk(2, dim=-1)
        return self._exit(self._down(F.gelu(gate, approximate="tanh") * up)), residual
