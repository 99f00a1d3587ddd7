"""Prefixes on disk: what is written of those in memory, and which of them a prompt can have back."""

from __future__ import annotations

import json
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
import torch

from curkv.cache.page_manager import PageManager
from curkv.cache.prefixes import Prefix, context_digest
from curkv.cache.sessions import MAX_STATES, SessionName, State
from curkv.cache.store import Entry, Store
from curkv.cache.transfer import copy_in, copy_out

STEP_BYTES = 16 * 1024**2
"""What a step copies out for the disk, one prefix at least."""


@dataclass(frozen=True)
class Restored:
    """What was read for a prompt, to be put into pages when it is admitted.

    Attributes:
        key: under which it was held in memory; of a session's state, a name only for the disk.
        entry: what it holds.
        state: of a session; None: a block or a context.
        policy: of that state.
    """

    key: Hashable
    entry: Entry
    state: State | None = None
    policy: str = ""


@dataclass(frozen=True)
class _Wanted:
    """A prefix to be written: its name, and what is to be known of it besides what the cache knows."""

    name: str
    state: State | None = None
    policy: str = ""


class StoredPrefixes:
    """Keeps copies of prefixes in a store. Blocks are copied once they have been found by a prompt.

    Args:
        kv: the cache.
        store: the store.
        ttl: seconds after its last use at which a session's state is not taken any more.
    """

    def __init__(self, kv: PageManager, store: Store, ttl: float) -> None:
        self._kv = kv
        self._ttl = ttl
        self._wanted: dict[Hashable, _Wanted] = {}
        self.store = store

    @property
    def pending(self) -> bool:
        """Whether there are prefixes to be copied."""
        return bool(self._wanted)

    def want_blocks(self, tenant: str, keys: Sequence[bytes]) -> None:
        """Has blocks copied that were found."""
        for key in keys:
            self._want(key, _Wanted(f"{_digest(tenant)}/blocks/{key.hex()}"))

    def want_context(self, tenant: str, key: Hashable) -> None:
        """Has a compressed context copied."""
        self._want(key, _Wanted(_context_name(tenant, key)))

    def want_state(self, tenant: str, session: SessionName, key: Hashable, state: State, policy: str) -> None:
        """Has the state of a session copied."""
        name = f"{_folder(tenant, session)}/{_state_name(state.shaped_by, state.tokens.tolist())}"
        self._want(key, _Wanted(name, state, policy))

    def _want(self, key: Hashable, wanted: _Wanted) -> None:
        if not self.store.knows(wanted.name):
            self._wanted[key] = wanted

    def copy_some(self) -> None:
        """Copies out some of what is to be written; its pages may be used again then."""
        left = STEP_BYTES
        while self._wanted and left > 0:
            key, wanted = next(iter(self._wanted.items()))
            del self._wanted[key]
            if key in self._kv.prefixes:
                entry = self._entry(self._kv.prefixes.get(key), wanted)
                left -= entry.num_bytes
                self.store.put(wanted.name, entry, MAX_STATES if wanted.state is not None else None)

    def _entry(self, prefix: Prefix, wanted: _Wanted) -> Entry:
        tensors = copy_out(self._kv, prefix.table, prefix.lengths)
        tensors["lengths"] = torch.from_numpy(prefix.lengths.copy())
        if wanted.state is not None:
            tensors["tokens"] = torch.from_numpy(wanted.state.tokens)
        if prefix.repeated is not None:
            tensors["repeated"] = prefix.repeated.cpu().contiguous()
        facts = {
            "tokens": prefix.tokens,
            "evictions": prefix.evictions,
            "evicted_at": prefix.evicted_at,
            "shareable": prefix.shareable,
            "protect": prefix.protect,
        }
        return Entry(tensors, {"facts": json.dumps(facts), "policy": wanted.policy})

    def blocks(self, tenant: str, keys: Sequence[bytes]) -> list[Restored]:
        """Reads those of a prompt's blocks that are not in memory, up to the first one that is nowhere."""
        found = []
        for key in keys[: self._kv.prefixes.max_pages // self._kv.layout.num_tables]:
            if key not in self._kv.prefixes:
                entry = self.store.load(f"{_digest(tenant)}/blocks/{key.hex()}")
                if entry is None:
                    break
                found.append(Restored(key, entry))
        return found

    def context(self, tenant: str, key: Hashable) -> list[Restored]:
        """Reads a compressed context that is not in memory."""
        entry = None if key in self._kv.prefixes else self.store.load(_context_name(tenant, key))
        return [] if entry is None else [Restored(key, entry)]

    def state(
        self, tenant: str, session: SessionName, shaped_by: str, tokens: Sequence[int], most: int
    ) -> list[Restored]:
        """Reads the state of a session that a prompt begins with, if it has more than `most` tokens."""
        best, longest = "", most
        for name, used in self.store.names(_folder(tenant, session)).items():
            count = int(name.rsplit("-", 2)[1])
            fresh, longer = used + self._ttl >= time.time(), longest < count <= len(tokens)
            if fresh and longer and name.endswith("/" + _state_name(shaped_by, tokens[:count])):
                best, longest = name, count
        entry = self.store.load(best) if best else None
        if entry is None:
            return []
        state = State(entry.tensors["tokens"].numpy(), shaped_by)
        return [Restored(best, entry, state, entry.facts["policy"])]

    def forget_prefixes(self, tenant: str) -> None:
        """Has blocks and contexts deleted."""
        for kind in ("blocks", "contexts"):
            self.store.drop(f"{_digest(tenant)}/{kind}")

    def forget_session(self, tenant: str, session: SessionName) -> bool:
        """Has a session deleted; tells whether there was anything."""
        folder = _folder(tenant, session)
        known = self.store.knows_below(folder)
        self.store.drop(folder)
        return known

    def place(self, restored: Restored) -> Prefix:
        """Puts what was read into pages, of which the caller is the owner.

        Raises:
            OutOfPages: there are too few.
        """
        tensors = restored.entry.tensors
        lengths, facts = tensors["lengths"].numpy(), json.loads(restored.entry.facts["facts"])
        table = copy_in(self._kv, lengths, tensors)
        first = np.arange(table.shape[-1]) * self._kv.layout.page_size
        self.store.took(facts["tokens"])
        facts["protect"] = tuple((start, end) for start, end in facts["protect"])
        repeated = tensors["repeated"].to(self._kv.device) if "repeated" in tensors else None
        pages = table[first < lengths[..., None]]
        return replace(Prefix(table, lengths, pages, 0, repeated=repeated), **facts)


def _folder(tenant: str, session: SessionName) -> str:
    return f"{_digest(tenant)}/sessions/{_digest(session.name)}"


def _state_name(shaped_by: str, tokens: Sequence[int]) -> str:
    return f"{_digest(shaped_by)}-{len(tokens):07d}-{context_digest(tokens).hex()}"


def _context_name(tenant: str, key: Hashable) -> str:
    return f"{_digest(tenant)}/contexts/{_digest(repr(key))}"


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()
