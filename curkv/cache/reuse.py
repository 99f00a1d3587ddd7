"""Prompts that begin alike: what is cached of them, under which keys, and who may start from it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from curkv.cache.observations import Needs
from curkv.cache.page_manager import PageManager
from curkv.cache.page_pool import OutOfPages
from curkv.cache.plan import EvictionPlan
from curkv.cache.prefixes import Prefix, block_keys, context_digest, root_key
from curkv.cache.sessions import SessionName, Sessions, State
from curkv.cache.store import Store
from curkv.cache.stored import Restored, StoredPrefixes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReuseKeys:
    """Under what a prompt's prefixes are cached, and how much of it is shared with others.

    Attributes:
        salt: prompts share only with those of the same salt.
        tenant: who alone finds what is cached of it; "": everybody with the same salt.
        blocks: of its blocks, in their order, see `curkv.cache.prefixes`.
        context: of its compressed context; None if that is not to be cached.
        context_tokens: first tokens of the prompt that the context is.
        context_ttl: seconds for which what is cached of it gives way after all else.
        cacheable_tokens: first tokens whose K and V can be cached.
        reusable_tokens: first tokens whose K and V can come from a cached prefix.
        session: that it belongs to; None: to none.
        shaped_by: what else a session's state depends on, see `curkv.cache.sessions`.
        continued_tokens: first tokens that can come from such a state.
    """

    salt: str = ""
    tenant: str = ""
    blocks: Sequence[bytes] = ()
    context: Hashable | None = None
    context_tokens: int = 0
    context_ttl: float = 0.0
    cacheable_tokens: int = 0
    reusable_tokens: int = 0
    session: SessionName | None = None
    shaped_by: str = ""
    continued_tokens: int = 0


SESSION_TTL = 3600.0
"""Seconds after its last use at which a session is dropped by default."""


class PrefixReuse:
    """Caches what sequences compute, and finds it for those that come.

    Attributes:
        sessions: what conversations go on from.
    """

    def __init__(
        self,
        kv: PageManager,
        reuse_generated: bool = False,
        session_ttl: float = SESSION_TTL,
    ) -> None:
        """Caches for the sequences of one cache.

        Args:
            kv: the cache.
            reuse_generated: generated tokens are cached too. They were computed one by one, which rounds
                differently, so that an answer is no longer bit for bit that of a prompt computed anew.
            session_ttl: seconds after its last use at which a session is dropped.
        """
        self._kv = kv
        self._ttl = session_ttl
        self._stored: StoredPrefixes | None = None
        self._reuse_generated = reuse_generated
        whole = any(kv.layout.windows)  # what windows have left is not there to be cut back to
        self.sessions = Sessions(kv.prefixes, kv.layout.page_size, session_ttl, whole)

    def keys(
        self,
        prompt: Sequence[int],
        plan: EvictionPlan,
        observed: Needs,
        salt: str = "",
        judged: bool = False,
        session: SessionName | None = None,
        shaped_by: str = "",
        tenant: str = "",
        context_ttl: float = 0.0,
    ) -> ReuseKeys:
        """Gives a prompt its keys.

        Cacheable is all before the first eviction; but where attention is summed up, pages are written to as
        long as their sequence runs, and a context that is cached compressed is not cached as a whole too.
        What is not reused must hold the queries that the policy observes, and two tokens: a single one would
        be computed as a decode, which rounds differently.

        Args:
            prompt: its token ids.
            plan: of its request.
            observed: what is observed of its queries.
            salt: prompts share only with those of the same salt.
            judged: log-probabilities of its tokens are wanted, so that no context may be left out.
            session: that it belongs to.
            shaped_by: what else a state of it depends on.
            tenant: who alone finds what is cached of it.
            context_ttl: seconds for which what is cached of its context gives way after all else.
        """
        if not self._caches:
            return ReuseKeys()
        layout, most = self._kv.layout, self._kv.prefixes.max_pages
        context: Hashable | None = None
        pages = layout.sequence_pages(plan.budget_tokens, ragged=True, seen=plan.context_tokens)
        if plan.reusable and pages <= most and not judged:
            context = context_digest(prompt[: plan.context_tokens], salt), plan.options
        unevicted, anew = plan.next_stop(0), max(2, observed.queries)
        return ReuseKeys(
            salt=salt,
            tenant=tenant,
            blocks=block_keys(prompt, layout.page_size, salt),
            context=context,
            context_tokens=plan.context_tokens,
            context_ttl=context_ttl,
            cacheable_tokens=0 if observed.column_sums or context is not None else unevicted,
            reusable_tokens=0 if observed.all_queries else max(0, unevicted - anew),
            session=session,
            shaped_by=shaped_by,
            continued_tokens=max(0, len(prompt) - anew),
        )

    def find(self, keys: ReuseKeys, prompt: Sequence[int], judged: bool = False) -> Prefix | None:
        """The cached prefix of a prompt: a state of its session, its compressed context, or blocks of it.

        Of a session that has lost nothing, blocks may have more.

        Args:
            keys: of the prompt.
            prompt: its token ids.
            judged: log-probabilities of its tokens are still wanted, so that all have to be computed.
        """
        prefixes, most = self._kv.prefixes, 0 if judged else keys.reusable_tokens
        state = None
        if keys.session is not None and not judged:
            state = self.sessions.find(keys.session, keys.shaped_by, prompt[: keys.continued_tokens])
        if state is not None and state.evictions:
            return state
        self._pin(keys)
        if keys.context is not None and (context := prefixes.find(keys.context)) is not None:
            return context
        blocks = keys.blocks[: most // self._kv.layout.page_size]
        plain = prefixes.find_blocks(blocks, prompt[:most], root_key(keys.salt))
        if plain is not None and self._stored is not None:
            self._stored.want_blocks(keys.tenant, blocks[: plain.tokens // self._kv.layout.page_size])
        if state is None or (plain is not None and plain.tokens > state.tokens):
            return plain
        return state

    def start(self, prefix: Prefix | None, observed: Needs) -> tuple[int, Prefix | None]:
        """Gives a sequence a slot, with what a prefix holds unless its partial pages cannot be copied.

        Returns:
            The slot, and the prefix if it could be taken.
        """
        if prefix is not None:
            with contextlib.suppress(OutOfPages):
                return self._kv.adopt(prefix, observed), prefix
        return self._kv.add_sequence(observed), None

    def after_chunk(
        self, slot: int, keys: ReuseKeys, prompt: Sequence[int], start: int, computed: int
    ) -> None:
        """Holds the blocks that a sequence has just computed, before anything is evicted from it.

        Args:
            slot: the sequence.
            keys: of its prompt.
            prompt: its token ids.
            start: first token of the chunk.
            computed: tokens computed with it.
        """
        size = self._kv.layout.page_size
        if start < keys.cacheable_tokens and computed // size > start // size:
            blocks = min(computed, keys.cacheable_tokens) // size
            self._kv.keep_blocks(slot, keys.blocks[:blocks], prompt, root_key(keys.salt), keys.tenant)
            self._pin(keys)

    def after_eviction(
        self, slot: int, keys: ReuseKeys, computed: int, evictions: int, repeated: Tensor | None
    ) -> None:
        """Holds a context once it is compressed.

        Args:
            slot: the sequence.
            keys: of its prompt.
            computed: tokens computed.
            evictions: how often some of them have been evicted.
            repeated: see `Prefix`.
        """
        if keys.context is not None and computed == keys.context_tokens:
            self._kv.keep(slot, keys.context, computed, evictions, repeated, keys.tenant)
            self._pin(keys)
            if self._stored is not None:
                self._stored.want_context(keys.tenant, keys.context)

    def after_end(self, slot: int, keys: ReuseKeys, tokens: Sequence[int], left: Prefix, policy: str) -> None:
        """Holds what a sequence leaves that has computed its prompt and is freed next.

        Args:
            slot: the sequence.
            keys: of its prompt.
            tokens: those computed: its prompt, and what it has generated but for the last token.
            left: all that it holds.
            policy: name of its policy.
        """
        if not self._caches:
            return
        if keys.session is not None:
            key = self.sessions.key()
            shareable = left.shareable and self._reuse_generated and not left.evictions
            self._kv.prefixes.insert(key, replace(left, shareable=shareable))
            state = State(np.asarray(tokens, dtype=np.int64), keys.shaped_by)
            self.sessions.add(keys.session, key, state, policy)
            if self._stored is not None and left.evictions and not left.observes_more_than_pages:
                self._stored.want_state(keys.tenant, keys.session, key, state, policy)
        if self._reuse_generated and left.shareable and not left.evictions:
            size = self._kv.layout.page_size
            blocks = block_keys(tokens, size, keys.salt, ends=True)
            self._kv.keep_blocks(slot, blocks, tokens, root_key(keys.salt), keys.tenant)
            if self._stored is not None and keys.session is not None:
                self._stored.want_blocks(keys.tenant, blocks[: len(tokens) // size])

    def read(self, keys: ReuseKeys, prompt: Sequence[int], judged: bool = False) -> tuple[Restored, ...]:
        """Reads from disk what a prompt can start from and memory has not. Any thread may; it may be slow.

        Args:
            keys: of the prompt.
            prompt: its token ids.
            judged: log-probabilities of its tokens are wanted, so that all have to be computed.
        """
        if self._stored is None or judged:
            return ()
        try:
            return tuple(self._read(self._stored, keys, prompt))
        except Exception:
            logger.exception("nothing was read from the prefix store")
            return ()

    def _read(self, stored: StoredPrefixes, keys: ReuseKeys, prompt: Sequence[int]) -> list[Restored]:
        if keys.session is not None:
            tokens = prompt[: keys.continued_tokens]
            most = self.sessions.most(keys.session, keys.shaped_by, tokens)
            found = stored.state(keys.tenant, keys.session, keys.shaped_by, tokens, most)
            if found or most:
                return found
        if keys.context is not None:
            found = stored.context(keys.tenant, keys.context)
            if found or keys.context in self._kv.prefixes:
                return found
        return stored.blocks(keys.tenant, keys.blocks[: keys.reusable_tokens // self._kv.layout.page_size])

    def restore(self, keys: ReuseKeys, prompt: Sequence[int], read: Sequence[Restored]) -> None:
        """Caches what was read of a prompt's prefixes, as far as there are pages."""
        if self._stored is None:
            return
        try:
            for one in read:
                if one.key not in self._kv.prefixes:
                    self._restore(self._stored, keys, prompt, one)
        except OutOfPages:
            return
        except Exception:
            logger.exception("what was read from the prefix store is of no use")

    def _restore(self, stored: StoredPrefixes, keys: ReuseKeys, prompt: Sequence[int], one: Restored) -> None:
        prefixes = self._kv.prefixes
        prefix = replace(stored.place(one), tenant=keys.tenant)
        try:
            if one.state is not None and keys.session is not None:
                key = self.sessions.key()
                prefixes.insert(key, prefix)
                self.sessions.add(keys.session, key, one.state, one.policy)
            elif one.key == keys.context:
                prefixes.insert(one.key, prefix)
            elif isinstance(one.key, bytes):
                chain = keys.blocks[: keys.blocks.index(one.key) + 1]
                if all(key in prefixes for key in chain[:-1]):
                    table = prefix.table.repeat(len(chain), axis=-1)  # of those that are new, there is one
                    size = self._kv.layout.page_size
                    root = root_key(keys.salt)
                    prefixes.insert_blocks(chain, table, size, prompt, root, tenant=keys.tenant)
        finally:
            self._kv.pool.release(prefix.pages)

    def keep_on_disk(self, store: Store) -> None:
        """Keeps copies from now on, and reads those that are there."""
        self._stored = StoredPrefixes(self._kv, store, self._ttl)

    @property
    def unwritten(self) -> bool:
        """Whether there is something to be copied out for the disk."""
        return self._stored is not None and self._stored.pending

    def write_some(self) -> None:
        """Copies out some of what is to be written to disk."""
        if self._stored is not None:
            self._stored.copy_some()

    @property
    def store(self) -> Store | None:
        """What keeps copies on disk, if anything does."""
        return self._stored.store if self._stored is not None else None

    def drop_prefixes(self, tenant: str) -> int:
        """Drops what no running sequence uses, in memory and on disk, sessions aside.

        Args:
            tenant: whose it is; "": everybody's, if nothing is a tenant's.

        Returns:
            Pages that went back to the pool.
        """
        if self._stored is not None:
            self._stored.forget_prefixes(tenant)
        return self._kv.prefixes.drop(spare=self.sessions, tenant=tenant or None)

    def drop_session(self, session: SessionName, tenant: str) -> int | None:
        """Drops a session, in memory and on disk.

        Returns:
            Pages that went back to the pool; None: there is no such session.
        """
        pages = self.sessions.drop(session)
        stored = self._stored is not None and self._stored.forget_session(tenant, session)
        return 0 if pages is None and stored else pages

    def _pin(self, keys: ReuseKeys) -> None:
        """Pins what is cached of a context for which that was asked."""
        if keys.context_ttl:
            blocks = keys.blocks[: keys.context_tokens // self._kv.layout.page_size]
            self._kv.prefixes.pin([keys.context, *blocks], keys.context_ttl)

    @property
    def _caches(self) -> bool:
        """Whether anything is cached."""
        return bool(self._kv.prefixes.max_pages)
