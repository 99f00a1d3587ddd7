from __future__ import annotations

import pytest
import torch

from curkv.kernels.store_kv import reference, triton
from tests.kernels.util import generator, make_pool, query_start, rope_tables


def store(kernel, pool, new_tokens, head_dim, slots=None, activations=torch.float32):
    tokens, heads = sum(new_tokens), pool.table.shape[1]
    qkv = torch.randn(tokens, 4 * heads, head_dim, generator=generator(1)).to(activations)
    k, v = qkv[:, 2 * heads : 3 * heads], qkv[:, 3 * heads :]
    positions = torch.arange(100, 100 + tokens, dtype=torch.int32)
    layout = pool.table, pool.lengths, pool.slots if slots is None else slots
    kernel.store_kv(pool.pages, k, v, *rope_tables(head_dim), positions, *layout, query_start(new_tokens))


@pytest.mark.parametrize(
    ("lengths", "new_tokens", "head_dim", "page_size", "kv_dtype"),
    [
        ([[1]], [1], 64, 16, "float32"),
        ([[5, 20, 3], [16, 17, 33]], [3, 16], 64, 16, "float32"),
        ([[19, 40, 18, 18, 33], [1, 1, 1, 1, 65]], [18, 1], 96, 32, "float16"),
        ([[9, 64], [65, 128]], [9, 2], 128, 64, "bfloat16"),
        ([[130, 7]], [6], 256, 128, "bfloat16"),
        ([[19, 40, 18], [1, 1, 65]], [18, 1], 96, 32, "int8"),
        ([[19, 40, 18], [1, 1, 65]], [18, 1], 96, 32, "fp8"),
        ([[19, 40, 18], [1, 1, 65]], [18, 1], 128, 32, "int8"),
        ([[19, 40, 18], [1, 1, 65]], [18, 1], 64, 32, "k8v4"),
        ([[19, 40, 18], [1, 1, 65]], [18, 1], 192, 32, "int4"),
        ([[n % 40 + 1] for n in range(64)], [1] * 64, 64, 16, "float32"),
    ],
)
def test_writes_what_the_reference_writes_and_nothing_else(
    close, lengths, new_tokens, head_dim, page_size, kv_dtype
):
    pool = make_pool(
        lengths, head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype, new_tokens=new_tokens
    )
    expected = pool.copy()
    store(reference, expected, new_tokens, head_dim)
    store(triton, pool, new_tokens, head_dim)
    for field in pool.pages.arrays:
        close(pool.pages.arrays[field], expected.pages.arrays[field], kv_dtype)


def test_8_bit_floats_are_rounded_as_in_the_reference_small_and_large_ones_too():
    spread = 2.0 ** torch.linspace(-16, 16, 128).view(2, 1, 64)
    found = []
    for kernel in (triton, reference):
        pool = make_pool([[2]], new_tokens=[2], kv_dtype="fp8")
        k = torch.randn(2, 1, 64, generator=generator(1)) * spread
        still = torch.ones(2, 32), torch.zeros(2, 32), torch.arange(2, dtype=torch.int32)
        where = pool.table, pool.lengths, pool.slots, query_start([2])
        kernel.store_kv(pool.pages, k, k, *still, *where)
        found.append([store.arrays["vectors"].float().nan_to_num() for store in (pool.pages.k, pool.pages.v)])
    for ours, wanted in zip(*found, strict=True):
        assert torch.equal(ours, wanted)
    assert wanted.abs().max() == 448


def test_queries_are_rotated_in_the_same_launch(close):
    pool, draw = make_pool([[5, 9, 4], [20, 33, 8]], new_tokens=[3, 1]), generator(1)
    k, v = torch.randn(2, 4, 3, 64, generator=draw)
    q = torch.randn(4, 20, 64, generator=draw)[:, :15]
    wanted, expected = q.clone(), pool.copy()
    rest = *rope_tables(64), torch.arange(100, 104, dtype=torch.int32)
    rest = *rest, pool.table, pool.lengths, pool.slots, query_start([3, 1])
    triton.store_kv(pool.pages, k, v, *rest, q)
    reference.store_kv(expected.pages, k, v, *rest, wanted)
    close(q, wanted)
    for field in pool.pages.arrays:
        close(pool.pages.arrays[field], expected.pages.arrays[field])


def test_a_slot_below_zero_is_not_written():
    pool = make_pool([[4], [7]], new_tokens=[1, 1])
    before = pool.copy()
    store(triton, pool, [1, 1], 64, slots=torch.tensor([-1, -1], dtype=torch.int32))
    for field in pool.pages.arrays:
        assert torch.equal(pool.pages.arrays[field].nan_to_num(), before.pages.arrays[field].nan_to_num())


def test_bfloat16_keys_and_values(close):
    pool = make_pool([[19, 3]], new_tokens=[3], kv_dtype="bfloat16")
    expected = pool.copy()
    for kernel, where in ((reference, expected), (triton, pool)):
        store(kernel, where, [3], 64, activations=torch.bfloat16)
    for field in pool.pages.arrays:
        close(pool.pages.arrays[field], expected.pages.arrays[field])
