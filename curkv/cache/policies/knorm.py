"""Knorm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curkv.cache.options import EvictionOptions
from curkv.cache.policies.base import CacheView, Policy

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


class Knorm(Policy):
    """Knorm, or L2 (https://arxiv.org/abs/2406.11430, section 3): keys of low norm receive the most
    attention.

    The score is -||k||, the opposite sign of CurDKV's key term. The original leaves the first two layers
    whole; here, as in kvpress, all layers are treated alike.
    """

    name = "knorm"
    description = "Knorm: tokens whose keys have the lowest norm"
    reads = frozenset({"pool", "pool_kind"})

    def score(self, view: CacheView, options: EvictionOptions, kernels: Kernels) -> Tensor:
        """Score tokens by the negative norm of their key."""
        return view.gather(view.pages.k_sq, torch.inf).sqrt_().neg_()
