"""Knorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curkv.cache.policies.base import PooledPolicy
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class Knorm(PooledPolicy):
    """Knorm, or L2 (https://arxiv.org/abs/2406.11430, section 3): keys of low norm receive the most
    attention.

    The score is -||k||, the opposite sign of CurDKV's key term. The original leaves the first two layers
    whole; here, as in kvpress, all layers are treated alike.
    """

    name: str = "knorm"
    description: str = "Knorm: tokens whose keys have the lowest norm"

    def score_tokens(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by the negative norm of their key."""
        return view.gather(view.pages.k_sq, torch.inf).sqrt_().neg_()
