"""GGUF files written as llama.cpp's converter writes them, read back against the model they came from."""

from collections.abc import Callable
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

from curkv.kernels.dispatch import get_kernels
from curkv.models.errors import ModelError, ModelNotFound, UnsupportedModel
from curkv.models.families.gguf_names import TENSOR_NAMES
from curkv.models.loading import gguf_blocks, load_config, resolve_model
from curkv.models.loading.checkpoint import Checkpoint, tensor_files
from curkv.models.loading.gguf import describe_gguf
from curkv.models.loading.gguf_file import GGUFFile
from curkv.models.rope_scaling import YarnScaling
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
    tokens = byte_level_metadata("qwen2", SHAPE["vocab_size"])
    writer.add_tokenizer_model(fields.pop("tokenizer.ggml.model", "gpt2"))
    writer.add_tokenizer_pre(fields.pop("tokenizer.ggml.pre", "qwen2"))
    writer.add_token_list(tokens["tokenizer.ggml.tokens"])
    writer.add_token_types(tokens["tokenizer.ggml.token_type"])
    writer.add_token_merges(tokens["tokenizer.ggml.merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in fields.items():
        adders[type(value)](key, value)
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
def test_a_file_gives_the_model_back(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = random_model(MODELS[architecture])
    path = tmp_path / "tiny.gguf"
    write_gguf(path, architecture, model)
    directory = resolve_model(str(path))
    assert directory.is_relative_to(tmp_path / "cache/curkv/models")
    config = load_config(directory)
    assert config.architecture == type(model).__name__
    tensors = tensor_files(directory)
    assert set(tensors.names) >= model.state_dict().keys() - {"lm_head.weight"}
    for name in tensors.names:
        assert torch.equal(tensors.read(name), model.state_dict()[name]), name
    assert config.rms_norm_eps == MODELS[architecture].rms_norm_eps
    assert config.eos_token_ids == (2, 5)
    before = directory.stat().st_mtime_ns
    assert resolve_model(str(path)) == directory
    assert directory.stat().st_mtime_ns == before, "described twice"


def test_llama3_scaling_is_recovered_from_the_divisors(tmp_path: Path) -> None:
    rope = LLAMA3 | {"rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192}
    model = random_model(LlamaConfig(**SHAPE, head_dim=64, rope_parameters=rope))
    write_gguf(tmp_path / "a.gguf", "llama", model, **{"llama.attention.key_length": 64})
    describe_gguf(tmp_path / "a.gguf", tmp_path)
    scaling = load_config(tmp_path).rope_scaling
    assert scaling is not None
    assert scaling.factor == pytest.approx(32.0)
    assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1.0, 4.0)
    assert scaling.original_max_positions == 8192


def test_unknown_divisors_are_refused(tmp_path: Path) -> None:
    model = random_model(LlamaConfig(**SHAPE, rope_parameters=LLAMA3))
    write_gguf(tmp_path / "a.gguf", "llama", model)
    with pytest.raises(UnsupportedModel, match="RoPE frequencies"):
        describe_gguf(tmp_path / "a.gguf", tmp_path)


PUBLISHED = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS"),
    *("IQ2_XXS", "IQ1_S", "IQ1_M"),
)
"""Types of tensors in files that people publish."""


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """Blocks of any content, but for what would make a scale NaN or infinity."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (rows * columns // values, size), np.uint8)
    if kind.name in ("F32", "F16", "BF16"):
        return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    halves = blocks[:, : size // 2 * 2].view(np.float16)
    halves[~(abs(halves) < 1e3)] = 0.5
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_quantised_weights_have_the_values_of_the_gguf_package(name: str, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType[name]
    blocks = random_blocks(kind, 9, 512)
    if blocks.dtype == np.float32:
        blocks = gguf.quantize(blocks, kind)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("before", np.ones(5, np.float32))
    writer.add_tensor("output.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = GGUFFile(tmp_path / "q.gguf").tensors["output.weight"]
    assert (tensor.shape, tensor.kind) == ((9, 512), kind)
    expected = gguf.dequantize(blocks, kind).astype(np.float32)
    assert np.array_equal(tensor.read(), expected, equal_nan=True)


@pytest.mark.parametrize("kind", gguf_blocks.FOUR_BITS)
def test_blocks_of_4_bits_are_taken_over_as_they_are(kind: gguf.GGMLQuantizationType) -> None:
    blocks = random_blocks(kind, 9, 512)
    integers, steps, lows = gguf_blocks.grids_of(blocks, kind)
    expected = gguf.dequantize(blocks, kind).reshape(9, -1, 32)
    found = integers.reshape(expected.shape) * steps.astype(np.float32)[..., None] + lows[..., None]
    off, sides = abs(found - expected), abs(15 * steps.astype(np.float32)) + abs(lows.astype(np.float32))
    assert (off <= sides[..., None] / 1024).all()  # float16 has 11 bits


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_blocks_that_are_not_finite_are_named_when_they_are_packed(broken: float, tmp_path: Path) -> None:
    model = random_model(MODELS["llama"])
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", model)
    tensor = GGUFFile(path).tensors["blk.1.ffn_up.weight"]
    with path.open("r+b") as file:
        file.seek(tensor.offset + 4)
        file.write(np.float32(broken).tobytes())
    describe_gguf(path, tmp_path)
    weights = Checkpoint(tmp_path, load_config(tmp_path), unread=True)
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight holds NaN or infinity"):
        get_kernels("cpu").pack_linear(weights.layer(1).mlp.gate_up)


def test_large_tensors_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(gguf.GGMLQuantizationType.Q4_K, 9, 512)
    whole = gguf_blocks.dequantise(blocks.ravel(), gguf.GGMLQuantizationType.Q4_K, (9, 512))
    monkeypatch.setattr(gguf_blocks, "PART", 1024)
    parts = gguf_blocks.dequantise(blocks.ravel(), gguf.GGMLQuantizationType.Q4_K, (9, 512))
    assert np.array_equal(whole, parts)


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    """A model in three files."""
    write_gguf(tmp_path / "whole.gguf", "llama", random_model(MODELS["llama"]))
    whole = gguf.GGUFReader(tmp_path / "whole.gguf")
    paths = [tmp_path / f"a-{part:05d}-of-00003.gguf" for part in (1, 2, 3)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        for key, field in whole.fields.items() if number == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                sub = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(whole.tensors))
        for tensor in whole.tensors[number::3]:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_a_split_file_is_the_whole_one(
    split: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole, parts = (resolve_model(str(path)) for path in (tmp_path / "whole.gguf", split[1]))
    assert (whole / "config.json").read_text() == (parts / "config.json").read_text()
    one, other = tensor_files(whole), tensor_files(parts)
    assert len(other.paths) == 3 and sorted(one.names) == sorted(other.names)
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.names)


def test_missing_pieces_are_named(split: list[Path]) -> None:
    split[1].unlink()
    with pytest.raises(ModelNotFound, match=r"one of 3 pieces; missing in .*: a-00002-of-00003\.gguf"):
        GGUFFile(split[0])


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "llama", random_model(MODELS["llama"]))
    (tmp_path / "model").mkdir()
    describe_gguf(tmp_path / "a.gguf", tmp_path / "model")
    (tmp_path / "a.gguf").unlink()
    with pytest.raises(ModelNotFound, match=r"/a\.gguf is gone"):
        tensor_files(tmp_path / "model")


def yarn(**fields: float) -> dict[str, Any]:
    return {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0} | fields


@pytest.mark.parametrize(
    ("fields", "amplitude", "beta_fast"),
    [
        (yarn(), 1 + 0.1 * np.log(4), 32.0),
        (yarn(**{"llama.rope.scaling.attn_factor": 0.5}), 0.5 * (1 + 0.1 * np.log(4)), 32.0),
        (yarn(**{"llama.rope.scaling.yarn_beta_fast": 16.0}), 1 + 0.1 * np.log(4), 16.0),
    ],
)
def test_yarn_of_a_file_is_applied(
    tmp_path: Path, fields: dict[str, Any], amplitude: float, beta_fast: float
) -> None:
    write_gguf(tmp_path / "a.gguf", "llama", random_model(MODELS["llama"]), **fields)
    describe_gguf(tmp_path / "a.gguf", tmp_path)
    scaling = load_config(tmp_path).rope_scaling
    assert isinstance(scaling, YarnScaling)
    assert (scaling.amplitude, scaling.beta_fast) == (pytest.approx(amplitude), beta_fast)


@pytest.mark.parametrize(
    ("architecture", "fields", "words"),
    [
        ("gpt2", {}, "gpt2; supported: llama, qwen2, qwen3"),
        ("llama", {"llama.attention.sliding_window": 4096}, "sliding-window"),
        ("llama", {"llama.rope.dimension_count": 4}, "partial rotary"),
        ("llama", {"llama.rope.scaling.yarn_ext_factor": 1}, "yarn_ext_factor, which is not supported"),
    ],
)
def test_unsupported_files_are_refused(
    tmp_path: Path, architecture: str, fields: dict[str, int], words: str
) -> None:
    write_gguf(tmp_path / "a.gguf", architecture, random_model(MODELS["llama"]), **fields)
    with pytest.raises(UnsupportedModel, match=words):
        describe_gguf(tmp_path / "a.gguf", tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda whole: b"not a model", "does not begin with GGUF"),
        (lambda whole: b"", "no readable GGUF"),
        (lambda whole: whole[:5], "no readable GGUF"),
        (lambda whole: whole[:400], "cut off"),
        (lambda whole: whole[:-1], "before the tensor .* does; it is cut off"),
        (lambda whole: whole[:4] + b"\x01\0\0\0" + whole[8:], "its version is 1"),
        (lambda whole: whole[:4] + b"\0\0\0\x03" + whole[8:], "big-endian"),
        (lambda whole: whole[:16] + b"\xff" * 8 + whole[24:], "no readable GGUF"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: Callable[[bytes], bytes], words: str) -> None:
    write_gguf(tmp_path / "a.gguf", "llama", random_model(MODELS["llama"]))
    (tmp_path / "a.gguf").write_bytes(content((tmp_path / "a.gguf").read_bytes()))
    with pytest.raises(ModelError, match=words) as error:
        describe_gguf(tmp_path / "a.gguf", tmp_path)
    assert "a.gguf" in str(error.value) and "\n" not in str(error.value)


def test_a_piece_that_is_not_named_like_one_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "llama", random_model(MODELS["llama"]), **{"split.count": 3})
    with pytest.raises(ModelError, match="a piece of 3"):
        GGUFFile(tmp_path / "a.gguf")
