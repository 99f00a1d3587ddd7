"""Prompts that begin alike: what is cached of them, under which keys, and who may start from it."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from curkv.cache.observations import Needs
from curkv.cache.page_manager import PageManager
from curkv.cache.page_pool import OutOfPages
from curkv.cache.plan import EvictionPlan
from curkv.cache.prefixes import Prefix, block_keys, context_digest


@dataclass(frozen=True)
class ReuseKeys:
    """Under what a prompt's prefixes are cached, and how much of it is shared with others.

    Attributes:
        blocks: of its blocks, in their order, see `curkv.cache.prefixes`.
        context: of its compressed context; None if that is not to be cached.
        context_tokens: first tokens of the prompt that the context is.
        cacheable_tokens: first tokens whose K and V can be cached.
        reusable_tokens: first tokens whose K and V can come from a cached prefix.
    """

    blocks: Sequence[Hashable] = ()
    context: Hashable | None = None
    context_tokens: int = 0
    cacheable_tokens: int = 0
    reusable_tokens: int = 0


class PrefixReuse:
    """Caches what sequences compute of their prompts, and finds it for those that come.

    Args:
        kv: the cache.
    """

    def __init__(self, kv: PageManager) -> None:
        self._kv = kv

    def keys(
        self, prompt: Sequence[int], plan: EvictionPlan, observed: Needs, salt: str = "", judged: bool = False
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
        """
        layout, most = self._kv.layout, self._kv.prefixes.max_pages
        if not most or any(layout.windows):  # of which a block behind the window is gone
            return ReuseKeys()
        context: Hashable | None = None
        pages = layout.sequence_pages(plan.budget_tokens, ragged=True, seen=plan.context_tokens)
        if plan.reusable and pages <= most and not judged:
            context = context_digest(prompt[: plan.context_tokens], salt), plan.options
        unevicted = plan.next_stop(0)
        return ReuseKeys(
            blocks=block_keys(prompt, layout.page_size, salt),
            context=context,
            context_tokens=plan.context_tokens,
            cacheable_tokens=0 if observed.column_sums or context is not None else unevicted,
            reusable_tokens=0 if observed.all_queries else max(0, unevicted - max(2, observed.queries)),
        )

    def find(self, keys: ReuseKeys, prompt: Sequence[int], judged: bool = False) -> Prefix | None:
        """The cached prefix of a prompt: its compressed context, or blocks of it.

        Args:
            keys: of the prompt.
            prompt: its token ids.
            judged: log-probabilities of its tokens are still wanted, so that all have to be computed.
        """
        prefixes, most = self._kv.prefixes, 0 if judged else keys.reusable_tokens
        prefix = prefixes.find(keys.context) if keys.context is not None else None
        blocks = keys.blocks[: most // self._kv.layout.page_size]
        return prefix or prefixes.find_blocks(blocks, prompt[:most])

    def start(self, prefix: Prefix | None, observed: Needs) -> tuple[int, Prefix | None]:
        """Gives a sequence a slot, with what a prefix holds unless its partial pages cannot be copied.

        Returns:
            The slot, and the prefix if it could be taken.
        """
        if prefix is not None:
            with contextlib.suppress(OutOfPages):
                return self._kv.adopt(prefix, observed if not prefix.evictions else None), prefix
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
            self._kv.keep_blocks(slot, keys.blocks[:blocks], prompt)

    def after_eviction(self, slot: int, keys: ReuseKeys, computed: int, evictions: int) -> None:
        """Holds a context once it is compressed.

        Args:
            slot: the sequence.
            keys: of its prompt.
            computed: tokens computed.
            evictions: how often some of them have been evicted.
        """
        if keys.context is not None and computed == keys.context_tokens:
            self._kv.keep(slot, keys.context, computed, evictions)
