"""LAVa's scores and budgets are the published ones, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from curkv.cache.allocation import Entropy
from curkv.cache.policies.lava import Lava
from curkv.kernels.dispatch import get_kernels
from tests.cache.test_defensivekv import BUDGET, GROUP, HEADS, LAYERS, WINDOW, N, observed_view

NOTHING = torch.zeros(LAYERS, HEADS, N, dtype=torch.bool)


def test_scores_are_those_of_the_published_steps() -> None:
    view, queries, _ = observed_view()
    scores = Lava(observation=WINDOW).score(view, get_kernels("reference"))
    for layer in range(LAYERS):
        keys, values = view.keys(layer), view.values(layer)
        for head in range(HEADS):
            members = []
            for query in range(head * GROUP, (head + 1) * GROUP):
                logits = queries[layer, :, query] @ keys[head].T * view.scale
                logits += torch.full_like(logits, -torch.inf).triu(N - WINDOW + 1)
                members.append(logits.softmax(-1).mean(0)[: N - WINDOW] * values[head].abs().sum(-1).max())
            most = torch.stack(members).amax(0)
            padded = torch.cat([most[:3].new_zeros(3), most, most[:3].new_zeros(3)])
            expected = padded.unfold(0, 7, 1).amax(-1)
            torch.testing.assert_close(scores[layer, head, :-WINDOW], expected)


def test_layers_share_by_the_entropy_of_their_scores() -> None:
    view, _, _ = observed_view()
    scores = torch.rand(LAYERS, HEADS, N, generator=torch.Generator().manual_seed(2))
    scores[0] = scores[0] ** 40  # a few tokens have nearly all of it
    keep, floor = Entropy().budgets(scores, view, NOTHING)
    shares = (scores - scores.amin((1, 2), keepdim=True)).flatten(1)
    shares /= shares.sum(1, keepdim=True)
    entropy = -torch.xlogy(shares, shares).sum(1)
    expected = LAYERS * BUDGET * entropy / entropy.sum()
    assert keep.sum() == LAYERS * HEADS * BUDGET and floor is not None
    assert (keep - expected[:, None]).abs().max() <= 1
    assert keep[0, 0] < keep[1, 0] and torch.equal(floor, keep // 2)


@pytest.mark.parametrize("budget", [N - 1, N])
def test_no_layer_gets_more_than_there_is(budget: int) -> None:
    view, _, _ = observed_view()
    scores = torch.rand(LAYERS, HEADS, N, generator=torch.Generator().manual_seed(2))
    scores[0] = scores[0] ** 40
    keep, _ = Entropy().budgets(scores, replace(view, budget=budget), NOTHING)
    assert keep.sum() == LAYERS * HEADS * budget and keep.max() == N
