"""Expected Attention."""

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


@dataclass(frozen=True, kw_only=True)
class FuturePolicy(PooledPolicy):
    """A policy that foretells queries: the mean of those so far, turned to positions that come."""

    published: Published = Published(sinks=4)
    future: int = option(
        512, Integer(1, 65536), "Positions after the prompt that the foretold queries are turned to."
    )
    factor = True

    @property
    def needs(self) -> Needs:
        """The mean and covariance of all queries."""
        return Needs(query_statistics=True)

    def mean_rotations(self, view: CacheView) -> list[Tensor]:
        """By layer: the mean rotary matrix of the positions to come, float32 [head_dim, head_dim]."""
        assert view.rope is not None
        start = int(view.position.max()) + 1
        rotations = []
        for rope in view.rope[: view.num_layers]:
            cos, sin = (
                table[start : start + self.future].mean(0).diag() for table in self._ahead(rope, start)
            )
            rotations.append(torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)]))
        return rotations

    def _ahead(self, rope: tuple[Tensor, Tensor], start: int) -> tuple[Tensor, Tensor]:
        """The rotary tables; at the end of the context their last rows stand for the future."""
        cos, sin = rope
        return (
            (cos, sin)
            if start < len(cos)
            else (cos[-1:].expand(start + 1, -1), sin[-1:].expand(start + 1, -1))
        )


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(FuturePolicy):
    """Expected Attention (https://arxiv.org/abs/2510.00636, section 3): what future queries will look at.

    Queries before RoPE are taken as Gaussian; their mean and covariance, rotated by the mean rotation of the
    next `future` = 512 positions, give the expected exp(q k) of every key; normalised over a head, mean over
    the group, times ||v||.
    """

    name: str = "expected-attention"
    description: str = "Expected Attention: tokens that Gaussian future queries would attend to, times ||v||"

    def score_tokens(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by the expected attention times the norm of their value."""
        assert view.observations is not None
        judged = view.position >= self.published.sinks
        layers = []
        for layer, rotation in enumerate(self.mean_rotations(view)):
            statistics = view.observations.statistics[layer]
            mean = statistics.mean @ rotation.T
            covariance = rotation @ statistics.covariance @ rotation.T
            layers.append(self._expected(view, layer, mean, covariance, judged[layer]))
        scores = torch.stack(layers) * view.gather(view.pages.v_sq, 0.0).sqrt_()
        scores.masked_fill_(~judged, view.whole(scores).max() + 1)
        return scores.masked_fill_(~view.stored, -torch.inf)

    def _expected(
        self, view: CacheView, layer: int, mean: Tensor, covariance: Tensor, judged: Tensor
    ) -> Tensor:
        """Softmax of the expected logits, mean over the group: float32 [H, n]."""
        keys = view.keys(layer)
        heads, _, dim = keys.shape
        mean, covariance = mean.view(heads, -1, dim), covariance.view(heads, -1, dim, dim)
        logits = mean @ keys.transpose(1, 2) * view.scale
        spread = ((keys[:, None] @ covariance) * keys[:, None]).sum(-1) * (view.scale**2 / 2)
        logits = (logits + spread).masked_fill_(~judged[:, None], -torch.inf)
        return logits.softmax(-1).nan_to_num_(0.0).mean(1)
