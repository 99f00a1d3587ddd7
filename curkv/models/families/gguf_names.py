"""What GGUF files of all families have in common: names of tensors, keys of metadata."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np

from curkv.models.errors import ModelError, UnsupportedModel

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
POST_NORM_TENSORS = {
    name: tensor for name, tensor in TENSOR_NAMES.items() if name not in ("attn_norm", "ffn_norm")
} | {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""Where norms stand behind the blocks and not before them."""

FUSED_TENSORS = {name: tensor for name, tensor in TENSOR_NAMES.items() if name != "ffn_gate"} | {
    "attn_qkv": "self_attn.qkv_proj",
    "ffn_up": "mlp.gate_up_proj",
}
"""Where gate and up are one tensor."""

EXPERT_TENSORS = TENSOR_NAMES | {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
"""Where layers have experts; one tensor holds those of all, and their numbers stand for the braces."""

ROW_TENSORS = ("ffn_gate_inp_shexp",)
"""Vectors that are matrices of one row elsewhere."""

EXPERT_SETTINGS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
"""Keys of metadata about experts that have a size of their own."""

ROPE_FREQS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = {ROPE_FREQS, LONG_FACTORS, SHORT_FACTORS}
"""What says how frequencies are scaled, and is no weight."""

ROPE_KEYS = {
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}
"""What is read, or says nothing that matters; anything else about RoPE is refused."""

YARN_KEYS = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
"""Keys of YaRN beside those, and what `config.json` calls them."""

# GGUF keeps Llama 3's frequency divisors but not the parameters; every released model uses these.
LLAMA3_LOW_FREQ, LLAMA3_HIGH_FREQ, LLAMA3_CONTEXT = 1.0, 4.0, 8192

FLOAT32_LIMIT = 4 << 30
"""Bytes up to which a model that is written out anew, as by pruning, is so in float32, in which dequantised
weights are exact; else in float16, whose rounding (2^-11) is far below that of the quantisation."""


class GGUF(Protocol):
    """A GGUF file as a family sees it; `loading.gguf.GGUFFile` is one.

    Attributes:
        tensors: Those of the file by name; `loading.gguf_file.GGUFTensor` says what they have.
        keys: All keys of metadata under the architecture's prefix, without it.
    """

    @property
    def tensors(self) -> Mapping[str, Any]: ...  # noqa: D102

    @property
    def keys(self) -> set[str]: ...  # noqa: D102

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a metadata key."""

    def setting(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key under the architecture's prefix."""


def read_metadata(gguf: GGUF, *, windows: bool, norm: str, settings: Collection[str]) -> dict[str, Any]:
    """Returns the part of a `config.json` that all families write alike.

    Args:
        gguf: The file.
        windows: Sliding windows are not refused.
        norm: Key of the number that is added to the mean square in norms.
        settings: Keys that the family reads itself.

    Raises:
        UnsupportedModel: A setting is not implemented.
        ModelError: A key or the embedding is missing.
    """
    window = gguf.setting("attention.sliding_window") or None
    if window and not windows:
        raise UnsupportedModel("sliding-window attention is not supported; full attention is")
    heads, kv_heads = _required(gguf, "attention.head_count"), gguf.setting("attention.head_count_kv")
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise UnsupportedModel("GGUF models whose layers differ in their heads are not supported")
    hidden_size = _required(gguf, "embedding_length")
    head_dim = gguf.setting("attention.key_length", hidden_size // heads)
    rotated = gguf.setting("rope.dimension_count", head_dim)
    if "token_embd.weight" not in gguf.tensors:
        raise ModelError("the GGUF file has no tensor token_embd.weight")
    optional: dict[str, Any] = {}
    if rotated != head_dim:
        optional["partial_rotary_factor"] = rotated / head_dim
    if windows:
        optional |= {"sliding_window": window, **_layer_types(gguf)}
    parameters = sum(tensor.n_elements for tensor in gguf.tensors.values())
    return {
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "bos_token_id": gguf.get("tokenizer.ggml.bos_token_id"),
        "dtype": "float32" if parameters * 4 <= FLOAT32_LIMIT else "float16",
        "eos_token_id": gguf.get("tokenizer.ggml.eos_token_id"),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": _required(gguf, "feed_forward_length"),
        "max_position_embeddings": _required(gguf, "context_length"),
        "mlp_bias": "blk.0.ffn_gate.bias" in gguf.tensors,
        "num_attention_heads": heads,
        "num_hidden_layers": _required(gguf, "block_count"),
        "num_key_value_heads": kv_heads or heads,
        "pad_token_id": gguf.get("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": _shortest(_required(gguf, norm)),
        "rope_scaling": _rope_scaling(gguf, rotated, settings),
        "rope_theta": gguf.setting("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
    } | optional


def _layer_types(gguf: GGUF) -> dict[str, Any]:
    """Returns which layers have a window: a flag for each, or every which has none."""
    pattern = gguf.setting("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return {"layer_types": ["sliding_attention" if one else "full_attention" for one in pattern]}
    return {} if pattern is None else {"sliding_window_pattern": pattern}


def _required(gguf: GGUF, key: str) -> Any:
    value = gguf.setting(key)
    if value is None:
        raise ModelError(f"the GGUF file does not name {gguf.get('general.architecture')}.{key}")
    return value


def _shortest(value: float) -> float:
    """Returns the shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(gguf: GGUF, head_dim: int, others: Collection[str]) -> dict[str, Any] | None:
    kind = gguf.setting("rope.scaling.type", "linear")
    known = ROPE_KEYS | set(others)
    if LONG_FACTORS in gguf.tensors or kind == "yarn":
        known |= {"rope.scaling.attn_factor"}
    if kind == "yarn":
        known |= YARN_KEYS.keys()
    unknown = sorted(key for key in gguf.keys if key.startswith("rope.") and key not in known)
    if unknown:
        raise UnsupportedModel(f"the GGUF file sets {unknown[0]}, which is not supported")
    original = gguf.setting("rope.scaling.original_context_length")
    if LONG_FACTORS in gguf.tensors and SHORT_FACTORS in gguf.tensors:
        return {
            "rope_type": "longrope",
            "attention_factor": gguf.setting("rope.scaling.attn_factor"),
            "original_max_position_embeddings": original,
            "short_factor": gguf.tensors[SHORT_FACTORS].read().tolist(),
            "long_factor": gguf.tensors[LONG_FACTORS].read().tolist(),
        }
    factor = gguf.setting("rope.scaling.factor") or gguf.setting("rope.scale_linear") or 1.0
    scaled = kind != "none" and (factor != 1.0 or kind != "linear")
    if ROPE_FREQS in gguf.tensors:
        if scaled:
            raise UnsupportedModel(
                "RoPE frequencies and a scaling beside them are not supported in GGUF files"
            )
        return _llama3_scaling(gguf, head_dim)
    scaling = {"rope_type": kind, "factor": _shortest(factor)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = original
        scaling |= {name: gguf.setting(key) for key, name in YARN_KEYS.items() if key in gguf.keys}
        if amplitude := gguf.setting("rope.scaling.attn_factor"):
            scaling["attention_factor"] = _shortest(amplitude) * (1 + 0.1 * math.log(factor))
    return scaling if scaled else None


def _llama3_scaling(gguf: GGUF, head_dim: int) -> dict[str, Any]:
    divisors = gguf.tensors[ROPE_FREQS].read()
    factor = float(divisors.max())
    frequency = gguf.setting("rope.freq_base", 10000.0) ** -(np.arange(0, head_dim, 2) / head_dim)
    waves = LLAMA3_CONTEXT * frequency / (2 * np.pi)
    blend = ((waves - LLAMA3_LOW_FREQ) / (LLAMA3_HIGH_FREQ - LLAMA3_LOW_FREQ)).clip(0, 1)
    expected = 1 / ((1 - blend) / factor + blend)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise UnsupportedModel("the RoPE frequencies of this GGUF file are not those of a Llama 3 model")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW_FREQ,
        "high_freq_factor": LLAMA3_HIGH_FREQ,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }
