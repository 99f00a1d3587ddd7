"""Keeping everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curkv.cache.policies.base import Policy
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Keeps every token: the ordinary cache, and what the other policies are measured against."""

    name: str = "full"
    description: str = "keeps every token"

    def score(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score all tokens alike."""
        return torch.zeros(view.stored.shape, device=view.lengths.device).masked_fill_(
            ~view.stored, -torch.inf
        )
