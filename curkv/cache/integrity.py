"""The invariants of the cache, checked for all pages at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from curkv.cache.page_pool import Ids

if TYPE_CHECKING:
    from curkv.cache.kv_cache import KVCache


class IntegrityError(RuntimeError):
    """The cache's books do not agree with each other; the message says where."""


def check_integrity(cache: KVCache) -> None:
    """Checks that pages, owners, lengths and positions fit together.

    Every page is free or owned; reference counts equal owners; lengths fit pages; positions ascend within a
    head; no page lies in two heads (a fork shares pages with the same layer and head of its origin only); a
    shared page is full. Positions are those stored, so call it between steps, not between `extend` and
    `attend`.

    Args:
        cache: the cache to check.

    Raises:
        IntegrityError: the first invariant that does not hold.
    """
    _check_lengths(cache)
    slot, layer, head, page = _owned(cache)
    ids = cache.page_table[slot, layer, head, page].numpy(force=True)
    _check_owners(cache, ids)
    where = layer * cache.layout.num_kv_heads + head
    _check_sharing(cache, ids, slot, where)
    tokens = cache.lengths.numpy(force=True)[slot, layer, head] - page * cache.layout.page_size
    _check_shared_full(cache, ids, tokens)
    _check_positions(cache, ids, tokens, slot * cache.layout.num_heads + where)


def _require(condition: NDArray[np.bool_], message: str) -> None:
    """Raises when an element of `condition` is false; `{}` in the message becomes the first such index."""
    if not condition.all():
        raise IntegrityError(message.format(", ".join(map(str, np.argwhere(~condition)[0]))))


def _owned(cache: KVCache) -> tuple[NDArray[np.int64], ...]:
    """Gives slot, layer, head and page index [n] of every owned page, in this order."""
    return (np.arange(cache.layout.max_pages) < cache.page_counts[..., None]).nonzero()


def _check_lengths(cache: KVCache) -> None:
    lengths, size = cache.lengths.numpy(force=True), cache.layout.page_size
    inside = (lengths >= 0) & (lengths <= cache.layout.max_tokens)
    _require(inside, "length out of range at (slot, layer, head) {}")
    fits = cache.page_counts == (lengths + size - 1) // size
    _require(fits, "page count does not fit length at (slot, layer, head) {}")
    idle = np.ones(cache.layout.max_sequences, dtype=np.bool_)
    idle[cache.active_slots] = False
    _require(~idle | (lengths == 0).all(axis=(1, 2)), "slot {} is not in use but holds tokens")
    if idle.sum() != cache.free_slots:
        raise IntegrityError(f"{cache.free_slots} slots are free but {idle.sum()} are not in use")


def _check_owners(cache: KVCache, ids: Ids) -> None:
    pool, num_pages = cache.pool, cache.num_pages
    _require((ids >= 0) & (ids < num_pages), "the table names a page outside the pool (entry {})")
    owners = np.bincount(ids, minlength=num_pages)
    free = np.bincount(pool.free_pages, minlength=num_pages)
    _require(free <= 1, "page {} is in the free list twice")
    _require((free == 0) | (owners == 0), "page {} is free but a sequence owns it")
    _require(pool.owners == owners, "reference count of page {} differs from its owners")
    _require((free == 1) | (owners > 0), "page {} is neither free nor owned")


def _check_sharing(cache: KVCache, ids: Ids, slot: NDArray[np.int64], where: NDArray[np.int64]) -> None:
    home = np.full(cache.num_pages, -1)
    home[ids] = where
    _require(home[ids] == where, "a page lies in two heads (entry {})")
    pairs = np.sort(ids.astype(np.int64) * cache.layout.max_sequences + slot)
    _require(pairs[1:] != pairs[:-1], "a page lies twice in the same head of a sequence (entry {})")


def _check_shared_full(cache: KVCache, ids: Ids, tokens: NDArray[np.int64]) -> None:
    full = tokens >= cache.layout.page_size
    _require((cache.pool.owners[ids] <= 1) | full, "a shared page is not full (entry {})")


def _check_positions(cache: KVCache, ids: Ids, tokens: NDArray[np.int64], row: NDArray[np.int64]) -> None:
    """Entries follow each other page by page within a row, so neighbours can be compared."""
    position = cache.pages.position[torch.from_numpy(ids)].numpy(force=True)
    ascends = position[:, 1:] > position[:, :-1]
    beyond = np.arange(1, cache.layout.page_size) >= tokens[:, None]
    _require(ascends | beyond, "positions do not ascend within a page (entry, token) {}")
    crosses = position[1:, 0] > position[:-1, -1]
    _require(crosses | (row[1:] != row[:-1]), "positions do not ascend from page to page (entry {})")
