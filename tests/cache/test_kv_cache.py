from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from curkv.cache.batch import Batch
from curkv.cache.integrity import IntegrityError, check_integrity
from curkv.cache.layout import CacheLayout
from curkv.cache.page_manager import OutOfSlots, PageManager
from curkv.cache.page_pool import OutOfPages
from curkv.kernels.formats import KV_FORMATS
from curkv.kernels.rope.reference import rope
from tests.cache.util import attention_over, books, head_tokens, kept, make_cache, same_books, step


def rope_tables(positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(positions)[:, None] * 100.0 ** -torch.linspace(0, 1, head_dim // 2)
    return angles.cos(), angles.sin()


class DenseSequence:
    """Keys and values of one sequence per (layer, head), and attention over them without pages."""

    def __init__(self, layout: CacheLayout, tables: tuple[Tensor, Tensor]) -> None:
        self.tables, self.group = tables, 2
        self.k, self.v = (
            [[torch.empty(0, layout.head_dim)] * layout.num_kv_heads for _ in range(layout.num_layers)]
            for _ in range(2)
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        q, k = q.clone(), k.clone()
        rope(q, *self.tables, positions)
        rope(k, *self.tables, positions)
        out = torch.empty_like(q)
        for head in range(k.shape[1]):
            keys = self.k[layer][head] = torch.cat([self.k[layer][head], k[:, head]])
            values = self.v[layer][head] = torch.cat([self.v[layer][head], v[:, head]])
            causal = torch.ones(len(q), len(keys), dtype=torch.bool).tril(len(keys) - len(q))
            for i in range(head * self.group, (head + 1) * self.group):
                scores = (q[:, i] @ keys.T * q.shape[-1] ** -0.5).masked_fill(~causal, -torch.inf)
                out[:, i] = scores.softmax(-1) @ values
        return out

    def evict(self, keep: list[list[list[int]]]) -> None:
        for layer, heads in enumerate(keep):
            for head, indices in enumerate(heads):
                self.k[layer][head] = self.k[layer][head][indices]
                self.v[layer][head] = self.v[layer][head][indices]


def run_both(
    cache: PageManager,
    tables: tuple[Tensor, Tensor],
    dense: dict[int, DenseSequence],
    chunks: dict[int, int],
    starts: dict[int, int],
) -> None:
    """One step of random tokens through the cache and through dense attention; both must agree."""
    batch = Batch.build(list(chunks), [[0] * n for n in chunks.values()], [starts[slot] for slot in chunks])
    cache.extend(list(chunks), list(chunks.values()))
    layout, total, attention = cache.layout, len(batch.token_ids), attention_over(cache, tables)
    bounds = batch.query_start.tolist()
    for layer in range(layout.num_layers):
        q = torch.randn(total, 2 * layout.num_kv_heads, layout.head_dim)
        k, v = torch.randn(2, total, layout.num_kv_heads, layout.head_dim)
        expected = torch.cat(
            [
                dense[slot].attend(layer, q[a:b], k[a:b], v[a:b], batch.positions[a:b])
                for slot, a, b in zip(chunks, bounds, bounds[1:], strict=False)
            ]
        )
        torch.testing.assert_close(attention.attend(layer, q, k, v, batch), expected)
    for slot, count in chunks.items():
        starts[slot] += count


def test_chunks_decodes_and_evicted_heads_attend_like_dense_attention() -> None:
    torch.manual_seed(0)
    tables = rope_tables(64, 8)
    cache = make_cache(head_dim=8)
    a, b = cache.add_sequence(), cache.add_sequence()
    dense = {slot: DenseSequence(cache.layout, tables) for slot in (a, b)}
    starts = {a: 0, b: 0}
    run_both(cache, tables, dense, {a: 7}, starts)
    run_both(cache, tables, dense, {a: 1, b: 5}, starts)
    keep = [[[0, 3, 7], [1, 2, 3, 4, 5]], [[7], [0, 1, 2, 3, 4, 5, 6, 7]]]
    cache.evict(a, *kept(keep))
    dense[a].evict(keep)
    for _ in range(6):
        run_both(cache, tables, dense, {a: 1, b: 1}, starts)
    run_both(cache, tables, dense, {a: 1, b: 6}, starts)
    run_both(cache, tables, dense, {b: 2, a: 3}, starts)


def test_rope_is_applied_to_queries_in_place_at_logical_positions() -> None:
    tables = rope_tables(64, 4)
    cache = make_cache()
    slot = cache.add_sequence()
    batch = Batch.build([slot], [[1, 2]], [9])
    cache.extend([slot], [2])
    q = torch.randn(2, 4, 4)
    expected = q.clone()
    rope(expected, *tables, torch.tensor([9, 10], dtype=torch.int32))
    attention_over(cache, tables).attend(0, q, torch.randn(2, 2, 4), torch.randn(2, 2, 4), batch)
    assert torch.equal(q, expected)
    assert head_tokens(cache, slot, 0, 1)["position"].tolist() == [9, 10]


def test_a_new_cache_uses_nothing() -> None:
    cache = make_cache(num_pages=10)
    assert (cache.usage.used_bytes, cache.free_pages, cache.usage.stranded_slots_ratio) == (0, 10, 0.0)
    assert cache.usage.capacity_bytes == 10 * cache.page_bytes
    check_integrity(cache)


@pytest.mark.parametrize("kv_dtype", KV_FORMATS)
def test_the_layout_counts_the_bytes_that_pages_really_have(kv_dtype: str) -> None:
    cache = make_cache(num_pages=3, kv_dtype=kv_dtype)
    assert sum(array.nbytes for array in cache.pages.arrays.values()) == 3 * cache.page_bytes
    assert cache.layout.token_bytes * cache.layout.page_size == 4 * cache.page_bytes


def test_one_token_takes_a_page_in_every_head() -> None:
    cache = make_cache()
    slot = cache.add_sequence()
    assert cache.pages_needed([slot], [1]) == 4
    cache.extend([slot], [1])
    assert cache.used_pages == 4
    assert cache.usage.stranded_slots_ratio == 0.75
    cache.extend([slot], [3])
    assert cache.used_pages == 4
    assert cache.usage.stranded_slots_ratio == 0.0
    assert cache.pages_needed([slot], [1]) == 4


def test_ragged_heads_take_pages_only_where_they_are_full() -> None:
    cache = make_cache()
    slot = cache.add_sequence()
    step(cache, {slot: 8}, {slot: 0})
    cache.evict(slot, *kept([[[0, 1, 2], [0, 1, 2, 3]], [[4, 5, 6, 7], []]]))
    assert cache.used_pages == 3
    assert cache.pages_needed([slot], [1]) == 3
    step(cache, {slot: 1}, {slot: 8})
    assert cache.head_lengths(slot).tolist() == [[4, 5], [5, 1]]
    assert cache.used_pages == 6
    check_integrity(cache)


def test_pages_needed_of_several_sequences_is_what_extend_takes() -> None:
    cache = make_cache()
    slots = [cache.add_sequence() for _ in range(3)]
    cache.extend(slots, [3, 4, 0])
    needed, free = cache.pages_needed(slots, [1, 1, 9]), cache.free_pages
    cache.extend(slots, [1, 1, 9])
    assert needed == 0 + 4 + 12 == free - cache.free_pages
    assert cache.layout.sequence_pages(9) == 12


def test_an_extend_without_room_changes_nothing_for_any_sequence() -> None:
    cache = make_cache(num_pages=8)
    a, b = cache.add_sequence(), cache.add_sequence()
    step(cache, {a: 3}, {a: 0})
    before = books(cache)
    with pytest.raises(OutOfPages, match="8 pages are needed but only 4 are free"):
        cache.extend([a, b], [2, 1])
    assert same_books(before, books(cache))
    cache.extend([a, b], [1, 1])


def test_extending_past_max_tokens_or_a_free_slot_is_refused() -> None:
    cache = make_cache(max_tokens=10)
    slot = cache.add_sequence()
    with pytest.raises(ValueError, match="more than 10 tokens"):
        cache.extend([slot], [11])
    with pytest.raises(ValueError, match=f"slot {slot + 1} is not in use"):
        cache.extend([slot, slot + 1], [1, 1])
    assert cache.used_pages == 0
    cache.extend([slot], [10])


def test_slots_run_out_and_come_back() -> None:
    cache = make_cache(max_sequences=2)
    slots = [cache.add_sequence() for _ in range(2)]
    with pytest.raises(OutOfSlots):
        cache.add_sequence()
    cache.free(slots[0])
    assert cache.add_sequence() == slots[0]


def test_freeing_twice_is_refused() -> None:
    cache = make_cache()
    slot = cache.add_sequence()
    cache.extend([slot], [5])
    assert cache.free(slot) == 8
    with pytest.raises(ValueError, match=f"slot {slot} is not in use"):
        cache.free(slot)
    assert cache.free_pages == cache.num_pages


def test_a_fork_shares_full_pages_and_copies_partial_ones_bit_for_bit() -> None:
    cache = make_cache()
    slot = cache.add_sequence()
    step(cache, {slot: 10}, {slot: 0})
    cache.pages.attention[:] = torch.rand_like(cache.pages.attention)
    used = cache.used_pages
    new = cache.fork(slot)
    assert cache.used_pages == used + 4
    assert torch.equal(cache.page_table[new, ..., :2], cache.page_table[slot, ..., :2])
    assert not torch.equal(cache.page_table[new, ..., 2], cache.page_table[slot, ..., 2])
    for layer in range(2):
        for head in range(2):
            ours, theirs = (head_tokens(cache, s, layer, head) for s in (slot, new))
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    check_integrity(cache)
    assert cache.free(slot) == 4
    assert cache.free(new) == 12


def test_a_fork_and_its_origin_go_separate_ways() -> None:
    cache = make_cache()
    slot = cache.add_sequence()
    step(cache, {slot: 6}, {slot: 0})
    new = cache.fork(slot)
    shared = head_tokens(cache, slot, 1, 1)["k"]
    step(cache, {slot: 1, new: 1}, {slot: 6, new: 6})
    ours, theirs = (head_tokens(cache, s, 1, 1)["k"] for s in (slot, new))
    assert torch.equal(ours[:6], shared)
    assert torch.equal(theirs[:6], shared)
    assert not torch.equal(ours[6], theirs[6])


@pytest.mark.parametrize(("num_pages", "max_sequences"), [(11, 4), (12, 1)])
def test_a_fork_without_room_changes_nothing(num_pages: int, max_sequences: int) -> None:
    cache = make_cache(num_pages=num_pages, max_sequences=max_sequences)
    slot = cache.add_sequence()
    step(cache, {slot: 5}, {slot: 0})
    before = books(cache)
    with pytest.raises((OutOfPages, OutOfSlots)):
        cache.fork(slot)
    assert same_books(before, books(cache))
    check_integrity(cache)


def test_eviction_compacts_in_place_and_frees_the_emptied_pages() -> None:
    cache = make_cache()
    slot = cache.add_sequence()
    step(cache, {slot: 12}, {slot: 0})
    before = head_tokens(cache, slot, 0, 0)
    first_page = cache.page_table[slot, 0, 0, 0].item()
    full = list(range(12))
    assert cache.evict(slot, *kept([[[1, 4, 5, 6, 11], full], [[], [0]]])) == 1 + 0 + 3 + 2
    after = head_tokens(cache, slot, 0, 0)
    assert all(torch.equal(after[name], before[name][[1, 4, 5, 6, 11]]) for name in before)
    assert cache.page_table[slot, 0, 0, 0].item() == first_page
    assert cache.head_lengths(slot).tolist() == [[5, 12], [0, 1]]
    check_integrity(cache)


def test_evicting_from_shared_pages_leaves_the_other_sequence_untouched() -> None:
    cache = make_cache()
    slot = cache.add_sequence()
    step(cache, {slot: 9}, {slot: 0})
    new = cache.fork(slot)
    before = [[head_tokens(cache, slot, layer, head) for head in range(2)] for layer in range(2)]
    keep = [0, 2, 4, 6, 8]
    assert cache.evict(new, *kept([[keep, keep], [keep, keep]])) == 4 * (1 - 2)
    for layer in range(2):
        for head in range(2):
            ours, theirs = (head_tokens(cache, s, layer, head) for s in (slot, new))
            for name, held in before[layer][head].items():
                assert torch.equal(ours[name], held)
                assert torch.equal(theirs[name], held[keep])
    assert cache.pool.owners.max() == 1
    check_integrity(cache)


def test_an_eviction_that_cannot_copy_shared_pages_changes_nothing() -> None:
    cache = make_cache(num_pages=11)
    slot = cache.add_sequence()
    step(cache, {slot: 8}, {slot: 0})
    new = cache.fork(slot)
    before = books(cache)
    with pytest.raises(OutOfPages, match="4 pages are needed but only 3 are free"):
        cache.evict(new, *kept([[[0], [1]], [[2], [3]]]))
    assert same_books(before, books(cache))


def test_an_eviction_keeping_everything_changes_nothing_even_on_shared_pages() -> None:
    cache = make_cache()
    slot = cache.add_sequence()
    step(cache, {slot: 9}, {slot: 0})
    cache.fork(slot)
    before = books(cache)
    full = list(range(9))
    assert cache.evict(slot, *kept([[full, full], [full, full]])) == 0
    assert same_books(before, books(cache))


def test_keeping_more_than_there_is_is_refused() -> None:
    cache = make_cache()
    slot = cache.add_sequence()
    step(cache, {slot: 2}, {slot: 0})
    with pytest.raises(ValueError, match="more tokens than it has"):
        cache.evict(slot, *kept([[[0, 1, 2], [0]], [[0], [0]]]))


def share_with_another_head(cache: PageManager) -> None:
    ids = cache.page_table[0, 0, 0, :1].numpy().copy()
    cache.pool.release(cache.page_table[0, 0, 1, :1].numpy().copy())
    cache.pool.share(ids)
    cache.page_table[0, 0, 1, 0] = int(ids[0])


def repeat_in_own_head(cache: PageManager) -> None:
    ids = cache.page_table[0, 0, 0, :1].numpy().copy()
    cache.pool.release(cache.page_table[0, 0, 0, 1:2].numpy().copy())
    cache.pool.share(ids)
    cache.page_table[0, 0, 0, 1] = int(ids[0])


def share_partial(cache: PageManager) -> None:
    cache.page_table[1] = cache.page_table[0]
    cache.page_counts[1] = cache.page_counts[0]
    cache.lengths[1] = cache.lengths[0]
    cache.pool.share(cache.page_table[0, ..., :2].numpy().flatten())


def swap_pages(cache: PageManager) -> None:
    cache.page_table[0, 1, 0, :2] = cache.page_table[0, 1, 0, :2].flip(0)
    cache.lengths[0, 1, 0] = 8


def set_position(cache: PageManager) -> None:
    cache.pages.position[cache.page_table[0, 1, 0, 0].item(), 2] = 1


CORRUPTIONS: list[tuple[Callable[[PageManager], object], str]] = [
    (lambda cache: cache.lengths[0, 1, 0].add_(4), r"page count does not fit length at .* 0, 1, 0"),
    (lambda cache: cache.lengths[0, 1, 0].fill_(-1), r"length out of range at .* 0, 1, 0"),
    (lambda cache: cache._active.__setitem__(0, False), "slot 0 is not in use but holds tokens"),
    (lambda cache: cache._free_slots.pop(), "1 slots are free but 2 are not in use"),
    (lambda cache: cache.page_table[0, 0, 0, 0].fill_(64), "outside the pool"),
    (lambda cache: cache.pool.owners.put(0, 2), "reference count of page 0 differs"),
    (
        lambda cache: cache.pool.release(np.array([3], dtype=np.int32)),
        "page 3 is free but has an owner",
    ),
    (lambda cache: cache.pool._stack.put(0, 62), "page 62 is in the free list twice"),
    (lambda cache: cache.pool._stack.put(0, 0), "page 0 is free but has an owner"),
    (lambda cache: setattr(cache.pool, "_num_free", 50), "page .* is neither free nor owned"),
    (share_with_another_head, "a page lies in two heads"),
    (repeat_in_own_head, "twice in the same head"),
    (share_partial, "a shared page is not full"),
    (set_position, "positions do not ascend within a page"),
    (swap_pages, "positions do not ascend"),
]


@pytest.mark.parametrize(("corrupt", "message"), CORRUPTIONS)
def test_the_integrity_check_says_what_is_wrong(
    corrupt: Callable[[PageManager], object], message: str
) -> None:
    cache = make_cache()
    slots = [cache.add_sequence() for _ in range(2)]
    step(cache, {slots[0]: 7}, {slots[0]: 0})
    check_integrity(cache)
    corrupt(cache)
    with pytest.raises(IntegrityError, match=message):
        check_integrity(cache)


def test_a_batch_is_the_flattened_sequences() -> None:
    batch = Batch.build([2, 0, 1], [[5], [6], [7, 8, 9]], [40, 3, 10], wanted=[1, 1, 0])
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.positions.tolist() == [40, 3, 10, 11, 12]
    assert batch.query_start.tolist() == [0, 1, 2, 5]
    assert batch.num_decodes == 2
    assert batch.logit_rows.tolist() == [0, 1]
    assert batch.decode_slots.tolist() == [2, 0]
    assert batch.prefill_slots.tolist() == [1]
    assert batch.prefill_query_start.tolist() == [0, 3]


def test_only_leading_single_tokens_are_decodes() -> None:
    batch = Batch.build([0, 1, 2], [[5], [6, 7], [8]], [0, 0, 0])
    assert batch.num_decodes == 1
    assert batch.prefill_query_start.tolist() == [0, 2, 3]
    assert batch.logit_rows.tolist() == [0, 2, 3]


def test_a_sequence_without_new_tokens_is_no_part_of_a_batch() -> None:
    with pytest.raises(ValueError, match="at least one new token"):
        Batch.build([0, 1], [[5], []], [0, 0])


def test_a_check_reads_no_more_than_what_sequences_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that falls idle checks before it takes the next request, whatever it has places for."""
    cache, read, numpy = make_cache(max_tokens=4000), [], Tensor.numpy
    slot = cache.add_sequence()
    step(cache, {slot: 9}, {slot: 0})

    def noted(tensor: Tensor, *, force: bool = False) -> object:
        read.append(tensor.numel())
        return numpy(tensor, force=force)

    monkeypatch.setattr(Tensor, "numpy", noted)
    check_integrity(cache)
    cache.free(slot)
    held, read[:] = sum(read), []
    check_integrity(cache)
    assert sum(read) < held < cache.page_table.numel() / 2
