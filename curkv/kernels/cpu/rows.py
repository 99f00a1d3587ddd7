"""Decode attention's loops: queries against rows of keys, weights against rows of values.

Int8 is multiplied with what is rounded to int16, and pairs of products are summed as int32, which takes half
the instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from curkv.kernels.cpu.jit import intrinsic
from curkv.kernels.cpu.llvm import (
    F32,
    F32X8,
    I8X16,
    I16X16,
    I32,
    I32X8,
    L2,
    LANES,
    LINE,
    Args,
    accumulators,
    call_own,
    constant,
    int16s,
    multiply_add,
    offset,
    pair_products,
    pointer,
    prefetch_line,
    shuffle,
    splat,
    switch,
)
from curkv.kernels.cpu.tiles import float_tile
from curkv.kernels.cpu.vectors import addresses

LARGEST_INT16 = 32767
MOST_ROWS = 3
"""Rows that are taken together if it is not said before how many: 3 x 4 accumulators fit 16 registers."""


def by_rows(
    builder: ir.IRBuilder,
    kind: Any,
    rows: ir.Value,
    name: str,
    args: Args,
    body: Callable[[ir.IRBuilder, int, Args], None],
) -> None:
    """Call the function that `body` emits for a number of rows: a literal, or one up to `MOST_ROWS`."""

    def emit(count: int) -> None:
        call_own(builder, name.format(count), args, lambda inner, own: body(inner, count, own))

    if isinstance(kind, types.IntegerLiteral):
        emit(kind.literal_value)
    else:
        switch(builder, rows, MOST_ROWS, emit)


@intrinsic
def dot_rows(
    context: Any, primitives: Any, rows: Any,
    q: Any, dim: Any, store: Any, token: Any, keys: Any, out: Any, out_stride: Any, ahead: Any,
) -> Any:  # fmt: skip
    """Products of `rows` query vectors and consecutive keys, four keys at a time.

    Args:
        context: Numba's.
        primitives: Of the keys' format.
        rows: 1 to `MOST_ROWS`.
        q: Address of float32 [rows, dim].
        dim: Multiple of 8.
        store: Where the keys lie.
        token: Number of the first key.
        keys: Taken up to a multiple of four: so many are read, and written to `out`.
        out: Address of float32 [rows, keys], written.
        out_stride: Floats from one row of `out` to the next.
        ahead: Bytes from the first key to the keys that will be read next, to be prefetched: into the L2
            cache, since a page of keys and the next one together push each other out of L1.
    """
    own, block = primitives.primitives, 4

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        _primitives, _rows, q, dim, store, *others = args
        arguments = [q, dim, *others, *addresses(builder, store)]
        name = f"dot_rows_{{}}_{own.name}"
        by_rows(builder, signature.args[1], args[1], name, arguments, body)

    def body(builder: ir.IRBuilder, count: int, args: Args) -> None:
        q, dim, token, keys, out, out_stride, ahead, *store = args
        sums = accumulators(builder, count * block)
        with cgutils.for_range_slice(builder, keys.type(0), keys, keys.type(block)) as (key, _first):
            for slot in sums:
                builder.store(constant(F32X8, 0.0), slot)
            first = builder.add(token, key)
            vectors = [own.row(builder, store, dim, builder.add(first, key.type(t))) for t in range(block)]
            with cgutils.for_range_slice(builder, dim.type(0), dim, dim.type(LANES)) as (d, _second):
                places = [offset(builder, offset(builder, q, dim, 4 * m), d, 4) for m in range(count)]
                queries = [builder.load(pointer(builder, place, F32X8), align=4) for place in places]
                for t in range(block):
                    loaded = vectors[t](d)
                    for m in range(count):
                        slot = sums[m * block + t]
                        builder.store(multiply_add(builder, queries[m], loaded, builder.load(slot)), slot)
            block_bytes = own.channel_bytes(builder, builder.mul(dim, dim.type(block)))
            next_block = builder.add(own.place(builder, store, dim, first), ahead)
            with cgutils.for_range_slice(builder, dim.type(0), block_bytes, dim.type(LINE)) as (
                line,
                _third,
            ):
                prefetch_line(builder, builder.add(next_block, line), L2)
            for m in range(count):
                four = sum_four(builder, [builder.load(slot) for slot in sums[m * block : (m + 1) * block]])
                place = offset(builder, offset(builder, out, out_stride, 4 * m), key, 4)
                builder.store(four, pointer(builder, place, four.type), align=4)

    return types.void(primitives, rows, *[types.int64] * 2, store, *[types.int64] * 5), generate


def sum_four(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """The lane sums of four vectors of eight floats or int32, a vector of four."""
    even, odd = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
    add = builder.fadd if vectors[0].type == F32X8 else builder.add

    def pairs(a: ir.Value, b: ir.Value) -> ir.Value:
        return add(shuffle(builder, a, b, even), shuffle(builder, a, b, odd))

    quads = pairs(pairs(vectors[0], vectors[1]), pairs(vectors[2], vectors[3]))
    return add(shuffle(builder, quads, quads, [0, 1, 2, 3]), shuffle(builder, quads, quads, [4, 5, 6, 7]))


def integer_tile(
    builder: ir.IRBuilder, height: int, width: int, out: ir.Value, out_stride: ir.Value
) -> tuple[list[ir.Value], Callable[[], None]]:
    """Stack slots that start as int32 [height, 8 * width] in memory, and what emits writing them back."""
    tile = [cgutils.alloca_once(builder, I32X8) for _ in range(height * width)]
    targets = [
        pointer(builder, offset(builder, offset(builder, out, out_stride, 4 * m), 4 * LANES * n), I32X8)
        for m in range(height)
        for n in range(width)
    ]
    for slot, target in zip(tile, targets, strict=True):
        builder.store(builder.load(target, align=4), slot)

    def finish() -> None:
        for slot, target in zip(tile, targets, strict=True):
            builder.store(builder.load(slot), target, align=4)

    return tile, finish


@intrinsic
def dot_rows_int8(
    context: Any, rows: Any, q: Any, spreads: Any, dim: Any, k: Any, scales: Any, groups: Any, keys: Any,
    out: Any, out_stride: Any, ahead: Any,
) -> Any:  # fmt: skip
    """`dot_rows` for int16 queries and int8 keys, whose products are summed as integers in each group.

    Args:
        context: Numba's.
        rows: 1 to `MOST_ROWS`.
        q: Address of int16 [rows, dim].
        spreads: Address of float32 [rows], what the integers must be multiplied with.
        dim: Channels.
        k: Address of int8 [keys, dim].
        scales: Address of float32 [keys, groups].
        groups: Of a key's channels, a multiple of 16 and at most 512 each, so that no sum exceeds an int32.
        keys: As in `dot_rows`.
        out: Address of float32 [rows, keys], written.
        out_stride: Floats from one row of `out` to the next.
        ahead: As in `dot_rows`.
    """
    block = 4
    four_floats = ir.VectorType(F32, block)

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        by_rows(builder, signature.args[0], args[0], "dot_rows_int8_{}", args[1:], body)

    def body(builder: ir.IRBuilder, count: int, args: Args) -> None:
        q, spreads, dim, k, scales, groups, keys, out, out_stride, ahead = args
        sums = [cgutils.alloca_once(builder, I32X8) for _ in range(count * block)]
        totals = [cgutils.alloca_once(builder, four_floats) for _ in range(count)]
        places = [pointer(builder, offset(builder, spreads, 4 * m), F32) for m in range(count)]
        of_rows = [splat(builder, builder.load(place, align=4), block) for place in places]
        channels = builder.udiv(dim, groups)
        with cgutils.for_range_slice(builder, keys.type(0), keys, keys.type(block)) as (key, _first):
            for slot in totals:
                builder.store(constant(four_floats, 0.0), slot)
            starts = [offset(builder, k, builder.add(key, key.type(t)), dim) for t in range(block)]
            with cgutils.for_range_slice(builder, dim.type(0), dim, channels) as (first, j):
                for slot in sums:
                    builder.store(constant(I32X8, 0), slot)
                end = builder.add(first, channels)
                with cgutils.for_range_slice(builder, first, end, dim.type(2 * LANES)) as (d, _second):
                    places = [offset(builder, offset(builder, q, dim, 2 * m), d, 2) for m in range(count)]
                    queries = [builder.load(pointer(builder, place, I16X16), align=2) for place in places]
                    for t in range(block):
                        loaded = int16s(builder, builder.add(starts[t], d))
                        for m in range(count):
                            slot = sums[m * block + t]
                            products = pair_products(builder, queries[m], loaded)
                            builder.store(builder.add(builder.load(slot), products), slot)
                factors = ir.Constant(four_floats, ir.Undefined)
                for t in range(block):
                    number = builder.add(builder.mul(builder.add(key, key.type(t)), groups), j)
                    scale = builder.load(pointer(builder, offset(builder, scales, number, 4), F32), align=4)
                    factors = builder.insert_element(factors, scale, I32(t))
                for m, total in enumerate(totals):
                    slots = sums[m * block : (m + 1) * block]
                    four = sum_four(builder, [builder.load(slot) for slot in slots])
                    floats = builder.sitofp(four, four_floats)
                    builder.store(multiply_add(builder, floats, factors, builder.load(total)), total)
            next_block, block_bytes = builder.add(starts[0], ahead), builder.mul(dim, dim.type(block))
            with cgutils.for_range_slice(builder, dim.type(0), block_bytes, dim.type(LINE)) as (
                line,
                _third,
            ):
                prefetch_line(builder, builder.add(next_block, line), L2)
            for m, total in enumerate(totals):
                value = builder.fmul(builder.load(total), of_rows[m])
                place = offset(builder, offset(builder, out, out_stride, 4 * m), key, 4)
                builder.store(value, pointer(builder, place, value.type), align=4)

    return types.void(rows, *[types.int64] * 10), generate


@intrinsic
def weigh_rows_int8(
    context: Any, rows: Any, vectors: Any,
    weights: Any, weights_stride: Any, v: Any, dim: Any, values: Any, out: Any, out_stride: Any, ahead: Any,
) -> Any:  # fmt: skip
    """`weigh_rows` for int16 weights and int8 values, two values at a time; sums are int32.

    Args:
        context: Numba's.
        rows: Of weights and of `out`; a literal, or 1 to `MOST_ROWS`.
        vectors: Literal, columns in eights, an even number.
        weights: Address of int16 [rows, values].
        weights_stride: Numbers from one row of weights to the next.
        v: Address of int8 [values, 8 * vectors].
        dim: Bytes from one row of `v` to the next.
        values: How many, taken up to an even number: the weight of one too many is 0.
        out: Address of int32 [rows, 8 * vectors]; no sum may exceed an int32.
        out_stride: Numbers from one row of `out` to the next.
        ahead: As in `weigh_rows`.
    """
    width = vectors.literal_value

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        by_rows(builder, signature.args[0], args[0], f"weigh_rows_int8_{{}}_{width}", args[2:], body)

    def body(builder: ir.IRBuilder, height: int, args: Args) -> None:
        weights, weights_stride, v, dim, values, out, out_stride, ahead = args
        tile, finish = integer_tile(builder, height, width, out, out_stride)
        starts = [offset(builder, weights, weights_stride, 2 * m) for m in range(height)]
        with cgutils.for_range_slice(builder, values.type(0), values, values.type(2)) as (index, _count):
            first = offset(builder, v, index, dim)
            second = builder.add(first, dim)
            for row in (first, second):
                for line in range(0, LANES * width, LINE):
                    prefetch_line(builder, builder.add(builder.add(row, ahead), row.type(line)), L2)
            places = [pointer(builder, offset(builder, start, index, 2), I32) for start in starts]
            pairs = [
                builder.bitcast(splat(builder, builder.load(place, align=2)), I16X16) for place in places
            ]
            for n in range(0, width, 2):
                of_both = [
                    builder.load(pointer(builder, builder.add(row, row.type(LANES * n)), I8X16), align=1)
                    for row in (first, second)
                ]
                for half in range(2):
                    mixed = [i + of for i in range(LANES * half, LANES * (half + 1)) for of in (0, 2 * LANES)]
                    numbers = builder.sext(shuffle(builder, of_both[0], of_both[1], mixed), I16X16)
                    for m in range(height):
                        slot = tile[m * width + n + half]
                        products = pair_products(builder, pairs[m], numbers)
                        builder.store(builder.add(builder.load(slot), products), slot)
        finish()

    return types.void(rows, vectors, *[types.int64] * 8), generate


@intrinsic
def weigh_rows(
    context: Any, primitives: Any, rows: Any, vectors: Any,
    weights: Any, weights_stride: Any, store: Any, dim: Any, token: Any, channel: Any, values: Any, out: Any,
    out_stride: Any, ahead: Any,
) -> Any:  # fmt: skip
    """Add weighted sums of consecutive values to `out`, for `rows` rows of weights at once.

    Args:
        context: Numba's.
        primitives: Of the values' format.
        rows: Of weights and of `out`; a literal, or 1 to `MOST_ROWS`.
        vectors: Literal, columns in eights.
        weights: Address of float32 [rows, values].
        weights_stride: Floats from one row of weights to the next.
        store: Where the values lie.
        dim: Channels of a value.
        token: Number of the first value.
        channel: The first of the 8 * vectors channels that are read.
        values: How many.
        out: Address of float32 [rows, 8 * vectors].
        out_stride: Floats from one row of `out` to the next.
        ahead: Bytes from the first value to those that will be read next, to be prefetched into the L2
            cache.
    """
    own, width = primitives.primitives, vectors.literal_value

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        weights, weights_stride, store, *others = args[3:]
        arguments = [weights, weights_stride, *others, *addresses(builder, store)]
        name = f"weigh_rows_{{}}_{width}_{own.name}"
        by_rows(builder, signature.args[1], args[1], name, arguments, body)

    def body(builder: ir.IRBuilder, height: int, args: Args) -> None:
        weights, weights_stride, dim, token, channel, values, out, out_stride, ahead, *store = args

        def columns(index: ir.Value) -> Callable[[int], ir.Value]:
            value = builder.add(token, index)
            start = builder.add(own.place(builder, store, dim, value), own.channel_bytes(builder, channel))
            for line in range(0, LANES * width * own.bits // 8, LINE):
                prefetch_line(builder, offset(builder, builder.add(start, ahead), line), L2)
            read = own.row(builder, store, dim, value)
            return lambda n: read(builder.add(channel, channel.type(LANES * n)))

        float_tile(builder, height, width, False, weights, weights_stride, columns, values, out, out_stride)

    return (
        types.void(primitives, rows, vectors, *[types.int64] * 2, store, *[types.int64] * 7),
        generate,
    )
