"""TOVA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from curkv.cache.policies.base import PooledPolicy
from curkv.cache.policies.snapkv import ObservingPolicy
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class TOVA(ObservingPolicy, PooledPolicy):
    """TOVA (https://arxiv.org/abs/2401.06104, section 3.2): what the last query looks at.

    The score is the attention of the last query, mean over all heads of the layer, so that these keep the
    same tokens. In decode one token is evicted per step.
    """

    name: str = "tova"
    description: str = "TOVA: tokens that the last token attends to, the same for all heads of a layer"
    decode_interval: int = 1
    observation: int = 1
    heads_compete = False
    factor = True

    def score_tokens(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by the attention of the last query, mean over heads."""
        by_head = self.attention(view, kernels, "mean")
        return view.whole(by_head).mean(1, keepdim=True).expand_as(by_head).contiguous()
