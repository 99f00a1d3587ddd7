"""Long chunks that begin a text attend to their own keys and values, and get what pages would give them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curkv.cache.attention import PagedAttention
from curkv.cache.batch import Batch
from curkv.cache.layout import LayerSpec
from tests.cache.util import attention_over, make_cache
from tests.kernels.util import rope_tables

LAYERS = (LayerSpec(2), LayerSpec(2, window=12), LayerSpec(2, window=8))
STEPS: tuple[tuple[list[int], list[int], list[int]], ...] = (
    ([0, 1], [6, 3], [0, 0]),
    ([1, 0, 2, 3], [1, 5, 2, 9], [3, 6, 0, 0]),  # a decode, a chunk behind another, short and long beginnings
    ([3], [8], [9]),
    ([2], [5], [0]),
)
"""Sequences, tokens of each and where they start, step by step."""


def attend(dense: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[int]]:
    """Outputs of every layer and step, and the tokens of chunks that read no page."""
    cache, draw, chunks = make_cache(200, layers=LAYERS), torch.Generator().manual_seed(1), []
    attention = attention_over(cache, rope_tables(4, 64))
    attention.dense_prompts = dense
    densely = PagedAttention._attend_densely

    def noted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chunks.append(len(q))
        return densely(attention, q, k, v)

    monkeypatch.setattr(attention, "_attend_densely", noted)
    slots, outs = [cache.add_sequence() for _ in range(4)], []
    for chosen, counts, starts in STEPS:
        places = [slots[index] for index in chosen]
        if chosen == [2]:  # its text begins anew
            cache.free(slots[2])
            assert cache.add_sequence() == slots[2]
        cache.extend(places, counts)
        batch = Batch.build(places, [[0] * count for count in counts], starts)
        for layer in range(len(LAYERS)):
            q, k, v = (torch.randn(sum(counts), heads, 4, generator=draw) for heads in (4, 2, 2))
            outs.append(attention.attend(layer, q, k, v, batch))
    return outs, chunks


def test_they_get_what_pages_would_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curkv.cache.batch.LONG_CHUNK", 4)
    (paged, none), (dense, chunks) = (attend(dense, monkeypatch) for dense in (False, True))
    assert not none
    for ours, expected in zip(dense, paged, strict=True):
        torch.testing.assert_close(ours, expected)
    # 9 tokens see past a window of 8, there they read pages
    assert chunks == [6, 6, 6, 9, 9, 5, 5, 5]


def test_short_ones_read_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attend(True, monkeypatch)[1] == []
