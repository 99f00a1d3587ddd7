"""CAKE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from curkv.cache.allocation import ALLOCATIONS, Allocation
from curkv.cache.declarations import Number, option
from curkv.cache.policies.base import PooledPolicy
from curkv.cache.policies.snapkv import ObservingPolicy
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class Cake(ObservingPolicy, PooledPolicy):
    """CAKE (https://arxiv.org/abs/2503.12491, section 4): attention and how it changes, layers by preference.

    The score is the mean attention of the last `observation` = 32 queries plus `gamma` = 200 times its
    variance over them, mean over the group, mean over 5 neighbours. See the allocation of the same name for
    the budgets of layers.
    """

    name: str = "cake"
    description: str = "CAKE: attention of the last 32 tokens and its variance, layers' budgets by both"
    allocation: Allocation = ALLOCATIONS["cake"]
    pool: int = 5
    pool_kind: Literal["max", "mean"] = "mean"
    gamma: float = option(
        200.0, Number(0, 10_000), "Weight of the variance of CAKE's attention beside its mean."
    )
    factor = True

    def score_tokens(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by mean and variance of their attention."""
        layers = []
        for paid in view.paid(self.observation):
            count, mean = paid.shape[1], paid.mean(1)
            squares = paid.square_().sum(1).sub_(mean.square(), alpha=count).clamp_min_(0.0)
            layers.append(mean.add_(squares, alpha=self.gamma / max(1, count - 1)).mean(1))
        return torch.stack(layers)
