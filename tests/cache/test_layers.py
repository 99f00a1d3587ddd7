"""Layers that keep a window, and layers that keep nothing, beside those that attend to everything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curkv.cache.batch import Batch
from curkv.cache.integrity import check_integrity
from curkv.cache.layout import CacheLayout, LayerSpec, full_attention
from curkv.cache.page_manager import PageManager
from curkv.kernels.formats import get_format
from curkv.kernels.store_kv.reference import store_kv
from tests.cache.util import attention_over, books, head_tokens, kept, make_cache, same_books, view_of

PAGE, HEADS = 4, 2
LAYERS = (LayerSpec(HEADS, window=6), LayerSpec(0), LayerSpec(HEADS), LayerSpec(HEADS, window=1))
ROWS = {None: 1, 6: 0, 1: 2}
"""Row of the page table of each window."""


def windowed_cache(num_pages: int = 200) -> PageManager:
    return make_cache(num_pages, layers=LAYERS, max_tokens=80)


def advance(cache: PageManager, slot: int, start: int, count: int) -> None:
    """Stores tokens whose keys are their positions, as a step does, then trims."""
    store(cache, slot, start, count)
    cache.trim([slot])


def store(cache: PageManager, slot: int, start: int, count: int) -> None:
    cache.extend([slot], [count])
    batch = Batch.build([slot], [[0] * count], [start])
    k = batch.positions[:, None, None].float().expand(-1, HEADS, cache.layout.head_dim).contiguous()
    rope = torch.ones(256, 2), torch.zeros(256, 2)
    for row in range(cache.layout.num_layers):
        heads = cache.page_table[:, row], cache.lengths[:, row]
        store_kv(cache.pages, k, k, *rope, batch.positions, *heads, batch.slots, batch.query_start)


def positions(cache: PageManager, slot: int, window: int | None) -> list[int]:
    """Of the tokens that both heads of a layer hold."""
    first, second = (head_tokens(cache, slot, ROWS[window], head) for head in range(HEADS))
    assert torch.equal(first["position"], second["position"])
    assert torch.equal(first["k"][:, 0], first["position"].float())
    held: list[int] = first["position"].tolist()
    return held


def test_layers_without_kv_heads_take_no_row_and_no_page() -> None:
    cache = windowed_cache()
    assert cache.page_table.shape[1:3] == (3, HEADS)
    assert cache.layout.cached_layers == (0, 2, 3) and cache.layout.evicted_rows == (1,)
    cache.extend([cache.add_sequence()], [1])
    assert cache.used_pages == 3 * HEADS


@settings(max_examples=60, deadline=None)
@given(chunks=st.lists(st.integers(1, 13), min_size=1, max_size=6))
def test_a_window_is_held_to_less_than_a_page_more_and_the_rest_is_given_back(chunks: list[int]) -> None:
    cache, computed = windowed_cache(), 0
    slot = cache.add_sequence()
    for chunk in chunks:
        advance(cache, slot, computed, chunk)
        computed += chunk
        for window in (6, 1):
            held = positions(cache, slot, window)
            assert held == list(range(computed - len(held), computed))
            assert min(computed, window - 1) <= len(held) < window - 1 + PAGE
        assert positions(cache, slot, None) == list(range(computed))
        assert cache.held_tokens(slot) == computed
        assert cache.sequence_bytes(slot) == int(cache.page_counts[slot].sum()) * cache.page_bytes
        check_integrity(cache)
    cache.free(slot)
    assert cache.free_pages == cache.num_pages


def test_an_eviction_leaves_windows_alone() -> None:
    cache = windowed_cache()
    slot = cache.add_sequence()
    advance(cache, slot, 0, 21)
    windows = [positions(cache, slot, window) for window in (6, 1)]
    cache.evict(slot, *kept([[[0, 5, 20], [0, 5, 20]]]))
    assert positions(cache, slot, None) == [0, 5, 20]
    assert [positions(cache, slot, window) for window in (6, 1)] == windows
    assert cache.held_tokens(slot) == 3
    check_integrity(cache)


def test_policies_see_the_layers_that_attend_to_everything() -> None:
    cache = windowed_cache()
    slot = cache.add_sequence()
    advance(cache, slot, 0, 10)
    view = view_of(cache, slot)
    assert view.lengths.tolist() == [[10, 10]] and view.num_layers == 1
    assert view.position.tolist() == [[list(range(10))] * HEADS]


def test_an_output_projection_is_asked_for_by_the_layer_of_the_model_and_once() -> None:
    cache = windowed_cache()
    attention, asked, weight = attention_over(cache), [], torch.rand(3, 2, 5)
    attention.output_projection = lambda layer: asked.append(layer) or weight  # type: ignore[func-returns-value]
    view = attention.view(cache.add_sequence())
    assert view.output_gram is not None
    view.output_gram(0)
    torch.testing.assert_close(view.output_gram(0), torch.einsum("hdc,hec->hde", weight, weight))
    assert asked == [2]


def test_what_a_fork_trims_stays_with_its_origin() -> None:
    cache = windowed_cache()
    slot = cache.add_sequence()
    advance(cache, slot, 0, 8)
    fork, before = cache.fork(slot), positions(cache, slot, 6)
    advance(cache, fork, 8, 12)
    assert positions(cache, slot, 6) == before
    assert positions(cache, fork, 6)[-1] == 19
    check_integrity(cache)
    cache.free(slot)
    check_integrity(cache)
    cache.free(fork)
    assert cache.free_pages == cache.num_pages


def test_without_windows_there_is_nothing_to_trim() -> None:
    cache = make_cache()
    slot = cache.add_sequence()
    cache.extend([slot], [9])
    before = books(cache)
    assert cache.trim([slot]) == 0
    assert same_books(before, books(cache))


def test_a_query_attends_to_its_window_of_positions() -> None:
    """Also where the layer's tokens were evicted, so that fewer are stored than the window is wide."""
    cache = make_cache(200, layers=(LayerSpec(HEADS, window=6),), max_tokens=80)
    slot = cache.add_sequence()
    advance(cache, slot, 0, 12)
    assert positions(cache, slot, 6) == list(range(4, 12))
    cache.evict(slot, *kept([[[1, 3, 4, 7], [1, 3, 4, 7]]]))  # positions 5, 7, 8, 11
    attention = attention_over(cache)
    q, k, v = torch.zeros(1, HEADS, 4), torch.zeros(1, HEADS, 4), torch.full((1, HEADS, 4), 12.0)
    for position, seen in ((12, [7, 8, 11, 12]), (13, [8, 11, 12, 12]), (14, [11, 12, 12, 12])):
        cache.extend([slot], [1])
        out = attention.attend(0, q.clone(), k.clone(), v, Batch.build([slot], [[0]], [position]))
        assert torch.allclose(out, torch.tensor(sum(seen) / len(seen)))


def test_where_all_layers_have_windows_policies_evict_from_them() -> None:
    layers = (LayerSpec(HEADS, window=10), LayerSpec(HEADS, window=7))
    cache = make_cache(200, layers=layers, max_tokens=80)
    slot = cache.add_sequence()
    advance(cache, slot, 0, 21)
    assert cache.layout.evicted_rows == (0, 1)
    view = view_of(cache, slot)
    assert view.lengths.tolist() == [[9, 9], [9, 9]]
    assert view.position[:, 0, 0].tolist() == [12, 12]
    cache.evict(slot, *kept([[[3, 8], [0, 1]], [[7, 8], [6, 7]]]))
    held = cache.used_pages
    advance(cache, slot, 21, 6)  # what was stored then is behind no window of 10 yet, but that of 7
    assert cache.lengths[slot].tolist() == [[8, 8], [8, 8]]
    advance(cache, slot, 27, 3)
    check_integrity(cache)
    assert cache.lengths[slot].tolist() == [[11, 11], [7, 7]]
    advance(cache, slot, 30, 13)
    assert [list(heads) for heads in cache.lengths[slot].tolist()] == [[12, 12], [8, 8]]
    for row, window in ((0, 10), (1, 7)):
        found = head_tokens(cache, slot, row, 0)["position"].tolist()
        assert found == list(range(43 - len(found), 43)) and len(found) >= window - 1
    assert cache.used_pages >= held
    cache.free(slot)
    assert cache.free_pages == cache.num_pages


@pytest.mark.parametrize("trimmed", [False, True])
def test_a_prefix_has_all_pages_of_its_blocks_and_who_starts_from_it_what_windows_reach(
    trimmed: bool,
) -> None:
    cache = make_cache(400, layers=LAYERS, max_tokens=80, max_prefix_pages=300)
    slot, keys = cache.add_sequence(), [bytes([i]) for i in range(5)]
    if trimmed:  # the first blocks are held when the windows have passed them already
        advance(cache, slot, 0, 12)
        store(cache, slot, 12, 8)
        cache.keep_blocks(slot, keys)
        assert cache.prefixes.find_blocks(keys) is None
        other = cache.add_sequence()
        store(cache, other, 0, 20)
        cache.keep_blocks(other, keys)
        cache.free(other)
    else:
        store(cache, slot, 0, 20)
        cache.keep_blocks(slot, keys)
    cache.free(slot)
    check_integrity(cache)
    for blocks in (5, 2):
        prefix = cache.prefixes.find_blocks(keys[:blocks])
        assert prefix is not None and prefix.tokens == 4 * blocks
        new = cache.adopt(prefix)
        for window in (6, 1):
            found = positions(cache, new, window)
            assert found == list(range(4 * blocks - len(found), 4 * blocks))
            assert min(4 * blocks, window - 1) <= len(found) < window - 1 + PAGE
        assert positions(cache, new, None) == list(range(4 * blocks))
        advance(cache, new, 4 * blocks, 9)
        assert positions(cache, new, 6)[-5:] == list(range(4 * blocks + 4, 4 * blocks + 9))
        check_integrity(cache)
        cache.free(new)
    cache.prefixes.drop()
    assert cache.free_pages == cache.num_pages


@pytest.mark.parametrize(
    "layers",
    [(), (LayerSpec(0),), (LayerSpec(2), LayerSpec(4)), (LayerSpec(2, window=0),)],
)
def test_layers_that_no_table_holds_are_refused(layers: tuple[LayerSpec, ...]) -> None:
    with pytest.raises(ValueError, match=r"KV heads|window"):
        CacheLayout(layers, 4, PAGE, get_format("float32"), 2, 80)


def test_full_attention_is_as_many_equal_layers() -> None:
    layout = CacheLayout(full_attention(3, 2), 4, PAGE, get_format("float32"), 2, 80)
    assert (layout.num_layers, layout.num_heads, layout.evicted_rows) == (3, 6, (0, 1, 2))
