"""Merging against a token-by-token reading of its definition."""

from __future__ import annotations

import pytest
import torch

from curkv.cache.eviction import Eviction, evict, select
from curkv.cache.integrity import check_integrity
from curkv.cache.merging import merged
from curkv.cache.parsing import parse_options
from curkv.cache.plan import resolve
from curkv.kernels.dispatch import get_kernels
from tests.cache.util import head_tokens, kept, make_cache, step, view_of


def one_by_one(
    keys: torch.Tensor, values: torch.Tensor, kept_tokens: list[int], threshold: float
) -> torch.Tensor:
    """Values of the kept tokens of one head after each evicted one's went to its nearest."""
    sums = [[values[token].clone(), 1.0] for token in kept_tokens]
    for token in sorted(set(range(len(keys))) - set(kept_tokens)):
        cosines = torch.cosine_similarity(keys[token], keys[kept_tokens])
        best = int(cosines.argmax())
        if cosines[best] >= max(0, threshold):
            length, theirs = values[token].norm(), values[kept_tokens[best]].norm()
            weight = float(cosines[best] * length / (length + theirs))
            sums[best][0] += weight * values[token]
            sums[best][1] += weight
    return torch.stack([total / weight for total, weight in sums])


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 2.0])
def test_evicted_values_are_averaged_into_that_of_the_nearest_kept_key(threshold: float) -> None:
    cache = make_cache()
    slot = cache.add_sequence()
    step(cache, {slot: 13}, {slot: 0}, torch.Generator().manual_seed(3))
    choice = [[0, 3, 4, 9, 12], [1, 2, 12]]
    indices, counts = kept([choice, choice])
    for layer in range(2):
        before = [head_tokens(cache, slot, layer, head) for head in range(2)]
        found = merged(view_of(cache, slot), layer, indices[layer], counts[layer], threshold)
        for head, tokens in enumerate(choice):
            expected = one_by_one(before[head]["k"], before[head]["v"], tokens, threshold)
            torch.testing.assert_close(found[head, : len(tokens)], expected)


def test_merged_values_are_what_the_cache_then_holds_and_norms_follow() -> None:
    cache = make_cache(num_pages=128, max_tokens=64)
    slot = cache.add_sequence()
    step(cache, {slot: 40}, {slot: 0}, torch.Generator().manual_seed(4))
    raw = {"policy": "knorm", "budget": 12, "recent_tokens": 2, "merge": "nearest", "merge_threshold": 0.1}
    plan = resolve(parse_options(raw), list(range(40)), cache.layout)
    view = view_of(cache, slot)
    indices, counts = select(view, plan, get_kernels("reference"))
    wanted = [merged(view, layer, indices[layer, :, :12], counts[layer], 0.1) for layer in range(2)]
    before = [[head_tokens(cache, slot, layer, head) for head in range(2)] for layer in range(2)]
    evict(cache, [Eviction(slot, view, plan, indices, counts)])
    check_integrity(cache)
    for layer in range(2):
        for head in range(2):
            held = head_tokens(cache, slot, layer, head)
            torch.testing.assert_close(held["v"], wanted[layer][head])
            torch.testing.assert_close(held["v_sq"], wanted[layer][head].square().sum(-1))
            own = indices[layer, head, :12].long()
            torch.testing.assert_close(held["k"], before[layer][head]["k"][own])


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_values_are_those_of_the_press(threshold: float) -> None:
    """Which folds them into the places of what is kept."""
    kvpress = pytest.importorskip("kvpress")
    cache = make_cache()
    slot = cache.add_sequence()
    step(cache, {slot: 20}, {slot: 0}, torch.Generator().manual_seed(5))
    tokens = torch.tensor([[0, 3, 4, 9, 12, 19], [1, 2, 7, 11, 12, 18]])
    press = kvpress.MergingPress(kvpress.KnormPress(0.7), similarity_threshold=threshold)
    for layer in range(2):
        heads = [head_tokens(cache, slot, layer, head) for head in range(2)]
        keys, values = (torch.stack([head[name] for head in heads])[None] for name in ("k", "v"))
        theirs = press.merge(keys, values, tokens[None])[1][0]
        ours = merged(view_of(cache, slot), layer, tokens.int(), torch.tensor([6, 6]), threshold)
        torch.testing.assert_close(
            ours, theirs.gather(1, tokens[..., None].expand(-1, -1, 4)), rtol=1e-4, atol=1e-5
        )
