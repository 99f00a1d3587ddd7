"""KeyDiff."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from curkv.cache.policies.base import PooledPolicy
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class KeyDiff(PooledPolicy):
    """KeyDiff (https://arxiv.org/abs/2504.15364, section 3): keys unlike the others receive attention.

    The score is the negative cosine of a key and the mean of the normalised keys of its head.
    """

    name: str = "keydiff"
    description: str = "KeyDiff: tokens whose keys differ most from the mean key"

    def score_tokens(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by how unlike the mean key theirs is."""
        layers = []
        for layer in range(view.num_layers):
            keys = F.normalize(view.keys(layer), dim=-1)
            anchor = F.normalize(keys.sum(1), dim=-1)
            layers.append(-(keys @ anchor[..., None])[..., 0])
        return torch.stack(layers).masked_fill_(~view.stored, -torch.inf)
