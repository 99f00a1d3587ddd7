"""CriticalKV."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curkv.cache.options import EvictionOptions
from curkv.cache.policies.base import CacheView, best_of_heads
from curkv.cache.policies.snapkv import SnapKV

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels

_EPSILON = 1e-4
"""Added to the attention before it is weighted, so that what nobody looks at is told apart by its value."""


class CriticalKV(SnapKV):
    """CriticalKV (https://arxiv.org/abs/2502.03805, algorithm 1) over SnapKV: attention, then what it moves.

    The first stage keeps the `first_stage` = half of a head's budget with the most attention. The second
    ranks the others by (attention + 1e-4) times ||v W_o||_1, the value's part of the layer's output, mean
    over the group. With adaptive allocation the heads' budgets come from attention alone (section 4.3).
    """

    name = "criticalkv"
    description = "CriticalKV: SnapKV's attention, then attention times the norm of the projected value"
    reads = SnapKV.reads | {"first_stage"}
    factor = False

    def scores(self, view: CacheView, options: EvictionOptions, kernels: Kernels) -> Tensor:
        """SnapKV's pooled scores in two stages; kept tokens of the window stay +inf."""
        scores = super().scores(view, options, kernels)
        counts = torch.full_like(view.lengths, view.budget)
        if options.allocation == "adaptive":
            floor = torch.full_like(counts, max(int(options.alpha * view.budget), options.alpha > 0))
            counts = kernels.select(scores, view.lengths, counts, floor)[1]
        first = best_of_heads(scores, (counts * options.first_stage).int(), view, kernels)
        weighted = (scores + _EPSILON) * projected_norms(view)
        weighted.masked_fill_(first, torch.inf)
        if options.allocation != "adaptive":
            return weighted
        # Heads keep their own budgets: the best of each head stand above everything else.
        chosen = best_of_heads(weighted, counts, view, kernels)
        return weighted + chosen * weighted.masked_fill(weighted.isinf(), 0.0).max()


def projected_norms(view: CacheView) -> Tensor:
    """||v W_o||_1 of every stored token, mean over the query heads of its group: float32 [L, H, n]."""
    if view.output_projection is None:
        raise ValueError("the attention was given no output projection; see `PagedAttention`")
    layers = []
    for layer in range(view.num_layers):
        values, weights = view.values(layer), view.output_projection(layer)
        group = len(weights) // len(values)
        norms = torch.zeros(values.shape[:2], device=values.device)
        for member in range(group):
            norms += (values @ weights[member::group]).abs_().sum(-1)
        layers.append(norms / group)
    return torch.stack(layers)
