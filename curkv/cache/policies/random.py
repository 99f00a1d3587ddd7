"""Random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curkv.cache.policies.base import Policy
from curkv.cache.upload import upload
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Keeps a random choice of tokens in every head: what a policy has to beat."""

    name: str = "random"
    description: str = "random tokens, reproducible by seed"
    heads_compete = False

    def score(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Draw a uniform score for every token."""
        shape = view.num_layers, view.num_heads, view.width
        scores = upload(torch.rand(shape, generator=view.generator()), view.lengths.device)
        return view.own(scores).masked_fill(~view.stored, -torch.inf)
