"""GGUF files written as llama.cpp's converter writes them, read back against the model they came from."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from curkv.models.errors import ModelError, UnsupportedModel
from curkv.models.families.gguf_names import TENSOR_NAMES
from curkv.models.loading import load_config, resolve_model
from curkv.models.loading.gguf import GGUFFile, convert_gguf
from tests.models.test_llama import LLAMA3, SHAPE
from tests.models.test_tokenizer import byte_level_metadata

MODELS = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True, rms_norm_eps=1e-5),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True, rms_norm_eps=1e-6),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32, rms_norm_eps=1e-6),
}


def permute(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The reordering of query and key rows in llama.cpp's convert_hf_to_gguf.py."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return {value: key for key, value in TENSOR_NAMES.items()}[stem] + f".{kind}"
    _, _, layer, stem = stem.split(".", 3)
    return f"blk.{layer}.{ {value: key for key, value in TENSOR_NAMES.items()}[stem] }.{kind}"


def write_gguf(path: Path, architecture: str, model: PreTrainedModel, **fields: Any) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == "qwen3":
        writer.add_key_length(config.head_dim)
    tokens = byte_level_metadata("qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens["tokenizer.ggml.tokens"])
    writer.add_token_types(tokens["tokenizer.ggml.token_type"])
    writer.add_token_merges(tokens["tokenizer.ggml.merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    for key, value in fields.items():
        writer.add_uint32(key, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            rows = permute(rows, 6 if "q_proj" in name else 2)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(rows))
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(model))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_divisors(model: PreTrainedModel) -> np.ndarray[Any, Any]:
    scaled = model.model.rotary_emb.inv_freq.numpy()
    theta, size = model.config.rope_parameters["rope_theta"], model.config.head_dim
    return (theta ** -(np.arange(0, size, 2) / size) / scaled).astype(np.float32)


def random_model(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("architecture", MODELS)
def test_conversion_restores_the_model(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = random_model(MODELS[architecture])
    path = tmp_path / "tiny.gguf"
    write_gguf(path, architecture, model)
    directory = resolve_model(str(path))
    assert directory.is_relative_to(tmp_path / "cache/curkv/models")
    converted = AutoModelForCausalLM.from_pretrained(directory)
    assert type(converted) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name
    config = load_config(directory)
    assert config.rms_norm_eps == MODELS[architecture].rms_norm_eps
    assert config.eos_token_ids == (2, 5)
    before = directory.stat().st_mtime_ns
    assert resolve_model(str(path)) == directory
    assert directory.stat().st_mtime_ns == before, "converted twice"


def test_llama3_scaling_is_recovered_from_the_divisors(tmp_path: Path) -> None:
    rope = LLAMA3 | {"rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192}
    model = random_model(LlamaConfig(**SHAPE, head_dim=64, rope_parameters=rope))
    write_gguf(tmp_path / "a.gguf", "llama", model, **{"llama.attention.key_length": 64})
    convert_gguf(tmp_path / "a.gguf", tmp_path)
    scaling = load_config(tmp_path).rope_scaling
    assert scaling is not None
    assert scaling.factor == pytest.approx(32.0)
    assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1.0, 4.0)
    assert scaling.original_max_positions == 8192


def test_unknown_divisors_are_refused(tmp_path: Path) -> None:
    model = random_model(LlamaConfig(**SHAPE, rope_parameters=LLAMA3))
    write_gguf(tmp_path / "a.gguf", "llama", model)
    with pytest.raises(UnsupportedModel, match="RoPE frequencies"):
        convert_gguf(tmp_path / "a.gguf", tmp_path)


def test_quantised_weights_are_dequantised(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    blocks = gguf.quantize(weight, gguf.GGMLQuantizationType.Q4_1)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("output.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = GGUFFile(tmp_path / "q.gguf").tensors["output.weight"]
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    assert np.abs(values - weight).max() < 0.2


@pytest.mark.parametrize(
    ("architecture", "fields", "words"),
    [
        ("gpt2", {}, "gpt2; supported: llama, qwen2, qwen3"),
        ("llama", {"llama.attention.sliding_window": 4096}, "sliding-window"),
        ("llama", {"llama.rope.dimension_count": 4}, "partial rotary"),
        ("llama", {"split.count": 3}, "several parts"),
    ],
)
def test_unsupported_files_are_refused(
    tmp_path: Path, architecture: str, fields: dict[str, int], words: str
) -> None:
    write_gguf(tmp_path / "a.gguf", architecture, random_model(MODELS["llama"]), **fields)
    with pytest.raises(UnsupportedModel, match=words):
        convert_gguf(tmp_path / "a.gguf", tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="no readable GGUF"):
        convert_gguf(path, tmp_path)
