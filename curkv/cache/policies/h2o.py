"""H2O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from curkv.cache.observations import Needs
from curkv.cache.policies.base import PooledPolicy, Published
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class H2O(PooledPolicy):
    """H2O, heavy hitters (https://arxiv.org/abs/2306.14048, algorithm 1): what all queries so far looked at.

    The score is the attention that a token received from all queries, summed over the group; it goes on
    adding up in decode. Half of the budget is for the newest tokens. Under preset "kvpress" the sum is
    divided by the number of queries that could see the token, as in `ObservedAttentionPress`.
    """

    name: str = "h2o"
    description: str = "H2O: tokens that received the most attention, and the newest ones"
    published: Published = Published(recent_share=0.5)
    factor = True

    @property
    def needs(self) -> Needs:
        """The attention of all queries."""
        return Needs(column_sums=True)

    def score_tokens(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by the attention they received."""
        sums = view.gather(view.pages.attention, float("-inf"))
        if self.preset.like_kvpress:
            position = view.position
            sums = sums / (position.max() + 1 - position)
        return sums
