"""The shape of a model, and how it is read from a Hugging Face `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curkv.models.errors import UnsupportedModel
from curkv.models.rope_scaling import LinearScaling, Llama3Scaling, LongRope, Rope, RopeScaling, YarnScaling

SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
SUPPORTED_QUANTISATIONS = ("awq", "gptq", "fp8", "compressed-tensors")
SUPPORTED_LAYER_TYPES = ("full_attention", "sliding_attention")
SUPPORTED_ACTIVATIONS = (
    "silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "relu",
)  # fmt: skip
"""Of gated MLPs; `blocks.ACTIVATIONS` has what they are."""

# What transformers assumes when config.json does not say.
DEFAULT_ROPE_THETA = 10000.0
DEFAULT_RMS_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class LayerKind:
    """In what the attention of layers may differ.

    Attributes:
        rope: How queries and keys are rotated; None: not at all.
        window: Newest tokens that a query attends to, its own included; None: all of them.
    """

    rope: Rope | None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class MixtureConfig:
    """The experts that take the place of MLPs.

    Attributes:
        num_experts: Experts of a layer.
        num_chosen: Of these, those that a token runs through.
        intermediate_size: Width of an expert.
        normalised: The weights of the chosen ones sum to 1; else they are their shares among all.
        shared_size: Width of an expert that every token runs through, behind a gate; 0: there is none.
        dense_layers: Layers that have an MLP.
    """

    num_experts: int
    num_chosen: int
    intermediate_size: int
    normalised: bool = True
    shared_size: int = 0
    dense_layers: frozenset[int] = frozenset()


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
        qk_norm: Queries and keys are RMS-normalised before RoPE, per head (Qwen3) unless `qk_norm_whole`.
        tie_embeddings: The head is the embedding.
        bos_token_id: Token that begins a text, or None.
        eos_token_ids: Tokens that end a generation.
        qk_norm_whole: The norms of queries and keys go over all heads of a token together (OLMo 2).
        rotary_factor: Share of a head's channels that RoPE rotates: the first ones.
        rope_interleaved: Channels that rotate together are neighbours, not half of those rotated apart.
        layers: Attention of each layer; empty: all attend to everything and rotate by `rope_theta`.
        embedding_scale: Multiplies embeddings.
        query_scale: Multiplies queries, beside the 1 / sqrt(head_dim) that all scores are multiplied by.
        residual_scale: Multiplies what a block adds to the residual stream.
        logit_scale: Multiplies logits.
        activation: Of the MLP's gate, by its name in `config.json`.
        attention_softcap: Scores x of attention become softcap tanh(x / softcap); None: they do not.
        logit_softcap: The same of logits.
        sinks: Each query head has a score that takes part in its softmax as one more token does.
        mixture: Experts in the place of MLPs, or None.
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
    qk_norm_whole: bool = False
    rotary_factor: float = 1.0
    rope_interleaved: bool = False
    layers: tuple[LayerKind, ...] = ()
    embedding_scale: float = 1.0
    query_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    activation: str = "silu"
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    sinks: bool = False
    mixture: MixtureConfig | None = None

    @property
    def rope(self) -> Rope:
        """How queries and keys are rotated where a layer does not differ."""
        return Rope(self.rope_theta, self.rope_scaling)

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that RoPE rotates."""
        return int(self.head_dim * self.rotary_factor)

    @property
    def padded_head_dim(self) -> int:
        """Channels of a head as it is computed with: up to the next multiple of 8, as kernels take them."""
        return -(-self.head_dim // 8) * 8

    def layer(self, index: int) -> LayerKind:
        """Returns the attention of a layer."""
        return self.layers[index] if self.layers else LayerKind(self.rope)

    @property
    def q_size(self) -> int:
        """Width of the queries of one token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the keys (or values) of one token."""
        return self.num_kv_heads * self.head_dim


def read_shape(
    raw: Mapping[str, Any],
    architecture: str,
    head_dim: int | None = None,
    activation: str = "silu",
    partial: bool = False,
) -> ModelConfig:
    """Reads what all families write alike, in the form of transformers 4 or 5: no biases, no norms of heads.

    Args:
        raw: A parsed `config.json`.
        architecture: Of the family.
        head_dim: What the family assumes if the file does not say; else hidden size over heads.
        activation: Of the MLP if the file does not say.
        partial: RoPE may rotate a part of the channels only.

    Raises:
        UnsupportedModel: A setting is missing, senseless or not implemented.
    """
    activation = _activation(raw, activation)
    rope_theta, rope_scaling, rotary_factor = read_rope(raw)
    if rotary_factor != 1.0 and not partial:
        raise UnsupportedModel(
            f"partial rotary embeddings (partial_rotary_factor = {rotary_factor}) are not supported in "
            f"{architecture}"
        )
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
        rms_norm_eps=read_number(raw, "rms_norm_eps", DEFAULT_RMS_NORM_EPS),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        bos_token_id=next(iter(token_ids(raw, "bos_token_id")), None),
        eos_token_ids=token_ids(raw, "eos_token_id"),
        rotary_factor=rotary_factor,
        activation=activation,
    )
    if config.num_heads % config.num_kv_heads:
        raise UnsupportedModel(
            f"num_attention_heads ({num_heads}) is no multiple of num_key_value_heads ({config.num_kv_heads})"
        )
    if config.head_dim % 2:
        raise UnsupportedModel(f"head_dim ({config.head_dim}) is odd; RoPE needs an even one")
    if config.rotary_dim % 2 or not 0 < config.rotary_dim <= config.head_dim:
        raise UnsupportedModel(
            f"partial_rotary_factor = {rotary_factor} rotates {config.rotary_dim} of {config.head_dim} "
            "channels; RoPE needs an even number of them"
        )
    if isinstance(rope_scaling, LongRope) and not (
        len(rope_scaling.short) == len(rope_scaling.long) == config.rotary_dim // 2
    ):
        raise UnsupportedModel(
            f"short_factor and long_factor need a number for each of {config.rotary_dim // 2} frequencies"
        )
    return config


def sliding_layers(raw: Mapping[str, Any], num_layers: int, pattern: int | None) -> list[bool]:
    """Tells which layers attend to a window.

    Args:
        raw: A parsed `config.json`, which has `layer_types` or `sliding_window_pattern`, or neither.
        num_layers: Layers of the model.
        pattern: Every which layer attends to everything if nothing is said; None: all of them.

    Raises:
        UnsupportedModel: A layer is of another type, or there are not as many types as layers.
    """
    types = raw.get("layer_types")
    if types is None:
        every = raw.get("sliding_window_pattern") or pattern or 1
        if not isinstance(every, int):
            raise UnsupportedModel(f"sliding_window_pattern = {every!r} is no whole number")
        return [(index + 1) % every != 0 for index in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers:
        raise UnsupportedModel(
            f"layer_types = {types!r} does not name a type for each of {num_layers} layers"
        )
    for found in types:
        if found not in SUPPORTED_LAYER_TYPES:
            raise unsupported("layer type", found, SUPPORTED_LAYER_TYPES)
    return [found == "sliding_attention" for found in types]


def read_softcap(raw: Mapping[str, Any], key: str) -> float | None:
    """Returns what a setting caps, or None if it does not."""
    return read_number(raw, key) if raw.get(key) else None


def read_mixture(
    raw: Mapping[str, Any],
    num_experts: str = "num_local_experts",
    intermediate_size: str = "intermediate_size",
) -> MixtureConfig:
    """Reads the experts of all layers, whose weights sum to 1, from the keys that a family calls them by.

    Raises:
        UnsupportedModel: A setting is missing or senseless.
    """
    mixture = MixtureConfig(
        _count(raw, num_experts), _count(raw, "num_experts_per_tok"), _count(raw, intermediate_size)
    )
    if mixture.num_chosen > mixture.num_experts:
        raise UnsupportedModel(
            f"num_experts_per_tok ({mixture.num_chosen}) is more than {num_experts} ({mixture.num_experts})"
        )
    return mixture


def read_window(raw: Mapping[str, Any], key: str = "sliding_window") -> int | None:
    """Returns the width of windows, or None if there are none or the longest text fits into one."""
    if raw.get(key) is None or _count(raw, key) >= _count(raw, "max_position_embeddings"):
        return None
    return _count(raw, key)


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


def _activation(raw: Mapping[str, Any], activation: str) -> str:
    """Returns the name of the MLP's activation; refuses quantised weights."""
    found = str(raw.get("hidden_act") or activation)
    if found not in SUPPORTED_ACTIVATIONS:
        raise unsupported("activation", found, SUPPORTED_ACTIVATIONS)
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        if method not in SUPPORTED_QUANTISATIONS:
            raise unsupported("quantisation of safetensors (quant_method)", method, SUPPORTED_QUANTISATIONS)
    return found


def read_rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None, float]:
    """Returns theta, scaling and the share of channels that are rotated.

    They stand in `rope_parameters` (transformers 5) or in older keys.

    Raises:
        UnsupportedModel: A setting is missing, senseless or not implemented.
    """
    parameters: dict[str, Any] = {"rope_theta": raw.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        given = raw.get(key) or {}
        if not isinstance(given, dict):
            raise UnsupportedModel(f"{key} = {given!r} is no object")
        parameters |= given
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise unsupported("rope type", rope_type, SUPPORTED_ROPE_TYPES)
    theta = read_number(parameters, "rope_theta", DEFAULT_ROPE_THETA)
    key = "partial_rotary_factor"
    rotated = read_number({key: parameters.get(key) or raw.get(key)}, key, 1.0)
    return theta, _scaling(rope_type, theta, parameters, raw), rotated


def _scaling(
    rope_type: str, theta: float, parameters: Mapping[str, Any], raw: Mapping[str, Any]
) -> RopeScaling | None:
    if rope_type == "default":
        return None
    if rope_type == "longrope":
        return _longrope(parameters, raw)
    factor = read_number(parameters, "factor")
    if rope_type == "dynamic":  # begins beyond the context, which no text is longer than
        return None
    if rope_type == "linear":
        return LinearScaling(factor)
    original = _original_positions(parameters, raw)
    if rope_type == "yarn":
        return YarnScaling(
            factor=factor,
            theta=theta,
            original_max_positions=original,
            amplitude=_yarn_amplitude(factor, parameters),
            beta_fast=read_number(parameters, "beta_fast", 32.0),
            beta_slow=read_number(parameters, "beta_slow", 1.0),
            truncate=bool(parameters.get("truncate", True)),
        )
    return Llama3Scaling(
        factor=factor,
        low_freq_factor=read_number(parameters, "low_freq_factor"),
        high_freq_factor=read_number(parameters, "high_freq_factor"),
        original_max_positions=original,
    )


def _yarn_amplitude(factor: float, parameters: Mapping[str, Any]) -> float:
    """Returns what YaRN multiplies cosines and sines by, named or by section 3.4 of the paper."""
    if parameters.get("attention_factor") is not None:
        return read_number(parameters, "attention_factor")
    logarithm = 0.1 * math.log(max(factor, 1.0))
    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if above and below:
        return (read_number(parameters, "mscale") * logarithm + 1) / (
            read_number(parameters, "mscale_all_dim") * logarithm + 1
        )
    return logarithm + 1


def _longrope(parameters: Mapping[str, Any], raw: Mapping[str, Any]) -> LongRope:
    original = _original_positions(parameters, raw)
    factor = read_number(parameters, "factor", _count(raw, "max_position_embeddings") / original)
    amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRope(
        short=_numbers(parameters, "short_factor"),
        long=_numbers(parameters, "long_factor"),
        original_max_positions=original,
        amplitude=read_number(parameters, "attention_factor", amplitude),
    )


def _original_positions(parameters: Mapping[str, Any], raw: Mapping[str, Any]) -> int:
    """Returns the context of the pretraining, which is that of the model unless something else is said."""
    key = "original_max_position_embeddings"
    return _count({key: parameters.get(key) or raw.get(key) or raw.get("max_position_embeddings")}, key)


def _numbers(raw: Mapping[str, Any], key: str) -> tuple[float, ...]:
    values = _required(raw, key)
    if not isinstance(values, list):
        raise UnsupportedModel(f"{key} = {values!r} is no list of numbers")
    return tuple(read_number({key: value}, key) for value in values)


def _count(raw: Mapping[str, Any], key: str) -> int:
    value = _required(raw, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"{key} = {value!r} is no whole number above 0")
    return value


def read_number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Returns a number above 0, or the default if there is none.

    Raises:
        UnsupportedModel: It is something else, or there is neither.
    """
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
