"""What a policy sees of a sequence's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from curkv.cache.observations import Observations
from curkv.kernels.formats.base import Store
from curkv.kernels.paged_decode_attention.reference import softcapped, with_sinks
from curkv.kernels.pages import Pages
from curkv.ranks import ALONE, Ranks


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
        frame: First positions that a chat template wrote, whatever is said behind them; 0 without one.
        observations: Of the sequence's queries, if its policy needs them.
        rope: By layer: cos and sin, float32 [positions, head_dim / 2] each.
        output_projection: Gives a layer's W_o, float32 [Hq, head_dim, hidden].
        output_gram: Gives a layer's W_o W_o^T by query head, float32 [Hq, head_dim, head_dim].
        softcap: Scaled scores x become softcap tanh(x / softcap); None: they do not.
        sinks: By layer: float32 [Hq], the score of one more token whose value is 0; empty: there are none.
        repetition: If its policy needs that, the most attention that each stored token received while the
            model repeated the text, float32 [L, H, n_max].
        draft: If its policy needs that, and the prompt is at its end, the most attention that each stored
            token receives from a drafted answer, float32 [L, H, n_max].
        ranks: The processes that share the heads: H are those of this one.
    """

    pages: Pages
    table: Tensor
    lengths: Tensor
    width: int
    seed: int = 0
    phase: Literal["prefill", "decode"] = "prefill"
    round: int = 0
    budget: int = 0
    frame: int = 0
    observations: Observations | None = None
    rope: Sequence[tuple[Tensor, Tensor]] | None = None
    output_projection: Callable[[int], Tensor] | None = None
    output_gram: Callable[[int], Tensor] | None = None
    softcap: float | None = None
    sinks: Sequence[Tensor] = ()
    repetition: Tensor | None = None
    draft: Tensor | None = None
    ranks: Ranks = ALONE

    def whole(self, x: Tensor) -> Tensor:
        """What [L, H, ...] is of the heads of all processes; all have to ask."""
        return self.ranks.whole(x, 1)

    def own(self, x: Tensor) -> Tensor:
        """This process's heads of [L, heads of all, ...]."""
        return self.ranks.own(x, 1)

    @property
    def of_all_heads(self) -> CacheView:
        """The same with the lengths of the heads of all processes; of what they hold it has nothing."""
        return self if self.ranks.size == 1 else replace(self, lengths=self.whole(self.lengths), ranks=ALONE)

    @property
    def num_layers(self) -> int:
        """Layers that are evicted from, L."""
        return self.lengths.shape[0]

    @property
    def num_heads(self) -> int:
        """KV heads of a layer in all processes."""
        return self.lengths.shape[1] * self.ranks.size

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
        return blank(tokens, past)

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
        heads, dim = self.lengths.shape[1], self.pages.head_dim
        layers = self._observed.last_queries(count).float()
        by_head = layers.view(*layers.shape[:2], heads, -1, dim).transpose(1, 2)
        return by_head.flatten(0, 1).contiguous()

    def paid(self, count: int) -> Iterator[Tensor]:
        """What each of the last `count` queries pays each token: by layer, float32 [H, w, group, n_max]."""
        heads, position = self.lengths.shape[1], self.position
        queries = self.queries(count)
        queries = queries.view(self.num_layers, heads, *queries.shape[1:])
        window = queries.shape[2]
        before = torch.arange(window - 1, -1, -1, device=position.device)
        for layer in range(self.num_layers):
            asked = queries[layer].flatten(1, 2) * self.scale
            logits = softcapped(asked @ self.keys(layer).transpose(1, 2), self.softcap)
            logits = logits.view(heads, window, -1, self.width)
            newest = position[layer].amax(-1, keepdim=True) - before
            hidden = (position[layer][:, None] > newest[..., None]) | (position[layer] < 0)[:, None]
            # Adding a mask of numbers is three times as fast as filling in by one of bits.
            logits += torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)[
                :, :, None
            ]
            if self.sinks:
                logits = with_sinks(logits, self.sinks[layer].view(heads, 1, -1))
            yield logits.softmax(-1)[..., : self.width].nan_to_num_(0.0)

    def chunk(self) -> tuple[Tensor, Tensor]:
        """The newest chunk's queries as attention took them, by KV head, and their log-sum-exp.

        Returns:
            [L * H, T, group, head_dim] and float32 [L * H, T, group].
        """
        observed, heads = self._observed.chunk, self.lengths.shape[1]
        queries, lse = (
            torch.stack(layers) for layers in zip(*(observed[i] for i in range(self.num_layers)), strict=True)
        )
        by_head = *lse.shape[:2], heads, lse.shape[2] // heads
        queries, lse = queries.view(*by_head, -1), lse.view(by_head)
        return queries.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)

    @property
    def sink_rows(self) -> Tensor | None:
        """Sinks by KV head, as `window_scores` takes them: float32 [L * H, group]; None: there are none."""
        return torch.cat(tuple(self.sinks)).view(self.lengths.numel(), -1) if self.sinks else None

    @property
    def _observed(self) -> Observations:
        if self.observations is None:
            raise ValueError("the sequence's queries were not observed; see `PageManager.add_sequence`")
        return self.observations

    def generator(self) -> torch.Generator:
        """A random generator for this request and round, on the CPU: it draws the same for every device."""
        return torch.Generator().manual_seed(mix(self.seed, self.round))


def blank(vectors: Tensor, gone: Tensor) -> Tensor:
    """Write zeros over float32 [..., d] where bool [...] says so, whatever is there.

    By bits, which processors do several times faster than `masked_fill_` with a mask for whole rows.
    """
    vectors.view(torch.int32).bitwise_and_(gone.int()[..., None] - 1)
    return vectors


def mix(seed: int, round: int) -> int:
    """Derive the seed of one eviction from the request's: SplitMix64, so that neighbours are unrelated."""
    x = (seed + (round + 1) * 0x9E3779B97F4A7C15) & (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return (x ^ x >> 31) >> 1
