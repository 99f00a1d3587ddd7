"""Packed weights in the cache directory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from curkv.kernels.dispatch import get_kernels
from curkv.kernels.linear.formats import AS_PUBLISHED, FLOAT32, INT8, WeightFormat
from curkv.models.decoder import Decoder
from curkv.models.errors import ModelError
from curkv.models.loading import load_config, packed
from curkv.models.loading.checkpoint import Checkpoint
from tests.models.dense import DenseAttention, DenseBatch
from tests.models.test_bad_checkpoints import rewritten as rewritten_tensors
from tests.models.test_model_families import MODELS, text

CPU = get_kernels("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/curkv/packed"


def saved(directory: Path, name: str) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS[name]).save_pretrained(directory)
    return directory


def loaded(directory: Path, form: WeightFormat = INT8) -> Decoder:
    return packed.load_decoder(directory, load_config(directory), CPU, form, torch.device("cpu"))


def logits(decoder: Decoder) -> Tensor:
    return decoder.forward(DenseBatch.of([text(20, 0)], [0]), DenseAttention(decoder.config))


@pytest.mark.parametrize("name", MODELS)
def test_kept_weights_are_those_that_were_packed(name: str, tmp_path: Path, cache: Path) -> None:
    directory = saved(tmp_path / "model", name)
    config = load_config(directory)
    expected = Decoder(config, Checkpoint(directory, config), CPU, INT8)
    kept = loaded(directory)
    assert torch.equal(logits(kept), logits(expected))
    assert (kept.weights, kept.weights_bytes) == (expected.weights, expected.weights_bytes)
    assert torch.equal(kept.output_projection(0), expected.output_projection(0))
    assert len(kept.sinks) == len(expected.sinks) and all(map(torch.equal, kept.sinks, expected.sinks))


@pytest.fixture
def directory(tmp_path: Path, cache: Path) -> Path:
    """A model that has been packed."""
    directory = saved(tmp_path / "model", "granite-tied")
    loaded(directory)
    return directory


def test_packed_weights_are_read_again_without_the_model(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "layer", lambda *_: pytest.fail("weights were read"))
    loaded(directory)


def rewritten(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


def reconfigured(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))


@pytest.mark.parametrize("change", [rewritten, reconfigured])
def test_another_model_is_packed_anew(directory: Path, cache: Path, change: Callable[[Path], None]) -> None:
    before = set(cache.glob("[!.]*"))
    change(directory)
    loaded(directory)
    assert len(set(cache.glob("[!.]*")) - before) == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize(
    ("file", "damage"), [(name, how) for name in (packed.WEIGHTS, packed.INDEX) for how in (cut, flipped)]
)
def test_damaged_ones_are_packed_anew(
    directory: Path, cache: Path, file: str, damage: Callable[[Path], None]
) -> None:
    (kept,) = cache.glob("[!.]*")
    expected = logits(loaded(directory))
    damage(kept / file)
    assert torch.equal(logits(loaded(directory)), expected)
    assert [path.name for path in cache.glob("[!.]*")] == [kept.name]


def test_what_has_not_been_used_for_longest_is_dropped(
    directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "MOST_BYTES", 1)
    loaded(directory, AS_PUBLISHED)
    assert [path.name.split("-")[1] for path in cache.glob("[!.]*")] == ["published"]


def test_float32_weights_are_not_kept(tmp_path: Path, cache: Path) -> None:
    loaded(saved(tmp_path / "model", "granite-tied"), FLOAT32)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    decoder = loaded(saved(tmp_path / "model", "granite-tied"))
    assert decoder.weights == "int8" and "packed again at each start" in caplog.text


def test_a_model_that_cannot_be_packed_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    def broken(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"][0] = torch.nan

    directory = saved(tmp_path / "model", "granite-tied")
    rewritten_tensors(directory, broken)
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds NaN"):
        loaded(directory)
    assert not list(cache.glob("[!.]*")) and not list(cache.glob("*.partial"))
