"""Attention of prompt chunks over ragged pages: the CPU kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from curkv.kernels.paged_prefill_attention import cpu, reference
from tests.kernels.util import (
    CPU_FORMATS,
    MASKS,
    UNMIXED,
    assert_close,
    fitting,
    make_pool,
    mask_arguments,
    query_start,
    scatter_positions,
)

TOLERANCE = 2e-6  # both read the same rounded K and V and compute in float32
BFLOAT16_TOLERANCE = 2e-2  # keys, values and weights of up to 4 are rounded to 8 bits


def check(
    lengths: list[list[int]],
    new_tokens: list[int],
    group: int,
    q_dtype: torch.dtype = torch.float32,
    **options: object,
) -> None:
    """Compare outputs and log-sum-exps on a random pool whose sequences end in new tokens."""
    pool = make_pool(lengths, **options)  # type: ignore[arg-type]
    heads, dim = len(lengths[0]), pool.pages.head_dim
    q = torch.randn(sum(new_tokens), heads * group, dim, generator=torch.Generator().manual_seed(1))
    q = q.to(q_dtype)
    tolerance = TOLERANCE if q_dtype is torch.float32 else BFLOAT16_TOLERANCE
    args = (q, pool.pages, pool.table, pool.lengths, pool.slots, query_start(new_tokens), dim**-0.5, True)
    out, lse = cpu.paged_prefill_attention(*args)
    expected_out, expected_lse = reference.paged_prefill_attention(*args)
    assert out.dtype is lse.dtype is torch.float32
    assert_close(out, expected_out, tolerance)
    assert_close(lse, expected_lse, tolerance)
    assert_close(cpu.paged_prefill_attention(*args[:-1]), out, 0)


@pytest.mark.parametrize("kv_dtype", UNMIXED)
@pytest.mark.parametrize(
    ("head_dim", "page_size", "group"),
    [
        (64, 16, 3),
        (64, 64, 1),
        (96, 32, 2),
        (128, 128, 4),
        (256, 16, 5),
        (72, 24, 6),
        (8, 8, 16),
        (64, 256, 8),
    ],
)
def test_ragged_heads_and_chunks(kv_dtype: str, head_dim: int, page_size: int, group: int) -> None:
    head_dim = fitting(head_dim, kv_dtype)
    lengths = [[1, 1, 1], [300, 77, 129], [page_size + 1, 2 * page_size, 40], [65, 64, 500]]
    check(lengths, [1, 77, 9, 17], group, head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype)


@pytest.mark.parametrize("kv_dtype", [name for name in CPU_FORMATS if name != "int4"])
@pytest.mark.parametrize(
    ("head_dim", "page_size", "group"), [(64, 64, 3), (96, 24, 2), (256, 16, 5), (72, 8, 1)]
)
def test_queries_of_bfloat16(kv_dtype: str, head_dim: int, page_size: int, group: int) -> None:
    head_dim = fitting(head_dim, kv_dtype)
    lengths = [[1, 1, 1], [300, 77, 129], [65, 64, 501]]
    check(
        lengths, [1, 77, 17], group, torch.bfloat16, head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype
    )


def test_queries_of_bfloat16_are_widened_where_they_are_not_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "MULTIPLIES_BFLOAT16", False)
    pool = make_pool([[300, 77]])
    q = torch.randn(30, 6, 64).bfloat16()
    args = (pool.pages, pool.table, pool.lengths, pool.slots, query_start([30]), 0.125)
    assert torch.equal(cpu.paged_prefill_attention(q, *args), cpu.paged_prefill_attention(q.float(), *args))


@pytest.mark.parametrize("new_tokens", [1, 2, 63, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("before", [0, 1, 127, 128])
def test_chunks_around_block_boundaries(new_tokens: int, before: int) -> None:
    check([[before + new_tokens, new_tokens]], [new_tokens], 3)


def test_long_context_with_shared_pages() -> None:
    check([[2000, 900], [1900, 1000]], [300, 5], 3, shared_pages=50)


def test_growing_scores_are_rescaled() -> None:
    pool = make_pool([[600]])
    row = pool.table[int(pool.slots[0]), 0]
    for page in range(38):
        pool.pages.k.arrays["vectors"][int(row[page])] *= 1 + page
    q = torch.randn(600, 2, 64)
    args = (q, pool.pages, pool.table, pool.lengths, pool.slots, query_start([600]), 0.5)
    assert_close(cpu.paged_prefill_attention(*args), reference.paged_prefill_attention(*args), 1e-4)


def test_queries_may_be_a_slice_of_a_wider_projection() -> None:
    pool = make_pool([[40, 50]])
    q = torch.randn(30, 10, 64)[:, :6]
    args = (q, pool.pages, pool.table, pool.lengths, pool.slots, query_start([30]), 0.125)
    assert_close(cpu.paged_prefill_attention(*args), reference.paged_prefill_attention(*args), TOLERANCE)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_windows_caps_and_sinks(kv_dtype: str, mask: dict[str, float]) -> None:
    lengths, new_tokens = [[1, 1, 1], [300, 77, 129], [17, 32, 40], [65, 64, 500]], [1, 77, 9, 17]
    pool = scatter_positions(make_pool(lengths, kv_dtype=kv_dtype), new_tokens)
    q = torch.randn(sum(new_tokens), 9, 64, generator=torch.Generator().manual_seed(1))
    rest = q, pool.pages, pool.table, pool.lengths, pool.slots, query_start(new_tokens), 0.4, True
    masks = mask_arguments(mask, 9)
    out, lse = cpu.paged_prefill_attention(*rest, **masks)
    expected, expected_lse = reference.paged_prefill_attention(*rest, **masks)
    assert_close(out, expected, 2 * TOLERANCE)
    assert_close(lse, expected_lse, TOLERANCE)


def test_a_window_of_queries_of_bfloat16() -> None:
    pool = make_pool([[600, 300]])
    q = torch.randn(250, 6, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    rest = q, pool.pages, pool.table, pool.lengths, pool.slots, query_start([250]), 0.125
    masks = {"window": 130, "softcap": 2.0}
    expected = reference.paged_prefill_attention(*rest, **masks)
    assert_close(cpu.paged_prefill_attention(*rest, **masks), expected, BFLOAT16_TOLERANCE)
