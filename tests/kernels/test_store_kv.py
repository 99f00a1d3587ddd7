"""Storing keys and values: the CPU kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from curkv.kernels.pages import Pages
from curkv.kernels.store_kv import cpu, reference
from tests.kernels.util import (
    CPU_FORMATS,
    Pool,
    assert_close,
    fitting,
    make_pool,
    query_start,
    rope_tables,
)

# A fused multiply-add may round a few rotated keys to the neighbouring 16-bit value.
TOLERANCE = {"float32": 1e-6, "float16": 1e-4, "bfloat16": 1e-3, "int8": 1e-3, "int4": 2e-2}


def store(kernel: object, pool: Pool, new_tokens: list[int], seed: int = 0) -> Pages:
    """Store random tokens at random positions into a copy of the pool."""
    generator = torch.Generator().manual_seed(seed)
    heads, head_dim = pool.table.shape[1], pool.pages.head_dim
    tokens = sum(new_tokens)
    wide = torch.randn(tokens, 2 * heads, head_dim, generator=generator)
    positions = torch.randint(0, 4096, (tokens,), generator=generator, dtype=torch.int32)
    pages = pool.copy().pages
    tables = rope_tables(head_dim)
    k, v = wide[:, :heads], wide[:, heads:]
    starts = query_start(new_tokens)
    kernel.store_kv(pages, k, v, *tables, positions, pool.table, pool.lengths, pool.slots, starts)  # type: ignore[attr-defined]
    return pages


def check(lengths: list[list[int]], new_tokens: list[int], **options: object) -> None:
    pool = make_pool(lengths, new_tokens=new_tokens, **options)  # type: ignore[arg-type]
    actual, expected = store(cpu, pool, new_tokens), store(reference, pool, new_tokens)
    assert_close(actual.k.read(), expected.k.read(), TOLERANCE[pool.pages.k.format.name])
    for name, array in actual.v.arrays.items():
        assert torch.equal(array.nan_to_num(-1), expected.v.arrays[name].nan_to_num(-1))
    assert torch.equal(actual.position, expected.position)
    assert torch.equal(actual.attention.nan_to_num(-1), expected.attention.nan_to_num(-1))
    assert_close(actual.k_sq, expected.k_sq, 1e-6)
    assert_close(actual.v_sq, expected.v_sq, 1e-6)


@pytest.mark.parametrize("kv_dtype", [name for name in CPU_FORMATS if name != "int4"])
@pytest.mark.parametrize(
    ("head_dim", "page_size"), [(64, 16), (96, 64), (128, 128), (256, 8), (72, 24), (8, 16)]
)
def test_ragged_heads(kv_dtype: str, head_dim: int, page_size: int) -> None:
    head_dim = fitting(head_dim, kv_dtype)
    lengths = [[1, 1, 1], [100, 41, page_size + 41], [2 * page_size, 3 * page_size + 1, 7]]
    check(lengths, [1, 41, 7], head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype)


@pytest.mark.parametrize(("head_dim", "count"), [(64, 1), (96, 1), (256, 8)])
def test_int8_is_within_half_a_step_of_the_vector_and_zeros_stay_zeros(head_dim: int, count: int) -> None:
    """Wide vectors have a step for every 32 channels."""
    pool = make_pool([[40, 7]], new_tokens=[7], kv_dtype="int8", head_dim=head_dim)
    heads, tokens = 2, 7
    k, v = torch.randn(2, tokens, heads, head_dim, generator=torch.Generator().manual_seed(2))
    k[..., 40] *= 100
    v[3] = 0
    still = torch.ones(9, head_dim // 2), torch.zeros(9, head_dim // 2)
    starts, positions = query_start([tokens]), torch.arange(tokens, dtype=torch.int32)
    for kernel in (cpu, reference):
        pages = pool.copy().pages
        kernel.store_kv(pages, k, v, *still, positions, pool.table, pool.lengths, pool.slots, starts)
        for head in range(heads):
            index = int(pool.lengths[pool.slots[0], head]) - tokens + torch.arange(tokens)
            where = pool.table[pool.slots[0], head][index // 16].long(), index % 16
            for store, x in ((pages.k, k), (pages.v, v)):
                scales = store.arrays["scales"][where]
                error = (store.read(*where) - x[:, head]).abs().unflatten(-1, (count, -1))
                assert (error <= 0.5001 * scales[..., None]).all()
                assert torch.allclose(127 * scales, x[:, head].abs().unflatten(-1, (count, -1)).amax(-1))
            assert torch.equal(pages.v_sq[where], v[:, head].square().sum(-1)) or kernel is cpu


def test_4_bits_are_within_half_a_step_of_the_vector_and_zeros_stay_zeros() -> None:
    pool = make_pool([[40, 7]], new_tokens=[7], kv_dtype="k8v4")
    k, v = 5 * torch.randn(2, 7, 2, 64, generator=torch.Generator().manual_seed(2)) + 3
    v[3] = 0
    still = torch.ones(9, 32), torch.zeros(9, 32)
    starts, positions = query_start([7]), torch.arange(7, dtype=torch.int32)
    for kernel in (cpu, reference):
        pages = pool.copy().pages
        kernel.store_kv(pages, k, v, *still, positions, pool.table, pool.lengths, pool.slots, starts)
        index = int(pool.lengths[pool.slots[0], 1]) - 7 + torch.arange(7)
        where = pool.table[pool.slots[0], 1][index // 16].long(), index % 16
        step, low = pages.v.arrays["ranges"][where].float().unbind(-1)
        lost = 2**-11 * (15 * step + low.abs())  # of step and lowest value as float16
        most = (0.5001 * step + lost).repeat_interleave(32, 1)
        assert ((pages.v.read(*where) - v[:, 1]).abs() <= most).all()
        assert torch.equal(step.gt(0).any(1), v[:, 1].any(1))


@pytest.mark.parametrize("kv_dtype", ["int8", "k8v4"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_vector_that_is_no_number_spoils_no_other(kv_dtype: str, bad: float) -> None:
    pool = make_pool([[20]], new_tokens=[5], kv_dtype=kv_dtype)
    k, v = torch.randn(2, 5, 1, 64, generator=torch.Generator().manual_seed(2))
    spoilt = k.clone(), v.clone()
    for x in spoilt:
        x[2, 0, 7] = bad
    positions, starts = torch.arange(5, dtype=torch.int32), query_start([5])
    where = pool.table, pool.lengths, pool.slots, starts
    found = []
    for new in ((k, v), spoilt):
        pages = pool.copy().pages
        cpu.store_kv(pages, *new, *rope_tables(64), positions, *where)
        found.append(pages)
    row, index = pool.table[pool.slots[0], 0], torch.tensor([*range(17), 18, 19])
    others = row[index // 16].long(), index % 16
    for name, array in found[0].arrays.items():
        assert torch.equal(array[others], found[1].arrays[name][others]), name


def test_decode_step_of_a_few_sequences() -> None:
    check([[5, 17], [16, 1], [33, 32]], [1, 1, 1])


def test_sequence_without_new_tokens_is_left_alone() -> None:
    check([[5, 17], [20, 30], [43, 40]], [2, 0, 40])
