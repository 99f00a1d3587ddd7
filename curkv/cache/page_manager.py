"""Who holds which pages: slots, page tables, lengths and reference counts, on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from curkv.cache.layout import CacheLayout, longest, shortest
from curkv.cache.observations import Needs, Observations
from curkv.cache.page_pool import Ids, OutOfPages, PagePool
from curkv.cache.prefixes import Prefix, PrefixCache
from curkv.cache.upload import upload
from curkv.cache.usage import CacheUsage
from curkv.kernels.dispatch import Kernels
from curkv.kernels.pages import Pages
from curkv.ranks import ALONE, Ranks


class OutOfSlots(RuntimeError):
    """Every one of the cache's `max_sequences` slots is taken."""


@dataclass(frozen=True)
class Mark:
    """Where sequences stood before a step.

    Attributes:
        slots: [B], the sequences.
        lengths: int32 [B, L, H].
        observed: by slot, what had been observed of their queries.
        attention: by slot, float32 [pages, page_size], what their tokens had received, if it is summed up.
    """

    slots: Sequence[int]
    lengths: NDArray[np.int32]
    observed: Mapping[int, Observations]
    attention: Mapping[int, Tensor]


@dataclass(frozen=True)
class Kept:
    """What an eviction keeps of a sequence.

    Attributes:
        slot: the sequence.
        indices: int32 [L, heads, n], ascending indices of the tokens each head keeps, read up to its count,
            for the L layers that policies evict from.
        counts: int32 [L, heads] on the host, how many each head keeps.
    """

    slot: int
    indices: Tensor
    counts: NDArray[np.int32]


@dataclass(frozen=True)
class _Compaction:
    """How the heads of a sequence come to hold what they keep.

    Attributes:
        chosen: what that is.
        source: int32 [tables of all layers, pages], their pages.
        target: the same, the pages that tokens move to.
        fresh: ids of the pages that were taken for it.
        emptied: ids of the pages that it gives back.
        pages: int32 [L, tables], pages of each head.
    """

    chosen: Kept
    source: Ids
    target: Ids
    fresh: Ids
    emptied: Ids
    pages: NDArray[np.int32]


class PageManager:
    """Which pages hold what: slots, page tables, lengths and reference counts of many sequences.

    A sequence is known by its slot, a row of the page table. `extend` makes room for new tokens, `evict`
    keeps a chosen part of them, `trim` what windows reach. Bookkeeping is done on the host, for every head of
    every sequence at once; kernels read the table and lengths on the cache's device (on a CPU the same
    memory), so that no step waits for a device to count pages.

    Of several processes each has the memory of its own heads, and the books of all: tables, lengths and free
    pages are the same everywhere, and whoever decides by them decides alike.

    Attributes:
        layout: the cache's shape.
        kernels: the operations on pages.
        ranks: the processes that share its heads.
        pool: the pages and their owners.
        prefixes: what is cached of prompts whose sequences may be gone.
        observed: by slot, what policies need to know of a sequence's queries.
        page_table: int32 [max_sequences, layers, tables, max_pages], of this process's heads; entries past a
            head's page count mean nothing.
        lengths: int32 [max_sequences, layers, tables], tokens of each of these; 0 for a slot not in use.
        page_counts: int32 [max_sequences, layers, tables] on the host, pages of each.
    """

    def __init__(
        self,
        layout: CacheLayout,
        num_pages: int,
        kernels: Kernels,
        device: str | torch.device = "cpu",
        max_prefix_pages: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        """Allocates the pool; its memory is touched only when tokens are stored.

        Args:
            layout: the cache's shape.
            num_pages: pages in the pool, see `curkv.cache.sizing.num_pages_for`.
            kernels: the operations on pages.
            device: where everything lies.
            max_prefix_pages: most pages of cached prefixes; 0: none are.
            ranks: the processes that share the heads, as many as the layout has shards.
        """
        tables = (layout.max_sequences, layout.num_layers, layout.row_tables)
        self.layout = layout
        self.ranks = ranks
        self.pool = PagePool(num_pages, layout.page_size, layout.head_dim, layout.format, device)
        self.prefixes = PrefixCache(self.pool, max_prefix_pages, layout.shards)
        self.observed: dict[int, Observations] = {}
        self._table = np.zeros((*tables, layout.max_pages), dtype=np.int32)
        self._lengths = np.zeros((*tables[:2], layout.num_kv_heads), dtype=np.int32)
        self.page_counts = np.zeros(tables, dtype=np.int32)
        self._own = ranks.share(layout.num_kv_heads)
        self.page_table = torch.from_numpy(self._table).to(device)
        self.lengths = torch.from_numpy(self._lengths[..., self._own]).to(device)
        self.kernels = kernels
        self._active = [False] * layout.max_sequences
        self._free_slots = list(range(layout.max_sequences - 1, -1, -1))
        self._row_start = np.arange(0, self._table.size, layout.max_pages).reshape(tables)
        self._page_index = np.arange(layout.max_pages, dtype=np.int32)
        windows = [(row, window) for row, window in enumerate(layout.windows) if window is not None]
        self._window_rows = np.array([row for row, _ in windows], dtype=np.int64)
        self._windows = np.array([window for _, window in windows], dtype=np.int32)[:, None]
        every = len(layout.evicted_rows) == layout.num_layers
        self._evicted_rows = slice(None) if every else np.array(layout.evicted_rows, dtype=np.int64)
        self._trimmed = np.zeros(tables, dtype=np.int32)  # pages that windows have moved past
        # Newest tokens that no eviction from a window has come behind; without any, more than there are.
        self._unevicted = np.full(layout.max_sequences, layout.max_tokens, dtype=np.int32)

    @property
    def pages(self) -> Pages:
        """The pool's memory."""
        return self.pool.pages

    @property
    def device(self) -> torch.device:
        """Where the pages, the table and the lengths that kernels read lie."""
        return self.lengths.device

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.pool.num_pages

    @property
    def free_pages(self) -> int:
        """Pages that no sequence owns; prefixes that hold some of them are dropped when they are needed."""
        return self.pool.num_idle

    @property
    def used_pages(self) -> int:
        """Pages that sequences own; a shared page counts once."""
        return self.num_pages - self.free_pages

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.layout.page_bytes

    @property
    def usage(self) -> CacheUsage:
        """What the pages are used for."""
        held = int(self.page_counts.sum())
        return CacheUsage(
            page_bytes=self.page_bytes,
            page_size=self.layout.page_size * self.layout.shards,
            num_pages=self.num_pages,
            used_pages=self.used_pages,
            prefix_pages=self.prefixes.held_pages,
            saved_pages=held + self.prefixes.held_pages - self.num_pages + self.pool.num_free,
            empty_tokens=held * self.layout.page_size * self.layout.shards - int(self._lengths.sum()),
        )

    @property
    def free_slots(self) -> int:
        """Sequences that can still be added."""
        return len(self._free_slots)

    @property
    def active_slots(self) -> list[int]:
        """Slots in use, ascending."""
        return [slot for slot, active in enumerate(self._active) if active]

    def wait(self) -> None:
        """Waits until a GPU has done all that it was told; on a CPU it has."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def sequence_bytes(self, slot: int) -> int:
        """Bytes of the pages a sequence owns, alone or with others."""
        return int(self.page_counts[slot].sum()) * self.page_bytes

    def sequence_tokens(self, slot: int) -> int:
        """Tokens a sequence holds, summed over layers and heads."""
        return int(self._lengths[slot].sum())

    def held_tokens(self, slot: int) -> float:
        """Tokens that a head of a sequence holds, mean over the layers that policies evict from."""
        lengths = self._lengths[slot][self._evicted_rows]
        mean: float = int(lengths.sum()) / max(1, lengths.size)
        return mean

    def head_lengths(self, slot: int) -> NDArray[np.int32]:
        """int32 [L, H] on the host, tokens that each head of a sequence holds, everybody's (a copy)."""
        lengths: NDArray[np.int32] = self._lengths[slot]
        return lengths.copy()

    @property
    def all_lengths(self) -> NDArray[np.int32]:
        """int32 [max_sequences, L, H] on the host, tokens of each head, everybody's. A view: do not write."""
        return self._lengths

    def add_sequence(self, needs: Needs | None = None) -> int:
        """Starts an empty sequence.

        Args:
            needs: what to observe of its queries for its policy.

        Returns:
            Its slot.

        Raises:
            OutOfSlots: `max_sequences` sequences are held already.
        """
        if not self._free_slots:
            raise OutOfSlots(f"all {self.layout.max_sequences} sequence slots are taken")
        slot = self._free_slots.pop()
        self._active[slot] = True
        if needs is not None and not needs.query_agnostic:
            self.observed[slot] = Observations(needs)
        return slot

    def observe(self, slot: int, needs: Needs) -> None:
        """Starts to observe a sequence's queries, from its next token on."""
        self.observed[slot] = Observations(needs)

    def stop_observing(self, slot: int) -> None:
        """Forgets a sequence's queries: nothing will be evicted from it any more."""
        self.observed.pop(slot, None)

    def free(self, slot: int) -> int:
        """Ends a sequence.

        Args:
            slot: its slot, which may be given to another sequence afterwards.

        Returns:
            The number of pages that no sequence owns any more.
        """
        self._check_active(slot)
        free_before = self.free_pages
        self.pool.release(self._owned_pages(slot, self.page_counts[slot]))
        self._lengths[slot] = 0
        self.page_counts[slot] = 0
        self._trimmed[slot] = 0
        self._unevicted[slot] = self.layout.max_tokens
        self._publish([slot])
        self._active[slot] = False
        self._free_slots.append(slot)
        self.stop_observing(slot)
        return self.free_pages - free_before

    def fork(self, slot: int, observe: bool = True) -> int:
        """Starts a sequence that holds what another one holds.

        Full pages are shared; partial last pages are copied, so that neither sequence ever writes into a page
        of the other. While the attention that tokens receive is summed up, every step writes to all pages:
        then all are copied.

        Args:
            slot: the sequence to copy.
            observe: go on observing the new sequence's queries as those of the other.

        Returns:
            The slot of the new sequence.

        Raises:
            OutOfPages: the partial pages cannot be copied; nothing is changed.
            OutOfSlots: no slot is free; nothing is changed.
        """
        self._check_active(slot)
        lengths = self._lengths[slot]
        observed = self.observed.get(slot) if observe else None
        shared = self._full_pages_of(lengths)
        if observed is not None and observed.needs.column_sums:
            shared = np.zeros_like(lengths)
        new = self._start_from(self._table[slot], lengths, shared)
        self._trimmed[new], self._unevicted[new] = self._trimmed[slot], self._unevicted[slot]
        if observed is not None:
            self.observed[new] = observed.fork()
        return new

    def adopt(self, prefix: Prefix, needs: Needs | None = None) -> int:
        """Starts a sequence that holds what a prefix holds; full pages are shared, others copied.

        What windows have moved past is not held.

        Args:
            prefix: one of `prefixes`.
            needs: what to observe of the queries that follow.

        Returns:
            The slot of the new sequence.

        Raises:
            OutOfPages: the partial pages cannot be copied; nothing is changed.
            OutOfSlots: no slot is free; nothing is changed.
        """
        slot = self._start_from(prefix.table, prefix.lengths, self._shareable(prefix, needs), needs)
        if not prefix.evictions:
            self._trimmed[slot] = self._full_pages_of(prefix.tokens - prefix.lengths)
        elif self.layout.evicts_from_windows:
            self._unevicted[slot] = 0
        self.trim([slot])
        if prefix.observed is not None:
            self.observed[slot] = prefix.observed.fork()
        return slot

    def keep_blocks(
        self,
        slot: int,
        keys: Sequence[Hashable],
        tokens: Sequence[int] = (),
        root: Hashable = None,
        tenant: str = "",
    ) -> None:
        """Holds the first pages of a sequence for prompts to come.

        Args:
            slot: the sequence, of whose first `len(keys)` pages per head nothing was evicted; if the last of
                them is not full, the sequence ends. Blocks of which windows have trimmed a page are left out.
            keys: of its first blocks, in their order.
            tokens: its prompt, so that a block can be found by its first tokens.
            root: stands for what lies before the first block.
            tenant: who alone finds them.
        """
        if keys:
            trimmed = self._trimmed[slot][..., None]
            first = int(trimmed.max())
            column = np.maximum(self._page_index[: len(keys)] - trimmed, 0)
            table = np.take_along_axis(self._table[slot], column, axis=-1)
            self.prefixes.insert_blocks(keys, table, self.layout.page_size, tokens, root, first, tenant)

    def contents(self, slot: int, tokens: int) -> Prefix:
        """All that a sequence of so many tokens holds; to be cached, it must end."""
        counts = self.page_counts[slot]
        table = self._table[slot][..., : counts.max()].copy()
        return Prefix(table, self.head_lengths(slot), self._owned_pages(slot, counts), tokens)

    def keep(
        self,
        slot: int,
        key: Hashable,
        tokens: int,
        evictions: int,
        repeated: Tensor | None = None,
        tenant: str = "",
    ) -> None:
        """Holds all that a sequence holds for prompts to come; without room for its partial pages, nothing.

        Args:
            slot: the sequence.
            key: stands for its tokens and everything that chose what was kept of them.
            tokens: how many tokens those were.
            evictions: how many evictions.
            repeated: see `Prefix`.
            tenant: who alone finds it.
        """
        lengths, counts = self._lengths[slot].copy(), self.page_counts[slot]
        with contextlib.suppress(OutOfPages):
            table = self._duplicate(self._table[slot], lengths, self._full_pages_of(lengths))
            table = table[..., : counts.max()].copy()
            pages = table[self._page_index[: counts.max()] < counts[..., None]]
            prefix = Prefix(table, lengths, pages, tokens, evictions, tokens)
            self.prefixes.insert(key, replace(prefix, repeated=repeated, tenant=tenant))
            self.pool.release(pages)

    def _shareable(self, prefix: Prefix, needs: Needs | None) -> NDArray[np.int32]:
        """int32 [L, tables], pages of each head of a prefix that a sequence need not copy."""
        full = self._full_pages_of(prefix.lengths)
        return np.zeros_like(full) if needs is not None and needs.column_sums else full  # which write to all

    def pages_to_adopt(self, prefix: Prefix, needs: Needs) -> int:
        """Pages that `adopt` takes from the free ones while it copies what is not shared."""
        idle = int(np.count_nonzero(self.pool.owners[prefix.pages] == self.pool.held[prefix.pages]))
        copies = self._pages_of(prefix.lengths) - self._shareable(prefix, needs)
        return idle + int(copies.sum())

    def pages_needed(self, slots: Sequence[int], new_tokens: Sequence[int]) -> int:
        """Counts the pages that `extend` with the same arguments would take."""
        lengths, counts = self._grown(slots, new_tokens)
        return int((self._pages_of(lengths) - counts).sum())

    def extend(self, slots: Sequence[int], new_tokens: Sequence[int]) -> None:
        """Makes room for new tokens in every head: takes pages and advances the lengths.

        Args:
            slots: [B], different sequences.
            new_tokens: [B], tokens to add to each.

        Raises:
            OutOfPages: the pool is short; nothing is changed.
            ValueError: a slot is not in use or a head would exceed `max_tokens`; nothing is changed.
        """
        for slot in slots:
            self._check_active(slot)
        lengths, counts = self._grown(slots, new_tokens)
        if lengths.max(initial=0) > self.layout.max_tokens:
            raise ValueError(f"a head would hold more than {self.layout.max_tokens} tokens")
        new_counts = self._pages_of(lengths)
        missing = new_counts - counts
        total = int(missing.sum())
        if total:
            self._append_pages(slots, counts, missing, self.take(total))
            self.page_counts[slots] = new_counts
        self._lengths[slots] = lengths
        self._unevicted[slots] += np.array(new_tokens, dtype=np.int32)
        self._publish_lengths(slots)

    def mark(self, slots: Sequence[int]) -> Mark:
        """Notes where sequences stand, so that a step that fails half-way can be taken back.

        Args:
            slots: [B], different sequences.
        """
        observed = {slot: self.observed[slot].fork() for slot in slots if slot in self.observed}
        attention = {
            slot: self.pages.attention[self._page_ids(slot)]
            for slot, one in observed.items()
            if one.needs.column_sums
        }
        return Mark(slots, self._lengths[np.array(slots, dtype=np.int64)], observed, attention)

    def retract(self, mark: Mark) -> None:
        """Takes back what `extend` and the kernels have done to sequences since they were marked.

        Only tokens may have been added meanwhile, and what is observed of queries may have been changed.
        """
        for slot, lengths in zip(mark.slots, mark.lengths, strict=True):
            kept, column = self._pages_of(lengths), self._page_index
            counts = self.page_counts[slot]
            self.pool.release(self._table[slot][(column >= kept[..., None]) & (column < counts[..., None])])
            self._unevicted[slot] -= (self._lengths[slot] - lengths).max()
            self.page_counts[slot], self._lengths[slot] = kept, lengths
        for slot in mark.slots:
            self.stop_observing(slot)
        self.observed.update(mark.observed)
        for slot, sums in mark.attention.items():
            self.pages.attention[self._page_ids(slot)] = sums
        self._publish_lengths(mark.slots)

    def clear(self) -> None:
        """Forgets everything, whatever state it is in: every slot and page is free, no prefix is held."""
        self.pool.clear()
        self.prefixes.clear()
        self.observed.clear()
        self._lengths[:] = 0
        self.page_counts[:] = 0
        self._trimmed[:] = 0
        self._unevicted[:] = self.layout.max_tokens
        slots = range(self.layout.max_sequences)
        self._active[:] = [False for _ in slots]
        self._free_slots[:] = reversed(slots)
        self._publish_lengths(slots)

    def evict(self, slot: int, indices: Tensor, counts: Tensor) -> int:
        """Keeps the chosen tokens of one sequence; see `evict_together`, and `Kept` for the arguments."""
        [freed] = self.evict_together([Kept(slot, indices, counts.numpy(force=True))])
        return freed

    def evict_together(self, chosen: Sequence[Kept]) -> list[int]:
        """Keeps the chosen tokens of sequences and gives the emptied pages back.

        Heads that own their pages alone are compacted in place; heads with a shared page move to fresh pages.
        Heads that keep everything are left as they are. If there are too few fresh pages, prefixes that share
        the sequences' pages are dropped, so that they can be compacted in place.

        However many they are, a device is told everything at once.

        Args:
            chosen: what each keeps.

        Returns:
            Pages freed of each, less the fresh ones taken.

        Raises:
            OutOfPages: pages shared with other sequences cannot be copied; only prefixes may be gone.
        """
        moves: list[_Compaction] = []
        try:
            for one in chosen:
                if (move := self._compaction(one)) is not None:
                    moves.append(move)
        except Exception:
            for move in moves:
                self.pool.release(move.fresh)
            raise
        freed = dict.fromkeys((one.slot for one in chosen), 0)
        if moves:
            self._move(
                _side_by_side([move.source for move in moves]),
                _side_by_side([move.target for move in moves]),
                _rows([self.ranks.own(move.chosen.indices, 1).flatten(0, 1) for move in moves]),
                np.concatenate([move.chosen.counts[:, self._own].reshape(-1) for move in moves]),
            )
            freed |= {move.chosen.slot: self._settle(move) for move in moves}
            self._publish([move.chosen.slot for move in moves])
        return list(freed.values())

    def _compaction(self, chosen: Kept) -> _Compaction | None:
        """Says how heads come to hold what is chosen, and takes fresh pages; None: they lose nothing.

        Raises:
            OutOfPages: nothing is changed; only prefixes may be gone.
        """
        slot, kept = chosen.slot, chosen.counts
        self._check_active(slot)
        rows, tables = self._evicted_rows, self.layout.row_tables
        lengths = self._lengths[slot][rows]
        if (kept > lengths).any():
            raise ValueError("a head cannot keep more tokens than it has")
        changed = longest(lengths - kept, tables).reshape(-1, 1) > 0
        if not changed.any():
            return None
        old = self.page_counts[slot][rows].reshape(-1, 1)
        new = self._pages_of(kept).reshape(-1, 1)
        column = self._page_index[: old.max()]
        source = self._table[slot][rows, :, : len(column)].reshape(-1, len(column)).copy()
        owned = column < old
        shared = self._share_pages(source, owned & changed)
        if np.count_nonzero(shared & (column < new)) > self.free_pages:
            self.prefixes.forget(source[owned])
            shared = self._share_pages(source, owned & changed)
        fresh = shared & (column < new)
        target = self._with_fresh_pages(source, fresh)
        emptied = source[owned & (shared | (column >= new))]
        return _Compaction(chosen, source, target, target[fresh], emptied, new.reshape(-1, tables))

    def _settle(self, move: _Compaction) -> int:
        """Notes what a sequence holds now; the pages freed, less the fresh ones."""
        slot, rows, columns = move.chosen.slot, self._evicted_rows, move.source.shape[1]
        free_before = self.free_pages
        self.pool.release(move.emptied)
        self._table[slot][rows, :, :columns] = move.target.reshape(*move.pages.shape, columns)
        self._lengths[slot][rows] = move.chosen.counts
        self.page_counts[slot][rows] = move.pages
        if self.layout.evicts_from_windows:
            self._unevicted[slot] = 0
        return self.free_pages - free_before - len(move.fresh)

    def trim(self, slots: Sequence[int]) -> int:
        """Gives back what windows have moved past: pages of which no later query reaches a token.

        Whole pages go, from the front, so that nothing is moved: after it a head of a layer with a window of
        w holds the newest w - 1 tokens and less than a page more. One that was evicted from is left alone
        until the window has moved past all that was stored then: where that stands in the text is not known
        here.

        Args:
            slots: different sequences whose new tokens are stored and attended to.

        Returns:
            The number of pages that no sequence owns any more.
        """
        if not len(self._windows):
            return 0
        heads, size, free_before = (
            np.ix_(np.array(slots), self._window_rows),
            self.layout.page_size,
            self.free_pages,
        )
        behind = self._full_pages_of(np.maximum(self._lengths[heads] - (self._windows - 1), 0))
        behind *= self._unevicted[np.array(slots), None, None] >= self._windows - 1
        if not behind.any():
            return 0
        table, first = self._table[heads], behind[..., None]
        self.pool.release(table[self._page_index < first])
        moved = np.minimum(self._page_index + first, self.layout.max_pages - 1)
        self._table[heads] = np.take_along_axis(table, moved, axis=-1)
        self._lengths[heads] -= np.tile(behind, self.layout.shards) * size
        self.page_counts[heads] -= behind
        self._trimmed[heads] += behind
        self._publish(slots)
        return self.free_pages - free_before

    def overwrite(self, slot: int, layer: int, k: Tensor | None, v: Tensor) -> None:
        """Replaces the first keys and values of a layer's heads by others; their norms follow.

        Heads that share a page are left as they are: they have just lost nothing.

        Args:
            slot: the sequence.
            layer: which of the layers that policies evict from.
            k: float32 [KV heads, n, head_dim], after RoPE; of a head with fewer tokens the first ones count.
                None: keys stay.
            v: the same for values.
        """
        size, pages, row = self.layout.page_size, self.pages, self.layout.evicted_rows[layer]
        index = np.arange(v.shape[1])
        ids = self._table[slot, row][:, index // size]
        held = index < self._lengths[slot, row, self._own, None]
        chosen = ((self.pool.owners[ids] == 1) & held).nonzero()
        head, token = (self._upload(x) for x in chosen)
        place = self._upload(ids[chosen].astype(np.int64)), token % size
        for store, squares, x in ((pages.k, pages.k_sq, k), (pages.v, pages.v_sq, v)):
            if x is not None:
                store.write(x[head, token], *place)
                squares[place] = x[head, token].square().sum(-1)

    def _check_active(self, slot: int) -> None:
        if not self._active[slot]:
            raise ValueError(f"slot {slot} is not in use")

    @property
    def _mirrored(self) -> bool:
        """Whether the kernels read copies of tables and lengths; on a CPU they read the host's own memory."""
        mirrored: bool = self.lengths.data_ptr() != self._lengths.ctypes.data
        return mirrored

    def _publish(self, slots: Sequence[int]) -> None:
        """Brings the device's table and lengths of some sequences up to date."""
        if self._mirrored:
            self.page_table.index_copy_(0, self._upload(np.array(slots)), self._upload(self._table[slots]))
        self._publish_lengths(slots)

    def _publish_lengths(self, slots: Sequence[int]) -> None:
        if self._mirrored:
            self.lengths.index_copy_(
                0, self._upload(np.array(slots)), self._upload(self._lengths[slots][..., self._own])
            )

    def _upload(self, array: NDArray[Any]) -> Tensor:
        """Copies an array to the device without waiting."""
        return upload(torch.from_numpy(array), self.device)

    def _pages_of(self, lengths: NDArray[np.int32]) -> NDArray[np.int32]:
        """Pages [..., tables] of heads that hold lengths [..., H]."""
        return (
            longest(lengths, self.layout.row_tables) + (self.layout.page_size - 1)
        ) // self.layout.page_size

    def _full_pages_of(self, lengths: NDArray[np.int32]) -> NDArray[np.int32]:
        """Those of them that are full in every head: [..., tables]."""
        return shortest(lengths, self.layout.row_tables) // self.layout.page_size

    def _page_ids(self, slot: int) -> Tensor:
        """int64 [pages], ids of all pages of a sequence, on the cache's device."""
        return self._upload(self._owned_pages(slot, self.page_counts[slot]).astype(np.int64))

    def _owned_pages(self, slot: int, counts: NDArray[np.int32]) -> Ids:
        """Lists the ids of the first `counts` [L, tables] pages of each head."""
        column = self._page_index[: counts.max()]
        table: Ids = self._table[slot][..., : len(column)]
        return table[column < counts[..., None]]

    def _grown(
        self, slots: Sequence[int], new_tokens: Sequence[int]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Gives lengths with the new tokens, [B, L, H], and present page counts, [B, L, tables]."""
        rows = np.array(slots, dtype=np.int64)
        added = np.array(new_tokens, dtype=np.int32)
        return self._lengths[rows] + added[:, None, None], self.page_counts[rows]

    def _append_pages(
        self, slots: Sequence[int], counts: NDArray[np.int32], missing: NDArray[np.int32], ids: Ids
    ) -> None:
        """Writes `ids` into the table, `missing` [B, L, tables] of them after the first `counts` of each."""
        growing = missing.nonzero()
        missing = missing[growing]
        place = (self._row_start[slots] + counts)[growing]
        if len(place) < len(ids):
            place = (place + missing - missing.cumsum()).repeat(missing) + np.arange(len(ids))
        self._table.reshape(-1)[place] = ids
        if self._mirrored:
            self.page_table.view(-1).index_copy_(0, self._upload(place), self._upload(ids))

    def _share_pages(self, table: Ids, owned: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Tells, [N, 1], which rows of the table [N, pages] share an `owned` page."""
        shared = (self.pool.owners[table] > 1) & owned
        rows: NDArray[np.bool_] = np.logical_or.reduce(shared, axis=1, keepdims=True)
        return rows

    def take(self, count: int) -> Ids:
        """Takes pages for sequences, dropping prefixes if too few are free.

        Raises:
            OutOfPages: sequences own too many; nothing is changed.
        """
        if count > self.free_pages:
            raise OutOfPages(count, self.free_pages)
        short = count - self.pool.num_free
        if short > 0:
            self.prefixes.drop(short)
        return self.pool.take(count)

    def _start_from(
        self, table: Ids, lengths: NDArray[np.int32], shared: NDArray[np.int32], needs: Needs | None = None
    ) -> int:
        """Starts a sequence that holds what others hold; the arguments are those of `_duplicate`."""
        new = self.add_sequence(needs)
        try:
            own = self._duplicate(table, lengths, shared)
        except OutOfPages:
            self.free(new)
            raise
        self._table[new, ..., : own.shape[-1]] = own
        self._lengths[new] = lengths
        self.page_counts[new] = self._pages_of(lengths)
        self._publish([new])
        return new

    def _duplicate(self, table: Ids, lengths: NDArray[np.int32], shared: NDArray[np.int32]) -> Ids:
        """Makes another owner of what heads hold.

        Args:
            table: int32 [L, tables, pages].
            lengths: int32 [L, H].
            shared: int32 [L, tables], pages of each head to share; the rest is copied.

        Returns:
            int32 [L, tables, pages], the table of the new owner.

        Raises:
            OutOfPages: nothing is changed.
        """
        column = self._page_index[: table.shape[-1]]
        used = column < self._pages_of(lengths)[..., None]
        copied = used & (column >= shared[..., None])
        self.pool.share(table[used])  # those to be copied as well, lest they are dropped for their copies
        try:
            copies = self.take(int(copied.sum()))
        except OutOfPages:
            self.pool.release(table[used])
            raise
        tokens = (lengths[..., self._own, None] - column * self.layout.page_size)[copied]
        self._copy_pages(table[copied], copies, tokens.clip(0, self.layout.page_size).astype(np.int32))
        self.pool.release(table[copied])
        own = table.copy()
        own[copied] = copies
        return own

    def _with_fresh_pages(self, source: Ids, fresh: NDArray[np.bool_]) -> Ids:
        """Copies the table rows `source` [N, pages], with newly taken pages where `fresh`."""
        target = source.copy()
        target[fresh] = self.take(int(fresh.sum()))
        return target

    def _copy_pages(self, source: Ids, target: Ids, counts: NDArray[np.int32]) -> None:
        """Copies the first `counts` [N] tokens of the pages `source` [N]."""
        tokens = torch.arange(self.layout.page_size, dtype=torch.int32, device=self.device)
        self._move(source[:, None], target[:, None], tokens.expand(len(counts), -1), counts)

    def _move(self, source: Ids, target: Ids, indices: Tensor, counts: NDArray[np.int32]) -> None:
        """Moves tokens `indices` [N, n] of the table rows `source` [N, pages] to the front of `target`."""
        tables = self._upload(source), self._upload(target)
        move = self.layout.format.move
        move(self.kernels.compact, self.pages, *tables, indices, self._upload(counts))


def _side_by_side(tables: Sequence[Ids]) -> Ids:
    """One table [N, pages] of several with different numbers of pages; what is added means nothing."""
    if len(tables) == 1:
        return tables[0]
    most = max(table.shape[1] for table in tables)
    return np.concatenate([np.pad(table, ((0, 0), (0, most - table.shape[1]))) for table in tables])


def _rows(several: Sequence[Tensor]) -> Tensor:
    """The rows [N, n] of several with different n; what is added means nothing."""
    if len(several) == 1:
        return several[0]
    most = max(x.shape[1] for x in several)
    return torch.cat([F.pad(x, (0, most - x.shape[1])) for x in several])
