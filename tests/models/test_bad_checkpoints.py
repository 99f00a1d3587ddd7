"""Models that contradict themselves: each is refused in one line that names the file and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from curkv.models.errors import ModelError, ModelNotFound, UnsupportedModel
from curkv.models.loading import load_config, load_tokenizer, resolve_model
from curkv.models.loading.checkpoint import Checkpoint
from tests.models.test_gguf import MODELS, random_model, write_gguf
from tests.models.test_llama import SHAPE

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small model that is whole."""
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    return tmp_path


def refusal(directory: Path) -> str:
    """The message with which the directory is refused, when loaded in full."""
    with pytest.raises(ModelError) as error:
        config = load_config(directory)
        checkpoint = Checkpoint(directory, config)
        _ = checkpoint.head, checkpoint.embedding, checkpoint.final_norm
        for index in range(config.num_layers):
            checkpoint.layer(index)
    message = str(error.value)
    assert "\n" not in message and str(directory) in message
    return message


def configured(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewritten(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 200}, f"{WEIGHTS}: model.embed_tokens.weight has the shape [131, 48], but [200, 48]"),
        ({"intermediate_size": 81}, "mlp.gate_proj.weight has the shape [80, 48], but [81, 48]"),
        ({"hidden_size": 96}, "model.embed_tokens.weight has the shape [131, 48], but [131, 96]"),
        ({"num_key_value_heads": 3}, "k_proj.weight has the shape [16, 48], but [24, 48]"),
        ({"num_hidden_layers": 4}, "no tensor model.layers.3."),
        ({"architectures": ["Qwen2ForCausalLM"]}, "no tensor model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_a_configuration_that_speaks_of_other_tensors(
    directory: Path, changes: dict[str, Any], words: str
) -> None:
    configured(directory, **changes)
    assert words in refusal(directory)


def test_tensors_that_the_configuration_does_not_know(directory: Path) -> None:
    bias = "model.layers.1.self_attn.q_proj.bias"
    rewritten(directory, lambda tensors: tensors.update({bias: torch.zeros(48)}))
    assert bias in refusal(directory)


def test_what_no_layer_computes_with_may_lie_beside(directory: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "score.weight": torch.ones(2)}
    rewritten(directory, lambda tensors: tensors.update(extra))
    Checkpoint(directory, load_config(directory)).layer(0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(directory: Path, name: str, value: float) -> None:
    rewritten(directory, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    message = refusal(directory)
    assert f"{WEIGHTS}: {name} holds NaN or infinity" in message


def test_large_finite_weights_are_no_infinity(directory: Path) -> None:
    rewritten(directory, lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    assert Checkpoint(directory, load_config(directory)).final_norm[0] == 3e38


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", "[]", "config.json holds a JSON list"),
        ("config.json", "{", "no valid JSON"),
        ("config.json", "\x00\ud800", "no valid JSON"),
        ("generation_config.json", "[1]", "generation_config.json holds a JSON list"),
        (INDEX, "{}", "has no weight_map"),
        (INDEX, '{"weight_map": {"a": "b.safetensors", "c": "d.safetensors"}}', "no b.safetensors, d.safet"),
        (WEIGHTS, "short", "damaged"),
    ],
)
def test_damaged_files_are_named(directory: Path, file: str, content: str, words: str) -> None:
    (directory / file).write_bytes(content.encode(errors="surrogatepass"))
    assert words in refusal(directory)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json is no readable tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_directory_of_something_else_says_what_it_is_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "Model.Q4.GGUF").touch()
    with pytest.raises(ModelNotFound, match=r"a GGUF file: name the file itself, --model .*Model\.Q4\.GGUF"):
        load_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(ModelNotFound, match=r"LoRA adapter.*merge it into owner/base"):
        load_config(tmp_path)


def checkpoint_of(directory: Path) -> Checkpoint:
    return Checkpoint(directory, load_config(directory))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/curkv/models"


def left_over(cache: Path) -> list[str]:
    return [path.name for path in cache.glob("*") if path.suffix != ".lock"]


def test_an_upper_case_gguf_is_one(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "TINY.GGUF", "llama", random_model(MODELS["llama"]))
    assert load_config(resolve_model(str(tmp_path / "TINY.GGUF"))).num_layers == 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"llama.feed_forward_length": 96},
            "a.gguf: blk.0.ffn_gate.weight has the shape [80, 48], but [96, 48]",
        ),
        ({"llama.block_count": 4}, "a.gguf has no tensor blk.3.attn_q.weight"),
        ({"llama.rope.scaling.attn_factor": 2}, "rope.scaling.attn_factor, which is not supported"),
        ({"general.type": "adapter"}, "a.gguf: it holds a LoRA adapter"),
        ({"general.type": "mmproj"}, "a.gguf: it holds the vision or audio tower"),
        (
            {"tokenizer.ggml.pre": "newest"},
            "a.gguf: unsupported GGUF pre-tokenizer newest (tokenizer.ggml.pre)",
        ),
        ({"tokenizer.ggml.model": "bert"}, "a.gguf: unsupported GGUF tokenizer bert"),
        ({"tokenizer.ggml.model": ""}, "a.gguf: the GGUF file has no tokenizer (no tokenizer.ggml.model)"),
    ],
)
def test_a_bad_gguf_leaves_nothing_in_the_cache(
    tmp_path: Path, cache: Path, fields: dict[str, Any], words: str
) -> None:
    write_gguf(tmp_path / "a.gguf", "llama", random_model(MODELS["llama"]), **fields)
    with pytest.raises(ModelError) as error:
        resolve_model(str(tmp_path / "a.gguf"))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert left_over(cache) == []


def test_a_tokenizer_larger_than_the_embedding_is_named(tmp_path: Path, cache: Path) -> None:
    small = LlamaConfig(**SHAPE | {"vocab_size": 100})
    write_gguf(tmp_path / "a.gguf", "llama", random_model(small))
    with pytest.raises(ModelError, match=r"a\.gguf: tokenizer\.ggml\.tokens has .* only 100 rows"):
        resolve_model(str(tmp_path / "a.gguf"))
    assert left_over(cache) == []


def test_an_unknown_architecture_is_named(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "mamba", random_model(MODELS["llama"]))
    words = r"a\.gguf: unsupported GGUF architecture \(general\.architecture\) mamba; supported: llama"
    with pytest.raises(UnsupportedModel, match=words):
        resolve_model(str(tmp_path / "a.gguf"))
    assert left_over(cache) == []


def test_nan_in_a_gguf_is_named(tmp_path: Path, cache: Path) -> None:
    model = random_model(MODELS["llama"])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = float("nan")
    write_gguf(tmp_path / "a.gguf", "llama", model)
    with pytest.raises(ModelError, match=r"a\.gguf: blk\.1\.ffn_down\.weight holds NaN"):
        checkpoint_of(resolve_model(str(tmp_path / "a.gguf"))).layer(1)


@pytest.mark.parametrize("key", ["llama.rope.scale_linear", "llama.rope.scaling.factor"])
def test_linear_scaling_of_a_gguf_is_applied(tmp_path: Path, cache: Path, key: str) -> None:
    write_gguf(tmp_path / "a.gguf", "llama", random_model(MODELS["llama"]), **{key: 2})
    scaling = load_config(resolve_model(str(tmp_path / "a.gguf"))).rope_scaling
    assert scaling is not None and scaling.factor == 2.0


def test_a_refused_setting_names_the_directory(directory: Path) -> None:
    configured(directory, hidden_act="mish")
    with pytest.raises(UnsupportedModel, match=f"{directory}.*mish"):
        load_config(directory)
