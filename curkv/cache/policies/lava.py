"""LAVa."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from curkv.cache.allocation import ALLOCATIONS, Allocation
from curkv.cache.policies.snapkv import SnapKV
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class Lava(SnapKV):
    """LAVa (https://arxiv.org/abs/2509.09754, section 3): attention times the head's longest value.

    The score is the mean attention of the last `observation` = 32 tokens times the largest ||v||_1 of the
    head, the most over the group, the largest of 7 neighbours. Layers share the budget by the entropy of
    their scores. The published cascade, which cuts earlier layers while later ones are computed, is left out:
    here all layers are held until the prompt is read.
    """

    name: str = "lava"
    description: str = "LAVa: attention times the head's longest value, layers' budgets by entropy"
    allocation: Allocation = ALLOCATIONS["entropy"]
    pool: int = 7
    pool_kind: Literal["max", "mean"] = "max"

    def score_tokens(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by attention and the values of their head."""
        queries = self.queries(view)
        group = queries.shape[2]
        table, lengths = (x.repeat_interleave(group, 0) for x in view.rows)
        sinks = view.sink_rows
        paid = kernels.window_scores(
            queries.transpose(1, 2).flatten(0, 1)[:, :, None].contiguous(),
            view.pages,
            table,
            lengths,
            view.scale,
            self.reduction,
            width=view.width,
            softcap=view.softcap,
            sinks=None if sinks is None else sinks.view(-1, 1),
        )
        longest = [view.values(layer).abs().sum(-1).amax(-1) for layer in range(view.num_layers)]
        most = paid.view(*view.lengths.shape, group, view.width).amax(2)
        return most * torch.stack(longest)[..., None]
