"""Conversion of a GGUF file to the directory of a Hugging Face model: config, safetensors and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, dequantize

from curkv.models.config import ModelConfig
from curkv.models.errors import ModelError, UnsupportedModel
from curkv.models.gguf_tokenizer import write_tokenizer
from curkv.models.safetensors_file import TensorEntry, write_safetensors

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
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
ROPE_FREQS = "rope_freqs.weight"

# Dequantised weights are exact in float32; models beyond this many bytes are stored in float16 instead, whose
# rounding (2^-11) is far below that of the quantisation.
FLOAT32_LIMIT = 4 << 30

# GGUF keeps Llama 3's frequency divisors but not the parameters; every released model uses these.
LLAMA3_LOW_FREQ, LLAMA3_HIGH_FREQ, LLAMA3_CONTEXT = 1.0, 4.0, 8192


class GGUFFile:
    """A GGUF file: metadata by key, and tensors by name."""

    def __init__(self, path: Path):
        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise ModelError(f"{path} is no readable GGUF file: {error}") from error
        self.architecture = str(self.get("general.architecture"))
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a metadata key."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def setting(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key under the architecture's prefix."""
        return self.get(f"{self.architecture}.{key}", default)


def convert_gguf(source: Path, directory: Path) -> None:
    """Writes the model in `source` to `directory`, in the files that transformers reads as well.

    Raises:
        UnsupportedModel: The architecture, its settings or its tokenizer are not implemented.
    """
    gguf = GGUFFile(source)
    config = read_config(gguf)
    parsed = ModelConfig.from_dict(config)
    write_tokenizer(gguf.get, directory, parsed.max_positions)
    _write_json(directory / "config.json", config)
    eos = (gguf.get("tokenizer.ggml.eos_token_id"), gguf.get("tokenizer.ggml.eot_token_id"))
    _write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": list(dict.fromkeys(id for id in eos if id is not None)),
            "pad_token_id": config["pad_token_id"],
        },
    )
    dtype = np.dtype("float32" if config["dtype"] == "float32" else "float16")
    write_safetensors(directory / "model.safetensors", list(_entries(gguf, parsed, dtype)))


def read_config(gguf: GGUFFile) -> dict[str, Any]:
    """Returns the `config.json` that describes the file."""
    if gguf.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"unsupported GGUF architecture {gguf.architecture}; supported: {', '.join(ARCHITECTURES)}"
        )
    if gguf.get("split.count", 1) > 1:
        raise UnsupportedModel("GGUF files in several parts are not supported; join them first")
    if gguf.setting("attention.sliding_window"):
        raise UnsupportedModel("sliding-window attention is not supported; full attention is")
    heads, kv_heads = gguf.setting("attention.head_count"), gguf.setting("attention.head_count_kv")
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise UnsupportedModel("GGUF models whose layers differ in their heads are not supported")
    hidden_size = gguf.setting("embedding_length")
    head_dim = gguf.setting("attention.key_length", hidden_size // heads)
    if gguf.setting("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel("partial rotary embeddings are not supported; RoPE must cover the whole head")
    parameters = sum(int(tensor.n_elements) for tensor in gguf.tensors.values())
    return {
        "architectures": [ARCHITECTURES[gguf.architecture]],
        "model_type": gguf.architecture,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "bos_token_id": gguf.get("tokenizer.ggml.bos_token_id"),
        "dtype": "float32" if parameters * 4 <= FLOAT32_LIMIT else "float16",
        "eos_token_id": gguf.get("tokenizer.ggml.eos_token_id"),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": gguf.setting("feed_forward_length"),
        "max_position_embeddings": gguf.setting("context_length"),
        "mlp_bias": "blk.0.ffn_gate.bias" in gguf.tensors,
        "num_attention_heads": heads,
        "num_hidden_layers": gguf.setting("block_count"),
        "num_key_value_heads": kv_heads or heads,
        "pad_token_id": gguf.get("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": _shortest(gguf.setting("attention.layer_norm_rms_epsilon")),
        "rope_scaling": _rope_scaling(gguf, head_dim),
        "rope_theta": gguf.setting("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "vocab_size": int(gguf.tensors["token_embd.weight"].shape[1]),
    }


def _shortest(value: float) -> float:
    """Returns the shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(gguf: GGUFFile, head_dim: int) -> dict[str, Any] | None:
    if ROPE_FREQS not in gguf.tensors:
        kind = gguf.setting("rope.scaling.type", "none")
        return None if kind == "none" else {"rope_type": kind}
    divisors = gguf.tensors[ROPE_FREQS].data.view(np.float32)
    factor = float(divisors.max())
    frequency = gguf.setting("rope.freq_base", 10000.0) ** -(np.arange(0, head_dim, 2) / head_dim)
    waves = LLAMA3_CONTEXT * frequency / (2 * np.pi)
    blend = ((waves - LLAMA3_LOW_FREQ) / (LLAMA3_HIGH_FREQ - LLAMA3_LOW_FREQ)).clip(0, 1)
    if not np.allclose(divisors, 1 / ((1 - blend) / factor + blend), rtol=1e-3):
        raise UnsupportedModel("the RoPE frequencies of this GGUF file are not those of a Llama 3 model")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW_FREQ,
        "high_freq_factor": LLAMA3_HIGH_FREQ,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }


def _entries(gguf: GGUFFile, config: ModelConfig, dtype: np.dtype[Any]) -> Iterator[TensorEntry]:
    tensors = [tensor for name, tensor in gguf.tensors.items() if name != ROPE_FREQS]
    for name, tensor in [(tensor_name(tensor.name), tensor) for tensor in tensors]:
        shape = tuple(int(size) for size in reversed(tensor.shape))

        def read(name: str = name, tensor: Any = tensor, shape: tuple[int, ...] = shape) -> npt.NDArray[Any]:
            values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            if gguf.architecture == "llama":
                values = _unpermuted(name, values, config)
            return values.astype(dtype, copy=False)

        yield TensorEntry(name, shape, dtype, read)


def tensor_name(name: str) -> str:
    """Returns the Hugging Face name of a GGUF tensor, such as `blk.3.attn_q.weight`."""
    stem, _, kind = name.rpartition(".")
    prefix = ""
    if stem.startswith("blk."):
        _, layer, stem = stem.split(".", 2)
        prefix = f"model.layers.{layer}."
    if stem not in TENSOR_NAMES:
        raise UnsupportedModel(f"unsupported tensor {name}; only dense Llama, Qwen2 and Qwen3 models are")
    return f"{prefix}{TENSOR_NAMES[stem]}.{kind}"


def _unpermuted(name: str, values: npt.NDArray[Any], config: ModelConfig) -> npt.NDArray[Any]:
    """Undoes llama.cpp's reordering of query and key rows, from interleaved RoPE pairs back to half-split."""
    if "q_proj" in name:
        heads = config.num_heads
    elif "k_proj" in name:
        heads = config.num_kv_heads
    else:
        return values
    pairs = values.reshape(heads, config.head_dim // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
