from __future__ import annotations

import pytest
import torch

from curkv.kernels.compact import reference, triton
from tests.kernels.triton.test_window_scores import rows_of
from tests.kernels.util import generator, make_pool


def choose(lengths, share):
    """Ascending random indices [N, max_kept], -1 padded, and their counts."""
    draw = generator(2)
    kept = [(torch.rand(n, generator=draw) < share).nonzero()[:, 0] for n in lengths.tolist()]
    counts = torch.tensor([len(x) for x in kept], dtype=torch.int32)
    indices = torch.full((len(kept), int(counts.max()) + 3), -1, dtype=torch.int32)
    for row, x in zip(indices, kept, strict=True):
        row[: len(x)] = x
    return indices, counts


def assert_same(pages, expected):
    for field, a in pages.arrays.items():
        e = expected.arrays[field]
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[a.itemsize]
        assert torch.equal(a.view(bits), e.view(bits)), field


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(
    ("head_dim", "page_size", "kv_dtype"),
    [
        (64, 16, "float32"),
        (96, 32, "float16"),
        (256, 128, "bfloat16"),
        (64, 64, "int8"),
        (64, 64, "fp8"),
        (64, 64, "k8v4"),
    ],
)
def test_moves_in_place_bit_for_bit(head_dim, page_size, kv_dtype, share):
    lengths = [[300, 0, 1], [64, 65, 17]]
    pool = make_pool(lengths, head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype)
    expected = pool.copy()
    table, lengths = rows_of(pool)
    chosen = choose(lengths, share)
    triton.compact(pool.pages, table, table, *chosen)
    reference.compact(expected.pages, table, table, *chosen)
    assert_same(pool.pages, expected.pages)


def test_moves_into_other_pages():
    pool = make_pool([[90, 40], [90, 40]], shared_pages=2)
    expected = pool.copy()
    table, lengths = rows_of(pool)
    indices, counts = choose(lengths, 0.5)
    rows = slice(0, 2)
    arguments = table[rows], table[2:], indices[rows], counts[rows]
    triton.compact(pool.pages, *arguments)
    reference.compact(expected.pages, *arguments)
    assert_same(pool.pages, expected.pages)
