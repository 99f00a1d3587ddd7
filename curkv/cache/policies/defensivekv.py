"""DefensiveKV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from curkv.cache.policies.criticalkv import projected_norms
from curkv.cache.policies.snapkv import SnapKV
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class DefensiveKV(SnapKV):
    """DefensiveKV (https://arxiv.org/abs/2510.13334, section 3) over SnapKV: the worst case, not the mean.

    The largest attention that a query of the window pays, over the group too, pooled as SnapKV's, at least
    the mean of its head (a prior risk for tokens that nobody looked at yet), times ||v W_o||_1.
    """

    name: str = "defensivekv"
    description: str = (
        "DefensiveKV: the most attention of any of the last 32 tokens, times the projected value"
    )
    reduction: Literal["mean", "max"] = "max"

    def score(self, view: CacheView, kernels: Kernels) -> Tensor:
        """The pooled scores, bounded from below and weighted; tokens of the window stay +inf."""
        scores = super().score(view, kernels)
        judged = scores.isfinite()
        total, count = scores.masked_fill(~judged, 0.0).sum(-1, keepdim=True), judged.sum(-1, keepdim=True)
        clamped = scores.maximum(total / count.clamp_min(1)).where(judged, scores)
        return (clamped * projected_norms(view)).where(judged, scores)
