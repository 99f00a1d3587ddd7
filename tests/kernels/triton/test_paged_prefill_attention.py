from __future__ import annotations

import pytest
import torch

from curkv.kernels.paged_prefill_attention import reference, triton
from tests.kernels.util import MASKS, generator, make_pool, mask_arguments, query_start, scatter_positions


@pytest.mark.parametrize(
    ("lengths", "new_tokens", "group", "head_dim", "page_size", "kv_dtype", "shared_pages"),
    [
        ([[1]], [1], 1, 64, 16, "float32", 0),
        ([[40, 9], [90, 150]], [9, 70], 3, 64, 16, "float32", 0),
        ([[130], [3], [64], [65]], [130, 3, 64, 1], 2, 64, 32, "float32", 0),
        ([[40, 80], [90, 50]], [5, 17], 2, 96, 32, "float16", 1),
        ([[70, 140]], [70], 4, 128, 128, "bfloat16", 0),
        ([[33]], [20], 16, 256, 64, "bfloat16", 0),
        ([[40, 80], [190, 50]], [5, 17], 3, 64, 32, "int8", 1),
        ([[40, 80], [90, 50]], [5, 17], 3, 64, 32, "fp8", 1),
        ([[40, 80], [90, 50]], [5, 17], 3, 64, 32, "k8v4", 1),
        ([[40, 65]], [9], 2, 192, 32, "int4", 0),
    ],
)
def test_attends_like_the_reference(
    close, lengths, new_tokens, group, head_dim, page_size, kv_dtype, shared_pages
):
    pool = make_pool(
        lengths, head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype, shared_pages=shared_pages
    )
    heads = len(lengths[0])
    q = torch.randn(sum(new_tokens), 2 * heads * group, head_dim)[:, heads * group :]
    layout = pool.table, pool.lengths, pool.slots, query_start(new_tokens)
    arguments = q, pool.pages, *layout, head_dim**-0.5
    out, lse = triton.paged_prefill_attention(*arguments, return_lse=True)
    expected, expected_lse = reference.paged_prefill_attention(*arguments, return_lse=True)
    close(out, expected, kv_dtype)
    close(lse, expected_lse, kv_dtype)


def test_many_sequences(close):
    new_tokens = [n % 5 + 1 for n in range(64)]
    pool = make_pool([[n + n % 9] for n in new_tokens])
    q = torch.randn(sum(new_tokens), 1, 64)
    layout = pool.table, pool.lengths, pool.slots, query_start(new_tokens)
    arguments = q, pool.pages, *layout, 0.125
    close(triton.paged_prefill_attention(*arguments), reference.paged_prefill_attention(*arguments))


def test_large_scores_do_not_overflow():
    pool = make_pool([[100]])
    layout = pool.table, pool.lengths, pool.slots, query_start([50])
    arguments = 60 * torch.randn(50, 2, 64), pool.pages, *layout, 1.0
    # Scores of hundreds carry rounding errors of 1e-5, and so do the exponents.
    actual, expected = (
        triton.paged_prefill_attention(*arguments),
        reference.paged_prefill_attention(*arguments),
    )
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_bfloat16_queries_give_bfloat16(close):
    pool = make_pool([[90, 20]], kv_dtype="bfloat16")
    layout = pool.table, pool.lengths, pool.slots, query_start([9])
    arguments = torch.randn(9, 6, 64).bfloat16(), pool.pages, *layout, 0.125
    expected = reference.paged_prefill_attention(*arguments).bfloat16()
    close(triton.paged_prefill_attention(*arguments), expected, torch.bfloat16)


@pytest.mark.parametrize("kv_dtype", ["float32"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_windows_caps_and_sinks(close, kv_dtype, mask):
    lengths, new_tokens = [[1, 1, 1], [300, 77, 129], [17, 32, 40], [65, 64, 500]], [1, 77, 9, 17]
    pool = scatter_positions(make_pool(lengths, kv_dtype=kv_dtype), new_tokens)
    q = torch.randn(sum(new_tokens), 9, 64, generator=generator(1))
    rest = q, pool.pages, pool.table, pool.lengths, pool.slots, query_start(new_tokens), 0.4, True
    masks = mask_arguments(mask, 9)
    out, lse = triton.paged_prefill_attention(*rest, **masks)
    expected, expected_lse = reference.paged_prefill_attention(*rest, **masks)
    close(out, expected, kv_dtype)
    close(lse, expected_lse, kv_dtype)


@pytest.mark.parametrize("processors", [1, 6, 100])
def test_programs_that_share_a_tile_give_what_one_gives(close, monkeypatch, processors):
    """One program a tile; three, of which the last have nothing to do for short texts; sixteen."""
    monkeypatch.setattr(triton, "num_processors", lambda _: processors)
    lengths, new_tokens = [[300, 77], [17, 430]], [9, 1]
    pool = scatter_positions(make_pool(lengths), new_tokens)
    q = torch.randn(sum(new_tokens), 6, 64, generator=generator(1))
    rest = q, pool.pages, pool.table, pool.lengths, pool.slots, query_start(new_tokens), 0.4, True
    for mask in ({}, {"window": 200, "sinks": 1.0}):
        masks = mask_arguments(mask, 6)
        found = triton.paged_prefill_attention(*rest, **masks)
        for actual, expected in zip(found, reference.paged_prefill_attention(*rest, **masks), strict=True):
            close(actual, expected)


def test_a_chunk_that_fills_the_device_is_not_split():
    assert [triton.num_splits(programs, 132) for programs in (8, 24, 67, 132, 1000)] == [16, 5, 1, 1, 1]
