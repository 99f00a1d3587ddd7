"""CapKV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from curkv.cache.declarations import Number, option
from curkv.cache.policies.curdkv import whitening
from curkv.cache.policies.expected_attention import FuturePolicy
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels

_EPSILON = 1e-6
"""Added to the weights in the matrix, so that it has every token (kvpress)."""


@dataclass(frozen=True, kw_only=True)
class CapKV(FuturePolicy):
    """CapKV (https://arxiv.org/abs/2604.25975, as in kvpress): leverage of values, weighted by attention.

    With w_j = exp(tau cos(k_j, q)), q the mean query turned by the mean rotation of the next `future` = 512
    positions, a token's score is its ridge leverage w_j v_j^T (I + sum_i w_i v_i v_i^T)^-1 v_j, mean over the
    group: how much of the values' weighted span only it gives.
    """

    name: str = "capkv"
    description: str = "CapKV: leverage of values, weighted by likeness of their key to the mean query"
    tau: float = option(5.0, Number(0, 100), "How sharply CapKV tells keys like the mean query from others.")

    def score_tokens(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by weighted ridge leverage."""
        judged = view.position >= self.published.sinks
        rotations = self.mean_rotations(view)
        scores = torch.stack([self._leverage(view, i, judged[i], turn) for i, turn in enumerate(rotations)])
        scores.masked_fill_(~judged, view.whole(scores).max() + 1)
        return scores.masked_fill_(~view.stored, -torch.inf)

    def _leverage(self, view: CacheView, layer: int, judged: Tensor, rotation: Tensor) -> Tensor:
        """Scores of one layer, float32 [H, n], 0 where not judged."""
        assert view.observations is not None
        keys = F.normalize(view.keys(layer), dim=-1)
        values = view.values(layer).masked_fill_(~judged[..., None], 0.0)[:, None]
        mean = view.observations.statistics[layer].mean @ rotation.T
        alike = F.normalize(mean, dim=-1).view(len(keys), -1, keys.shape[-1]) @ keys.transpose(1, 2)
        logits = (self.tau * alike).masked_fill_(~judged[:, None], -torch.inf)
        weights = (logits - logits.amax(-1, keepdim=True)).exp_().nan_to_num_(0.0)
        span = (values * (weights + _EPSILON)[..., None]).transpose(2, 3) @ values
        span.diagonal(dim1=2, dim2=3).add_(1.0)
        return (weights * (values @ whitening(span)).square_().sum(-1)).mean(1)
