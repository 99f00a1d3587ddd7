"""CAKE's scores and budgets are the published ones, step by step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from curkv.cache import allocation
from curkv.cache.policies.cake import Cake
from curkv.cache.view import CacheView
from tests.cache.test_defensivekv import BUDGET, GROUP, HEADS, LAYERS, WINDOW, N, observed_view

PREFIX = N - WINDOW


def rows(view: CacheView) -> list[torch.Tensor]:
    """By layer, what each query of the window pays the tokens before it: float64 [Hq, w, n - w]."""
    layers = []
    for layer, queries in view.observations.queries.items():
        keys = view.keys(layer).double().repeat_interleave(GROUP, 0)
        logits = torch.einsum("wgd,gnd->gwn", queries.double(), keys) * view.scale
        for q in range(WINDOW):
            logits[:, q, PREFIX + q + 1 :] = -torch.inf
        layers.append(logits.softmax(-1)[..., :PREFIX])
    return layers


def test_scores_are_mean_and_variance_of_attention() -> None:
    view, _, _ = observed_view()
    scores = Cake(observation=WINDOW).score(view, SimpleNamespace())  # type: ignore[arg-type]
    assert (scores[..., -WINDOW:] == torch.inf).all()
    for layer, paid in enumerate(rows(view)):
        plain = (paid.mean(1) + 200 * paid.var(1)).view(HEADS, GROUP, PREFIX).mean(1)
        for token in range(PREFIX):
            expected = plain[:, max(0, token - 2) : token + 3].mean(1).float()
            torch.testing.assert_close(scores[layer, :, token], expected, rtol=1e-4, atol=1e-6)


def test_layers_share_by_entropy_and_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "OBSERVED", WINDOW)
    view, _, _ = observed_view()
    # All queries of a layer are one, so that what it looks at does not change.
    view.observations.queries[0] = view.observations.queries[0][-1:].expand(WINDOW, -1, -1)
    observed = rows(view)
    for tau1, tau2 in ((1.0, 1.0), (2.0, 0.5)):
        preferences = torch.stack(
            [torch.special.entr(x).sum() ** (1 / tau1) * x.var(1).sum() ** (1 / tau2) for x in observed]
        )
        protected = torch.zeros(LAYERS, HEADS, N, dtype=torch.bool)
        protected[..., -WINDOW:] = True
        kind = allocation.Cake(tau1=tau1, tau2=tau2)
        keep, floor = kind.seeing(view).budgets(torch.zeros(LAYERS, HEADS, N), view, protected)
        room = LAYERS * HEADS * (BUDGET - WINDOW)
        expected = HEADS * WINDOW + room * preferences / preferences.sum()
        assert floor is None and keep.sum() == LAYERS * HEADS * BUDGET
        assert (keep.sum(1) - expected.clamp_max(HEADS * N)).abs().max() <= 1
