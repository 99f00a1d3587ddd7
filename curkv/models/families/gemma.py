"""Gemma, Gemma 2 and Gemma 3's text models: scaled embeddings, norms stored less one, approximated GELU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy.typing as npt
from torch import Tensor

from curkv.models.config import (
    LayerKind,
    ModelConfig,
    read_number,
    read_rope,
    read_shape,
    read_softcap,
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

GEMMA2_CAPS, EVERY_WHICH_IS_FULL_IN_2 = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, 2
"""The same of Gemma 2."""


class Gemma(Family):
    """Biases of attention if the configuration says so."""

    title = "Gemma"
    model_type = "gemma"
    architectures = ("GemmaForCausalLM", "GemmaModel")
    gguf_architecture = "gemma"
    prunable = False

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        if raw.get("use_bidirectional_attention"):
            raise UnsupportedModel("use_bidirectional_attention is not supported")
        raw = DEFAULTS | dict(raw)
        raw["hidden_act"] = raw.get("hidden_activation") or raw.get("hidden_act") or ACTIVATION
        config = read_shape(raw, self.architectures[0], DEFAULT_HEAD_DIM)
        bias = bool(raw.get("attention_bias", False))
        return replace(config, qkv_bias=bias, o_bias=bias, embedding_scale=config.hidden_size**0.5)

    def norm(self, read: Read, name: str, size: int) -> Tensor:
        """See `Family.norm`."""
        return super().norm(read, name, size) + 1

    def values_of_gguf(self, name: str, values: npt.NDArray[Any], config: ModelConfig) -> npt.NDArray[Any]:
        """See `Family.values_of_gguf`; norms have the one added there."""
        return values - 1 if "norm" in name else values

    def config_of_gguf(self, gguf: GGUF) -> dict[str, Any]:
        """See `Family.config_of_gguf`."""
        return super().config_of_gguf(gguf) | {"hidden_act": ACTIVATION}


class Gemma2(Gemma):
    """Norms before and behind the blocks; every other layer has a window; scores and logits are capped.

    Attributes:
        layers_of_27b: Of the one model whose queries are scaled by something else than the width of a head.
    """

    title = "Gemma 2: windows, capped scores and logits"
    model_type = "gemma2"
    architectures = ("Gemma2ForCausalLM", "Gemma2Model")
    gguf_architecture = "gemma2"
    gguf_settings: ClassVar[Mapping[str, str]] = {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }
    gguf_windows = True
    layers_of_27b: ClassVar[int] = 46
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
        raw = GEMMA2_CAPS | DEFAULTS | dict(raw)
        config = super().config(raw)
        sliding = sliding_layers(raw, config.num_layers, EVERY_WHICH_IS_FULL_IN_2)
        kinds = LayerKind(config.rope), LayerKind(config.rope, read_window(raw))
        return self.scored(raw, replace(config, layers=tuple(kinds[slides] for slides in sliding)))

    def scored(self, raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
        """Returns the configuration with the scale of queries, and what caps scores and logits."""
        return replace(
            config,
            query_scale=(config.head_dim / read_number(raw, "query_pre_attn_scalar")) ** 0.5,
            attention_softcap=read_softcap(raw, "attn_logit_softcapping"),
            logit_softcap=read_softcap(raw, "final_logit_softcapping"),
        )

    def config_of_gguf(self, gguf: GGUF) -> dict[str, Any]:
        """See `Family.config_of_gguf`."""
        config = super().config_of_gguf(gguf)
        scalar = config["head_dim"]
        if config["num_hidden_layers"] == self.layers_of_27b:
            scalar = config["hidden_size"] // config["num_attention_heads"]
        return config | {"query_pre_attn_scalar": scalar}


class Gemma3(Gemma2):
    """Norms of heads, and no caps; five of six layers have a window and rotate faster."""

    title = "Gemma 3 (text): windows"
    model_type = "gemma3_text"
    architectures = ("Gemma3ForCausalLM", "Gemma3TextModel")
    gguf_architecture = "gemma3"
    gguf_settings = {"rope.freq_base_swa": "rope_local_base_freq"}  # noqa: RUF012
    layers_of_27b = 62

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        raw = DEFAULTS | dict(raw)
        ropes = raw.pop("rope_parameters", None) or {}
        full = {"rope_theta": raw.pop("rope_theta", None) or DEFAULT_THETA}
        local = {"rope_theta": raw.pop("rope_local_base_freq", None) or DEFAULT_LOCAL_THETA}
        full |= raw.pop("rope_scaling", None) or {}
        full |= ropes.get("full_attention") or {}
        local |= ropes.get("sliding_attention") or {}
        config = Gemma.config(self, raw | {"rope_parameters": full})
        theta, scaling, _ = read_rope(raw | {"rope_parameters": local})
        window = read_window(raw)
        sliding = sliding_layers(raw, config.num_layers, EVERY_WHICH_IS_FULL)
        kinds = LayerKind(Rope(theta, scaling), window), LayerKind(config.rope)
        layers = tuple(kinds[0] if slides else kinds[1] for slides in sliding)
        return self.scored(raw, replace(config, qk_norm=True, layers=layers))
