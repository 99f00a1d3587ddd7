"""What an eviction policy is, and what it sees of a sequence's cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from curkv.kernels.pages import Pages

if TYPE_CHECKING:
    from curkv.cache.options import EvictionOptions
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True)
class Needs:
    """What a policy reads besides the pages.

    Attributes:
        queries: Queries of that many last tokens.
        column_sums: The attention each token received from all queries.
    """

    queries: int = 0
    column_sums: bool = False

    @property
    def query_agnostic(self) -> bool:
        """Whether keys and values alone decide what is kept, so that a compressed prefix can be reused."""
        return not self.queries and not self.column_sums


@dataclass(frozen=True)
class CacheView:
    """One sequence's part of the cache, all layers at once; policies read it and write nothing.

    Attributes:
        pages: The page pool.
        table: int32 [L, H, max_pages], pages of each head.
        lengths: int32 [L, H], tokens of each head.
        seed: Seed of the request, for policies that draw random numbers.
        phase: "prefill" after the last chunk of the prompt, "decode" after an interval of generated tokens.
        round: Evictions of the sequence so far; a new one draws new random numbers.
    """

    pages: Pages
    table: Tensor
    lengths: Tensor
    seed: int = 0
    phase: Literal["prefill", "decode"] = "prefill"
    round: int = 0

    @property
    def width(self) -> int:
        """Tokens of the longest head, n_max."""
        return int(self.lengths.max())

    @property
    def stored(self) -> Tensor:
        """bool [L, H, n_max], False past a head's length."""
        return torch.arange(self.width, device=self.lengths.device) < self.lengths[..., None]

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

    def generator(self) -> torch.Generator:
        """A random generator for this request and round."""
        return torch.Generator(self.lengths.device).manual_seed(mix(self.seed, self.round))


def mix(seed: int, round: int) -> int:
    """Derive the seed of one eviction from the request's: SplitMix64, so that neighbours are unrelated."""
    x = (seed + (round + 1) * 0x9E3779B97F4A7C15) & (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return (x ^ x >> 31) >> 1


class Policy(Protocol):
    """Scores stored tokens; who keeps how many is decided by the allocation, and the cache moves them.

    Attributes:
        name: As a request names it. description: One line for `curkv model policies`. needs: What it reads
        besides the pages. allocation: "uniform" gives every head the same number of tokens, "adaptive" shares
        a layer's among its heads. published_sinks: First tokens it always keeps under the presets that follow
        a publication. reads: Options, of those that not every policy has, that change its outcome.
    """

    name: str
    description: str
    needs: Needs
    allocation: Literal["uniform", "adaptive"]
    published_sinks: int
    reads: frozenset[str]

    def score(self, view: CacheView, options: EvictionOptions, kernels: Kernels) -> Tensor:
        """Score every stored token.

        Args:
            view: The sequence.
            options: The request's options, with the preset filled in.
            kernels: Operations on pages.

        Returns:
            float32 [L, H, n_max], higher is kept, -inf past a head's length.
        """
        ...
