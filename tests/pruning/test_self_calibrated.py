from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from curkv.models.dense import DenseCache
from curkv.models.pruning import self_text
from curkv.models.pruning.forward import Model
from curkv.models.pruning.methods.self_calibrated import DOWN, SelfCalibrated
from curkv.models.pruning.plan import PruningError
from curkv.models.pruning.self_text import TEXT_FILE, Writing, load_text, texts_at_once, write_text
from curkv.models.pruning.source import Source
from tests.pruning.conftest import FAMILIES, ignore_progress, save_model

WRITING = Writing(sequences=12, tokens=24)


def load(source: Source) -> Model:
    return Model.mapped(source.checkpoint)


def test_forward_equals_transformers(tmp_path: Path) -> None:
    ids = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(0))
    for family in FAMILIES:
        source = Source(save_model(tmp_path / family, family))
        expected = AutoModelForCausalLM.from_pretrained(source.directory)(ids).logits
        torch.testing.assert_close(load(source).logits(ids), expected, rtol=1e-4, atol=1e-5)


def test_steps_with_a_cache_equal_one_pass(base: Source) -> None:
    model = load(base)
    ids = torch.randint(97, (3, 12), generator=torch.Generator().manual_seed(0))
    cache = DenseCache(model.config, 3, 12, torch.float32)
    parts = [model.logits(part, cache) for part in (ids[:, :5], *ids[:, 5:].split(1, dim=1))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.logits(ids), rtol=1e-4, atol=1e-5)


def test_text_is_seeded_begins_with_the_start_token_and_follows_the_model(base: Source) -> None:
    model = load(base)
    writing = Writing(64, 3)
    text = write_text(model, writing, seed=3)
    assert torch.equal(text, write_text(model, writing, seed=3))
    assert not torch.equal(text, write_text(model, writing, seed=4))
    assert (text[:, 0] == 1).all() and len(text[:, 1].unique()) > 32
    cold = write_text(model, Writing(4, 20, diverse=False, temperature=1e-4), seed=0)
    assert torch.equal(cold[:, 1:], model.logits(cold).argmax(-1)[:, :-1])


def test_texts_whose_cache_would_be_too_large_are_written_one_group_after_another(
    base: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert texts_at_once(base.config, tokens=24, cache_bytes=1) == 1
    per_text = 2 * 4 * 3 * 2 * 8 * 24  # keys and values, float32, layers, KV heads, head_dim, tokens
    assert texts_at_once(base.config, tokens=24, cache_bytes=5 * per_text) == 5
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(self_text, "CACHE_BYTES", 5 * per_text)
    text = write_text(load(base), Writing(12, 24), 3, lambda done, total: steps.append((done, total)))
    assert steps[-1] == (3 * 24, 3 * 24) and steps == sorted(steps)
    assert all(len(part.unique(dim=0)) == len(part) for part in text.split(5))


def test_tokens_are_drawn_as_often_as_they_are_likely(base: Source) -> None:
    model = load(base)
    text = write_text(model, Writing(4000, 2, diverse=False), seed=0)
    expected = model.logits(text[:1, :1])[0, 0].softmax(-1)
    drawn = text[:, 1].bincount(minlength=97) / 4000
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0.03)


def test_text_is_kept_and_reused(base: Source, tmp_path: Path) -> None:
    writer = SelfCalibrated(seed=1, writing=WRITING)
    writer.prepare(base, 48, ignore_progress)
    writer.save(tmp_path)
    reader = SelfCalibrated(text=tmp_path / TEXT_FILE)
    reader.prepare(base, 32, ignore_progress)
    weights = base.checkpoint.layer(0)
    assert torch.equal(reader.cut(0, weights, 32).rows, writer.cut(0, weights, 32).rows)
    assert reader.provenance()["text"] == str(tmp_path / TEXT_FILE)
    (tmp_path / "no-text.json").write_text('{"token_ids": [[1], [99]]}')
    for name in ("missing.json", "no-text.json"):
        with pytest.raises(PruningError, match="no text of this model"):
            load_text(tmp_path / name, 97)


def mute(model: Any) -> None:
    """Makes every fourth row of each MLP useless: its activation, or what reads it, is zero."""
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[::8] = 0
        layer.mlp.down_proj.weight[:, 4::8] = 0


def test_useless_rows_go_and_nothing_else_changes(tmp_path: Path) -> None:
    source = Source(save_model(tmp_path, change=mute))
    useful = [row for row in range(64) if row % 4]
    for compensate in (False, True):
        method = SelfCalibrated(compensate=compensate, writing=WRITING)
        method.prepare(source, 48, ignore_progress)
        for layer in range(3):
            weights = source.checkpoint.layer(layer)
            cut = method.cut(layer, weights, 48)
            assert cut.rows.tolist() == useful
            if compensate:
                torch.testing.assert_close(
                    cut.replaced[DOWN], weights.mlp.down[:, cut.rows], rtol=1e-3, atol=1e-3
                )


def test_compensation_lowers_the_error_of_the_output(base: Source) -> None:
    ids = torch.randint(97, (8, 32), generator=torch.Generator().manual_seed(5))
    dense = load(base).hidden(ids)
    errors = {}
    for compensate in (False, True):
        method, model = SelfCalibrated(compensate=compensate, writing=Writing(80, 32)), load(base)
        method.prepare(base, 48, ignore_progress)
        model.layers = [
            method.cut(layer, weights, 48).apply(weights) for layer, weights in enumerate(model.layers)
        ]
        errors[compensate] = (model.hidden(ids) - dense).square().mean().item()
    assert errors[True] < errors[False]
