"""What an eviction policy is, and what it sees of a sequence's cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from curkv.cache.allocation import ALLOCATIONS, Allocation
from curkv.cache.declarations import Choice, Configurable, Integer, option, unless
from curkv.cache.observations import Needs, Observations
from curkv.kernels.formats.base import Store
from curkv.kernels.pages import Pages

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels

POOLING = Integer(1, 1023, odd=True)
"""The sizes that a pooling may have."""


@dataclass(frozen=True)
class CacheView:
    """One sequence's part of the cache, all layers at once; policies read it and write nothing.

    Attributes:
        pages: The page pool.
        table: int32 [L, H, max_pages], pages of each head.
        lengths: int32 [L, H], tokens of each head.
        width: Tokens of the longest head, n_max, as the host knows.
        seed: Seed of the request, for policies that draw random numbers.
        phase: "prefill" while the prompt is computed, "decode" after an interval of generated tokens.
        round: Evictions of the sequence so far; a new one draws new random numbers.
        budget: Tokens per head, on average, that this eviction leaves.
        observations: Of the sequence's queries, if its policy needs them.
        rope: By layer: cos and sin, float32 [positions, head_dim / 2] each.
        output_projection: Gives a layer's W_o, float32 [Hq, head_dim, hidden].
    """

    pages: Pages
    table: Tensor
    lengths: Tensor
    width: int
    seed: int = 0
    phase: Literal["prefill", "decode"] = "prefill"
    round: int = 0
    budget: int = 0
    observations: Observations | None = None
    rope: Sequence[tuple[Tensor, Tensor]] | None = None
    output_projection: Callable[[int], Tensor] | None = None

    @property
    def num_layers(self) -> int:
        """Layers of the model, L."""
        return self.lengths.shape[0]

    @property
    def stored(self) -> Tensor:
        """bool [L, H, n_max], False past a head's length."""
        return torch.arange(self.width, device=self.lengths.device) < self.lengths[..., None]

    @property
    def position(self) -> Tensor:
        """int32 [L, H, n_max], logical positions, -1 past a head's length."""
        return self.gather(self.pages.position, -1)

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Table [L * H, max_pages] and lengths [L * H], one head a row."""
        return self.table.flatten(0, 1), self.lengths.flatten()

    @property
    def scale(self) -> float:
        """Factor of attention scores."""
        return float(self.pages.head_dim**-0.5)

    def gather(self, side: Tensor, fill: float) -> Tensor:
        """Read one of the pages' per-token side arrays.

        Args:
            side: [num_pages, page_size], for example `pages.position`.
            fill: Value past a head's length.

        Returns:
            [L, H, n_max] in the dtype of `side`.
        """
        used = -(-self.width // side.shape[1])
        pages = self.table[..., :used].clamp(0, len(side) - 1)
        tokens = side.index_select(0, pages.flatten()).view(*pages.shape[:2], -1)
        return tokens[..., : self.width].masked_fill_(~self.stored, fill)

    def keys(self, layer: int) -> Tensor:
        """A layer's keys: float32 [H, n_max, head_dim], 0 past a head's length."""
        return self._vectors(self.pages.k, layer)

    def values(self, layer: int) -> Tensor:
        """A layer's values: float32 [H, n_max, head_dim], 0 past a head's length."""
        return self._vectors(self.pages.v, layer)

    def _vectors(self, store: Store, layer: int) -> Tensor:
        used = -(-self.width // self.pages.page_size)
        pages = self.table[layer, :, :used].clamp(0, len(self.pages.position) - 1)
        past = torch.arange(self.width, device=pages.device) >= self.lengths[layer, :, None]
        tokens = store.read(pages.flatten()).view(len(pages), -1, store.head_dim)[:, : self.width]
        return tokens.masked_fill_(past[..., None], 0.0)

    def newest(self, count: int) -> Tensor:
        """Tell the tokens of the newest `count` positions: bool [L, H, n_max]."""
        position = self.position
        return (position > position.max() - count) & (position >= 0)

    def queries(self, count: int) -> Tensor:
        """The last queries after RoPE, by KV head.

        Args:
            count: How many tokens' queries; fewer, if fewer were computed.

        Returns:
            float32 [L * H, w, group, head_dim].
        """
        observed = self._observed.queries
        heads, dim = self.lengths.shape[1], self.pages.head_dim
        layers = torch.stack([observed[layer][-count:] for layer in range(self.num_layers)]).float()
        by_head = layers.view(*layers.shape[:2], heads, -1, dim).transpose(1, 2)
        return by_head.flatten(0, 1).contiguous()

    @property
    def _observed(self) -> Observations:
        if self.observations is None:
            raise ValueError("the sequence's queries were not observed; see `PageManager.add_sequence`")
        return self.observations

    def generator(self) -> torch.Generator:
        """A random generator for this request and round, on the CPU: it draws the same for every device."""
        return torch.Generator().manual_seed(mix(self.seed, self.round))


def mix(seed: int, round: int) -> int:
    """Derive the seed of one eviction from the request's: SplitMix64, so that neighbours are unrelated."""
    x = (seed + (round + 1) * 0x9E3779B97F4A7C15) & (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return (x ^ x >> 31) >> 1


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
