"""Formats of keys and values, and that a kernel needs to know nothing else of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import pytest
import torch
from llvmlite import ir
from torch import Tensor

from curkv.cache.integrity import check_integrity
from curkv.kernels.compact import cpu as compact_cpu
from curkv.kernels.cpu.lanes import broadcast, fma, lane_max, maximum, mul
from curkv.kernels.cpu.llvm import F32, F32X8, Args, constant, multiply_add, offset, pointer, splat, widen
from curkv.kernels.cpu.memory import FLOAT32, INT8, load, store, store_scalar
from curkv.kernels.cpu.vectors import Channels
from curkv.kernels.dispatch import load as load_kernel
from curkv.kernels.formats import KV_FORMATS, get_format
from curkv.kernels.formats.base import Array, KVFormat, VectorFormat
from curkv.kernels.formats.cpu.base import CPUVectors
from curkv.kernels.formats.int8 import Int8
from curkv.kernels.formats.plain import Plain
from curkv.kernels.pages import ALIGNMENT, SIDE_BYTES, allocate
from tests.cache.util import make_cache, step
from tests.kernels.util import assert_close, make_pool, query_start, relative_rms, rope_tables


@dataclass(frozen=True)
class Toy(VectorFormat):
    """256 evenly spaced values from a vector's lowest to its highest element."""

    name = "toy"

    def arrays(self, head_dim: int) -> dict[str, Array]:
        return {"codes": Array((head_dim,), torch.int8), "range": Array((2,), torch.float32)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        low = x.amin(-1)
        step = (x.amax(-1) - low) / 255
        codes = ((x - low[..., None]) / step.where(step > 0, 1.0)[..., None]).round() - 128
        return {"codes": codes.to(torch.int8), "range": torch.stack([low, step], -1)}

    def decode(self, entries: Mapping[str, Tensor]) -> Tensor:
        low, step = entries["range"].unbind(-1)
        return (entries["codes"].float() + 128) * step[..., None] + low[..., None]

    def on_cpu(self) -> CPUVectors:
        return ToyVectors()


_KIND = numba.typeof(INT8)


@dataclass(frozen=True)
class ToyVectors(CPUVectors):
    """The same for Numba's kernels, which are cached by their own sources: a changed toy needs a new name."""

    name = "toy 1"
    arrays = 2
    bits = 8

    def row(self, builder: ir.IRBuilder, store: Args, dim: ir.Value, token: ir.Value) -> Channels:
        start, own = offset(builder, store[0], token, dim), offset(builder, store[1], token, 8)
        low, step = (
            splat(builder, builder.load(pointer(builder, offset(builder, own, place), F32), align=4))
            for place in (0, 4)
        )
        shift = constant(F32X8, 128.0)

        def channels(first: ir.Value) -> ir.Value:
            codes = widen(builder, _KIND, builder.add(start, first), F32X8)
            return multiply_add(builder, builder.fadd(codes, shift), step, low)

        return channels

    @staticmethod
    def write(vectors: Any, source: int, dim: int, memory: Any, token: int) -> None:
        highest, lowest = broadcast(np.float32(-np.inf)), broadcast(np.float32(-np.inf))
        for d in range(0, dim, 8):
            highest = maximum(load(FLOAT32, source + 4 * d), highest)
            lowest = maximum(mul(load(FLOAT32, source + 4 * d), broadcast(np.float32(-1.0))), lowest)
        low = -lane_max(lowest)
        step = (lane_max(highest) - low) / np.float32(255)
        store_scalar(FLOAT32, memory[1] + 8 * token, low)
        store_scalar(FLOAT32, memory[1] + 8 * token + 4, step)
        factor = np.float32(1.0) / step if step > 0 else np.float32(0.0)
        shift = broadcast(-low * factor - np.float32(128))
        for d in range(0, dim, 8):
            code = fma(load(FLOAT32, source + 4 * d), broadcast(factor), shift)
            store(INT8, memory[0] + token * dim + d, code)


TOY = KVFormat("toy", Toy(), Toy())
MIXED = KVFormat("mixed", Int8(), Plain(torch.float16))


LOST = {"int4": 0.1, "fp8": 0.03}
"""Relative RMS error of rounding, where it is not small."""


@pytest.mark.parametrize("name", KV_FORMATS)
def test_a_format_gives_back_what_it_took_as_far_as_it_rounds(name: str) -> None:
    format, x = get_format(name), torch.randn(5, 3, 64)
    assert format.name == name
    for vectors in (format.keys, format.values):
        entries = vectors.encode(x)
        arrays = vectors.arrays(64)
        assert list(entries) == list(arrays)
        assert all(entries[n].shape == (5, 3, *a.shape) for n, a in arrays.items())
        assert all(entries[n].dtype == a.dtype for n, a in arrays.items())
        assert vectors.decode(entries).dtype == torch.float32
        assert relative_rms(vectors.decode(entries), x) < LOST.get(vectors.name, 0.01)
        assert vectors.decode(vectors.encode(torch.zeros(2, 64))).eq(0).all()


@pytest.mark.parametrize("format", [*map(get_format, KV_FORMATS), TOY, MIXED])
def test_bytes_are_those_of_the_arrays_and_tokens_are_whole_words(format: KVFormat) -> None:
    pages = allocate(format, 3, 16, 64)
    assert sum(array.nbytes for array in pages.arrays.values()) == 48 * (format.token_bytes(64) + SIDE_BYTES)
    assert all(array[0, 0].nbytes % 4 == 0 for array in pages.arrays.values())


def test_memory_begins_where_lines_of_the_caches_and_pages_of_the_machine_do() -> None:
    """What is fetched ahead for one page then holds nothing of another, which may lie anywhere."""
    pages = [allocate(get_format("k8v4"), count, 16, 64) for count in (1, 3, 700)]
    assert all(array.data_ptr() % ALIGNMENT == 0 for own in pages for array in own.arrays.values())


def test_an_unknown_format_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"no KV format 'int3'.*float32, bfloat16, float16, fp8, int8, k8v4, int4"
    ):
        get_format("int3")


def test_8_bit_floats_are_the_nearest_ones_and_end_at_448() -> None:
    x = torch.tensor([0.0, 1.0625, 1.1875, -3.9, 300.0, 464.0, 1e30, -1e30, 2.0**-10, 1.5 * 2.0**-9])
    vectors = get_format("fp8").keys
    found = vectors.decode(vectors.encode(x)).tolist()
    assert found == [0.0, 1.0, 1.25, -4.0, 288.0, 448.0, 448.0, -448.0, 0.0, 2.0**-8]


def test_memory_that_is_not_what_the_format_says_is_refused() -> None:
    pages = allocate(get_format("float16"), 3, 16, 64)
    pages.k.arrays["vectors"] = pages.k.arrays["vectors"].float()
    with pytest.raises(TypeError, match="array 'vectors' of float16"):
        _ = pages.k.addresses


def test_a_cache_of_a_format_that_only_this_test_knows() -> None:
    """Pages, attention, forks and evictions need nothing but the format."""
    caches = [make_cache(kv_dtype=kv_dtype, head_dim=8) for kv_dtype in ("float32", TOY)]
    outs = []
    for cache in caches:
        assert cache.layout.page_bytes == sum(array[0].nbytes for array in cache.pages.arrays.values())
        slot = cache.add_sequence()
        torch.manual_seed(0)
        step(cache, {slot: 9}, {slot: 0})
        fork = cache.fork(slot)
        kept = torch.tensor([0, 2, 3, 7, 8], dtype=torch.int32).expand(2, 2, -1)
        before = cache.pages.k.read(cache.page_table[slot, 1, 1, :3].long()).flatten(0, 1)
        cache.evict(slot, kept, torch.full((2, 2), 5, dtype=torch.int32))
        after = cache.pages.k.read(cache.page_table[slot, 1, 1, :2].long()).flatten(0, 1)
        assert torch.equal(after[:5], before[[0, 2, 3, 7, 8]])
        untouched = cache.pages.k.read(cache.page_table[fork, 1, 1, :3].long()).flatten(0, 1)
        assert torch.equal(untouched[:9], before[:9])
        check_integrity(cache)
        outs.append(after[:5])
    assert 0 < relative_rms(outs[1], outs[0]) < 0.01


LENGTHS = [[1, 40, 17], [70, 33, 129], [16, 15, 200]]


@pytest.mark.parametrize(("head_dim", "page_size", "group"), [(64, 16, 3), (80, 24, 2)])
def test_cpu_kernels_run_over_any_format(head_dim: int, page_size: int, group: int) -> None:
    """The toy has no arithmetic of its own: it takes the steps that every format has."""
    new = [1, 30, 15]
    lengths = [[max(n, c) for n in row] for row, c in zip(LENGTHS, new, strict=True)]
    shape = {"head_dim": head_dim, "page_size": page_size, "kv_dtype": TOY}
    pools = [make_pool(lengths, new_tokens=new, **shape) for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, sum(new), 3, head_dim, generator=generator)
    q = torch.randn(sum(new), 3 * group, head_dim, generator=generator)
    positions, start = torch.arange(sum(new), dtype=torch.int32), query_start(new)
    found = []
    for backend, pool in zip(("cpu", "reference"), pools, strict=True):
        where = pool.table, pool.lengths, pool.slots
        load_kernel("store_kv", backend)(pool.pages, k, v, *rope_tables(head_dim), positions, *where, start)
        found.append(
            [
                load_kernel("paged_prefill_attention", backend)(q, pool.pages, *where, start, head_dim**-0.5),
                load_kernel("paged_decode_attention", backend)(q[:3], pool.pages, *where, head_dim**-0.5),
            ]
        )
    for name, array in pools[0].pages.arrays.items():
        assert torch.equal(array.isnan(), pools[1].pages.arrays[name].isnan()), name
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, 2e-3)  # a code may round to its neighbour


def test_compact_moves_every_array_of_a_format() -> None:
    pool = make_pool([[100]], kv_dtype=TOY)
    expected = pool.copy()
    row, count = pool.table[pool.slots.long(), 0], torch.tensor([30], dtype=torch.int32)
    chosen = torch.arange(0, 60, 2, dtype=torch.int32)[None]
    TOY.move(compact_cpu.compact, pool.pages, row, row, chosen, count)
    TOY.move(load_kernel("compact", "reference"), expected.pages, row, row, chosen, count)
    for name, array in pool.pages.arrays.items():
        other = expected.pages.arrays[name]
        assert torch.equal(array.nan_to_num(-7) if array.is_floating_point() else array, other.nan_to_num(-7))
