"""The KV cache as attention, the policies and the scheduler see it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curkv.cache.batch import Batch, Segment
from curkv.cache.layout import CacheLayout
from curkv.cache.observations import Needs, Observations
from curkv.cache.page_pool import Ids, OutOfPages, PagePool
from curkv.cache.prefixes import Prefix, PrefixCache
from curkv.kernels.dispatch import Kernels
from curkv.kernels.pages import Pages, rounded

if TYPE_CHECKING:
    from curkv.cache.policies.base import CacheView


class OutOfSlots(RuntimeError):
    """Every one of the cache's `max_sequences` slots is taken."""


class KVCache:
    """Keys and values of many sequences, each KV head with its own length.

    A sequence is known by its slot, a row of the page table. `extend` makes room for new tokens, `attend`
    stores and reads them layer by layer, `evict` keeps a chosen part. The books are kept on the host, for
    every head of every sequence at once; kernels read the table and lengths on the cache's device (on a CPU
    the same memory), so that no step waits for a device to count pages.

    Attributes:
        layout: the cache's shape.
        kernels: the operations on pages.
        pool: the pages and their owners.
        prefixes: what is held of prompts whose sequences may be gone.
        page_table: int32 [max_sequences, layers, heads, max_pages]; entries past a head's page count mean
            nothing.
        lengths: int32 [max_sequences, layers, heads], tokens of each head; 0 for a slot not in use.
        page_counts: int32 [max_sequences, layers, heads] on the host, pages of each head.
        output_projection: gives a layer's W_o, float32 [query heads, head_dim, hidden], to policies that
            weigh values by what they add to the output; None: there are none.
    """

    output_projection: Callable[[int], Tensor] | None = None

    def __init__(
        self,
        layout: CacheLayout,
        num_pages: int,
        kernels: Kernels,
        rope: tuple[Tensor, Tensor],
        device: str | torch.device = "cpu",
        max_prefix_pages: int = 0,
        prefill_dtype: torch.dtype | None = None,
    ) -> None:
        """Allocates the pool; its memory is touched only when tokens are stored.

        Args:
            layout: the cache's shape.
            num_pages: pages in the pool, see `curkv.cache.sizing.num_pages_for`.
            kernels: the operations on pages.
            rope: cos and sin, float32 [positions, head_dim / 2] each.
            device: where everything lies.
            max_prefix_pages: most pages held for prefixes; 0: none are.
            prefill_dtype: what queries are rounded to before chunks attend; None: not at all.
        """
        heads = (layout.max_sequences, layout.num_layers, layout.num_kv_heads)
        self.layout = layout
        self.pool = PagePool(num_pages, layout.page_size, layout.head_dim, layout.dtype, device)
        self.prefixes = PrefixCache(self.pool, max_prefix_pages)
        self._table = np.zeros((*heads, layout.max_pages), dtype=np.int32)
        self._lengths = np.zeros(heads, dtype=np.int32)
        self.page_counts = np.zeros(heads, dtype=np.int32)
        self.page_table = torch.from_numpy(self._table).to(device)
        self.lengths = torch.from_numpy(self._lengths).to(device)
        self.kernels = kernels
        self._cos, self._sin = (table.to(device) for table in rope)
        self._scale = layout.head_dim**-0.5
        self._prefill_dtype = prefill_dtype
        self._observed: dict[int, Observations] = {}
        self._watched_now: list[tuple[Observations, Segment]] = []
        self._active = [False] * layout.max_sequences
        self._free_slots = list(range(layout.max_sequences - 1, -1, -1))
        self._row_start = np.arange(0, self._table.size, layout.max_pages).reshape(heads)
        self._page_index = np.arange(layout.max_pages, dtype=np.int32)

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
    def used_bytes(self) -> int:
        """Bytes of the pages that sequences own."""
        return self.used_pages * self.page_bytes

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the pages held for prefixes, whether sequences use them or not."""
        return self.prefixes.held_pages * self.page_bytes

    @property
    def saved_bytes(self) -> int:
        """Bytes that more would be taken if every sequence and prefix had pages of its own."""
        owned = int(self.page_counts.sum()) + self.prefixes.held_pages
        return (owned - self.num_pages + self.pool.num_free) * self.page_bytes

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all pages."""
        return self.num_pages * self.page_bytes

    @property
    def free_slots(self) -> int:
        """Sequences that can still be added."""
        return len(self._free_slots)

    @property
    def active_slots(self) -> list[int]:
        """Slots in use, ascending."""
        return [slot for slot, active in enumerate(self._active) if active]

    @property
    def stranded_slots_ratio(self) -> float:
        """Share of the token slots in used pages that hold no token, 0 to 1 (the cost of ragged last pages).

        Shared pages are always full, so the empty slots of all heads together are exactly those of the pool.
        """
        if not self.used_pages:
            return 0.0
        page_size = self.layout.page_size
        empty = int(self.page_counts.sum()) * page_size - int(self._lengths.sum())
        return empty / (self.used_pages * page_size)

    def sequence_bytes(self, slot: int) -> int:
        """Bytes of the pages a sequence owns, alone or with others."""
        return int(self.page_counts[slot].sum()) * self.page_bytes

    def sequence_tokens(self, slot: int) -> int:
        """Tokens a sequence holds, summed over layers and heads."""
        return int(self._lengths[slot].sum())

    def head_lengths(self, slot: int) -> NDArray[np.int32]:
        """int32 [L, H] on the host, tokens that each head of a sequence holds (a copy)."""
        lengths: NDArray[np.int32] = self._lengths[slot]
        return lengths.copy()

    def view(
        self, slot: int, seed: int = 0, phase: Literal["prefill", "decode"] = "prefill", round: int = 0
    ) -> CacheView:
        """What a policy sees of a sequence; the arguments are those of `CacheView`."""
        from curkv.cache.policies.base import CacheView

        return CacheView(
            self.pages,
            self.page_table[slot],
            self.lengths[slot],
            seed,
            phase,
            round,
            observations=self._observed.get(slot),
            rope=(self._cos, self._sin),
            output_projection=self.output_projection,
        )

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
            self._observed[slot] = Observations(needs)
        return slot

    def stop_observing(self, slot: int) -> None:
        """Forgets a sequence's queries: nothing will be evicted from it any more."""
        self._observed.pop(slot, None)

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
        observed = self._observed.get(slot) if observe else None
        shared = lengths // self.layout.page_size
        if observed is not None and observed.needs.column_sums:
            shared = np.zeros_like(lengths)
        new = self._start_from(self._table[slot], lengths, shared)
        if observed is not None:
            self._observed[new] = observed.fork()
        return new

    def adopt(self, prefix: Prefix, needs: Needs | None = None) -> int:
        """Starts a sequence that holds what a prefix holds; full pages are shared, others copied.

        Args:
            prefix: held by `prefixes`.
            needs: what to observe of the queries that follow.

        Returns:
            The slot of the new sequence.

        Raises:
            OutOfPages: the partial pages cannot be copied; nothing is changed.
            OutOfSlots: no slot is free; nothing is changed.
        """
        return self._start_from(prefix.table, prefix.lengths, prefix.lengths // self.layout.page_size, needs)

    def keep_blocks(self, slot: int, keys: Sequence[Hashable], tokens: Sequence[int] = ()) -> None:
        """Holds the first pages of a sequence for prompts to come.

        Args:
            slot: the sequence, of whose first `len(keys)` pages per head nothing was evicted.
            keys: of its first blocks, in their order.
            tokens: its prompt, so that a block can be found by its first tokens.
        """
        if keys:
            table = self._table[slot][..., : len(keys)]
            self.prefixes.insert_blocks(keys, table, self.layout.page_size, tokens)

    def keep(self, slot: int, key: Hashable, tokens: int, evictions: int) -> None:
        """Holds all that a sequence holds for prompts to come; without room for its partial pages, nothing.

        Args:
            slot: the sequence.
            key: stands for its tokens and everything that chose what was kept of them.
            tokens: how many tokens those were.
            evictions: how many evictions.
        """
        lengths, counts = self._lengths[slot].copy(), self.page_counts[slot]
        with contextlib.suppress(OutOfPages):
            table = self._duplicate(self._table[slot], lengths, lengths // self.layout.page_size)
            table = table[..., : counts.max()].copy()
            pages = table[self._page_index[: counts.max()] < counts[..., None]]
            self.prefixes.insert(key, Prefix(table, lengths, pages, tokens, evictions))
            self.pool.release(pages)

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
            self._append_pages(slots, counts, missing, self._take(total))
            self.page_counts[slots] = new_counts
        self._lengths[slots] = lengths
        self._publish_lengths(slots)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Stores one layer's new keys and values and attends over everything its heads hold.

        Args:
            layer: index of the layer; a step begins with the first one.
            q: float32 [T, query heads, head_dim] before RoPE; rotated in place.
            k: float32 [T, KV heads, head_dim] before RoPE.
            v: float32 [T, KV heads, head_dim].
            batch: the step's tokens; `extend` has been called for them.

        Returns:
            float32 [T, query heads, head_dim].
        """
        table, lengths = self.page_table[:, layer], self.lengths[:, layer]
        cos, sin, decodes = self._cos, self._sin, batch.num_decodes
        if layer == 0:
            self._watched_now = self._watched(batch)
        watched = self._watched_now
        for observations, segment in watched:
            observations.see_unrotated(layer, q[segment.start : segment.end], segment.position)
        self.kernels.rope(q, cos, sin, batch.positions)
        self.kernels.store_kv(
            self.pages, k, v, cos, sin, batch.positions, table, lengths, batch.slots, batch.query_start
        )
        for observations, segment in watched:
            self._observe(layer, observations, segment, q, k, batch)
        parts = []
        if decodes:
            parts.append(self._decode(layer, q[:decodes], batch, watched))
        if decodes < batch.slots.shape[0]:
            parts.append(self._prefill(layer, q[decodes:], batch, watched))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def observes(self, batch: Batch) -> bool:
        """Whether a policy watches the queries of any sequence in a batch."""
        return bool(self._watched(batch))

    def _watched(self, batch: Batch) -> list[tuple[Observations, Segment]]:
        """The sequences of a batch whose queries are observed."""
        if not self._observed:
            return []
        return [(self._observed[s.slot], s) for s in batch.segments if s.slot in self._observed]

    def _observe(
        self, layer: int, observations: Observations, segment: Segment, q: Tensor, k: Tensor, batch: Batch
    ) -> None:
        rows, keys = slice(segment.start, segment.end), None
        if observations.needs.block:
            keys = k[rows].clone()
            self.kernels.rope(keys, self._cos, self._sin, batch.positions[rows])
        observations.see_rotated(layer, q[rows], keys, segment.position)

    def _decode(
        self, layer: int, q: Tensor, batch: Batch, watched: list[tuple[Observations, Segment]]
    ) -> Tensor:
        """Attention of single tokens; the probabilities are added up for those sequences that need it."""
        heads = self.page_table[:, layer], self.lengths[:, layer]
        attend, slots = self.kernels.paged_decode_attention, batch.decode_slots
        summed = [s.index for o, s in watched if o.needs.column_sums and s.index < batch.num_decodes]
        if not summed or len(summed) == len(slots):
            return attend(q, self.pages, *heads, slots, self._scale, accumulate=bool(summed))
        out = torch.empty_like(q)
        others = sorted(set(range(len(slots))) - set(summed))
        for chosen, accumulate in ((summed, True), (others, False)):
            rows = torch.tensor(chosen, device=q.device)
            out[rows] = attend(q[rows], self.pages, *heads, slots[rows], self._scale, accumulate=accumulate)
        return out

    def _prefill(
        self, layer: int, q: Tensor, batch: Batch, watched: list[tuple[Observations, Segment]]
    ) -> Tensor:
        """Attention of chunks; what each token receives is added up for those sequences that need it."""
        heads = self.page_table[:, layer], self.lengths[:, layer]
        place = self.pages, *heads, batch.prefill_slots, batch.prefill_query_start, self._scale
        summed = [s for o, s in watched if o.needs.column_sums and s.index >= batch.num_decodes]
        queries = q if self._prefill_dtype is None else q.to(self._prefill_dtype)
        if not summed:
            out: Tensor = self.kernels.paged_prefill_attention(queries, *place)
            return out
        out, lse = self.kernels.paged_prefill_attention(queries, *place, return_lse=True)
        for segment in summed:
            rows = slice(segment.start - batch.num_decodes, segment.end - batch.num_decodes)
            index = slice(segment.index, segment.index + 1)
            count = torch.tensor([0, segment.end - segment.start], dtype=torch.int32, device=q.device)
            self.kernels.column_sums(
                q[rows], lse[rows], self.pages, *heads, batch.slots[index], count, self._scale
            )
        return out

    def evict(self, slot: int, indices: Tensor, counts: Tensor) -> int:
        """Keeps the chosen tokens of a sequence and gives the emptied pages back.

        Heads that own their pages alone are compacted in place; heads with a shared page move to fresh pages.
        Heads that keep everything are left as they are. If there are too few fresh pages, prefixes that share
        the sequence's pages are dropped, so that it can be compacted in place.

        Args:
            slot: the sequence.
            indices: int32 [layers, heads, n], ascending indices of the tokens each head keeps, -1 padded.
            counts: int32 [layers, heads], how many each head keeps.

        Returns:
            Pages freed, less the fresh ones taken.

        Raises:
            OutOfPages: pages shared with other sequences cannot be copied; only prefixes may be gone.
        """
        self._check_active(slot)
        free_before = self.free_pages
        lengths, page_counts = self._lengths[slot].reshape(-1), self.page_counts[slot].reshape(-1)
        kept = counts.reshape(-1).numpy(force=True)
        if (kept > lengths).any():
            raise ValueError("a head cannot keep more tokens than it has")
        changed = kept < lengths
        if not changed.any():
            return 0
        old, new = page_counts[:, None], self._pages_of(kept)[:, None]
        column = self._page_index[: old.max()]
        table = self._table[slot].reshape(-1, self.layout.max_pages)[:, : len(column)]
        source = table.copy()
        owned = column < old
        shared = self._share_pages(source, owned & changed[:, None])
        if np.count_nonzero(shared & (column < new)) > self.free_pages:
            self.prefixes.forget(source[owned])
            shared = self._share_pages(source, owned & changed[:, None])
        target = self._with_fresh_pages(source, shared & (column < new))
        self._move(source, target, indices.flatten(0, 1), kept)
        self.pool.release(source[owned & (shared | (column >= new))])
        table[:] = target
        lengths[:] = kept
        page_counts[:] = new[:, 0]
        self._publish([slot])
        return self.free_pages - free_before

    def overwrite(self, slot: int, layer: int, k: Tensor, v: Tensor) -> None:
        """Replaces the first keys and values of a layer's heads by merged ones; their norms follow.

        Heads that share a page are left as they are: they have just lost nothing.

        Args:
            slot: the sequence.
            layer: index of the layer.
            k: float32 [KV heads, n, head_dim], after RoPE; of a head with fewer tokens the first ones count.
            v: the same for values.
        """
        size, pages = self.layout.page_size, self.pages
        index = torch.arange(k.shape[1], device=k.device)
        ids = self.page_table[slot, layer].long()[:, index // size]
        alone = torch.from_numpy(self.pool.owners == 1).to(k.device)[ids.clamp(0, self.num_pages - 1)]
        head, token = (alone & (index < self.lengths[slot, layer, :, None])).nonzero(as_tuple=True)
        place = ids[head, token], token % size
        for storage, scales, squares, x in (
            (pages.k, pages.k_scale, pages.k_sq, k),
            (pages.v, pages.v_scale, pages.v_sq, v),
        ):
            storage[place], scale = rounded(x[head, token], storage.dtype)
            squares[place] = x[head, token].square().sum(-1)
            if scales is not None and scale is not None:
                scales[place] = scale

    def _check_active(self, slot: int) -> None:
        if not self._active[slot]:
            raise ValueError(f"slot {slot} is not in use")

    @property
    def _mirrored(self) -> bool:
        """Whether the kernels read copies of the books; on a CPU they read the host's own memory."""
        mirrored: bool = self.lengths.data_ptr() != self._lengths.ctypes.data
        return mirrored

    def _publish(self, slots: Sequence[int]) -> None:
        """Brings the device's table and lengths of some sequences up to date."""
        if self._mirrored:
            self.page_table.index_copy_(0, self._upload(np.array(slots)), self._upload(self._table[slots]))
        self._publish_lengths(slots)

    def _publish_lengths(self, slots: Sequence[int]) -> None:
        if self._mirrored:
            self.lengths.index_copy_(0, self._upload(np.array(slots)), self._upload(self._lengths[slots]))

    def _upload(self, array: NDArray[Any]) -> Tensor:
        """Copies an array to the device without waiting: from pinned memory, in the order of the stream."""
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def _pages_of(self, lengths: NDArray[np.int32]) -> NDArray[np.int32]:
        return (lengths + (self.layout.page_size - 1)) // self.layout.page_size

    def _owned_pages(self, slot: int, counts: NDArray[np.int32]) -> Ids:
        """Lists the ids of the first `counts` [L, H] pages of each head."""
        column = self._page_index[: counts.max()]
        table: Ids = self._table[slot][..., : len(column)]
        return table[column < counts[..., None]]

    def _grown(
        self, slots: Sequence[int], new_tokens: Sequence[int]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Gives lengths with the new tokens and present page counts, both [B, L, H]."""
        rows = np.array(slots, dtype=np.int64)
        added = np.array(new_tokens, dtype=np.int32)
        return self._lengths[rows] + added[:, None, None], self.page_counts[rows]

    def _append_pages(
        self, slots: Sequence[int], counts: NDArray[np.int32], missing: NDArray[np.int32], ids: Ids
    ) -> None:
        """Writes `ids` into the table, `missing` [B, L, H] of them after the first `counts` of each head."""
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

    def _take(self, count: int) -> Ids:
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
            table: int32 [L, H, pages].
            lengths: int32 [L, H].
            shared: int32 [L, H], pages of each head to share; the rest is copied.

        Returns:
            int32 [L, H, pages], the table of the new owner.

        Raises:
            OutOfPages: nothing is changed.
        """
        column = self._page_index[: table.shape[-1]]
        used = column < self._pages_of(lengths)[..., None]
        copied = used & (column >= shared[..., None])
        self.pool.share(table[used])  # those to be copied as well, lest they are dropped for their copies
        try:
            copies = self._take(int(copied.sum()))
        except OutOfPages:
            self.pool.release(table[used])
            raise
        tokens = (lengths[..., None] - column * self.layout.page_size)[copied]
        self._copy_pages(table[copied], copies, np.minimum(tokens, self.layout.page_size).astype(np.int32))
        self.pool.release(table[copied])
        own = table.copy()
        own[copied] = copies
        return own

    def _with_fresh_pages(self, source: Ids, fresh: NDArray[np.bool_]) -> Ids:
        """Copies the table rows `source` [N, pages], with newly taken pages where `fresh`."""
        target = source.copy()
        target[fresh] = self._take(int(fresh.sum()))
        return target

    def _copy_pages(self, source: Ids, target: Ids, counts: NDArray[np.int32]) -> None:
        """Copies the first `counts` [N] tokens of the pages `source` [N]."""
        tokens = torch.arange(self.layout.page_size, dtype=torch.int32, device=self.device)
        self._move(source[:, None], target[:, None], tokens.expand(len(counts), -1), counts)

    def _move(self, source: Ids, target: Ids, indices: Tensor, counts: NDArray[np.int32]) -> None:
        """Moves tokens `indices` [N, n] of the table rows `source` [N, pages] to the front of `target`."""
        tables = self._upload(source), self._upload(target)
        self.kernels.compact(self.pages, *tables, indices, self._upload(counts))
