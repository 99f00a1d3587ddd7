from __future__ import annotations

import pytest
import torch

from curkv.kernels.column_sums import reference, triton
from curkv.kernels.paged_prefill_attention.reference import paged_prefill_attention
from tests.kernels.util import MASKS, make_pool, mask_arguments, query_start, scatter_positions


@pytest.mark.parametrize(
    ("lengths", "new_tokens", "group", "head_dim", "page_size", "kv_dtype", "shared_pages"),
    [
        ([[1]], [1], 1, 64, 16, "float32", 0),
        ([[40, 9], [90, 150]], [9, 70], 3, 64, 16, "float32", 0),
        ([[40, 80], [90, 50]], [5, 17], 2, 96, 32, "float16", 1),
        ([[70, 140]], [70], 4, 128, 128, "bfloat16", 0),
        ([[33]], [20], 16, 256, 64, "bfloat16", 0),
        ([[40, 80], [90, 50]], [5, 17], 3, 64, 32, "int8", 1),
        ([[40, 80], [90, 50]], [5, 17], 3, 64, 32, "int4", 1),
    ],
)
def test_adds_what_the_reference_adds(
    close, lengths, new_tokens, group, head_dim, page_size, kv_dtype, shared_pages
):
    pool = make_pool(
        lengths, head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype, shared_pages=shared_pages
    )
    expected = pool.copy()
    heads = len(lengths[0])
    q = torch.randn(sum(new_tokens), 2 * heads * group, head_dim)[:, heads * group :]
    layout = pool.table, pool.lengths, pool.slots, query_start(new_tokens), head_dim**-0.5
    _, lse = paged_prefill_attention(q, pool.pages, *layout, return_lse=True)
    for _ in range(2):
        triton.column_sums(q, lse, pool.pages, *layout)
        reference.column_sums(q, lse, expected.pages, *layout)
    close(pool.pages.attention, expected.pages.attention, kv_dtype)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_windows_and_caps(close, mask):
    lengths, new_tokens = [[1, 1, 1], [300, 77, 129], [65, 64, 500]], [1, 77, 17]
    pool = scatter_positions(make_pool(lengths), new_tokens)
    expected, masks = pool.copy(), mask_arguments(mask, 9)
    q = torch.randn(sum(new_tokens), 9, 64)
    layout = pool.table, pool.lengths, pool.slots, query_start(new_tokens), 0.4
    _, lse = paged_prefill_attention(q, pool.pages, *layout, return_lse=True, **masks)
    masks.pop("sinks", None)
    triton.column_sums(q, lse, pool.pages, *layout, **masks)
    reference.column_sums(q, lse, expected.pages, *layout, **masks)
    close(pool.pages.attention, expected.pages.attention)
