"""Prefixes of prompts that outlive the sequences that computed them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from curkv.cache.layout import longest
from curkv.cache.observations import Observations
from curkv.cache.options import Span
from curkv.cache.page_pool import Ids, PagePool

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Prefix:
    """What every head holds of the first tokens of a prompt, or of a block of them.

    Attributes:
        table: int32 [L, tables, n], pages of each head, or of those that share pages.
        lengths: int32 [L, H], tokens of each head.
        pages: int32 [pages], those of the table that are cached.
        tokens: prompt tokens that it stands for, kept or not.
        evictions: how often its tokens have been evicted from.
        evicted_at: how many tokens there were at the last of these; of those that followed none is gone.
        shareable: whether it is what any prompt that begins with its tokens would have.
        protect: spans of its tokens that are never evicted.
        tenant: who alone finds it; "": whoever has its key.
        observed: of the queries of its tokens, where a policy needs to know of all of them.
        repeated: float32 [L, H, n], what a repetition has paid those that the last eviction kept, -inf
            past a head's, of the layers that are evicted from; None: there was none.
    """

    table: Ids
    lengths: NDArray[np.int32]
    pages: Ids
    tokens: int
    evictions: int = 0
    evicted_at: int = 0
    shareable: bool = True
    protect: tuple[Span, ...] = ()
    tenant: str = ""
    observed: Observations | None = None
    repeated: Tensor | None = None

    @property
    def observes_more_than_pages(self) -> bool:
        """Whether its policy has to know more of the queries than what lies in its pages."""
        return self.observed is not None and bool(self.observed.statistics or self.observed.blocks)

    def cut(self, tokens: int, page_size: int) -> Prefix:
        """What its sequence held when it had so many tokens, `evicted_at` at least."""
        lengths = self.lengths - np.int32(self.tokens - tokens)
        held = longest(lengths, self.table.shape[1])
        pages = self.table[np.arange(self.table.shape[-1]) * page_size < held[..., None]]
        return replace(self, lengths=lengths, pages=pages, tokens=tokens, observed=None)


class PrefixCache:
    """Pages cached for prompts to come, by keys that stand for their tokens and all that has shaped them.

    Plain prefixes are cached in blocks: a page of every head, with the K and V of `page_size` tokens (fewer
    at the end of a text), whose key depends on all tokens before them. Of the block behind the last one that
    fits, a prompt gets those first tokens that do. Compressed prefixes are cached as a whole. A page that a
    sequence owns as well is cached in name only. What is cached gives way, least recently used first, where
    sequences need pages and where it exceeds its limit; a block is always dropped before those that it
    continues.

    Attributes:
        max_pages: most pages cached; 0: nothing is.
        held_pages: pages cached; one that two prefixes share counts for both.
        dropped: called with the key of each prefix that is about to be dropped.
        clock: tells seconds.
    """

    def __init__(self, pool: PagePool, max_pages: int, shards: int = 1) -> None:
        """Caches nothing yet.

        Args:
            pool: of whose pages.
            max_pages: most pages cached; 0: nothing is.
            shards: heads that share a page, see `CacheLayout`.
        """
        self.max_pages = max_pages
        self.clock: Callable[[], float] = time.monotonic
        self._shards = shards
        self.held_pages = 0
        self.dropped: Callable[[Hashable], object] = lambda key: None
        self._pool = pool
        self._entries: OrderedDict[Hashable, Prefix] = OrderedDict()
        self._following: dict[Hashable, dict[Hashable, Tokens]] = {}
        self._before: dict[Hashable, Hashable] = {}
        self._pinned: dict[Hashable, float] = {}

    @property
    def all(self) -> list[Prefix]:
        """Everything cached, least recently used first."""
        return list(self._entries.values())

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def get(self, key: Hashable) -> Prefix:
        """Gives the prefix under a key that is there, which is not to use it."""
        return self._entries[key]

    def find(self, key: Hashable) -> Prefix | None:
        """Gives the prefix under a key, if there is one, and uses it."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def pin(self, keys: Iterable[Hashable], seconds: float) -> None:
        """Has prefixes give way after those that are not pinned, for so many seconds."""
        until = self.clock() + seconds
        self._pinned |= {key: until for key in keys if key in self._entries}

    def find_blocks(
        self, keys: Sequence[Hashable], tokens: Sequence[int] = (), root: Hashable = None
    ) -> Prefix | None:
        """Gives the longest plain prefix.

        Args:
            keys: of the blocks of a prompt, in their order; see `block_keys`.
            tokens: the prompt as far as it may be that of others; without it whole blocks are found.
            root: stands for what lies before the first block; without it that one is found whole.

        Returns:
            The blocks cached from the first one on, put together, and the first tokens of one more; None if
            there are none. Its pages are those of whole blocks.
        """
        found = [block for block in takewhile(lambda b: b is not None, map(self._entries.get, keys)) if block]
        for key in reversed(keys[: len(found)]):
            self._entries.move_to_end(key)
        whole = sum(block.tokens for block in found)
        next_key, common = self._closest([root, *keys][len(found)], tokens[whole:])
        parts = [*found, *([self._entries[next_key]] if common else [])]
        if not parts:
            return None
        return Prefix(
            table=np.concatenate([block.table for block in parts], axis=-1),
            lengths=np.full_like(parts[0].lengths, whole + common),
            pages=np.concatenate([np.zeros(0, dtype=np.int32), *(block.pages for block in found)]),
            tokens=whole + common,
        )

    def _closest(self, key: Hashable, tokens: Sequence[int]) -> tuple[Hashable, int]:
        """The block cached behind one that begins with most of the tokens, and with how many."""
        best: tuple[Hashable, int] = (None, 0)
        for block, held in self._following.get(key, {}).items():
            common = common_length(held, tokens[: len(held)])
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
        self,
        keys: Sequence[Hashable],
        table: Ids,
        page_size: int,
        tokens: Sequence[int] = (),
        root: Hashable = None,
        first: int = 0,
        tenant: str = "",
    ) -> None:
        """Holds the first blocks of a prompt, as many as the limit allows.

        A block that was the end of a text, and is now the beginning of one of these, is dropped.

        Args:
            keys: of the blocks, in their order.
            table: int32 [L, tables, len(keys)], pages in use, all full but for the last one.
            page_size: tokens of a page.
            tokens: the prompt; without it the blocks are found whole or not at all.
            root: stands for what lies before the first block; without it that one is found whole.
            first: the first block whose pages are known.
            tenant: who alone finds them.
        """
        keys = keys[: self.max_pages // table[..., 0].size]
        new = [i for i, key in enumerate(keys) if i >= first and key not in self._entries]
        self._pool.share(table[..., new].reshape(-1), held=True)
        self.held_pages += table[..., new].size
        for i in new:
            held = np.asarray(tokens[i * page_size :][:page_size], dtype=np.int64)
            size = len(held) or page_size
            layers, tables = table.shape[:2]
            lengths = np.full((layers, tables * self._shards), size, dtype=np.int32)
            block = table[..., i : i + 1].copy()
            self._entries[keys[i]] = Prefix(block, lengths, block.reshape(-1), size, tenant=tenant)
            before = keys[i - 1] if i else root
            if before is not None and tokens:
                following = self._following.setdefault(before, {})
                for shorter in [key for key, other in following.items() if _begins(held, other)]:
                    self.remove(shorter)
                self._following.setdefault(before, {})[keys[i]] = held
                self._before[keys[i]] = before
        for key in reversed(keys):
            if key in self._entries:
                self._entries.move_to_end(key)
        self._shrink()

    def drop(
        self, pages: int | None = None, spare: Container[Hashable] = (), tenant: str | None = None
    ) -> int:
        """Drops prefixes that sequences do not use as a whole, least recently used first.

        Args:
            pages: drop until so many are free again; None: drop all.
            spare: keys of prefixes that stay.
            tenant: whose prefixes are dropped; None: everybody's.

        Returns:
            Pages that went back to the pool.
        """
        owners, held, freed = self._pool.owners, self._pool.held, 0
        for key in self._in_order():
            if pages is not None and freed >= pages:
                break
            prefix = self._entries[key]
            theirs = tenant is None or prefix.tenant == tenant
            if theirs and key not in spare and (owners[prefix.pages] == held[prefix.pages]).any():
                freed += self.remove(key)
        return freed

    def forget(self, pages: Ids) -> None:
        """Drops every prefix that holds one of the listed pages, so that their sequences own them alone."""
        listed = np.zeros(self._pool.num_pages, dtype=np.bool_)
        listed[pages] = True
        for key, prefix in list(self._entries.items()):
            if listed[prefix.pages].any():
                self.remove(key)

    def clear(self) -> None:
        """Forgets all prefixes, whose pages the pool has freed."""
        for key in self._entries:
            self.dropped(key)
        self.held_pages = 0
        for books in (self._entries, self._following, self._before, self._pinned):
            books.clear()

    def remove(self, key: Hashable) -> int:
        """Drops a prefix; returns the pages that went back to the pool."""
        self.dropped(key)
        prefix = self._entries.pop(key)
        self._pinned.pop(key, None)
        before = self._before.pop(key, None)
        if before is not None:
            self._following[before].pop(key)
            if not self._following[before]:
                del self._following[before]
        self.held_pages -= len(prefix.pages)
        return self._pool.release(prefix.pages, held=True)

    def _shrink(self) -> None:
        if self.held_pages <= self.max_pages:
            return
        for key in self._in_order():
            self.remove(key)
            if self.held_pages <= self.max_pages:
                return

    def _in_order(self) -> list[Hashable]:
        """All keys in the order in which they give way."""
        now = self.clock()
        self._pinned = {key: until for key, until in self._pinned.items() if until > now}
        return sorted(self._entries, key=self._pinned.__contains__)


def block_keys(tokens: Sequence[int], block: int, salt: str = "", ends: bool = False) -> list[bytes]:
    """Gives a key to each block of a prompt, which stands for the block and everything before it.

    Args:
        tokens: token ids.
        block: tokens of a block.
        salt: prompts with different salts have no key in common.
        ends: what is left behind the last full block is one as well.

    Returns:
        [len(tokens) // block], or one more, 16 bytes each.
    """
    data, size = np.asarray(tokens, dtype="<i8").tobytes(), 8 * block
    keys, key = [], root_key(salt)
    for start in range(0, len(data) if ends else len(data) // size * size, size):
        key = _digest(key + data[start : start + size])
        keys.append(key)
    return keys


def root_key(salt: str = "") -> bytes:
    """Stands for what lies before the first block of prompts with a salt: 16 bytes."""
    return _digest(salt.encode())


def common_length(first: Sequence[int] | Tokens, second: Sequence[int] | Tokens) -> int:
    """How many tokens two texts have in common at their beginning."""
    size = min(len(first), len(second))
    different = np.flatnonzero(np.asarray(first[:size]) != np.asarray(second[:size]))
    return int(different[0]) if len(different) else size


def context_digest(tokens: Sequence[int], salt: str = "") -> bytes:
    """Gives all tokens of a context one key, 16 bytes."""
    return _digest(root_key(salt) + np.asarray(tokens, dtype="<i8").tobytes())


def _begins(text: Tokens, other: Tokens) -> bool:
    """Whether a text begins with another one that is shorter."""
    return len(other) < len(text) and common_length(text, other) == len(other)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()
