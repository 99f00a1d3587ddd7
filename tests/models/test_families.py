"""The registry of families, and what a family's file has to say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from curkv.models import families
from curkv.models.blocks import Head, Packer
from curkv.models.config import ModelConfig, read_shape
from curkv.models.decoder import Decoder
from curkv.models.families import FAMILIES, family_of, family_of_gguf
from curkv.models.families.base import Family
from curkv.models.loading import load_config
from curkv.models.loading.checkpoint import Checkpoint
from tests.models.dense import REFERENCE, DenseAttention, DenseBatch
from tests.models.test_llama import FAMILIES as MODELS
from tests.models.test_llama import SHAPE


def test_names_are_said_once() -> None:
    for names in (
        [family.model_type for family in FAMILIES],
        [name for family in FAMILIES for name in family.architectures],
        [(name, family.gguf_experts) for family in FAMILIES if (name := family.gguf_architecture)],
    ):
        assert len(names) == len(set(names))
    assert family_of_gguf("qwen3").model_type == "qwen3"
    assert [family_of_gguf("llama", experts).model_type for experts in (False, True)] == ["llama", "mixtral"]


def test_the_families_of_the_documentation_are_those_that_there_are() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert "\n".join(families.table()) in text


@pytest.mark.parametrize("name", MODELS)
def test_a_family_knows_the_tensors_of_its_checkpoints(name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(MODELS[name])
    model.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config.tie_embeddings:
        del shapes["lm_head.weight"]
    assert family_of(config).tensors(config) == shapes


class Capped(Family):
    """A recipe of its own in one file: logits are soft-capped, embeddings scaled, norms stored minus one."""

    title = "Capped"
    model_type = "capped"
    architectures = ("CappedForCausalLM",)

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        return read_shape(raw, self.architectures[0])

    def embedding(self, read: Any, config: ModelConfig) -> Tensor:
        return super().embedding(read, config) * 2

    def final_norm(self, read: Any, config: ModelConfig) -> Tensor:
        return super().final_norm(read, config) + 1

    def head_block(self, config: ModelConfig, norm: Tensor, weight: Tensor, pack: Packer) -> Head:
        return CappedHead(config, norm, weight, pack)


class CappedHead(Head):
    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return 3 * (super().__call__(x, residual) / 3).tanh()


def test_a_family_may_compute_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, Capped()))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval()
    model.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    capped = replace(config, architecture="CappedForCausalLM")
    with torch.no_grad():
        model.model.embed_tokens.weight *= 2
        model.model.norm.weight += 1
        expected = 3 * (model(torch.arange(20)[None]).logits[0] / 3).tanh()
    decoder = Decoder(capped, Checkpoint(tmp_path, capped), REFERENCE)
    logits = decoder.forward(DenseBatch.of([list(range(20))], [0]), DenseAttention(capped))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_output_projection_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    model.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    decoder = Decoder(config, Checkpoint(tmp_path, config), REFERENCE)
    wanted = model.model.layers[1].self_attn.o_proj.weight.T.reshape(6, 8, 48)
    assert torch.equal(decoder.output_projection(1), wanted)
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(decoder.output_projection(1), wanted)


@pytest.mark.parametrize("form", ["without its head", "head only"])
def test_tied_models_are_read_however_they_were_saved(tmp_path: Path, form: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, tie_word_embeddings=True)).eval()
    if form == "head only":
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        model.model.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    decoder = Decoder(config, Checkpoint(tmp_path, config), REFERENCE)
    logits = decoder.forward(DenseBatch.of([list(range(20))], [0]), DenseAttention(config))
    expected = model(torch.arange(20)[None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_shapes_are_told_without_what_torch_loads_for_tensors_that_have_no_memory() -> None:
    code = (
        "import sys; from curkv.models.families.llama import Llama;"
        "raw = {'architectures': ['LlamaForCausalLM'], 'vocab_size': 8, 'hidden_size': 16,"
        " 'intermediate_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'rms_norm_eps': 1e-5,"
        " 'max_position_embeddings': 8};"
        "assert len(Llama().tensors(Llama().config(raw))) > 9;"
        "assert not {'triton', 'sympy', 'torch._inductor'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
