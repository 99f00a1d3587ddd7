"""DefensiveKV is the published method, step by step, and heads of all layers may compete."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from curkv.cache.allocation import Global
from curkv.cache.observations import Needs, Observations
from curkv.cache.policies.defensivekv import LAYER_DEFENSIVEKV, DefensiveKV
from curkv.cache.presets import PRESETS
from curkv.cache.view import CacheView
from curkv.kernels.select import cpu as select_cpu
from curkv.kernels.select import reference as select_reference
from tests.cache.test_policies import make_view

LAYERS, HEADS, GROUP, N, DIM, WINDOW, BUDGET = 2, 2, 3, 50, 8, 6, 20


def observed_view() -> tuple[CacheView, Tensor, Tensor]:
    """A view with queries, these [L, w, Hq, d], and W_o [L, Hq, d, hidden]."""
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(LAYERS, HEADS, N, DIM, generator=draw) for _ in range(2))
    queries = 3 * torch.randn(LAYERS, WINDOW, HEADS * GROUP, DIM, generator=draw)
    weights = torch.randn(LAYERS, HEADS * GROUP, DIM, 16, generator=draw)
    observations = Observations(Needs(queries=WINDOW))
    observations.queries = dict(enumerate(queries))
    view = replace(
        make_view(keys, values),
        observations=observations,
        output_projection=weights.__getitem__,
        output_gram=lambda layer: weights[layer] @ weights[layer].transpose(1, 2),
        budget=BUDGET,
    )
    return view, queries, weights


def published_risk(
    view: CacheView, queries: Tensor, weights: Tensor, layer: int, head: int, order: int
) -> list[float]:
    """Scores of the tokens before the window, by the steps of the paper's released code."""
    prefix = N - WINDOW
    keys, values = view.keys(layer), view.values(layer)
    rows, plain = [], []
    for q in range(WINDOW):
        for member in range(GROUP):
            query, seen = queries[layer, q, head * GROUP + member], prefix + q + 1
            paid = (keys[head, :seen] @ query * view.scale).softmax(0)[:prefix]
            padded = torch.cat([torch.zeros(2), paid, torch.zeros(2)])
            smooth = torch.stack([padded[i : i + 5].mean() for i in range(prefix)])
            rows.append(smooth * paid.sum() / smooth.sum())
            plain.append(paid)
    risk = torch.stack(rows).amax(0)
    risk = risk.maximum(risk.mean())
    moved = (values[:, None] @ weights[layer].view(HEADS, GROUP, DIM, -1))[:, :, :prefix]
    norms = moved.norm(order, -1).pow(order).mean(1).pow(1 / order)
    risk = risk * norms[head] / norms.sum(0)
    mean = torch.stack(plain).mean(0)
    covered, best = 0.0, float(risk.max())
    for rank, token in enumerate(mean.argsort(descending=True).tolist()):
        covered += float(mean[token] / mean.sum())
        if covered <= 0.9 and rank < BUDGET - WINDOW:
            risk[token] = best
    return risk.tolist()


@pytest.mark.parametrize(("preset", "order"), [("authors", 1), ("serving", 2)])
def test_scores_are_those_of_the_published_steps(preset: str, order: int) -> None:
    """As served with another norm of the projected values."""
    view, queries, weights = observed_view()
    policy = DefensiveKV(observation=WINDOW, preset=PRESETS[preset])
    scores = policy.score(view, SimpleNamespace())  # type: ignore[arg-type]
    assert (scores[..., -WINDOW:] == torch.inf).all()
    for layer in range(LAYERS):
        for head in range(HEADS):
            expected = torch.tensor(published_risk(view, queries, weights, layer, head, order))
            torch.testing.assert_close(scores[layer, head, :-WINDOW], expected, rtol=1e-4, atol=1e-7)


def test_heads_of_all_layers_compete_above_a_floor() -> None:
    view, _, _ = observed_view()
    scores = torch.rand(LAYERS, HEADS, N, generator=torch.Generator().manual_seed(1))
    scores[0] += 1
    for select in (select_cpu.select, select_reference.select):
        kernels, nothing = SimpleNamespace(select=select), torch.zeros_like(scores, dtype=torch.bool)
        indices, counts = Global(floor=0.25).select(scores, view, nothing, kernels)  # type: ignore[arg-type]
        assert counts.sum() == LAYERS * HEADS * BUDGET
        assert (counts[1] == BUDGET // 4).all() and (counts[0] > BUDGET).all()
        for head in range(HEADS):
            best = scores[0, head].topk(int(counts[0, head])).indices.sort().values
            assert indices[0, head, : counts[0, head]].tolist() == best.tolist()
    assert LAYER_DEFENSIVEKV.allocation.name == "global"
