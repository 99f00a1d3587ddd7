"""CriticalKV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from curkv.cache.declarations import SHARE, option
from curkv.cache.policies.base import Scored, best_of_heads
from curkv.cache.policies.snapkv import SnapKV
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels

_EPSILON = 1e-4
"""Added to the attention before it is weighted, so that what nobody looks at is told apart by its value."""

_TOKENS = 512
"""Tokens whose values are projected by all heads of their group at once."""


@dataclass(frozen=True, kw_only=True)
class CriticalKV(SnapKV):
    """CriticalKV (https://arxiv.org/abs/2502.03805, algorithm 1) over SnapKV: attention, then what it moves.

    The first stage keeps the `first_stage` = half of a head's budget with the most attention. The second
    ranks the others by (attention + 1e-4) times ||v W_o||, the value's part of the layer's output, mean over
    the group. Where heads compete, their budgets come from attention alone (section 4.3), so that the
    policy chooses each head's tokens itself.
    """

    name: str = "criticalkv"
    description: str = "CriticalKV: SnapKV's attention, then attention times the norm of the projected value"
    first_stage: float = option(0.5, SHARE, "Share of the budget that CriticalKV gives to attention alone.")
    factor = False

    def score(self, view: CacheView, kernels: Kernels) -> Tensor:
        """The second stage's scores; what the first one keeps, and the window, is +inf."""
        return self.judge(view, kernels).scores

    def judge(self, view: CacheView, kernels: Kernels) -> Scored:
        """SnapKV's pooled scores in two stages."""
        scores, competing = super().score(view, kernels), self.allocation.by_score
        counts = torch.full_like(view.lengths, view.budget)
        if competing:
            whole = view.whole(scores)
            nothing = torch.zeros_like(whole, dtype=torch.bool)
            counts = view.own(self.allocation.select(whole, view.of_all_heads, nothing, kernels)[1])
        first = best_of_heads(scores, (counts * self.first_stage).int(), view, kernels)
        weighted = (scores + _EPSILON) * projected_norms(view, self.preset.norm_order)
        weighted.masked_fill_(~view.stored, -torch.inf).masked_fill_(first, torch.inf)
        return Scored(weighted, best_of_heads(weighted, counts, view, kernels) if competing else None)


def projected_norms(view: CacheView, order: Literal[1, 2]) -> Tensor:
    """||v W_o|| of every stored token over the query heads of its group.

    Args:
        view: The sequence.
        order: Of the norm. 1 as published, the mean of the group, which has to make every projection. 2 is
            the root of the group's mean square, sqrt(v^T G v) with G the mean of W_o W_o^T: a form of the
            value itself.

    Returns:
        float32 [L, H, n].
    """
    if view.output_projection is None or view.output_gram is None:
        raise ValueError("the attention was given no output projection; see `PagedAttention`")
    layers = []
    for layer in range(view.num_layers):
        values = view.values(layer)
        if order == 2:
            gram = view.output_gram(layer)
            form = gram.view(len(values), -1, *gram.shape[1:]).mean(1)
            layers.append((values @ form).mul_(values).sum(-1).clamp_min_(0.0).sqrt_())
        else:
            weights = view.output_projection(layer).float()
            weights = weights.view(len(values), -1, *weights.shape[1:])
            side_by_side = weights.transpose(1, 2).flatten(2)
            moved = (part @ side_by_side for part in torch.split(values, _TOKENS, 1))
            layers.append(torch.cat([x.abs_().sum(-1) for x in moved], 1) / weights.shape[1])
    return torch.stack(layers)
