"""Prefixes by themselves: their keys, their order, and who gives way."""

from __future__ import annotations

import pytest

from curkv.cache.page_manager import PageManager
from curkv.cache.prefixes import block_keys, context_digest
from tests.cache.util import make_cache

HEADS = 4


def held_blocks(cache: PageManager, key: str, blocks: int) -> list[str]:
    """Computes a prompt of whole blocks, holds them, and ends its sequence."""
    slot = cache.add_sequence()
    cache.extend([slot], [blocks * cache.layout.page_size])
    keys = [f"{key}{i}" for i in range(blocks)]
    cache.keep_blocks(slot, keys)
    cache.free(slot)
    return keys


def test_a_key_stands_for_all_tokens_up_to_its_block() -> None:
    keys = block_keys(range(11), 4)
    assert len(keys) == 2 and block_keys([], 4) == []
    assert block_keys(range(8), 4) == keys
    assert block_keys([0, 1, 2, 3, 9, 9, 9, 9], 4)[0] == keys[0]
    assert block_keys([9, 1, 2, 3, 4, 5, 6, 7], 4)[1] != keys[1]
    assert block_keys(range(8), 4, salt="a")[0] != keys[0]
    assert context_digest([1, 2]) not in {context_digest([1, 2, 3]), context_digest([1, 2], "a")}


def test_the_longest_run_of_blocks_is_found() -> None:
    cache = make_cache(max_prefix_pages=100)
    keys = held_blocks(cache, "a", 3)
    found = cache.prefixes.find_blocks([*keys[:2], "other", keys[2]])
    assert found is not None and found.tokens == 8 and found.table.shape == (2, 2, 2)
    assert cache.prefixes.find_blocks(["other", *keys]) is None


def test_of_the_block_behind_the_last_one_the_first_tokens_are_found() -> None:
    cache = make_cache(max_prefix_pages=100)
    texts = {"a": [1, 2, 3, 4, 5, 6, 7, 8], "b": [1, 2, 3, 4, 5, 6, 9, 9]}
    for name, text in texts.items():
        slot = cache.add_sequence()
        cache.extend([slot], [8])
        cache.keep_blocks(slot, ["both", name], text)
        cache.free(slot)
    for text, common, page in (([5, 6, 7, 0], 3, "a"), ([5, 6, 9, 0], 3, "b"), ([5, 6], 2, "a")):
        found = cache.prefixes.find_blocks(["both"], [1, 2, 3, 4, *text])
        assert found is not None and found.tokens == 4 + common and (found.lengths == found.tokens).all()
        assert (found.table[..., 1:] == cache.prefixes.find(page).table).all()
        slot = cache.adopt(found)
        cache.free(slot)
    for text in ([], [1, 2, 3, 4], [1, 2, 3, 4, 6]):
        whole = cache.prefixes.find_blocks(["both"], text)
        assert whole is not None and whole.tokens == 4
    cache.prefixes.drop()
    assert cache.prefixes.find_blocks(["both"], texts["a"]) is None


def test_the_least_recently_used_gives_way_and_a_prefix_from_its_end() -> None:
    cache = make_cache(num_pages=8 * HEADS, max_prefix_pages=6 * HEADS)
    first, second = held_blocks(cache, "a", 3), held_blocks(cache, "b", 3)
    assert cache.prefixes.find_blocks(first) is not None
    third = held_blocks(cache, "c", 1)
    lengths = [
        prefix.tokens // 4 if (prefix := cache.prefixes.find_blocks(keys)) else 0
        for keys in (first, second, third)
    ]
    assert lengths == [3, 2, 1]


def test_a_prefix_that_a_sequence_uses_is_not_dropped_for_pages() -> None:
    cache = make_cache(num_pages=6 * HEADS, max_prefix_pages=100)
    used, idle = held_blocks(cache, "a", 2), held_blocks(cache, "b", 2)
    found = cache.prefixes.find_blocks(used)
    assert found is not None
    slot = cache.adopt(found)
    assert cache.free_pages == 4 * HEADS
    cache.extend([slot], [16])
    assert cache.free_pages == 0
    assert cache.prefixes.find_blocks(idle) is None
    assert cache.prefixes.find_blocks(used) is not None


def test_a_prefix_larger_than_the_limit_is_held_as_far_as_it_goes() -> None:
    cache = make_cache(max_prefix_pages=2 * HEADS + 1)
    found = cache.prefixes.find_blocks(held_blocks(cache, "a", 5))
    assert found is not None and found.tokens == 8


def test_bytes_held_and_saved() -> None:
    cache = make_cache(max_prefix_pages=100)
    keys = held_blocks(cache, "a", 3)
    assert (cache.usage.prefix_bytes, cache.usage.used_bytes, cache.usage.saved_bytes) == (
        12 * cache.page_bytes,
        0,
        0,
    )
    found = cache.prefixes.find_blocks(keys)
    assert found is not None
    for count in (1, 2):
        cache.adopt(found)
        assert cache.usage.used_bytes == 12 * cache.page_bytes
        assert cache.usage.saved_bytes == count * 12 * cache.page_bytes


def test_what_is_pinned_gives_way_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as it is pinned, and all the same where nothing else is left."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    cache = make_cache(max_prefix_pages=5 * HEADS)
    pinned = held_blocks(cache, "pinned", 2)
    cache.prefixes.pin(pinned, 10.0)
    for name in ("b", "c"):
        held_blocks(cache, name, 2)
    assert all(key in cache.prefixes for key in pinned)
    now[0] = 11.0
    held_blocks(cache, "d", 2)
    assert not any(key in cache.prefixes for key in pinned)
