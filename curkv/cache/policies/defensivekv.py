"""DefensiveKV and Layer-DefensiveKV."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from curkv.cache.allocation import ALLOCATIONS, Allocation, Global
from curkv.cache.policies.criticalkv import projected_norms
from curkv.cache.policies.snapkv import SnapKV
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels

_SURE_MASS = 0.9
"""Share of the mean attention whose tokens are kept in any case."""


@dataclass(frozen=True, kw_only=True)
class DefensiveKV(SnapKV):
    """DefensiveKV (https://arxiv.org/abs/2510.13334, section 3, as released): the worst case, not the mean.

    Each query's attention is pooled over 5 neighbours and scaled to the sum that it had. A token's risk is
    the most that any query of the window pays it, over the group too, and at least the mean risk of its head;
    times ||v W_o|| as a share of all heads'. The tokens with the most mean attention, up to 90 % of it, are
    kept.
    """

    name: str = "defensivekv"
    description: str = (
        "DefensiveKV: the most attention of any of the last 32 tokens, times the projected value"
    )
    allocation: Allocation = ALLOCATIONS["adaptive"]
    reduction: Literal["mean", "max"] = "max"

    def score(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by their risk; the best of a head is that of tokens that are kept in any case."""
        window = view.newest(self.observing)
        judged = view.stored & ~window
        room = max(0, view.budget - self.observing)
        weights = _shares(projected_norms(view, self.preset.norm_order), view)
        layers = [
            self._risks(paid.flatten(1, 2), judged[layer], weights[layer], room)
            for layer, paid in enumerate(view.paid(self.observation))
        ]
        return torch.stack(layers).masked_fill_(~view.stored, -torch.inf).masked_fill_(window, torch.inf)

    def _risks(self, paid: Tensor, judged: Tensor, weights: Tensor, room: int) -> Tensor:
        """Scores of one layer [H, n] from what is paid [H, q, n]; `room` tokens of a head may be sure."""
        paid *= judged[:, None]
        smooth = _neighbourhoods(paid, self.pool).mul_(judged[:, None])
        smooth *= paid.sum(-1, keepdim=True) / smooth.sum(-1, keepdim=True).clamp_min(1e-30)
        risk = smooth.amax(1) if self.reduction == "max" else smooth.mean(1)
        risk = risk.maximum(risk.sum(-1, keepdim=True) / judged.sum(-1, keepdim=True).clamp_min(1))
        risk *= weights
        ranked, order = paid.mean(1).sort(descending=True, stable=True)
        share = ranked.cumsum(-1) / ranked.sum(-1, keepdim=True).clamp_min(1e-30)
        sure = (share <= _SURE_MASS) & (torch.arange(len(share[0]), device=share.device) < room)
        sure = torch.zeros_like(judged).scatter_(1, order, sure) & judged
        return risk.where(~sure, risk.amax(-1, keepdim=True))


LAYER_DEFENSIVEKV = DefensiveKV(
    name="layer-defensivekv",
    description="Layer-DefensiveKV: DefensiveKV's scores, heads of all layers compete",
    allocation=replace(Global(), floor=0.0),
)
"""DefensiveKV's scores with one budget for all layers (https://arxiv.org/abs/2510.13334, section 4)."""


def _shares(norms: Tensor, view: CacheView) -> Tensor:
    """Norms [L, H, n] of tokens as shares of the sum over the heads that hold the token of that position."""
    position = view.position.clamp_min(0).long().flatten(1)
    norms = norms.masked_fill(~view.stored, 0.0)
    text = norms.new_zeros(len(norms), int(position.max()) + 1).scatter_add_(1, position, norms.flatten(1))
    text = view.ranks.sum(text)
    return norms / text.gather(1, position).view_as(norms).clamp_min(1e-30)


def _neighbourhoods(x: Tensor, size: int) -> Tensor:
    """Sums over `size` neighbours along the last dimension, zeros outside."""
    sums = x.clone()
    for apart in range(1, size // 2 + 1):
        sums[..., apart:] += x[..., :-apart]
        sums[..., :-apart] += x[..., apart:]
    return sums
