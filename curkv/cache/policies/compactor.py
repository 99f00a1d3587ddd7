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
        assert view.observations is not None
        position, generator = view.position, view.generator()
        judged = (position >= BLOCK_SKIP) & (position <= position.max() - _LAST)
        norms = view.gather(view.pages.v_sq, 0.0).sqrt_()
        layers = []
        for layer in range(view.num_layers):
            keys = unrotated(view, layer)
            sketch = torch.randn(view.num_heads, keys.shape[2], _SKETCH, generator=generator)
            own = view.ranks.own(upload(sketch / math.sqrt(_SKETCH), keys.device), 0)
            # Tokens that are not judged are pushed behind the others: the heads hold as many of them.
            geometry = _leverage_of(keys @ own, judged[layer])
            sums = view.observations.blocks[layer].all_sums()
            sums = F.pad(sums, (0, max(0, 1 - sums.shape[1])))  # no token lies behind those that are skipped
            place = (position[layer] - BLOCK_SKIP).clamp(0, sums.shape[1] - 1).long()
            attention = (sums.gather(1, place) * norms[layer]).masked_fill(~judged[layer], 0.0)
            attention = F.avg_pool1d(attention, 3, stride=1, padding=1)
            layers.append(torch.stack([geometry, attention], 1))
        everyones = view.whole(torch.stack(layers)), view.whole(judged)
        blended = torch.stack([
            self.blend * _normalised(parts[:, 0], which) + _normalised(parts[:, 1], which)
            for parts, which in zip(*everyones, strict=True)
        ])  # fmt: skip
        scores = torch.where(judged, view.own(blended), blended.amax((1, 2), keepdim=True))
        return scores.masked_fill_(~view.stored, -torch.inf)


ADA_COMPACTOR = Compactor(
    name="adacompactor",
    description="Compactor's scores, heads of a layer compete for its tokens above a floor",
    allocation=ALLOCATIONS["adaptive"],
)
"""Compactor's scores with Ada-KV's allocation (https://arxiv.org/abs/2407.11550, algorithm 1)."""


def unrotated(view: CacheView, layer: int) -> Tensor:
    """Keys before RoPE, float32 [H, n, head_dim], 0 past a head's length."""
    assert view.rope is not None
    keys = view.keys(layer)
    position = view.position[layer].clamp_min(0).long()
    cos, sin = (table[position] for table in view.rope[layer])
    first, second = keys.chunk(2, -1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)


def _leverage_of(x: Tensor, judged: Tensor) -> Tensor:
    """Leverage of the judged rows of float32 [H, n, d]: [H, n], 0 elsewhere."""
    order = judged.int().argsort(dim=1, descending=True, stable=True)
    front = x.gather(1, order[..., None].expand_as(x))
    counts = judged.sum(1).int()
    behind = torch.arange(x.shape[1], device=x.device) >= counts[:, None]
    scores = leverage(front.masked_fill(behind[..., None], 0.0), counts)
    return torch.zeros_like(scores).scatter_(1, order, scores)


def _normalised(scores: Tensor, judged: Tensor) -> Tensor:
    """Scores less the mean of those judged, in units of their standard deviation; 0 if there are no two."""
    values = scores[judged]
    if len(values) < 2:
        return torch.zeros_like(scores)
    return (scores - values.mean()) / values.std().clamp_min(1e-6)
