"""KVzip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curkv.cache.allocation import ALLOCATIONS, Allocation
from curkv.cache.observations import Needs
from curkv.cache.policies.base import PooledPolicy, Published
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class KVzip(PooledPolicy):
    """KVzip (https://arxiv.org/abs/2505.23416): what the model looks at while it repeats the text.

    The score of a token is the most attention that any repeated token pays it, over the group of query heads
    too; heads of all layers compete. It reads no question, and costs a second prefill.
    """

    name: str = "kvzip"
    description: str = "KVzip: what the model looks at while it repeats the text; costs a second prefill"
    allocation: Allocation = ALLOCATIONS["global"]
    published: Published = Published(sinks=4)
    factor = True

    @property
    def needs(self) -> Needs:
        """A repetition of the text."""
        return Needs(repetition=True)

    def score_tokens(self, view: CacheView, kernels: Kernels) -> Tensor:
        """The attention of the repetition; what there was no room to repeat is kept first, newest first."""
        if view.repetition is None:
            raise ValueError("the text was not repeated; see `CacheView.repetition`")
        newest_first = 1.0 + view.position.clamp_min(0)
        return torch.where(view.repetition == -torch.inf, newest_first, view.repetition)
