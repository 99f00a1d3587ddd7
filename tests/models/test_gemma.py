"""Gemma 3 270M as it is published: its tokenizer against llama.cpp's ids, its tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from curkv.models.errors import ModelNotFound
from curkv.models.loading import load_config, load_tokenizer, resolve_model
from curkv.models.loading.checkpoint import Checkpoint

IDS: dict[str, list[int]] = json.loads(Path(__file__).with_name("gemma_ids.json").read_text())
"""Of texts by llama.cpp (xllamacpp 2026.10) from the same file."""


@pytest.fixture(scope="module")
def directory() -> Path:
    try:
        return resolve_model("gemma-3-270m")
    except ModelNotFound as error:
        pytest.skip(f"Gemma 3 270M cannot be fetched: {error}")


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


@pytest.mark.parametrize("text", IDS)
def test_ids_are_those_of_llama_cpp(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids == IDS[text]
    if "\u2581" not in text:  # which stands for a space
        assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text


def test_layers_are_read(directory: Path) -> None:
    config = load_config(directory)
    assert (config.num_layers, config.head_dim, config.vocab_size) == (18, 256, 262144)
    assert [kind.window for kind in config.layers].count(None) == 3
    layer = Checkpoint(directory, config).layer(17)
    assert layer.attention.qkv.shape == (1024 + 2 * 256, 640)
    assert 0.01 < layer.mlp.down.std() < 0.1
