"""TOVA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from curkv.cache.options import EvictionOptions
from curkv.cache.policies.base import SAME_FOR_ALL_HEADS, CacheView
from curkv.cache.policies.snapkv import SnapKV

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


class TOVA(SnapKV):
    """TOVA (https://arxiv.org/abs/2401.06104, section 3.2): what the last query looks at.

    The score is the attention of the last query, mean over all heads of the layer, so that these keep the
    same tokens. In decode one token is evicted per step.
    """

    name = "tova"
    description = "TOVA: tokens that the last token attends to, the same for all heads of a layer"
    allocations = SAME_FOR_ALL_HEADS
    defaults: Mapping[str, Any] = {"observation": 1, "decode_interval": 1}
    reads = frozenset({"observation", "pool", "pool_kind"})

    def score(self, view: CacheView, options: EvictionOptions, kernels: Kernels) -> Tensor:
        """Score tokens by the attention of the last query, mean over heads."""
        by_head = super().score(view, replace(options, reduction="mean"), kernels)
        return by_head.mean(1, keepdim=True).expand_as(by_head).contiguous()
