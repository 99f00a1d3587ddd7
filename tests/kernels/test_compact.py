from __future__ import annotations

import pytest
import torch

from curkv.kernels.compact import cpu, reference
from curkv.kernels.pages import Pages
from tests.kernels.util import CPU_FORMATS, Pool, fitting, make_pool, map_arrays

IMPLEMENTATIONS = [reference, cpu]
RAGGED = [[0, 1, 15], [16, 17, 100], [333, 64, 31]]


def rows(pool: Pool) -> tuple[torch.Tensor, torch.Tensor]:
    return pool.table[pool.slots.long()].flatten(0, 1), pool.lengths[pool.slots.long()].flatten()


def bits(pages: Pages, name: str) -> torch.Tensor:
    """A tensor's memory as integers, so that NaN equals itself."""
    storage = pages.arrays[name]
    return storage.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[storage.itemsize])


def tokens(pages: Pages, name: str, row: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    size = pages.page_size
    return bits(pages, name)[row[index // size].long(), index % size]


def random_kept(lengths: torch.Tensor, share: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = (lengths * share).ceil().int()
    indices = torch.full((len(lengths), max(1, int(counts.max()))), -1, dtype=torch.int32)
    for row, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        chosen = torch.randperm(length, generator=generator)[:count]
        indices[row, :count] = chosen.sort().values.int()
    return indices, counts


def check(before: Pages, after: Pages, source, target, indices, counts) -> None:
    written = {name: torch.zeros(after.position.shape, dtype=torch.bool) for name in after.arrays}
    for row, count in enumerate(counts.tolist()):
        to = torch.arange(count)
        for name in after.arrays:
            expected = tokens(before, name, source[row], indices[row, :count].long())
            assert torch.equal(tokens(after, name, target[row], to), expected)
            written[name][target[row][to // after.page_size].long(), to % after.page_size] = True
    for name in after.arrays:
        untouched = ~written[name]
        assert torch.equal(bits(after, name)[untouched], bits(before, name)[untouched])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kv_dtype", CPU_FORMATS)
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (96, 48), (128, 128)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_in_place(implementation, kv_dtype, head_dim, page_size, share):
    head_dim = fitting(head_dim, kv_dtype)
    pool = make_pool(RAGGED, head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype)
    table, lengths = rows(pool)
    indices, counts = random_kept(lengths, share)
    after = pool.copy().pages
    implementation.compact(after, table, table, indices, counts)
    check(pool.pages, after, table, table, indices, counts)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shared_pages_are_copied_and_not_written(implementation):
    pool = make_pool([[100, 70], [90, 65]], shared_pages=3)
    table, lengths = rows(pool)
    indices, counts = random_kept(lengths, 0.8)
    after = pool.copy().pages
    fresh = len(after.position) + torch.arange(table.numel(), dtype=torch.int32).view_as(table)
    after, before = (
        map_arrays(p, lambda x: torch.cat([x, x.new_zeros(table.numel(), *x.shape[1:])]))
        for p in (after, pool.pages)
    )
    shared = torch.isin(table, table[2:]) & torch.isin(table, table[:2])
    assert shared.any()
    target = torch.where(shared, fresh, table)
    implementation.compact(after, table, target, indices, counts)
    check(before, after, table, target, indices, counts)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keeping_everything_changes_nothing(implementation):
    pool = make_pool(RAGGED)
    table, lengths = rows(pool)
    indices, counts = random_kept(lengths, 1.0)
    after = pool.copy().pages
    implementation.compact(after, table, table, indices, counts)
    assert all(torch.equal(bits(after, name), bits(pool.pages, name)) for name in after.arrays)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_rows(implementation):
    pages = make_pool([[3]]).pages
    empty = torch.empty(0, 4, dtype=torch.int32)
    implementation.compact(pages, empty, empty, empty, torch.empty(0, dtype=torch.int32))
