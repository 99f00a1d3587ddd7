from __future__ import annotations

import numpy as np
import pytest
import torch

from curkv.cache.page_pool import OutOfPages, PagePool
from curkv.kernels.formats import get_format


def make_pool(num_pages: int = 10) -> PagePool:
    return PagePool(num_pages, page_size=4, head_dim=8, format=get_format("float16"))


def test_pages_have_the_shapes_and_types_that_kernels_expect() -> None:
    pages = make_pool().pages
    for store in (pages.k, pages.v):
        assert store.arrays["vectors"].shape == (10, 4, 8)
        assert store.arrays["vectors"].dtype == torch.float16
    sides = (pages.position, pages.k_sq, pages.v_sq, pages.attention)
    assert [side.shape for side in sides] == [(10, 4)] * 4
    assert [side.dtype for side in sides] == [torch.int32, *[torch.float32] * 3]


def test_a_fresh_pool_hands_out_neighbouring_pages() -> None:
    pool = make_pool()
    assert pool.take(4).tolist() == [0, 1, 2, 3]
    assert pool.take(2).tolist() == [4, 5]
    assert pool.num_free == 4


def test_released_pages_are_taken_again_first() -> None:
    pool = make_pool()
    ids = pool.take(6)
    assert pool.release(ids[[1, 4]]) == 2
    assert pool.take(3).tolist() == [1, 4, 6]


def test_every_page_can_be_taken_and_none_twice() -> None:
    pool = make_pool()
    ids = np.concatenate([pool.take(3), pool.take(0), pool.take(7)])
    assert sorted(ids.tolist()) == list(range(10))
    with pytest.raises(OutOfPages, match="1 pages are needed but only 0 are free"):
        pool.take(1)


def test_a_refused_take_takes_nothing() -> None:
    pool = make_pool()
    with pytest.raises(OutOfPages) as error:
        pool.take(11)
    assert (error.value.needed, error.value.free) == (11, 10)
    assert pool.num_free == 10
    assert not pool.owners.any()


def test_a_shared_page_is_freed_by_its_last_owner() -> None:
    pool = make_pool()
    ids = pool.take(3)
    pool.share(ids[:2])
    assert pool.release(ids) == 1
    assert pool.release(ids[:2]) == 2
    assert pool.num_free == 10


def test_all_owners_can_release_a_page_in_one_call() -> None:
    pool = make_pool()
    ids = pool.take(2)
    pool.share(np.array([ids[0], ids[0]], dtype=np.int32))
    assert pool.release(np.array([ids[0], ids[1], ids[0], ids[0]], dtype=np.int32)) == 2
    assert sorted(pool.free_pages.tolist()) == list(range(10))


@pytest.mark.parametrize("ids", [[5], [0, 0], [0, 1, 1]])
def test_releasing_more_often_than_owned_is_refused_and_changes_nothing(ids: list[int]) -> None:
    pool = make_pool()
    pool.take(2)
    owners, free = pool.owners.copy(), pool.free_pages.copy()
    with pytest.raises(RuntimeError, match=f"page {ids[-1]} was released more often than it is owned"):
        pool.release(np.array(ids, dtype=np.int32))
    assert (pool.owners == owners).all()
    assert (pool.free_pages == free).all()


def test_a_free_page_cannot_be_shared() -> None:
    pool = make_pool()
    ids = pool.take(1)
    with pytest.raises(RuntimeError, match="page 1 is free"):
        pool.share(np.array([ids[0], 1], dtype=np.int32))
    assert pool.owners.tolist() == [1] + [0] * 9


def test_pages_that_only_prefixes_hold_are_idle_and_not_free() -> None:
    pool = make_pool()
    ids = pool.take(3)
    pool.share(ids[:2], held=True)
    assert (pool.num_free, pool.num_idle) == (7, 7)
    assert pool.release(ids) == 1
    assert (pool.num_free, pool.num_idle) == (8, 10)
    with pytest.raises(RuntimeError, match="released more often than it is owned"):
        pool.release(ids[:1])
    assert pool.release(ids[:2], held=True) == 2
    assert (pool.num_free, pool.num_idle) == (10, 10)
