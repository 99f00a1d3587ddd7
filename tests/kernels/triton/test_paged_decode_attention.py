from __future__ import annotations

import pytest
import torch

from curkv.kernels.paged_decode_attention import reference, triton
from tests.kernels.util import MASKS, generator, make_pool, mask_arguments, scatter_positions


@pytest.mark.parametrize(
    ("lengths", "group", "head_dim", "page_size", "kv_dtype", "shared_pages"),
    [
        ([[1]], 1, 64, 16, "float32", 0),
        ([[5, 0], [16, 17], [64, 65]], 3, 64, 16, "float32", 0),
        ([[700, 256, 257]], 4, 64, 128, "float32", 0),
        ([[40, 80], [50, 33]], 2, 96, 32, "float16", 2),
        ([[90, 1], [129, 127]], 8, 128, 64, "bfloat16", 1),
        ([[35]], 16, 256, 16, "bfloat16", 0),
        ([[90, 1], [129, 327]], 3, 64, 64, "int8", 1),
        ([[90, 1], [129, 327]], 3, 64, 64, "fp8", 1),
        ([[90, 1], [129, 327]], 3, 128, 64, "int8", 0),
        ([[90, 1], [129, 327]], 3, 64, 64, "k8v4", 1),
        ([[17, 90], [0, 65]], 4, 192, 32, "int4", 0),
    ],
)
def test_attends_like_the_reference(close, lengths, group, head_dim, page_size, kv_dtype, shared_pages):
    pool = make_pool(
        lengths, head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype, shared_pages=shared_pages
    )
    expected = pool.copy()
    q = torch.randn(len(lengths), 3 * len(lengths[0]) * group, head_dim)[:, : len(lengths[0]) * group]
    arguments = pool.table, pool.lengths, pool.slots, head_dim**-0.5
    close(
        triton.paged_decode_attention(q, pool.pages, *arguments),
        reference.paged_decode_attention(q, expected.pages, *arguments),
        kv_dtype,
    )


@pytest.mark.parametrize("batch", [1, 64])
def test_many_sequences(close, batch):
    pool = make_pool([[n * 7 % 50] for n in range(1, batch + 1)])
    q = torch.randn(batch, 2, 64)
    arguments = q, pool.pages, pool.table, pool.lengths, pool.slots, 0.125
    close(triton.paged_decode_attention(*arguments), reference.paged_decode_attention(*arguments))


def test_a_slot_below_zero_gives_zero():
    pool = make_pool([[300], [7]])
    slots = pool.slots.clone()
    slots[0] = -1
    q = torch.randn(2, 2, 64)
    out = triton.paged_decode_attention(q, pool.pages, pool.table, pool.lengths, slots, 0.125)
    assert torch.equal(out[0], torch.zeros(2, 64))


def test_large_scores_do_not_overflow():
    pool = make_pool([[600, 40]])
    q = 60 * torch.randn(1, 2, 64)
    arguments = q, pool.pages, pool.table, pool.lengths, pool.slots, 1.0
    # Scores of hundreds carry rounding errors of 1e-5, and so do the exponents.
    actual, expected = triton.paged_decode_attention(*arguments), reference.paged_decode_attention(*arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_no_sequences():
    pool = make_pool([[3]])
    none = torch.empty(0, dtype=torch.int32)
    q = torch.empty(0, 2, 64)
    assert triton.paged_decode_attention(q, pool.pages, pool.table, pool.lengths, none, 1.0).shape == q.shape


@pytest.mark.parametrize("lengths", [[[90, 1]], [[700, 600]]])
def test_bfloat16_queries_give_bfloat16(close, lengths):
    pool = make_pool(lengths, kv_dtype="bfloat16")
    arguments = torch.randn(1, 6, 64).bfloat16(), pool.pages, pool.table, pool.lengths, pool.slots, 0.125
    expected = reference.paged_decode_attention(*arguments).bfloat16()
    close(triton.paged_decode_attention(*arguments), expected, torch.bfloat16)


@pytest.mark.parametrize("kv_dtype", ["float32"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_windows_caps_and_sinks(close, kv_dtype, mask):
    lengths = [[1, 0, 40], [700, 3, 1025], [15, 512, 96]]
    pool = scatter_positions(make_pool(lengths, kv_dtype=kv_dtype), [1, 1, 1])
    q = torch.randn(3, 9, 64, generator=generator(1))
    mine, theirs = pool.copy(), pool.copy()
    rest, masks = (pool.table, pool.lengths, pool.slots, 0.4), mask_arguments(mask, 9)
    actual = triton.paged_decode_attention(q, mine.pages, *rest, **masks)
    expected = reference.paged_decode_attention(q, theirs.pages, *rest, **masks)
    close(actual, expected, kv_dtype)
