"""One-token attention over ragged pages: the CPU kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from curkv.kernels.paged_decode_attention import cpu, reference
from tests.kernels.util import (
    CPU_FORMATS,
    MASKS,
    assert_close,
    fitting,
    make_pool,
    mask_arguments,
    relative_rms,
    scatter_positions,
)

TOLERANCE = 2e-6  # both read the same rounded K and V and compute in float32
INTEGER_TOLERANCE = 1e-4  # queries and weights are rounded to int16 besides: 1 / 65,534 of the largest each


def check(lengths: list[list[int]], group: int, **options: object) -> None:
    """Compare outputs on a random pool."""
    pool = make_pool(lengths, **options)  # type: ignore[arg-type]
    heads, dim = len(lengths[0]), pool.pages.head_dim
    q = torch.randn(len(lengths), heads * group, dim, generator=torch.Generator().manual_seed(1))
    mine, theirs = pool.copy(), pool.copy()
    scale = dim**-0.5
    actual = cpu.paged_decode_attention(q, mine.pages, pool.table, pool.lengths, pool.slots, scale)
    expected = reference.paged_decode_attention(q, theirs.pages, pool.table, pool.lengths, pool.slots, scale)
    tolerance = INTEGER_TOLERANCE if options.get("kv_dtype") in ("int8", "k8v4", "int4") else TOLERANCE
    assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("kv_dtype", CPU_FORMATS)
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
def test_ragged_heads(kv_dtype: str, head_dim: int, page_size: int, group: int) -> None:
    head_dim = fitting(head_dim, kv_dtype)
    lengths = [[1, page_size, page_size + 1], [700, 3, 1025], [page_size - 1, 512, 2 * page_size]]
    check(lengths, group, head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8", "k8v4"])
def test_pages_shared_between_sequences(kv_dtype: str) -> None:
    check([[600, 40], [900, 33], [64, 700]], 3, shared_pages=8, kv_dtype=kv_dtype)


def test_int8_is_as_far_from_float32_as_rounding_explains() -> None:
    lengths, q = [[3000, 40]], torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1))
    exact, rounded = (make_pool(lengths, kv_dtype=name) for name in ("float32", "int8"))
    out, expected = (
        kernel.paged_decode_attention(q, pool.pages, pool.table, pool.lengths, pool.slots, 0.125)
        for kernel, pool in ((cpu, rounded), (reference, exact))
    )
    # An element is off by up to a 254th of the largest of 64 normal ones, about 2.4: a deviation of 0.0055.
    # Values are off by that much, and scores of deviation 1 shift weights by as much again.
    assert relative_rms(out, expected) < 2 * 0.0055


def test_int8_with_an_odd_head_is_refused() -> None:
    pool = make_pool([[5]], head_dim=72, kv_dtype="int8")
    with pytest.raises(ValueError, match="multiple of 16"):
        cpu.paged_decode_attention(
            torch.randn(1, 2, 72), pool.pages, pool.table, pool.lengths, pool.slots, 1.0
        )


def test_head_without_tokens_gives_zeros() -> None:
    pool = make_pool([[0, 5]])
    q = torch.randn(1, 4, 64)
    out = cpu.paged_decode_attention(q, pool.pages, pool.table, pool.lengths, pool.slots, 0.125, True)
    assert torch.equal(out[0, :2], torch.zeros(2, 64))
    assert out[0, 2:].isfinite().all()


def test_extreme_scores_stay_exact() -> None:
    pool = make_pool([[1500, 7]])
    pool.pages.k.arrays["vectors"].mul_(200)
    q = torch.randn(1, 6, 64)
    args = (q, pool.pages, pool.table, pool.lengths, pool.slots, 1.0)
    assert_close(cpu.paged_decode_attention(*args), reference.paged_decode_attention(*args), 1e-4)


def test_queries_may_be_a_slice_of_a_wider_projection() -> None:
    pool = make_pool([[40, 50], [20, 30]])
    wide = torch.randn(2, 10, 64)
    args = (pool.pages, pool.table, pool.lengths, pool.slots, 0.125)
    for q in (wide[:, :6], wide.transpose(0, 1).contiguous().transpose(0, 1)[:, :6]):
        actual = cpu.paged_decode_attention(q, *args)
        assert_close(actual, reference.paged_decode_attention(q, *args), TOLERANCE)


def test_wrong_arguments_are_refused() -> None:
    pool = make_pool([[4]])
    q = torch.randn(1, 2, 64)
    with pytest.raises(TypeError, match="int32"):
        cpu.paged_decode_attention(q, pool.pages, pool.table, pool.lengths, pool.slots.long(), 1.0)
    with pytest.raises(ValueError, match="multiples of 8"):
        cpu.paged_decode_attention(q[..., :60], pool.pages, pool.table, pool.lengths, pool.slots, 1.0)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_windows_caps_and_sinks(kv_dtype: str, mask: dict[str, float]) -> None:
    lengths = [[1, 0, 40], [700, 3, 1025], [15, 512, 96]]
    pool = scatter_positions(make_pool(lengths, kv_dtype=kv_dtype), [1, 1, 1])
    q = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(1))
    mine, theirs = pool.copy(), pool.copy()
    rest, masks = (pool.table, pool.lengths, pool.slots, 0.4), mask_arguments(mask, 9)
    actual = cpu.paged_decode_attention(q, mine.pages, *rest, **masks)
    expected = reference.paged_decode_attention(q, theirs.pages, *rest, **masks)
    assert_close(actual, expected, 2 * (INTEGER_TOLERANCE if kv_dtype == "int8" else TOLERANCE))
