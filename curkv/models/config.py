"""The shape of a model, and how it is read from a Hugging Face `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curkv.models.errors import UnsupportedModel
from curkv.models.rope import LinearScaling, Llama3Scaling, RopeScaling

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")
SUPPORTED_ACTIVATIONS = ("silu",)

# What transformers assumes when config.json does not say.
DEFAULT_ROPE_THETA = 10000.0
DEFAULT_RMS_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and settings of one model; names follow the paper rather than any one checkpoint format.

    A family with settings of its own extends it.

    Attributes:
        architecture: The family's first name among its `architectures`.
        vocab_size: Rows of the embedding and of the head.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        num_layers: Decoder layers.
        num_heads: Query heads of a layer.
        num_kv_heads: Key/value heads of a layer; divides `num_heads`.
        head_dim: Width of a head; even.
        max_positions: Longest sequence the model was made for, in tokens.
        rms_norm_eps: Added to the mean square in every RMS norm.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Scaling of those frequencies, or None.
        qkv_bias: The query, key and value projections have a bias.
        o_bias: The attention output projection has a bias.
        mlp_bias: The MLP projections have a bias.
        qk_norm: Queries and keys are RMS-normalised per head before RoPE (Qwen3).
        tie_embeddings: The head is the embedding.
        bos_token_id: Token that begins a text, or None.
        eos_token_ids: Tokens that end a generation.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def q_size(self) -> int:
        """Width of the queries of one token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the keys (or values) of one token."""
        return self.num_kv_heads * self.head_dim


def read_shape(raw: Mapping[str, Any], architecture: str, head_dim: int | None = None) -> ModelConfig:
    """Reads what all families write alike, in the form of transformers 4 or 5: no biases, no norms of heads.

    Args:
        raw: A parsed `config.json`.
        architecture: Of the family.
        head_dim: What the family assumes if the file does not say; else hidden size over heads.

    Raises:
        UnsupportedModel: A setting is missing, senseless or not implemented.
    """
    _refuse_unsupported(raw)
    rope_theta, rope_scaling = _rope(raw)
    num_heads, hidden_size = _count(raw, "num_attention_heads"), _count(raw, "hidden_size")
    config = ModelConfig(
        architecture=architecture,
        vocab_size=_count(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_count(raw, "intermediate_size"),
        num_layers=_count(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_count(raw, "num_key_value_heads") if raw.get("num_key_value_heads") else num_heads,
        head_dim=_count(raw, "head_dim") if raw.get("head_dim") else head_dim or hidden_size // num_heads,
        max_positions=_count(raw, "max_position_embeddings"),
        rms_norm_eps=_number(raw, "rms_norm_eps", DEFAULT_RMS_NORM_EPS),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        bos_token_id=next(iter(token_ids(raw, "bos_token_id")), None),
        eos_token_ids=token_ids(raw, "eos_token_id"),
    )
    if config.num_heads % config.num_kv_heads:
        raise UnsupportedModel(
            f"num_attention_heads ({num_heads}) is no multiple of num_key_value_heads ({config.num_kv_heads})"
        )
    if config.head_dim % 2:
        raise UnsupportedModel(f"head_dim ({config.head_dim}) is odd; RoPE needs an even one")
    return config


def token_ids(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Returns the ids of a setting that may hold one id, several or none; negative ones stand for none.

    Raises:
        UnsupportedModel: It holds something else.
    """
    value = raw.get(key)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(id, int) for id in ids):
        raise UnsupportedModel(f"{key} = {value!r} is no token id")
    return tuple(id for id in ids if id >= 0)


def unsupported(what: str, found: object, supported: tuple[str, ...]) -> UnsupportedModel:
    """Returns the error that names what was found, and what could have been."""
    return UnsupportedModel(f"unsupported {what} {found}; supported: {', '.join(supported)}")


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation not in SUPPORTED_ACTIVATIONS:
        raise unsupported("activation", activation, SUPPORTED_ACTIVATIONS)
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise UnsupportedModel(
            f"quantised weights ({method}) are not supported in safetensors; "
            "use the unquantised checkpoint or a GGUF file"
        )


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Returns theta and scaling, from `rope_parameters` (transformers 5) or the older two keys."""
    parameters: dict[str, Any] = {"rope_theta": raw.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        given = raw.get(key) or {}
        if not isinstance(given, dict):
            raise UnsupportedModel(f"{key} = {given!r} is no object")
        parameters |= given
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise unsupported("rope type", rope_type, SUPPORTED_ROPE_TYPES)
    rotated = parameters.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if rotated != 1.0:
        raise UnsupportedModel(f"partial_rotary_factor = {rotated} is not supported; only 1.0 is")
    theta = _number(parameters, "rope_theta", DEFAULT_ROPE_THETA)
    if rope_type == "default":
        return theta, None
    if rope_type == "linear":
        return theta, LinearScaling(_number(parameters, "factor"))
    original = "original_max_position_embeddings"
    positions = {original: parameters.get(original) or raw.get("max_position_embeddings")}
    return theta, Llama3Scaling(
        factor=_number(parameters, "factor"),
        low_freq_factor=_number(parameters, "low_freq_factor"),
        high_freq_factor=_number(parameters, "high_freq_factor"),
        original_max_positions=_count(positions, original),
    )


def _count(raw: Mapping[str, Any], key: str) -> int:
    value = _required(raw, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"{key} = {value!r} is no whole number above 0")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = _required(raw, key) if default is None else raw.get(key)
    if value is None:
        return default or 0.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UnsupportedModel(f"{key} = {value!r} is no number above 0")
    return float(value)


def _required(raw: Mapping[str, Any], key: str) -> Any:
    if raw.get(key) is None:
        raise UnsupportedModel(f"config.json does not name {key}")
    return raw[key]
