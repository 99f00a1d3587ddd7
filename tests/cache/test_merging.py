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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the kept tokens of one head after each evicted token went to its nearest."""
    goes = []
    for token in sorted(set(range(len(keys))) - set(kept_tokens)):
        cosines = torch.cosine_similarity(keys[token], keys[kept_tokens])
        best = int(cosines.argmax())
        if cosines[best] >= threshold:
            distance = (keys[token] - keys[kept_tokens[best]]).square().sum()
            goes.append((token, best, distance))
    width = sum(distance for *_, distance in goes) / max(1, len(goes))
    sums = [[keys[token].clone(), values[token].clone(), 1.0] for token in kept_tokens]
    for token, best, distance in goes:
        weight = float(torch.exp(-distance / (2 * width)))
        sums[best][0] += weight * keys[token]
        sums[best][1] += weight * values[token]
        sums[best][2] += weight
    return tuple(torch.stack([x[i] / x[2] for x in sums]) for i in (0, 1))


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 2.0])
def test_evicted_tokens_are_averaged_into_their_nearest_kept_key(threshold: float) -> None:
    cache = make_cache()
    slot = cache.add_sequence()
    step(cache, {slot: 13}, {slot: 0}, torch.Generator().manual_seed(3))
    choice = [[0, 3, 4, 9, 12], [1, 2, 12]]
    indices, counts = kept([choice, choice])
    for layer in range(2):
        before = [head_tokens(cache, slot, layer, head) for head in range(2)]
        k, v = merged(view_of(cache, slot), layer, indices[layer], counts[layer], threshold)
        for head, tokens in enumerate(choice):
            expected = one_by_one(before[head]["k"], before[head]["v"], tokens, threshold)
            torch.testing.assert_close(k[head, : len(tokens)], expected[0])
            torch.testing.assert_close(v[head, : len(tokens)], expected[1])


def test_merged_tokens_are_what_the_cache_then_holds_and_norms_follow() -> None:
    cache = make_cache(num_pages=128, max_tokens=64)
    slot = cache.add_sequence()
    step(cache, {slot: 40}, {slot: 0}, torch.Generator().manual_seed(4))
    raw = {"policy": "knorm", "budget": 12, "recent_tokens": 2, "merge": "nearest", "merge_threshold": 0.1}
    plan = resolve(parse_options(raw), list(range(40)), cache.layout)
    view = view_of(cache, slot)
    indices, counts = select(view, plan, get_kernels("reference"))
    wanted = [merged(view, layer, indices[layer, :, :12], counts[layer], 0.1) for layer in range(2)]
    evict(cache, [Eviction(slot, view, plan, indices, counts)])
    check_integrity(cache)
    for layer in range(2):
        for head in range(2):
            held = head_tokens(cache, slot, layer, head)
            for name, expected in zip(("k", "v"), wanted[layer], strict=True):
                torch.testing.assert_close(held[name], expected[head])
                torch.testing.assert_close(held[f"{name}_sq"], expected[head].square().sum(-1))
