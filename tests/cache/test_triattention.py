"""TriAttention's one product with a turned mean query is the published sum of cosines over distances."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from curkv.cache.observations import STATISTICS_SKIP, Needs, Observations
from curkv.cache.policies.triattention import TriAttention
from tests.cache.test_policies import make_view

LAYERS, HEADS, GROUP, N, DIM = 2, 2, 3, 40, 8
FREQUENCIES = 1 / 100.0 ** (torch.arange(DIM // 2).double() / (DIM // 2))


def complex_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.complex(*x.double().chunk(2, -1))


def test_scores_are_the_mean_over_distances_whatever_the_chunks() -> None:
    draw = torch.Generator().manual_seed(0)
    unrotated, values = (torch.randn(LAYERS, HEADS, N, DIM, generator=draw) for _ in range(2))
    queries = torch.randn(LAYERS, N, HEADS * GROUP, DIM, generator=draw) + 0.7
    angles = torch.arange(N)[:, None] * FREQUENCIES
    turned = complex_pairs(unrotated) * torch.polar(torch.ones_like(angles), angles)
    observations = Observations(Needs(query_pairs=True))
    for layer in range(LAYERS):
        for start, end in ((0, 3), (3, 25), (25, N)):
            observations.see_unrotated(layer, queries[layer, start:end], start)
    view = replace(
        make_view(torch.cat([turned.real, turned.imag], -1).float(), values),
        observations=observations,
        rope=[(angles.cos().float(), angles.sin().float())] * LAYERS,
    )
    scores = TriAttention().score(view, SimpleNamespace())  # type: ignore[arg-type]
    for layer in range(LAYERS):
        seen = complex_pairs(queries[layer, STATISTICS_SKIP:])
        mean, length = seen.mean(0), seen.abs().mean(0)
        for head in range(HEADS):
            keys, members = complex_pairs(unrotated[layer, head]), []
            for member in range(head * GROUP, (head + 1) * GROUP):
                products = mean[member] * keys.conj()
                looks = (length[member] - mean[member].abs()) @ keys.abs().T
                for power in range(17):
                    apart = N - 1 + 2**power - torch.arange(N)
                    phases = FREQUENCIES * apart[:, None] + products.angle()
                    looks = looks + (products.abs() * phases.cos()).sum(-1) / 17
                members.append((looks - looks.mean()) / looks.std())
            expected = torch.stack(members).amax(0).float()
            torch.testing.assert_close(scores[layer, head], expected, rtol=1e-3, atol=1e-3)
