"""SnapKV and what differs from it in the allocation alone: Ada-SnapKV and PyramidKV."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from curkv.cache.observations import Needs
from curkv.cache.options import Allocation, EvictionOptions
from curkv.cache.policies.base import CacheView, Policy

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


class SnapKV(Policy):
    """SnapKV (https://arxiv.org/abs/2404.14469, section 4): what the last queries of the prompt look at.

    The score is the attention of the last `observation` = 32 tokens, mean over them and the group of query
    heads, pooled over 5 neighbours (kvpress: 64 and 5; KVCache-Factory: 8 and 7, max). The observing tokens
    are kept.
    """

    name = "snapkv"
    description = "SnapKV: tokens that the last 32 tokens attend to"
    defaults: Mapping[str, Any] = {"observation": 32, "pool": 5, "pool_kind": "mean"}
    reads = frozenset({"observation", "reduction", "pool", "pool_kind"})
    factor = True

    def needs(self, options: EvictionOptions) -> Needs:
        """The queries of the window."""
        return Needs(queries=options.observation or 0)

    def window(self, options: EvictionOptions) -> int:
        """The tokens that observe."""
        return options.observation or 0

    def queries(self, view: CacheView, options: EvictionOptions) -> Tensor:
        """The queries that observe: float32 [L * H, w, group, head_dim], after RoPE."""
        return view.queries(options.observation or 0)

    def score(self, view: CacheView, options: EvictionOptions, kernels: Kernels) -> Tensor:
        """Score tokens by the attention of the window."""
        queries, reduction = self.queries(view, options), options.reduction or "mean"
        scores = kernels.window_scores(queries, view.pages, *view.rows, view.scale, reduction)
        return scores.view(*view.lengths.shape, view.width)


class AdaSnapKV(SnapKV):
    """SnapKV's scores with Ada-KV's allocation (https://arxiv.org/abs/2407.11550, algorithm 1).

    The heads of a layer share its tokens by score, each sure of its best alpha * k.
    """

    name = "adasnapkv"
    description = "Ada-SnapKV: SnapKV's scores, heads of a layer compete for its tokens above a floor"
    allocation: Allocation = "adaptive"


class PyramidKV(SnapKV):
    """SnapKV's scores with PyramidKV's budgets (https://arxiv.org/abs/2406.02069, section 3.2).

    They fall linearly over the layers: the last one gets 1 / beta of the mean, beta = 20, beside what is
    always kept.
    """

    name = "pyramidkv"
    description = "PyramidKV: SnapKV's scores, lower layers keep more"
    allocation: Allocation = "pyramid"
