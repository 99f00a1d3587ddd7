"""Compactor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from curkv.cache.allocation import ALLOCATIONS
from curkv.cache.declarations import SHARE, Integer, option
from curkv.cache.observations import BLOCK_SKIP, Needs
from curkv.cache.policies.base import Policy, Published
from curkv.cache.policies.curdkv import leverage
from curkv.cache.upload import upload
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels

_SKETCH = 48
"""Columns of the random projection before leverage is taken."""
_LAST = 4
"""Newest tokens that are always kept."""


@dataclass(frozen=True, kw_only=True)
class Compactor(Policy):
    """Compactor (https://arxiv.org/abs/2507.08143, section 3): outlying keys, and attention not causal.

    `blend` = 0.5 times the leverage of the keys before RoPE, centred and projected to 48 random columns, plus
    the attention that a token receives inside its block of `block` = 256 tokens from all of its queries,
    times ||v||, mean over 3 neighbours. Both are normalised to mean 0 and variance 1 over a layer. As in
    kvpress the logits of the blocks carry no 1 / sqrt(head_dim); blocks start after the first 8 tokens,
    which are kept.
    """

    name: str = "compactor"
    description: str = "Compactor: leverage of the keys before RoPE, blended with attention inside blocks"
    published: Published = Published(sinks=BLOCK_SKIP, recent=_LAST)
    blend: float = option(0.5, SHARE, "Weight of leverage beside attention in Compactor.")
    block: int = option(256, Integer(8, 4096), "Tokens of a block of Compactor's attention.")

    @property
    def needs(self) -> Needs:
        """Attention inside blocks."""
        return Needs(block=self.block)

    def score(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by leverage and attention; sinks and newest tokens get the layer's best score."""
        position, generator = view.position, view.generator()
        judged = (position >= BLOCK_SKIP) & (position <= position.max() - _LAST)
        geometry = torch.stack([
            leverage(_unrotated(view, layer, position[layer]) @ _sketch(view, generator), judged[layer])
            for layer in range(view.num_layers)
        ])  # fmt: skip
        everyones = view.whole(judged)
        blended = self.blend * _normalised(view.whole(geometry), everyones)
        blended += _normalised(view.whole(_attention(view, position, judged)), everyones)
        scores = torch.where(judged, view.own(blended), blended.amax((1, 2), keepdim=True))
        return scores.masked_fill_(~view.stored, -torch.inf)


ADA_COMPACTOR = Compactor(
    name="adacompactor",
    description="Compactor's scores, heads of a layer compete for its tokens above a floor",
    allocation=ALLOCATIONS["adaptive"],
)
"""Compactor's scores with Ada-KV's allocation (https://arxiv.org/abs/2407.11550, algorithm 1)."""


def _unrotated(view: CacheView, layer: int, position: Tensor) -> Tensor:
    """A layer's keys, at int32 [H, n], before RoPE: float32 [H, n, head_dim], 0 past a head's length."""
    assert view.rope is not None
    keys, place = view.keys(layer), position.clamp_min(0).flatten()
    cos, sin = (x.index_select(0, place).view(*position.shape, -1) for x in view.rope[layer])
    first, second = keys.chunk(2, -1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)


def _sketch(view: CacheView, generator: torch.Generator) -> Tensor:
    """The next layer's random projection, float32 [H, head_dim, 48]."""
    drawn = torch.randn(view.num_heads, view.pages.head_dim, _SKETCH, generator=generator)
    return view.ranks.own(upload(drawn / math.sqrt(_SKETCH), view.lengths.device), 0)


def _attention(view: CacheView, position: Tensor, judged: Tensor) -> Tensor:
    """What blocks pay their tokens, times ||v||, mean over 3 neighbours: float32 [L, H, n]."""
    assert view.observations is not None
    blocks = view.observations.blocks
    sums = torch.stack([blocks[layer].all_sums() for layer in range(view.num_layers)])
    sums = F.pad(sums, (0, max(0, 1 - sums.shape[2])))  # no token lies behind those that are skipped
    place = (position - BLOCK_SKIP).clamp_(0, sums.shape[2] - 1).long()
    paid = sums.gather(2, place).mul_(view.gather(view.pages.v_sq, 0.0).sqrt_())
    return F.avg_pool1d(paid.masked_fill_(~judged, 0.0), 3, stride=1, padding=1)


def _normalised(scores: Tensor, judged: Tensor) -> Tensor:
    """Scores [L, H, n] less the mean of those judged of the layer, in units of their standard deviation."""
    counts = judged.sum((1, 2), keepdim=True)
    apart = scores - (scores * judged).sum((1, 2), keepdim=True) / counts.clamp_min(1)
    variance = (apart.square() * judged).sum((1, 2), keepdim=True) / (counts - 1).clamp_min(1)
    return apart / variance.sqrt().clamp_min(1e-6)
