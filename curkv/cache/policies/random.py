"""Random tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curkv.cache.options import EvictionOptions
from curkv.cache.policies.base import SAME_FOR_ALL_HEADS, CacheView, Policy

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


class Random(Policy):
    """Keeps a random choice of tokens in every head: what a policy has to beat."""

    name = "random"
    description = "random tokens, reproducible by seed"
    allocations = SAME_FOR_ALL_HEADS

    def score(self, view: CacheView, options: EvictionOptions, kernels: Kernels) -> Tensor:
        """Draw a uniform score for every token."""
        scores = torch.rand(view.stored.shape, generator=view.generator(), device=view.lengths.device)
        return scores.masked_fill_(~view.stored, -torch.inf)
