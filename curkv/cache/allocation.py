"""How heads and layers share a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from curkv.cache.declarations import SHARE, Configurable, Number, option
from curkv.cache.observations import Needs
from curkv.cache.upload import upload

if TYPE_CHECKING:
    from curkv.cache.view import CacheView
    from curkv.kernels.dispatch import Kernels

OBSERVED = 32
"""Last queries that CAKE's budgets are made of."""


@dataclass(frozen=True, kw_only=True)
class Allocation(Configurable, ABC):
    """Says how many tokens each head keeps.

    Attributes:
        name: As a request names it.
        ragged: Whether heads may end with different numbers of tokens.
        by_score: Whether the scores decide how many tokens a head gets.
    """

    name: ClassVar[str]
    ragged: ClassVar[bool] = True
    by_score: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        """What it reads besides scores."""
        return Needs()

    def seeing(self, view: CacheView) -> Allocation:
        """The same, with what it has to know of a sequence besides scores; all processes ask."""
        return self

    @abstractmethod
    def budgets(self, scores: Tensor, view: CacheView, protected: Tensor) -> tuple[Tensor, Tensor | None]:
        """Share the view's budget out.

        Args:
            scores: float32 [L, H, n_max], higher is kept.
            view: The sequence; its `budget` is what is kept per head, on average.
            protected: bool [L, H, n_max], tokens that are kept in any case.

        Returns:
            int32 [L, H], tokens of each head; and None, or int32 [L, H], the tokens each head is sure of
            where those of a layer compete for the others.
        """

    def select(
        self, scores: Tensor, view: CacheView, protected: Tensor, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        """Select the best tokens of each head.

        Args:
            scores: float32 [L, H, n_max], higher is kept.
            view: The sequence.
            protected: bool [L, H, n_max], tokens that are kept in any case.
            kernels: Operations on pages.

        Returns:
            indices: int32 [L, H, n_max], ascending indices of each head's tokens, -1 past its count.
            counts: int32 [L, H].
        """
        keep, floor = self.budgets(scores, view, protected)
        return kernels.select(scores, view.lengths, keep, floor)


@dataclass(frozen=True, kw_only=True)
class Uniform(Allocation):
    """The same number of tokens for every head."""

    name = "uniform"
    ragged = False

    def budgets(self, scores: Tensor, view: CacheView, protected: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mean for all."""
        return torch.full_like(view.lengths, view.budget), None


@dataclass(frozen=True, kw_only=True)
class Adaptive(Allocation):
    """The heads of a layer compete for its tokens (Ada-KV, https://arxiv.org/abs/2407.11550, algorithm 1)."""

    name = "adaptive"
    by_score = True
    alpha: float = option(
        0.2, SHARE, "Share of the kept tokens that each head is sure of under adaptive allocation."
    )

    def budgets(self, scores: Tensor, view: CacheView, protected: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mean for all, of which a head is sure of alpha, and of one token at least."""
        keep = torch.full_like(view.lengths, view.budget)
        return keep, torch.maximum((self.alpha * keep).int(), torch.full_like(keep, self.alpha > 0))


@dataclass(frozen=True, kw_only=True)
class Global(Allocation):
    """All heads of all layers compete (KVzip, https://arxiv.org/abs/2505.23416; Layer-DefensiveKV)."""

    name = "global"
    by_score = True
    floor: float = option(
        0.2, SHARE, "Share of the mean budget that each head is sure of under global allocation."
    )

    def budgets(self, scores: Tensor, view: CacheView, protected: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mean for all, of which a head is sure of a floor."""
        keep = torch.full_like(view.lengths, view.budget)
        return keep, (self.floor * keep).int()

    def select(
        self, scores: Tensor, view: CacheView, protected: Tensor, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        """Select the best tokens of all heads together."""
        keep, floor = self.budgets(scores, view, protected)
        assert floor is not None
        together = (x.flatten(0, 1)[None] for x in (scores, view.lengths, keep, floor))
        indices, counts = kernels.select(*together)
        return indices.view(*view.lengths.shape, -1), counts.view_as(view.lengths)


@dataclass(frozen=True, kw_only=True)
class Pyramid(Allocation):
    """Lower layers keep more (PyramidKV, https://arxiv.org/abs/2406.02069, section 3.2)."""

    name = "pyramid"
    beta: float = option(
        20.0, Number(1), "Steepness of the pyramid: the last layer gets 1 / beta of the mean."
    )

    def budgets(self, scores: Tensor, view: CacheView, protected: Tensor) -> tuple[Tensor, Tensor | None]:
        """Budgets that fall linearly over the layers, their mean exactly the view's budget.

        Beside the tokens that every layer keeps, the last layer gets 1 / beta of the mean and the first one
        as much more; if that exceeds what there is, the slope is less. As in kvpress, nothing is set aside.
        """
        layers, length, k = view.num_layers, view.width, view.budget
        always = int(protected.sum(-1).max())
        base = k if self.preset.like_kvpress else k - always
        top = max(base, min(2 * base - base / self.beta, length - always))
        bottom = 2 * base - top
        budgets = _whole(torch.linspace(top, bottom, layers, dtype=torch.float64)) + (k - base)
        by_layer = upload(budgets.int(), view.lengths.device)
        return by_layer[:, None].expand(view.lengths.shape).contiguous(), None


@dataclass(frozen=True, kw_only=True)
class Entropy(Allocation):
    """Layers whose scores are spread wide keep more (LAVa, https://arxiv.org/abs/2509.09754, section 3).

    Beside the tokens that every layer keeps, a layer's budget is in proportion to the entropy of its scores,
    as shares of what they exceed the lowest by; its heads compete for that.
    """

    name = "entropy"
    by_score = True
    floor: float = option(
        0.5, SHARE, "Share of its layer's budget that each head is sure of under entropy allocation."
    )

    def budgets(self, scores: Tensor, view: CacheView, protected: Tensor) -> tuple[Tensor, Tensor | None]:
        """Budgets in proportion to entropies."""
        keep = _in_proportion(_entropies(scores, view.stored & ~protected), view, protected)
        return keep, (self.floor * keep).int()


@dataclass(frozen=True, kw_only=True)
class Cake(Allocation):
    """Layers whose attention is spread wide and changes keep more (CAKE, https://arxiv.org/abs/2503.12491).

    Beside the tokens that every layer keeps, a layer's budget is in proportion to H^(1/tau1) V^(1/tau2), H
    being the entropy of what the last 32 queries pay the tokens before them, and V its variance over these
    queries, both summed over heads. Heads of a layer keep as many. The published cascade, which cuts earlier
    layers while later ones are computed, is left out.
    """

    name = "cake"
    tau1: float = option(1.0, Number(0.1), "Inverse power of the entropy of attention in CAKE's budgets.")
    tau2: float = option(1.0, Number(0.1), "Inverse power of its variance over queries in CAKE's budgets.")
    preferences: Tensor | None = field(default=None, compare=False)

    @property
    def needs(self) -> Needs:
        """The queries of the window."""
        return Needs(queries=OBSERVED)

    def seeing(self, view: CacheView) -> Allocation:
        """The same, with each layer's preference, float64 [L]."""
        before, found = view.stored & ~view.newest(OBSERVED), []
        for layer, paid in enumerate(view.paid(OBSERVED)):
            paid *= before[layer][:, None, None]
            mean = paid.mean(1, keepdim=True)
            variance = (paid - mean).square().sum() / max(1, paid.shape[1] - 1)
            found.append(torch.stack([torch.special.entr(paid).sum(), variance]).double())
        entropy, variance = view.ranks.sum(torch.stack(found)).clamp_min(1e-30).unbind(1)
        preferences = entropy ** (1 / self.tau1) * variance ** (1 / self.tau2)
        return replace(self, preferences=preferences.clamp_min_(1e-300))

    def budgets(self, scores: Tensor, view: CacheView, protected: Tensor) -> tuple[Tensor, Tensor | None]:
        """Budgets in proportion to preferences."""
        assert self.preferences is not None
        return _in_proportion(self.preferences, view, protected), None


def _in_proportion(weights: Tensor, view: CacheView, protected: Tensor) -> Tensor:
    """Budgets int32 [L, H] of layers by weight, beside what is protected; their mean is exactly the view's.

    No layer gets more than there is. Heads of a layer get as many.
    """
    heads = view.lengths.shape[1]
    counts = torch.stack([protected.sum((1, 2)), view.lengths.sum(1)])
    weights, always, stored = torch.cat([weights[None], counts]).cpu()
    room, most = view.budget * heads * len(weights) - always.sum(), stored - always
    shares, full = torch.zeros_like(weights), torch.zeros_like(weights, dtype=torch.bool)
    while not full.all():
        left = (room - most[full].sum()) / weights[~full].sum()
        shares = torch.where(full, most, left * weights)
        if not (over := ~full & (shares > most)).any():
            break
        full |= over
    totals = _whole(shares) + always.long()
    keep = totals[:, None] // heads + (torch.arange(heads) < totals[:, None] % heads)
    return upload(keep.int(), view.lengths.device)


def _entropies(scores: Tensor, judged: Tensor) -> Tensor:
    """Entropy of the judged scores [L, H, n] of each layer: float64 [L], above 0."""
    scores, judged = scores.flatten(1).double(), judged.flatten(1) & scores.isfinite().flatten(1)
    lowest = scores.masked_fill(~judged, torch.inf).amin(1, keepdim=True)
    shares = (scores - lowest).masked_fill(~judged, 0.0)
    shares /= shares.sum(1, keepdim=True).clamp_min(1e-30)
    terms: Tensor = torch.special.entr(shares)
    return terms.sum(1).clamp_min(1e-6)


def _whole(shares: Tensor) -> Tensor:
    """Shares float64 [L] in whole tokens, rounded so that their sum stays."""
    ends = (shares.cumsum(0) + 1e-9).round().long()
    return ends.diff(prepend=ends.new_zeros(1))


ALLOCATIONS: dict[str, Allocation] = {
    kind.name: kind for kind in (Uniform(), Adaptive(), Global(), Pyramid(), Entropy(), Cake())
}
"""Every allocation with its defaults, by the name that a request gives it."""
