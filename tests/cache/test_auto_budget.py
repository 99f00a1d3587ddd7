"""The automatic budget against attention computed the long way."""

from __future__ import annotations

import pytest
import torch

from curkv.cache.auto_budget import STEPS
from curkv.cache.eviction import combined_scores, plan_kept, protected
from curkv.cache.kv_cache import KVCache
from curkv.cache.options import parse_options, policy_needs, resolve
from curkv.kernels.dispatch import get_kernels
from tests.cache.util import make_cache, step

N = 150
KERNELS = get_kernels("reference")


def filled(raw: dict[str, object]) -> tuple[KVCache, int]:
    cache = make_cache(num_pages=400, max_tokens=256)
    slot = cache.add_sequence(policy_needs(parse_options(raw)))
    step(cache, {slot: N}, {slot: 0}, torch.Generator().manual_seed(5))
    return cache, slot


def layer_loss(view, layer: int, kept: list[torch.Tensor], window: int) -> float:
    """Relative error of a layer's attention output for the last queries, over all heads."""
    queries = view.queries(window).view(*view.lengths.shape, window, -1, view.pages.k.shape[-1])
    keys, values = (view.vectors(storage, layer) for storage in (view.pages.k, view.pages.v))
    error = whole = 0.0
    for head, indices in enumerate(kept):
        for i in range(window):
            seen = torch.arange(N) < N - window + 1 + i
            for query in queries[layer, head, i]:
                logits = (keys[head] @ query) * view.scale
                full = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ values[head]
                chosen = torch.zeros(N, dtype=torch.bool).index_fill(0, indices, True) & seen
                part = logits.masked_fill(~chosen, -torch.inf).softmax(-1) @ values[head]
                error += float((part - full).square().sum())
                whole += float(full.square().sum())
    return (error / whole) ** 0.5


@pytest.mark.parametrize("max_loss", [0.05, 0.3])
def test_a_layer_keeps_the_fewest_tokens_whose_loss_stays_below(max_loss: float) -> None:
    raw = {"policy": "snapkv", "budget": "auto", "max_loss": max_loss, "observation": 4, "recent_tokens": 4}
    cache, slot = filled(raw)
    plan = resolve(parse_options(raw), list(range(N)), cache.layout)
    view = cache.view(slot)
    indices, counts = plan_kept(view, plan, KERNELS)
    scores = combined_scores(view, plan, KERNELS).masked_fill_(protected(view, plan), torch.inf)
    step_size = -(-N // STEPS)
    assert len(set(counts.flatten().tolist())) > 1
    for layer in range(2):
        count = int(counts[layer, 0])
        held = [indices[layer, head, :count].long() for head in range(2)]
        assert layer_loss(view, layer, held, 4) <= max_loss + 1e-5
        fewer = [row.topk(count - step_size).indices for row in scores[layer]]
        assert layer_loss(view, layer, fewer, 4) > max_loss
