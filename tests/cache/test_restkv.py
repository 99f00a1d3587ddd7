"""ReST-KV's scores are the released ones, step by step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from curkv.cache.policies.restkv import RestKV
from tests.cache.test_defensivekv import GROUP, HEADS, LAYERS, WINDOW, N, observed_view


def test_scores_are_those_of_the_released_steps() -> None:
    view, queries, weights = observed_view()
    scores = RestKV(observation=WINDOW).score(view, SimpleNamespace())  # type: ignore[arg-type]
    assert (scores[..., -WINDOW:] == torch.inf).all()
    prefix = N - WINDOW
    for layer in range(LAYERS):
        for head in range(HEADS):
            keys, values = (x(layer)[head].double() for x in (view.keys, view.values))
            members = []
            for member in range(head * GROUP, (head + 1) * GROUP):
                average = None
                for q in range(WINDOW):
                    query, seen = queries[layer, q, member].double(), prefix + q + 1
                    paid = (keys[:seen] @ query * view.scale).softmax(0)[:prefix]
                    average = paid if average is None else 0.3 * paid + 0.7 * average
                out = average @ values[:prefix]
                far = ((out - values[:prefix]) @ weights[layer, member].double()).norm(dim=1)
                members.append(average / (1 - average) * far)
            mean = torch.stack(members).mean(0)
            for token in range(prefix):
                expected = mean[max(0, token - 2) : token + 3].mean()
                assert scores[layer, head, token] == pytest.approx(float(expected), rel=1e-4)
