"""The invariants of the cache, checked for all pages at once."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from curkv.cache.page_manager import PageManager
from curkv.cache.page_pool import Ids


class IntegrityError(RuntimeError):
    """The records of who owns which page contradict each other; the message says where."""


def check_integrity(cache: PageManager) -> None:
    """Checks that pages, owners, lengths and positions fit together.

    Every page is free or owned; reference counts equal owners, sequences and prefixes; lengths fit pages;
    positions ascend within a head; no page lies in two heads (a fork or a prefix shares pages with the same
    layer and head of its origin only); a page that a sequence shares is full. Positions are those stored, so
    call it between steps, not between `extend` and `attend`.

    Args:
        cache: the cache to check.

    Raises:
        IntegrityError: the first invariant that does not hold.
    """
    _check_lengths(cache)
    ids, owner, head, tokens = _owned(cache)
    _check_owners(cache, ids, owner)
    _check_sharing(cache, ids, owner, head)
    _check_shared_full(cache, ids, tokens)
    _check_positions(cache, ids, tokens, owner * cache.layout.num_heads + head)


def _require(condition: NDArray[np.bool_], message: str) -> None:
    """Raises when an element of `condition` is false; `{}` in the message becomes the first such index."""
    if not condition.all():
        raise IntegrityError(message.format(", ".join(map(str, np.argwhere(~condition)[0]))))


def _owned(cache: PageManager) -> tuple[Ids, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Lists the pages of every head of every sequence, then of every prefix, in the order of their tokens.

    Returns:
        ids: [n], an id for each owner of each page.
        owner: [n], a slot; prefixes count from `max_sequences` on.
        head: [n], over all layers.
        tokens: [n], tokens of the head from this page on.
    """
    layout = cache.layout
    holders = [
        (np.arange(layout.max_sequences), cache.page_table.numpy(force=True), cache.lengths.numpy(force=True))
    ]
    for i, prefix in enumerate(cache.prefixes.all):
        holders.append((np.array([layout.max_sequences + i]), prefix.table[None], prefix.lengths[None]))
    parts = [_owned_by(*holder, layout.page_size) for holder in holders]
    ids, owner, head, tokens = (np.concatenate(part) for part in zip(*parts, strict=True))
    return ids, owner, head, tokens


def _owned_by(
    owners: NDArray[np.int64], table: Ids, lengths: NDArray[np.int32], page_size: int
) -> tuple[Ids, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """`_owned` of some owners [n], from their table [n, L, H, pages] and lengths [n, L, H]."""
    left = lengths[..., None] - np.arange(table.shape[-1]) * page_size
    owner, layer, head, page = (left > 0).nonzero()
    tokens = left[owner, layer, head, page]
    return table[owner, layer, head, page], owners[owner], layer * table.shape[2] + head, tokens


def _check_lengths(cache: PageManager) -> None:
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


def _check_owners(cache: PageManager, ids: Ids, owner: NDArray[np.int64]) -> None:
    pool, num_pages = cache.pool, cache.num_pages
    _require((ids >= 0) & (ids < num_pages), "the table names a page outside the pool (entry {})")
    owners = np.bincount(ids, minlength=num_pages)
    held = np.bincount(ids[owner >= cache.layout.max_sequences], minlength=num_pages)
    free = np.bincount(pool.free_pages, minlength=num_pages)
    _require(free <= 1, "page {} is in the free list twice")
    _require((free == 0) | (owners == 0), "page {} is free but has an owner")
    _require(pool.owners == owners, "reference count of page {} differs from its owners")
    _require(pool.held == held, "count of the prefixes that hold page {} differs from those that do")
    _require((free == 1) | (owners > 0), "page {} is neither free nor owned")
    if pool.num_idle != np.count_nonzero(owners == held) or cache.prefixes.held_pages != held.sum():
        raise IntegrityError("the numbers of idle and of held pages do not follow from the owners")


def _check_sharing(cache: PageManager, ids: Ids, owner: NDArray[np.int64], head: NDArray[np.int64]) -> None:
    home = np.full(cache.num_pages, -1)
    home[ids] = head
    _require(home[ids] == head, "a page lies in two heads (entry {})")
    pairs = np.sort(owner * cache.num_pages + ids)
    _require(pairs[1:] != pairs[:-1], "a page lies twice in the same head of a sequence (entry {})")


def _check_shared_full(cache: PageManager, ids: Ids, tokens: NDArray[np.int64]) -> None:
    full, pool = tokens >= cache.layout.page_size, cache.pool
    written = pool.owners[ids] > pool.held[ids]
    _require((pool.owners[ids] <= 1) | full | ~written, "a shared page is not full (entry {})")


def _check_positions(cache: PageManager, ids: Ids, tokens: NDArray[np.int64], row: NDArray[np.int64]) -> None:
    """Entries follow each other page by page within a row, so neighbours can be compared."""
    position = cache.pages.position[torch.from_numpy(ids)].numpy(force=True)
    ascends = position[:, 1:] > position[:, :-1]
    beyond = np.arange(1, cache.layout.page_size) >= tokens[:, None]
    _require(ascends | beyond, "positions do not ascend within a page (entry, token) {}")
    crosses = position[1:, 0] > position[:-1, -1]
    _require(crosses | (row[1:] != row[:-1]), "positions do not ascend from page to page (entry {})")
