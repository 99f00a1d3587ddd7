"""ChunkKV."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curkv.cache.observations import Needs
from curkv.cache.options import EvictionOptions
from curkv.cache.policies import get_policy
from curkv.cache.policies.base import SAME_FOR_ALL_HEADS, CacheView, Policy

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


class ChunkKV(Policy):
    """ChunkKV (https://arxiv.org/abs/2502.00299, algorithm 1): chunks of `chunk` = 20 tokens are kept whole.

    A chunk's score is the mean over its tokens of the sum over heads of another policy's scores, SnapKV's or
    CurDKV's (`scorer`). The last chunk that the budget reaches is kept in part, its first tokens, so that the
    budget is met exactly. A chunk with a token of SnapKV's window is kept.
    """

    name = "chunkkv"
    description = "ChunkKV: whole chunks of 20 tokens, by SnapKV's or CurDKV's scores"
    allocations = SAME_FOR_ALL_HEADS
    reads = frozenset(
        {"scorer", "chunk", "observation", "reduction", "leverage", "rank", "window", "combine"}
    )

    def needs(self, options: EvictionOptions) -> Needs:
        """What the scorer needs."""
        return get_policy(options.scorer).needs(options)

    def window(self, options: EvictionOptions) -> int:
        """That of the scorer."""
        return get_policy(options.scorer).window(options)

    def score(self, view: CacheView, options: EvictionOptions, kernels: Kernels) -> Tensor:
        """Score tokens by their chunk."""
        scorer = get_policy(options.scorer)
        pooling: dict[str, Any] = {name: scorer.defaults.get(name) for name in ("pool", "pool_kind")}
        scores = scorer.scores(view, replace(options, **pooling), kernels)
        stored = view.stored
        # Heads of a layer hold as many tokens as each other, since they always keep the same ones.
        by_layer = scores.masked_fill(~stored, 0.0).sum(1)
        chunk = torch.arange(view.width, device=scores.device) // (options.chunk or 1)
        sums = by_layer.new_zeros(view.num_layers, int(chunk[-1]) + 1).index_add_(1, chunk, by_layer)
        counts = sums.new_zeros(sums.shape).index_add_(1, chunk, stored[:, 0].to(sums.dtype))
        means = (sums / counts.clamp_min(1))[:, chunk]
        return means[:, None].expand_as(scores).masked_fill(~stored, -torch.inf)
