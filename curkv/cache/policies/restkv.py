"""ReST-KV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from curkv.cache.declarations import SHARE, option
from curkv.cache.policies.base import PooledPolicy
from curkv.cache.policies.snapkv import ObservingPolicy
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels

_CERTAIN = 1e-6
"""Least share that is left to the others of a token that has all attention."""


@dataclass(frozen=True, kw_only=True)
class RestKV(ObservingPolicy, PooledPolicy):
    """ReST-KV (https://arxiv.org/abs/2605.08840, as released): what the layer's output loses with a token.

    With a_j a query head's attention, an exponential moving average over the last `observation` = 32 queries
    in which a query weighs `smoothing` = 0.3, and o = sum_j a_j v_j, a token's score is
    a_j / (1 - a_j) ||(o - v_j) W_o||: what removing it, and giving its attention to the others, moves. Mean
    over the group, and over 5 neighbours. The published pooling widens and moves where the tokens with the
    most attention lie 2,000 positions apart in the two halves of the window; that is left out, since it has
    to sort every query's attention.
    """

    name: str = "restkv"
    description: str = "ReST-KV: how far the output of the last 32 tokens moves without a token"
    pool: int = 5
    pool_kind: Literal["max", "mean"] = "mean"
    smoothing: float = option(0.3, SHARE, "Weight of a query beside all before it in ReST-KV's average.")
    factor = True

    def score_tokens(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by what their removal changes."""
        if view.output_gram is None:
            raise ValueError("the attention was given no output projection; see `PagedAttention`")
        before = view.stored & ~view.newest(self.observing)
        layers = []
        for layer, paid in enumerate(view.paid(self.observation)):
            attention = (self._weights(paid) @ paid.flatten(2)).view(len(paid), -1, view.width)
            attention *= before[layer][:, None]
            odds = attention / (1 - attention).clamp_min_(_CERTAIN)
            layers.append(odds.mul_(self._distances(view, layer, attention)).mean(1))
        return torch.stack(layers)

    def _weights(self, paid: Tensor) -> Tensor:
        """What the queries of [H, w, group, n] weigh in the average, the oldest first; they sum to 1."""
        age = torch.arange(paid.shape[1] - 1, -1, -1, device=paid.device)
        weights = (1 - self.smoothing) ** age
        weights[1:] *= self.smoothing
        return weights

    @staticmethod
    def _distances(view: CacheView, layer: int, attention: Tensor) -> Tensor:
        """||(o - v) W_o|| of each query head [H, group, n], from its attention."""
        assert view.output_gram is not None
        values, grams = view.values(layer), view.output_gram(layer)
        apart = (attention @ values)[:, :, None] - values[:, None]
        moved = apart @ grams.view(*attention.shape[:2], *grams.shape[1:])
        return moved.mul_(apart).sum(-1).clamp_min_(0.0).sqrt_()
