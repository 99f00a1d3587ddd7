"""TriAttention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curkv.cache.declarations import Integer, option
from curkv.cache.observations import Needs
from curkv.cache.policies.base import PooledPolicy, Published
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels

_NEWEST = 128
"""Newest tokens that are kept, and generated tokens between two evictions."""


@dataclass(frozen=True, kw_only=True)
class TriAttention(PooledPolicy):
    """TriAttention, as released: what the mean query will look at, from distances of 1 to 2^`reach` tokens.

    Before RoPE queries lie close to their mean, so that how RoPE turns it tells which distances a head looks
    at. A key's score is its mean product with the mean query at 1, 2, 4, ... 65,536 positions ahead, plus,
    for what queries differ from the mean, sum_f (mean |q_f| - |mean q_f|) |k_f| over the pairs f of channels
    that RoPE turns together; in standard deviations of the head, the most of the group. Since the product is
    linear, the mean over distances is one product with the mean query turned once.

    The released code takes means over some text, once for a model; here they are those of the request.
    """

    name: str = "triattention"
    description: str = "TriAttention: what the mean query looks at from 1 to 65,536 positions ahead"
    published: Published = Published(recent=_NEWEST)
    decode_interval: int = _NEWEST
    reach: int = option(
        16, Integer(0, 24), "Binary logarithm of the farthest distance that TriAttention foretells."
    )

    @property
    def needs(self) -> Needs:
        """Mean queries, and the mean lengths of their pairs."""
        return Needs(query_pairs=True)

    def score_tokens(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by the mean query's look at them."""
        assert view.observations is not None
        ahead = view.position.max() + 2.0 ** torch.arange(self.reach + 1, device=view.lengths.device)
        stored, layers = view.stored, []
        for layer in range(view.num_layers):
            mean, lengths = view.observations.pairs[layer].means
            real, imaginary = mean.chunk(2, -1)
            cos, sin = self._turns(view, layer, ahead)
            anchor = torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
            apart = lengths - torch.hypot(real, imaginary)
            layers.append(_looks(view.keys(layer), anchor.float(), apart.float(), stored[layer]))
        return torch.stack(layers).masked_fill_(~stored, -torch.inf)

    @staticmethod
    def _turns(view: CacheView, layer: int, ahead: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cosine and sine of each pair at positions ahead, which may lie behind the tables' end.

        Returns:
            float64 [head_dim / 2] each.
        """
        assert view.rope is not None
        cos, sin = (table[1].double() for table in view.rope[layer])
        angles = ahead.double()[:, None] * torch.atan2(sin, cos)
        return angles.cos().mean(0), angles.sin().mean(0)


def _looks(keys: Tensor, anchor: Tensor, apart: Tensor, stored: Tensor) -> Tensor:
    """Scores of one layer, the most of the group.

    Args:
        keys: float32 [H, n, head_dim], 0 past a head's length.
        anchor: float32 [Hq, head_dim], mean queries, turned.
        apart: float32 [Hq, head_dim / 2], what the pairs' mean lengths exceed those of the mean by.
        stored: bool [H, n].

    Returns:
        float32 [H, n].
    """
    heads = len(stored)
    pairs = torch.hypot(*keys.chunk(2, -1))
    looks = anchor.view(heads, -1, anchor.shape[1]) @ keys.transpose(1, 2)
    looks += apart.view(heads, -1, apart.shape[1]) @ pairs.transpose(1, 2)
    counts = stored.sum(-1)[:, None, None]
    looks -= (looks * stored[:, None]).sum(-1, keepdim=True) / counts.clamp_min(1)
    variance = (looks.square() * stored[:, None]).sum(-1, keepdim=True) / (counts - 1).clamp_min(1)
    return (looks / variance.sqrt().clamp_min(1e-6)).amax(1)
