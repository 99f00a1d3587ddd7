"""The invariants of the cache, checked for all pages at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from curkv.cache.layout import longest, shortest
from curkv.cache.page_manager import PageManager
from curkv.cache.page_pool import Ids
from curkv.cache.upload import upload_list


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
    owned = _owned(cache)
    _check_owners(cache, owned.ids, owned.owner)
    _check_sharing(cache, owned.ids, owned.owner, owned.table)
    _check_shared_full(cache, owned.ids, owned.least)
    _check_positions(cache, owned)


@dataclass(frozen=True)
class _Owned:
    """The pages of every head of every sequence, then of every prefix, in the order of their tokens.

    Attributes:
        ids: [n], an id for each owner of each page.
        owner: [n], a slot; prefixes count from `max_sequences` on.
        table: [n], of which of an owner's lists of pages it is, over all layers.
        least: [n], tokens from this page on, of the head that has fewest of those that share it.
        own: [n], the same of the head that is this process's.
    """

    ids: Ids
    owner: NDArray[np.int64]
    table: NDArray[np.int64]
    least: NDArray[np.int64]
    own: NDArray[np.int64]


def _require(condition: NDArray[np.bool_], message: str) -> None:
    """Raises when an element of `condition` is false; `{}` in the message becomes the first such index."""
    if not condition.all():
        raise IntegrityError(message.format(", ".join(map(str, np.argwhere(~condition)[0]))))


def _owned(cache: PageManager) -> _Owned:
    slots, active = cache.layout.max_sequences, cache.active_slots
    table = cache.page_table[upload_list(active, cache.device)].numpy(force=True)  # the others hold nothing
    holders = [(np.array(active, dtype=np.int64), table, cache.all_lengths[active])]
    for i, prefix in enumerate(cache.prefixes.all):
        holders.append((np.array([slots + i]), prefix.table[None], prefix.lengths[None]))
    parts = [_owned_by(cache, *holder) for holder in holders]
    return _Owned(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _owned_by(
    cache: PageManager, owners: NDArray[np.int64], table: Ids, lengths: NDArray[np.int32]
) -> tuple[NDArray[Any], ...]:
    """`_owned` of some owners [n], from their table [n, L, tables, pages] and lengths [n, L, H]."""
    pages = -(-int(lengths.max(initial=0)) // cache.layout.page_size)
    tables, before = table.shape[2], np.arange(pages) * cache.layout.page_size
    places = (longest(lengths, tables)[..., None] > before).nonzero()
    owner, layer, row, page = places
    own = lengths[..., cache.ranks.share(lengths.shape[-1])]
    least, own = (x[owner, layer, row] - before[page] for x in (shortest(lengths, tables), own))
    return table[places], owners[owner], layer * tables + row, least, own


def _check_lengths(cache: PageManager) -> None:
    lengths, layout = cache.all_lengths, cache.layout
    told = cache.lengths.numpy(force=True) == lengths[..., cache.ranks.share(layout.num_kv_heads)]
    _require(told, "the kernels read another length at (slot, layer, head) {}")
    inside = (lengths >= 0) & (lengths <= layout.max_tokens)
    _require(inside, "length out of range at (slot, layer, head) {}")
    pages = -(-longest(lengths, layout.row_tables) // layout.page_size)
    fits = cache.page_counts == pages
    _require(fits, "page count does not fit length at (slot, layer, head) {}")
    idle = np.ones(layout.max_sequences, dtype=np.bool_)
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


def _check_positions(cache: PageManager, owned: _Owned) -> None:
    """Entries follow each other page by page within a row, so neighbours can be compared."""
    held = owned.own > 0
    tokens, row = owned.own[held], (owned.owner * cache.layout.num_tables + owned.table)[held]
    position = cache.pages.position[torch.from_numpy(owned.ids[held])].numpy(force=True)
    ascends = position[:, 1:] > position[:, :-1]
    beyond = np.arange(1, cache.layout.page_size) >= tokens[:, None]
    _require(ascends | beyond, "positions do not ascend within a page (entry, token) {}")
    crosses = position[1:, 0] > position[:-1, -1]
    _require(crosses | (row[1:] != row[:-1]), "positions do not ascend from page to page (entry {})")
