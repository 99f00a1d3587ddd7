import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from curkv.models.decoder import Decoder
from curkv.models.loading import load_config
from curkv.models.loading.checkpoint import Checkpoint
from curkv.models.pruning import export
from curkv.models.pruning.methods.base import LayerCut
from curkv.models.pruning.methods.random import Random
from curkv.models.pruning.plan import PruningError
from curkv.models.pruning.prune import PruneOptions, PruneResult, prune
from curkv.models.pruning.source import Source
from tests.models.dense import REFERENCE, DenseAttention, DenseBatch
from tests.pruning.conftest import FAMILIES, ignore_progress, save_model

HALF = PruneOptions("random", 0.5, align=1)
PROMPT = torch.randint(97, (1, 20), generator=torch.Generator().manual_seed(0))


def run(source: Source, output: Path, options: PruneOptions = HALF, force: bool = False) -> PruneResult:
    return prune(source, "base", output, options, ignore_progress, force)


def sliced(source: Source, kept_rows: list[list[int]]) -> Any:
    """The base in transformers with the rows cut out of its modules by hand."""
    model = AutoModelForCausalLM.from_pretrained(source.directory)
    for layer, rows in zip(model.model.layers, kept_rows, strict=True):
        mlp = layer.mlp
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight.data = projection.weight.data[rows]
            if projection.bias is not None:
                projection.bias.data = projection.bias.data[rows]
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, rows]
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_result_with_equal_logits(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    source = Source(save_model(tmp_path / "base", family, dtype))
    run(source, tmp_path / "pruned")
    provenance = json.loads((tmp_path / "pruned/pruning.json").read_text())
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.intermediate_size == 32 and loaded.dtype == dtype
    assert torch.equal(loaded(PROMPT).logits, sliced(source, provenance["kept_rows"])(PROMPT).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_forward_generates_the_same_tokens(tmp_path: Path, family: str) -> None:
    run(Source(save_model(tmp_path / "base", family)), tmp_path / "pruned")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    expected = reference.generate(PROMPT, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0].tolist()

    config = load_config(tmp_path / "pruned")
    model = Decoder(config, Checkpoint(tmp_path / "pruned", config), REFERENCE)
    ids = PROMPT[0].tolist()
    while len(ids) < len(expected):
        logits = model.forward(DenseBatch.of([ids], [0]), DenseAttention(config))
        logits[:, 2] = -torch.inf  # as min_new_tokens does
        ids.append(int(logits[-1].argmax()))
    assert ids == expected


def test_several_files_become_one_and_the_hash_is_over_all(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    source = Source(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    result = run(source, tmp_path / "pruned")
    assert [path.name for path in (tmp_path / "pruned").glob("*.safetensors*")] == ["model.safetensors"]
    assert result.bytes < result.base_bytes == source.bytes
    run(Source(tmp_path / "base"), tmp_path / "other")
    assert torch.equal(
        *(
            Source(tmp_path / name).tensor("model.layers.2.mlp.down_proj.weight")
            for name in ("pruned", "other")
        )
    )


def test_provenance_and_what_is_carried_along(tmp_path: Path) -> None:
    source = Source(save_model(tmp_path / "base"))
    (tmp_path / "base/tokenizer.json").write_text("{}")
    (tmp_path / "base/pytorch_model.bin").write_text("not this")
    run(source, tmp_path / "pruned", PruneOptions("random", 0.25, seed=5, align=16))
    files = {path.name for path in (tmp_path / "pruned").iterdir()}
    assert files == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "pruning.json",
    }
    provenance = json.loads((tmp_path / "pruned/pruning.json").read_text())
    assert provenance["method"] == "random" and provenance["seed"] == 5 and provenance["removed"] == 0.25
    assert provenance["base"]["sha256"] == source.sha256()
    rows = provenance["kept_rows"]
    assert all(layer == sorted(set(layer)) and len(layer) == 48 for layer in rows)
    assert rows[0] != rows[1]


def test_pruning_twice_is_recorded(tmp_path: Path) -> None:
    run(Source(save_model(tmp_path / "base")), tmp_path / "once")
    once = Source(tmp_path / "once")
    run(once, tmp_path / "twice")
    provenance = Source(tmp_path / "twice").provenance
    assert provenance is not None and provenance["base"]["pruning"]["method"] == "random"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "twice").config.intermediate_size == 16


def test_an_existing_directory_is_not_replaced_without_force(base: Source, tmp_path: Path) -> None:
    run(base, tmp_path / "pruned")
    before = (tmp_path / "pruned/pruning.json").read_text()
    with pytest.raises(PruningError, match="--force"):
        run(base, tmp_path / "pruned", PruneOptions("random", 0.5, seed=9, align=1))
    assert (tmp_path / "pruned/pruning.json").read_text() == before
    run(base, tmp_path / "pruned", PruneOptions("random", 0.5, seed=9, align=1), force=True)
    assert json.loads((tmp_path / "pruned/pruning.json").read_text())["seed"] == 9
    with pytest.raises(PruningError, match="is not replaced"):
        run(base, base.directory, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "pruned"]


def test_a_place_that_cannot_be_written_is_told(base: Source, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PruningError, match="file/pruned cannot be written"):
        run(base, tmp_path / "file/pruned")


def test_an_interrupted_run_leaves_nothing(
    base: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Random, layer: int, *_: Any) -> LayerCut:
        if layer == 1:
            raise KeyboardInterrupt
        return LayerCut(torch.arange(32))

    monkeypatch.setattr(Random, "cut", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "pruned")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_full_disk_is_told_and_leaves_nothing(
    base: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_safetensors", full)
        with pytest.raises(PruningError, match="full"):
            run(base, tmp_path / "pruned")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(PruningError, match="0 MB left"):
        run(base, tmp_path / "pruned")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
