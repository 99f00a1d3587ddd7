"""Prefixes of prompts that outlive the sequences that computed them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from curkv.cache.page_pool import Ids, PagePool

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Prefix:
    """What every head holds of the first tokens of a prompt, or of a block of them.

    Attributes:
        table: int32 [L, H, n], pages of each head.
        lengths: int32 [L, H], tokens of each head.
        pages: int32 [pages], those of the table that are cached.
        tokens: prompt tokens that it stands for, kept or not.
        evictions: how often its tokens have been evicted from.
    """

    table: Ids
    lengths: NDArray[np.int32]
    pages: Ids
    tokens: int
    evictions: int = 0


class PrefixCache:
    """Pages cached for prompts to come, by keys that stand for their tokens and all that has shaped them.

    Plain prefixes are cached in blocks: a page of every head, with the K and V of `page_size` tokens whose
    key depends on all tokens before them. Of the block behind the last one that fits, a prompt gets those
    first tokens that do. Compressed prefixes are cached as a whole. A page that a sequence owns as well is
    cached in name only. What is cached gives way, least recently used first, where sequences need pages and
    where it exceeds its limit; a block is always dropped before those that it continues.

    Attributes:
        max_pages: most pages cached; 0: nothing is.
        held_pages: pages cached; one that two prefixes share counts for both.
    """

    def __init__(self, pool: PagePool, max_pages: int) -> None:
        self.max_pages = max_pages
        self.held_pages = 0
        self._pool = pool
        self._entries: OrderedDict[Hashable, Prefix] = OrderedDict()
        self._following: dict[Hashable, dict[Hashable, Tokens]] = {}
        self._before: dict[Hashable, Hashable] = {}

    @property
    def all(self) -> list[Prefix]:
        """Everything cached, least recently used first."""
        return list(self._entries.values())

    def find(self, key: Hashable) -> Prefix | None:
        """Gives the prefix under a key."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def find_blocks(self, keys: Sequence[Hashable], tokens: Sequence[int] = ()) -> Prefix | None:
        """Gives the longest plain prefix.

        Args:
            keys: of the blocks of a prompt, in their order; see `block_keys`.
            tokens: the prompt as far as it may be that of others; without it whole blocks are found.

        Returns:
            The blocks cached from the first one on, put together, and the first tokens of one more; None if
            not even the first block is cached. Its pages are those of whole blocks.
        """
        found = [block for block in takewhile(lambda b: b is not None, map(self._entries.get, keys)) if block]
        for key in reversed(keys[: len(found)]):
            self._entries.move_to_end(key)
        if not found:
            return None
        whole = found[0].tokens * len(found)
        next_key, common = self._closest(keys[len(found) - 1], tokens[whole:][: found[0].tokens])
        further = [self._entries[next_key]] if common else []
        return Prefix(
            table=np.concatenate([block.table for block in [*found, *further]], axis=-1),
            lengths=found[0].lengths * len(found) + np.int32(common),
            pages=np.concatenate([block.pages for block in found]),
            tokens=whole + common,
        )

    def _closest(self, key: Hashable, tokens: Sequence[int]) -> tuple[Hashable, int]:
        """The block cached behind one that begins with most of the tokens, and with how many."""
        wanted = np.asarray(tokens, dtype=np.int64)
        best: tuple[Hashable, int] = (None, 0)
        for block, held in self._following.get(key, {}).items():
            different = np.flatnonzero(held[: len(wanted)] != wanted)
            common = int(different[0]) if len(different) else len(wanted)
            if common > best[1]:
                best = block, common
        return best

    def insert(self, key: Hashable, prefix: Prefix) -> None:
        """Holds a prefix, whose pages are in use; one that is larger than the limit is left alone."""
        if key in self._entries or len(prefix.pages) > self.max_pages:
            return
        self._pool.share(prefix.pages, held=True)
        self._entries[key] = prefix
        self.held_pages += len(prefix.pages)
        self._shrink()

    def insert_blocks(
        self, keys: Sequence[Hashable], table: Ids, page_size: int, tokens: Sequence[int] = ()
    ) -> None:
        """Holds the first blocks of a prompt, as many as the limit allows.

        Args:
            keys: of the blocks, in their order.
            table: int32 [L, H, len(keys)], full pages in use.
            page_size: tokens of a page.
            tokens: the prompt; without it the blocks are found whole or not at all.
        """
        keys = keys[: self.max_pages // table[..., 0].size]
        new = [i for i, key in enumerate(keys) if key not in self._entries]
        self._pool.share(table[..., new].reshape(-1), held=True)
        self.held_pages += table[..., new].size
        lengths = np.full(table.shape[:2], page_size, dtype=np.int32)
        for i in new:
            block = table[..., i : i + 1].copy()
            self._entries[keys[i]] = Prefix(block, lengths, block.reshape(-1), page_size)
            if i and tokens:
                held = np.asarray(tokens[i * page_size :][:page_size], dtype=np.int64)
                self._following.setdefault(keys[i - 1], {})[keys[i]] = held
                self._before[keys[i]] = keys[i - 1]
        for key in reversed(keys):
            self._entries.move_to_end(key)
        self._shrink()

    def drop(self, pages: int | None = None) -> int:
        """Drops prefixes that sequences do not use as a whole, least recently used first.

        Args:
            pages: drop until so many are free again; None: drop all.

        Returns:
            Pages that went back to the pool.
        """
        owners, held, freed = self._pool.owners, self._pool.held, 0
        for key, prefix in list(self._entries.items()):
            if pages is not None and freed >= pages:
                break
            if (owners[prefix.pages] == held[prefix.pages]).any():
                freed += self._remove(key)
        return freed

    def forget(self, pages: Ids) -> None:
        """Drops every prefix that holds one of the listed pages, so that their sequences own them alone."""
        listed = np.zeros(self._pool.num_pages, dtype=np.bool_)
        listed[pages] = True
        for key, prefix in list(self._entries.items()):
            if listed[prefix.pages].any():
                self._remove(key)

    def clear(self) -> None:
        """Forgets all prefixes, whose pages the pool has freed."""
        self.held_pages = 0
        for books in (self._entries, self._following, self._before):
            books.clear()

    def _remove(self, key: Hashable) -> int:
        prefix = self._entries.pop(key)
        before = self._before.pop(key, None)
        if before is not None:
            self._following[before].pop(key)
            if not self._following[before]:
                del self._following[before]
        self.held_pages -= len(prefix.pages)
        return self._pool.release(prefix.pages, held=True)

    def _shrink(self) -> None:
        while self.held_pages > self.max_pages:
            self._remove(next(iter(self._entries)))


def block_keys(tokens: Sequence[int], block: int, salt: str = "") -> list[bytes]:
    """Gives a key to each full block of a prompt, which stands for the block and everything before it.

    Args:
        tokens: token ids.
        block: tokens of a block.
        salt: prompts with different salts have no key in common.

    Returns:
        [len(tokens) // block], 16 bytes each.
    """
    data, size = np.asarray(tokens, dtype="<i8").tobytes(), 8 * block
    keys, key = [], _digest(salt.encode())
    for start in range(0, len(data) // size * size, size):
        key = _digest(key + data[start : start + size])
        keys.append(key)
    return keys


def context_digest(tokens: Sequence[int], salt: str = "") -> bytes:
    """Gives all tokens of a context one key, 16 bytes."""
    return _digest(_digest(salt.encode()) + np.asarray(tokens, dtype="<i8").tobytes())


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()
