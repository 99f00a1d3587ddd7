"""The shape of a Llama-family model, read from a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curkv.models.errors import UnsupportedModel

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
SUPPORTED_ROPE_TYPES = ("default", "llama3")
SUPPORTED_ACTIVATIONS = ("silu",)

# What transformers assumes when config.json does not say.
DEFAULT_ROPE_THETA = 10000.0
DEFAULT_RMS_NORM_EPS = 1e-6
DEFAULT_MISTRAL_WINDOW = 4096
DEFAULT_QWEN3_HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """RoPE scaling of Llama 3.1 (Meta's `apply_scaling`; transformers' `_compute_llama3_parameters`).

    Attributes:
        factor: Divides the frequencies whose wavelength exceeds original_max_positions / low_freq_factor.
        low_freq_factor: Start of the band in which scaled and plain frequencies are blended.
        high_freq_factor: End of that band; shorter wavelengths are left alone.
        original_max_positions: Context length of the pretraining, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and settings of one model; names follow the paper rather than any one checkpoint format.

    Attributes:
        architecture: One of `SUPPORTED_ARCHITECTURES`.
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
        rope_scaling: Llama 3 scaling of those frequencies, or None.
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
    rope_scaling: Llama3Scaling | None
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

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads a parsed `config.json`, in the form of transformers 4 or 5.

        Raises:
            UnsupportedModel: The architecture, or a setting of it, is not implemented.
        """
        architecture = _architecture(raw)
        _refuse_unsupported(raw, architecture)
        rope_theta, rope_scaling = _rope(raw)
        num_heads = _required(raw, "num_attention_heads")
        hidden_size = _required(raw, "hidden_size")
        attention_bias = bool(raw.get("attention_bias", False))
        qwen2 = architecture == "Qwen2ForCausalLM"
        has_bias_flags = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
        config = cls(
            architecture=architecture,
            vocab_size=_required(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_required(raw, "intermediate_size"),
            num_layers=_required(raw, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
            head_dim=_head_dim(raw, architecture, hidden_size, num_heads),
            max_positions=_required(raw, "max_position_embeddings"),
            rms_norm_eps=float(raw.get("rms_norm_eps", DEFAULT_RMS_NORM_EPS)),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qkv_bias=qwen2 or (has_bias_flags and attention_bias),
            o_bias=has_bias_flags and attention_bias,
            mlp_bias=architecture == "LlamaForCausalLM" and bool(raw.get("mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=token_ids(raw.get("eos_token_id")),
        )
        config._check_shape()
        return config

    def _check_shape(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModel(
                f"num_attention_heads ({self.num_heads}) is no multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise UnsupportedModel(f"head_dim ({self.head_dim}) is odd; RoPE needs an even one")


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Returns the ids of a config field that may hold one id, several or none."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _architecture(raw: Mapping[str, Any]) -> str:
    names = list(raw.get("architectures") or [])
    for name in names:
        if name in SUPPORTED_ARCHITECTURES:
            return str(name)
    found = ", ".join(map(str, names)) or f"model_type {raw.get('model_type')!r} without architectures"
    raise _unsupported("architecture", found, SUPPORTED_ARCHITECTURES)


def _refuse_unsupported(raw: Mapping[str, Any], architecture: str) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation not in SUPPORTED_ACTIVATIONS:
        raise _unsupported("activation", activation, SUPPORTED_ACTIVATIONS)
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModel(
            f"quantised weights ({method}) are not supported in safetensors; "
            "use the unquantised checkpoint or a GGUF file"
        )
    if architecture == "MistralForCausalLM":
        window = raw.get("sliding_window", DEFAULT_MISTRAL_WINDOW)
        if window is not None:
            raise UnsupportedModel(
                f"sliding-window attention (sliding_window = {window}) is not supported; Mistral models "
                "with full attention (sliding_window: null, such as Mistral-7B-Instruct-v0.3) are"
            )
    if raw.get("use_sliding_window"):
        raise UnsupportedModel(
            "sliding-window attention (use_sliding_window = true) is not supported; full attention is"
        )


def _rope(raw: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Returns theta and scaling, from `rope_parameters` (transformers 5) or the older two keys."""
    parameters: dict[str, Any] = {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_scaling") or {})}
    parameters |= raw.get("rope_parameters") or {}
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise _unsupported("rope type", rope_type, SUPPORTED_ROPE_TYPES)
    rotated = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if rotated != 1.0:
        raise UnsupportedModel(f"partial_rotary_factor = {rotated} is not supported; only 1.0 is")
    theta = float(parameters["rope_theta"] or DEFAULT_ROPE_THETA)
    if rope_type == "default":
        return theta, None
    original = parameters.get("original_max_position_embeddings") or raw["max_position_embeddings"]
    return theta, Llama3Scaling(
        factor=float(_required_value(parameters, "factor")),
        low_freq_factor=float(_required_value(parameters, "low_freq_factor")),
        high_freq_factor=float(_required_value(parameters, "high_freq_factor")),
        original_max_positions=int(original),
    )


def _head_dim(raw: Mapping[str, Any], architecture: str, hidden_size: int, num_heads: int) -> int:
    if raw.get("head_dim"):
        return int(raw["head_dim"])
    return DEFAULT_QWEN3_HEAD_DIM if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads


def _required(raw: Mapping[str, Any], key: str) -> int:
    return int(_required_value(raw, key))


def _required_value(raw: Mapping[str, Any], key: str) -> Any:
    if raw.get(key) is None:
        raise UnsupportedModel(f"config.json does not name {key}")
    return raw[key]


def _unsupported(what: str, found: object, supported: tuple[str, ...]) -> UnsupportedModel:
    return UnsupportedModel(f"unsupported {what} {found}; supported: {', '.join(supported)}")
