"""KVzip keeps what kvpress's press keeps of the same text, heads of all layers competing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import kvpress
import pytest
import torch
from transformers import DynamicCache

from curkv.bench import baseline
from curkv.cache.eviction import select
from curkv.cache.parsing import parse_options
from curkv.cache.plan import resolve
from curkv.engine.engine import Engine
from curkv.engine.repetition import Repetition
from curkv.models.chat_template import load_chat_template
from curkv.models.info import ModelInfo

from .conftest import Loaded


def their_kept(loaded: Loaded, text: list[int], ratio: float) -> torch.Tensor:
    """bool [L, H, n]; every token is repeated, none is set aside as the conversation's frame."""
    model, press = baseline.load(loaded.directory), kvpress.KVzipPress(compression_ratio=ratio)
    with torch.no_grad(), press(model):
        press.prefix_length = 0
        model.model(input_ids=torch.tensor([text]), past_key_values=DynamicCache())
    heads = model.config.num_key_value_heads
    kept = torch.ones(model.config.num_hidden_layers, heads, len(text), dtype=torch.bool)
    for mask, layer in zip(kept, model.model.layers, strict=True):
        mask[layer.self_attn.masked_key_indices[1:]] = False
    return kept


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_kept_sets_equal_those_of_kvpress(
    make_engine: Callable[..., Engine], loaded: Loaded, ratio: float
) -> None:
    engine, text = make_engine(), loaded.prompt(200)
    info = ModelInfo(loaded.tokenizer, chat_template=load_chat_template(loaded.directory))
    slot, repetition = engine.kv.add_sequence(), Repetition(text, info)
    engine.runner.run([slot], [text], [0])
    while not repetition.done:
        repetition.advance(engine.runner, slot)
    view = replace(engine.runner.attention.view(slot), repetition=repetition.scores)
    raw = {"policy": "kvzip", "budget": round(len(text) * (1 - ratio)), "preset": "kvpress", "floor": 0}
    plan = resolve(parse_options(raw), [*text, 0], engine.kv.layout)
    indices, counts = select(view, plan, engine.kv.kernels)
    ours = torch.zeros(*counts.shape, len(text) + 1, dtype=torch.bool)
    ours.scatter_(2, indices.long().masked_fill(indices < 0, len(text)), True)
    theirs = their_kept(loaded, text, ratio)
    assert theirs.sum() == counts.sum()
    assert (ours[..., :-1] & theirs).sum() / theirs.sum() >= 0.99
