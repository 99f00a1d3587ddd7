"""Keeping everything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curkv.cache.options import Allocation, EvictionOptions
from curkv.cache.policies.base import CacheView, Policy

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


class Full(Policy):
    """Keeps every token: the ordinary cache, and what the other policies are measured against."""

    name = "full"
    description = "keeps every token"
    allocations: frozenset[Allocation] = frozenset({"uniform"})

    def score(self, view: CacheView, options: EvictionOptions, kernels: Kernels) -> Tensor:
        """Score all tokens alike."""
        return torch.zeros(view.stored.shape, device=view.lengths.device).masked_fill_(
            ~view.stored, -torch.inf
        )
