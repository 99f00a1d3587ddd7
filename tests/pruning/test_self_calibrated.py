from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from curkv.models.pruning.forward import DenseCache, Model
from curkv.models.pruning.methods.self_calibrated import DOWN, SelfCalibrated, Text
from curkv.models.pruning.self_text import write_text
from curkv.models.pruning.source import Source
from tests.pruning.conftest import FAMILIES, ignore_progress, save_model

TEXT = Text(sequences=8, held_out=4, tokens=24)


def load(source: Source) -> Model:
    return Model.load(source.checkpoint)


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
    text = write_text(model, 16, 20, seed=3)
    assert torch.equal(text, write_text(model, 16, 20, seed=3))
    assert not torch.equal(text, write_text(model, 16, 20, seed=4))
    assert (text[:, 0] == 1).all()
    diverse = write_text(model, 64, 3, seed=0, diverse=True)
    assert len(diverse[:, 1].unique()) > 32
    cold = write_text(model, 4, 20, seed=0, temperature=1e-4)
    assert torch.equal(cold[:, 1:], model.logits(cold).argmax(-1)[:, :-1])


def mute(model: Any) -> None:
    """Makes every fourth row of each MLP useless: its activation, or what reads it, is zero."""
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[::8] = 0
        layer.mlp.down_proj.weight[:, 4::8] = 0


def test_useless_rows_go_and_nothing_else_changes(tmp_path: Path) -> None:
    source = Source(save_model(tmp_path, change=mute))
    useful = [row for row in range(64) if row % 4]
    for compensate in (False, True):
        method = SelfCalibrated(compensate=compensate, text=TEXT)
        method.prepare(source, 48, ignore_progress)
        for layer in range(3):
            weights = source.checkpoint.layer(layer)
            cut = method.cut(layer, weights, 48)
            assert cut.rows.tolist() == useful
            if compensate:
                torch.testing.assert_close(
                    cut.replaced[DOWN], weights.down[:, cut.rows], rtol=1e-3, atol=1e-3
                )


def test_compensation_lowers_the_error_of_the_output(base: Source) -> None:
    ids = torch.randint(97, (8, 32), generator=torch.Generator().manual_seed(5))
    dense = load(base).hidden(ids)
    errors = {}
    for compensate in (False, True):
        method, model = SelfCalibrated(compensate=compensate, text=Text(64, 16, 32)), load(base)
        method.prepare(base, 48, ignore_progress)
        for layer, weights in enumerate(list(model.layers)):
            cut = method.cut(layer, weights, 48)
            model.layers[layer] = cut.apply(weights)
        errors[compensate] = (model.hidden(ids) - dense).square().mean().item()
    assert errors[True] < errors[False]
