"""SnapCUR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curkv.cache.options import Allocation, EvictionOptions
from curkv.cache.policies.base import CacheView, best_of_heads, pooled
from curkv.cache.policies.curdkv import CurDKV
from curkv.cache.policies.snapkv import SnapKV

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


class SnapCur(SnapKV):
    """What the last tokens look at: passages weighed with CUR's leverage, then single tokens.

    A token's attention is the most that any query of the window pays it, as in DefensiveKV. A `first_stage` =
    half of the budget beside the window goes to passages that all heads of a layer keep, because the head
    that finds a passage need not be the one that has to read it: attention times leverage (CurDKV's
    ||k||^2 ||v||^2, normalised per head), summed over the heads and averaged over `chunk` = 33 neighbours.
    The rest goes to the tokens with the most attention, mean over 5 neighbours, heads of a layer competing.

    The best policy measured here for requests whose question is part of the prompt (docs/policies.md).
    """

    name = "snapcur"
    description = "attention, and passages by attention times leverage: recommended with the question visible"
    allocation: Allocation = "adaptive"
    defaults: Mapping[str, Any] = {
        "observation": 64,
        "reduction": "max",
        "pool": 5,
        "pool_kind": "mean",
        "chunk": 33,
        "leverage": "norm",
    }
    reads = SnapKV.reads | CurDKV.reads | {"first_stage", "chunk"}
    factor = False

    def scores(self, view: CacheView, options: EvictionOptions, kernels: Kernels) -> Tensor:
        """Each head's attention, pooled; tokens of the best passages and of the window are +inf."""
        window = view.newest(self.window(options))
        judged = view.stored & ~window
        attention = self.score(view, options, kernels)
        weighed = (attention * CurDKV().score(view, options, kernels)).masked_fill(~judged, 0.0)
        passages = self._passages(view, weighed, options.chunk or 1).masked_fill(~judged, -torch.inf)
        room = max(0, view.budget - self.window(options))
        first = torch.full_like(view.lengths, int(options.first_stage * room))
        single = pooled(attention, judged, options.pool or 1, options.pool_kind or "mean")
        return single.masked_fill(window | best_of_heads(passages, first, view, kernels), torch.inf)

    def _passages(self, view: CacheView, scores: Tensor, chunk: int) -> Tensor:
        """Mean over the `chunk` positions around each token of the sum of all heads' scores.

        Heads may hold different tokens, so the sums are taken by position.

        Args:
            view: The sequence.
            scores: float32 [L, H, n], 0 for tokens that are not judged.
            chunk: Positions of a passage.

        Returns:
            float32 [L, H, n].
        """
        position = view.position.clamp_min(0).long().flatten(1)
        text = scores.new_zeros(len(scores), int(position.max()) + 1)
        text.scatter_add_(1, position, scores.flatten(1))
        ahead = (chunk - 1) // 2
        smooth = F.avg_pool1d(F.pad(text, (chunk - 1 - ahead, ahead)), chunk, stride=1)
        return smooth.gather(1, position).view_as(scores)
