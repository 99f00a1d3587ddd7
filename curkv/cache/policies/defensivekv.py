"""DefensiveKV."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from curkv.cache.policies.base import CacheView
from curkv.cache.policies.criticalkv import projected_norms
from curkv.cache.policies.snapkv import SnapKV

if TYPE_CHECKING:
    from curkv.cache.options import EvictionOptions
    from curkv.kernels.dispatch import Kernels


class DefensiveKV(SnapKV):
    """DefensiveKV (https://arxiv.org/abs/2510.13334, section 3) over SnapKV: the worst case, not the mean.

    The largest attention that a query of the window pays, over the group too, pooled as SnapKV's, at least
    the mean of its head (a prior risk for tokens that nobody looked at yet), times ||v W_o||_1.
    """

    name = "defensivekv"
    description = "DefensiveKV: the most attention of any of the last 32 tokens, times the projected value"
    factor = False

    def score(self, view: CacheView, options: EvictionOptions, kernels: Kernels) -> Tensor:
        """Score tokens by the largest attention of the window."""
        queries = view.queries(options.observation or 0)
        scores = kernels.window_scores(queries, view.pages, *view.rows, view.scale, "max")
        return scores.view(*view.lengths.shape, view.width)

    def scores(self, view: CacheView, options: EvictionOptions, kernels: Kernels) -> Tensor:
        """The pooled scores, bounded from below and weighted; tokens of the window stay +inf."""
        scores = super().scores(view, options, kernels)
        judged = scores.isfinite()
        total, count = scores.masked_fill(~judged, 0.0).sum(-1, keepdim=True), judged.sum(-1, keepdim=True)
        clamped = scores.maximum(total / count.clamp_min(1)).where(judged, scores)
        return (clamped * projected_norms(view)).where(judged, scores)
