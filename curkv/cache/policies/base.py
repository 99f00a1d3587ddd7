"""What an eviction policy is, and what it sees of a sequence's cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from curkv.cache.allocation import ALLOCATIONS, Allocation
from curkv.cache.declarations import Choice, Configurable, Integer, option, unless
from curkv.cache.observations import Needs
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels

POOLING = Integer(1, 1023, odd=True)
"""The sizes that a pooling may have."""


class UnknownPolicy(KeyError):
    """There is no such policy, or it cannot be had here; the message says why."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Published:
    """What a policy keeps in any case, as it was published.

    Attributes:
        sinks: First tokens.
        recent: Newest tokens, under the presets that follow a publication.
        recent_share: Share of the budget that the newest tokens take unless told.
    """

    sinks: int = 0
    recent: int = 0
    recent_share: float = 0.0


@dataclass(frozen=True)
class Scored:
    """What a policy thinks of the stored tokens.

    Attributes:
        scores: float32 [L, H, n_max], higher is kept, -inf past a head's length.
        chosen: bool [L, H, n_max], the tokens that the policy has chosen itself: no other one is kept unless
            it is protected. None: the allocation chooses by score.
    """

    scores: Tensor
    chosen: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Policy(Configurable, ABC):
    """Scores stored tokens; its allocation decides who keeps how many, and the cache moves them.

    A policy is a frozen dataclass: the fields that are declared with `option` are what a request can set.

    Attributes:
        name: As a request names it.
        description: One line for `curkv model policies`.
        allocation: How heads and layers share the budget.
        published: What it keeps in any case.
        decode_interval: Generated tokens between two evictions unless the request says otherwise.
        heads_compete: Whether scores tell the heads of a layer apart, so that these can compete for tokens.
        factor: Whether scores are shares of something, at least 0, so that they can be multiplied.
    """

    name: str
    description: str
    allocation: Allocation = ALLOCATIONS["uniform"]
    published: Published = Published()
    decode_interval: int = 64
    heads_compete: ClassVar[bool] = True
    factor: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        """What it reads besides the pages."""
        return Needs()

    def drafts(self, budget: int) -> int:
        """Tokens of an answer that it wants drafted where so many tokens are kept per head."""
        return 0

    @property
    def observing(self) -> int:
        """Newest tokens whose queries do the scoring: they are kept, and pooling does not reach them."""
        return 0

    @abstractmethod
    def score(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score every stored token.

        Args:
            view: The sequence.
            kernels: Operations on pages.

        Returns:
            float32 [L, H, n_max], higher is kept, +inf for tokens that observe, -inf past a head's length.
        """

    def judge(self, view: CacheView, kernels: Kernels) -> Scored:
        """Score every stored token, and choose some if scores cannot say what is meant."""
        return Scored(self.score(view, kernels))


@dataclass(frozen=True, kw_only=True)
class PooledPolicy(Policy):
    """A policy whose scores can be pooled over neighbouring tokens."""

    pool: int = option(1, POOLING, "Odd size of the pooling over a head's scores; 1 is off.")
    pool_kind: Literal["max", "mean"] = option(
        "max",
        Choice(("max", "mean")),
        "What the pooling takes of its neighbourhood.",
        effective=unless(pool=1),
    )

    @abstractmethod
    def score_tokens(self, view: CacheView, kernels: Kernels) -> Tensor:
        """`score` before it is pooled, and whatever it is for tokens that observe."""

    def score(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score every stored token and pool the scores of those that do not observe."""
        scores, observing = self.score_tokens(view, kernels), self.observing
        newest = view.newest(observing) if observing else None
        judged = view.stored if newest is None else view.stored & ~newest
        scores = pooled(scores, judged, self.pool, self.pool_kind)
        return scores if newest is None else scores.masked_fill_(newest, torch.inf)


def pooled(scores: Tensor, judged: Tensor, kernel: int, kind: Literal["max", "mean"]) -> Tensor:
    """Pool scores over neighbouring stored tokens, so that spans are kept whole (SnapKV, section 4).

    Args:
        scores: float32 [L, H, n].
        judged: bool [L, H, n], False past a head's length and for tokens that are kept anyway.
        kernel: Odd number of tokens; 1 changes nothing.
        kind: "max", or "mean" over those of the neighbours that exist.

    Returns:
        float32 [L, H, n], -inf where not judged.
    """
    if kernel == 1:
        return scores
    if kind == "max":
        lowest = scores.masked_fill(~judged, -torch.inf)
        scores = F.max_pool1d(lowest, kernel, stride=1, padding=kernel // 2)
    else:
        sums, counts = (
            F.avg_pool1d(x, kernel, stride=1, padding=kernel // 2)
            for x in (scores.masked_fill(~judged, 0), judged.to(scores.dtype))
        )
        scores = sums / counts
    return scores.masked_fill(~judged, -torch.inf)


def best_of_heads(scores: Tensor, counts: Tensor, view: CacheView, kernels: Kernels) -> Tensor:
    """Tell each head's `counts` int32 [L, H] best tokens by `scores` float32 [L, H, n]: bool [L, H, n]."""
    indices = kernels.select(scores, view.lengths, counts)[0].long()
    n = scores.shape[2]
    mask = torch.zeros(*scores.shape[:2], n + 1, dtype=torch.bool, device=scores.device)
    return mask.scatter_(2, indices.masked_fill(indices < 0, n), True)[..., :n]
