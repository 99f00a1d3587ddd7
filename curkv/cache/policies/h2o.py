"""H2O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from curkv.cache.observations import Needs
from curkv.cache.options import EvictionOptions
from curkv.cache.policies.base import CacheView, Policy

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


class H2O(Policy):
    """H2O, heavy hitters (https://arxiv.org/abs/2306.14048, algorithm 1): what all queries so far looked at.

    The score is the attention that a token received from all queries, summed over the group; it goes on
    adding up in decode. Half of the budget is for the newest tokens. Under preset "kvpress" the sum is
    divided by the number of queries that could see the token, as in `ObservedAttentionPress`.
    """

    name = "h2o"
    description = "H2O: tokens that received the most attention, and the newest ones"
    recent_share = 0.5
    reads = frozenset({"pool", "pool_kind"})
    factor = True

    def needs(self, options: EvictionOptions) -> Needs:
        """The attention of all queries."""
        return Needs(column_sums=True)

    def score(self, view: CacheView, options: EvictionOptions, kernels: Kernels) -> Tensor:
        """Score tokens by the attention they received."""
        sums = view.gather(view.pages.attention, float("-inf"))
        if options.preset == "kvpress":
            position = view.position
            sums = sums / (position.max() + 1 - position)
        return sums
