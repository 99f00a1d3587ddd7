"""Shape and size of a KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from curkv.kernels.formats.base import KVFormat
from curkv.kernels.pages import SIDE_BYTES


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What a layer of the model keeps in the cache.

    Attributes:
        num_kv_heads: KV heads; 0 for a layer without keys and values.
        window: newest tokens that a query attends to, its own included; None: all of them.
    """

    num_kv_heads: int
    window: int | None = None


@dataclass(frozen=True)
class CacheLayout:
    """The shape of a cache.

    Layers that attend to everything are what policies evict from, and what tokens per head are counted in;
    those with a window hold its tokens, and a page and a step more. Where all have a window, policies evict
    from them.

    Attributes:
        layers: every layer of the model; those with KV heads have equally many.
        head_dim: channels of a key or value.
        page_size: tokens per page.
        format: how keys and values lie in memory.
        max_sequences: sequences held at once.
        max_tokens: most tokens that a head of one sequence can hold.
        max_step_tokens: most tokens that a step adds to one sequence; None: `max_tokens`.
        shards: processes among which the KV heads of each layer are divided. A page holds tokens of one head
            in each of them, so that all keep the same books; it is taken when the first of these needs it.
    """

    layers: tuple[LayerSpec, ...]
    head_dim: int
    page_size: int
    format: KVFormat
    max_sequences: int
    max_tokens: int
    max_step_tokens: int | None = None
    shards: int = 1

    def __post_init__(self) -> None:
        """Refuses layers that one table cannot hold."""
        heads = {spec.num_kv_heads for spec in self.layers} - {0}
        if len(heads) != 1:
            raise ValueError(f"layers need one number of KV heads beside 0, these have {sorted(heads)}")
        if self.num_kv_heads % self.shards:
            raise ValueError(f"{self.num_kv_heads} KV heads cannot be divided among {self.shards} processes")
        windows = [spec.window for spec in self.layers if spec.window is not None]
        if min(windows, default=1) < 1:
            raise ValueError(f"a window holds at least the query's own token, not {min(windows)}")

    @cached_property
    def cached_layers(self) -> tuple[int, ...]:
        """The layers that have KV heads, which are the rows of a page table, in their order."""
        return tuple(i for i, spec in enumerate(self.layers) if spec.num_kv_heads)

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """Window of each row of a page table."""
        return tuple(self.layers[i].window for i in self.cached_layers)

    @cached_property
    def evicted_rows(self) -> tuple[int, ...]:
        """Rows of the layers that policies evict from: those that attend to everything, else all."""
        full = tuple(row for row, window in enumerate(self.windows) if window is None)
        return full or tuple(range(self.num_layers))

    @cached_property
    def evicts_from_windows(self) -> bool:
        """Whether policies evict from layers with a window."""
        return None not in self.windows

    @cached_property
    def _uneven(self) -> bool:
        """Whether layers that policies evict from are cut to different lengths by their windows."""
        return self.evicts_from_windows and len(set(self.windows)) > 1

    @cached_property
    def num_layers(self) -> int:
        """Layers that have KV heads."""
        return len(self.cached_layers)

    @cached_property
    def num_kv_heads(self) -> int:
        """KV heads of a layer that has any."""
        return max(spec.num_kv_heads for spec in self.layers)

    @cached_property
    def num_heads(self) -> int:
        """KV heads of all layers together."""
        return self.num_layers * self.num_kv_heads

    @cached_property
    def row_tables(self) -> int:
        """Lists of pages that a sequence has in each layer: one for the heads that share pages."""
        return self.num_kv_heads // self.shards

    @cached_property
    def num_tables(self) -> int:
        """Lists of pages of a sequence in all layers together."""
        return self.num_layers * self.row_tables

    @property
    def max_pages(self) -> int:
        """Pages that a head of one sequence can hold."""
        return -(-self.max_tokens // self.page_size)

    @property
    def head_token_bytes(self) -> int:
        """Bytes of one token in one head, side arrays included."""
        return self.format.token_bytes(self.head_dim) + SIDE_BYTES

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in every head of every layer."""
        return self.num_heads * self.head_token_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, in all processes together."""
        return self.page_size * self.head_token_bytes * self.shards

    def sequence_pages(self, tokens: int, *, ragged: bool = False, seen: int | None = None) -> int:
        """Most pages of a sequence.

        Args:
            tokens: what heads hold on average in the layers that policies evict from.
            ragged: these heads may hold different numbers of tokens: then each may strand almost a page.
            seen: tokens that went through the cache, of which those layers hold a part and those with a
                window the newest; `tokens` unless told.

        Returns:
            The number of pages; exact for layers that attend to everything and are not ragged.
        """
        seen = tokens if seen is None else seen
        tables, size = len(self.evicted_rows) * self.row_tables, self.page_size
        pages = tables * -(-seen // size)
        if ragged or self._uneven:
            pages = min(pages, tables * (self.shards * tokens + size - 1) // size)
        else:
            pages = min(pages, tables * -(-tokens // size))
        windows = self._window_pages(seen, evicted=self.evicts_from_windows and tokens < seen)
        return min(pages, windows) if self.evicts_from_windows else pages + windows

    def sequence_tokens(self, pages: int, *, ragged: bool = False) -> int:
        """Most tokens per head, on average, that a sequence can hold in so many pages.

        Args:
            pages: what it may take, layers with windows included.
            ragged: heads of a layer may hold different numbers of tokens; counts with their worst split.

        Returns:
            Tokens per head of the layers that policies evict from; below 1 if there is not room for one.
        """
        windows = self._window_pages(self.max_tokens, evicted=self.evicts_from_windows)
        if self.evicts_from_windows and pages >= windows:
            return self.max_tokens
        left = pages if self.evicts_from_windows else pages - windows
        layer_pages, size = left // len(self.evicted_rows), self.page_size
        if ragged or self._uneven:
            return (layer_pages * size // self.row_tables - (size - 1)) // self.shards
        return layer_pages // self.row_tables * size

    def _window_pages(self, seen: int, evicted: bool) -> int:
        """Most pages that the layers with windows hold after so many tokens, until they are trimmed.

        Those that were evicted from are not trimmed before a window more has been stored.
        """
        step = self.max_tokens if self.max_step_tokens is None else self.max_step_tokens
        reach = [(window - 1) * (2 if evicted else 1) for window in self.windows if window is not None]
        most = [tokens + self.page_size - 1 + step for tokens in reach]
        return self.row_tables * sum(-(-min(seen, tokens) // self.page_size) for tokens in most)


def full_attention(num_layers: int, num_kv_heads: int) -> tuple[LayerSpec, ...]:
    """Layers that all attend to everything."""
    return (LayerSpec(num_kv_heads),) * num_layers


def longest(lengths: NDArray[np.int32], tables: int) -> NDArray[np.int32]:
    """Of lengths [..., H] those of the longest among the heads that share pages: [..., tables]."""
    *others, heads = lengths.shape
    if heads == tables:
        return lengths
    most: NDArray[np.int32] = lengths.reshape(*others, heads // tables, tables).max(-2)
    return most


def shortest(lengths: NDArray[np.int32], tables: int) -> NDArray[np.int32]:
    """Of lengths [..., H] those of the shortest among the heads that share pages: [..., tables]."""
    return -longest(-lengths, tables)
