"""Random tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from curkv.cache.policies.base import CacheView, Needs

if TYPE_CHECKING:
    from curkv.cache.options import EvictionOptions
    from curkv.kernels.dispatch import Kernels


class Random:
    """Keeps a random choice of tokens in every head: what a policy has to beat."""

    name = "random"
    description = "random tokens, reproducible by seed"
    needs = Needs()
    allocation: Literal["uniform", "adaptive"] = "uniform"
    published_sinks = 0
    reads: frozenset[str] = frozenset()

    def score(self, view: CacheView, options: EvictionOptions, kernels: Kernels) -> Tensor:
        """Draw a uniform score for every token."""
        scores = torch.rand(view.stored.shape, generator=view.generator(), device=view.lengths.device)
        return scores.masked_fill_(~view.stored, -torch.inf)
