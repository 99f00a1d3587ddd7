"""R-KV's scores are the published ones, step by step, however many keys are compared at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from curkv.cache.policies import rkv
from curkv.cache.policies.rkv import RKV
from tests.cache.test_defensivekv import GROUP, HEADS, LAYERS, WINDOW, N, observed_view


@pytest.mark.parametrize("rows", [7, 512])
def test_scores_are_those_of_the_published_steps(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rkv, "_ROWS", rows)
    view, queries, _ = observed_view()
    scores = RKV(observation=WINDOW).score(view, SimpleNamespace())  # type: ignore[arg-type]
    assert (scores[..., -WINDOW:] == torch.inf).all()
    for layer in range(LAYERS):
        for head in range(HEADS):
            keys, prefix = view.keys(layer)[head], N - WINDOW
            members = queries[layer, :, head * GROUP : (head + 1) * GROUP]
            logits = (members @ keys[:prefix].T * view.scale).amax(1)
            paid = logits.softmax(-1).mean(0)
            padded = torch.cat([paid.new_zeros(3), paid, paid.new_zeros(3)])
            copies = torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1)
            for own in range(N):
                copies[own, own] = 0
                alike = [other for other in range(N) if copies[own, other] > 0.5]
                copies[own, alike[-1] if alike else 0] = 0
            redundancy = copies.mean(0).softmax(0)[:prefix]
            expected = 0.1 * padded.unfold(0, 7, 1).amax(-1) - 0.9 * redundancy
            torch.testing.assert_close(scores[layer, head, :prefix], expected)
