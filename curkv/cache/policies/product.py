"""Two policies whose scores are multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from curkv.cache.observations import Needs
from curkv.cache.policies.base import Policy
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class Product(Policy):
    """A policy's scores times those of a second one; all else is as with the first.

    Attributes:
        first: The policy that the request names.
        second: The one that it is multiplied with.
    """

    first: Policy
    second: Policy

    @classmethod
    def of(cls, first: Policy, second: Policy) -> Self:
        """Multiply two policies."""
        return cls(
            name=first.name,
            description=f"{first.name} times {second.name}",
            preset=first.preset,
            allocation=first.allocation,
            published=first.published,
            decode_interval=min(first.decode_interval, second.decode_interval),
            first=first,
            second=second,
        )

    @property
    def needs(self) -> Needs:
        """What both need."""
        return self.first.needs | self.second.needs

    @property
    def observing(self) -> int:
        """Those of the first."""
        return self.first.observing

    def score(self, view: CacheView, kernels: Kernels) -> Tensor:
        """The product, where both have a finite score; the first one's scores elsewhere."""
        scores, factor = (policy.score(view, kernels) for policy in (self.first, self.second))
        return torch.where(scores.isfinite() & factor.isfinite(), scores * factor, scores)
