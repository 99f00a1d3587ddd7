"""Decode attention's loops over vectors of 4 bits a channel: half bytes are multiplied with int16.

A 16-bit word of codes holds four channels. Shifted and masked, the words of a vector give four registers, the
k-th of which has every fourth channel from the k-th on, so that queries and sums lie in that order.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from curkv.kernels.cpu.jit import intrinsic
from curkv.kernels.cpu.lanes import float32x8
from curkv.kernels.cpu.llvm import (
    F32,
    F32X8,
    I16,
    I16X16,
    I32,
    I32X8,
    I64,
    L2,
    LANES,
    LINE,
    ROUNDER,
    ROUNDER_BITS,
    Args,
    accumulators,
    call,
    constant,
    load_strided,
    multiply_add,
    offset,
    pair_products,
    pointer,
    prefetch_line,
    shuffle,
    splat,
)
from curkv.kernels.cpu.rows import LARGEST_INT16, by_rows, integer_tile, sum_four

BLOCK = 64
"""Channels of a query that are multiplied at once: the two groups of a register of codes."""
_WORD = 4  # channels


def _channels(builder: ir.IRBuilder, words: ir.Value) -> list[ir.Value]:
    """The codes of each word's four channels."""
    fifteen = constant(words.type, 15)
    shifted = [words, *(builder.lshr(words, constant(words.type, 4 * k)) for k in range(1, _WORD))]
    return [*(builder.and_(part, fifteen) for part in shifted[:-1]), shifted[-1]]


@intrinsic
def store_nibbles(context: Any, location: Any, value: Any) -> Any:
    """Store float32x8 as eight half bytes, rounded to nearest even and bounded to 0 and 15."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        location, value = args
        low, high = constant(F32X8, 0.0), constant(F32X8, 15.0)
        value = builder.select(builder.fcmp_ordered(">", value, low), value, low)
        value = builder.select(builder.fcmp_ordered("<", value, high), value, high)
        bits = builder.bitcast(builder.fadd(value, constant(F32X8, ROUNDER)), I32X8)
        places = ir.Constant(I32X8, [4 * i for i in range(LANES)])
        codes = builder.shl(builder.and_(bits, constant(I32X8, 15)), places)
        word = call(builder, "llvm.vector.reduce.or.v8i32", I32, [codes])
        builder.store(word, pointer(builder, location, I32), align=4)

    return types.void(types.int64, float32x8), generate


@intrinsic
def round_query_block(context: Any, source: Any, factor: Any, target: Any, sums: Any) -> Any:
    """Multiply 64 floats with a factor and write them as int16 in the order of the codes' registers.

    Args:
        context: Numba's.
        source: Address of float32 [64].
        factor: float32.
        target: Address of int16 [4, 16].
        sums: Address of float32 [8], written: the sums of eight integers that are neighbours.
    """

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        source, factor, target, sums = args
        floats, words = (ir.VectorType(item, BLOCK) for item in (F32, I32))
        values = builder.load(pointer(builder, source, floats), align=4)
        scaled = builder.fmul(values, splat(builder, factor, BLOCK))
        shifted = builder.bitcast(builder.fadd(scaled, constant(floats, ROUNDER)), words)
        integers = builder.sub(shifted, constant(words, ROUNDER_BITS))
        short = builder.trunc(integers, ir.VectorType(I16, BLOCK))
        mixed = shuffle(builder, short, short, [i + k for k in range(_WORD) for i in range(0, BLOCK, _WORD)])
        builder.store(mixed, pointer(builder, target, mixed.type), align=2)
        total = constant(I32X8, 0)
        for i in range(LANES):
            total = builder.add(total, shuffle(builder, integers, integers, list(range(i, BLOCK, LANES))))
        builder.store(builder.sitofp(total, F32X8), pointer(builder, sums, F32X8), align=4)

    return types.void(types.int64, types.float32, *[types.int64] * 2), generate


@intrinsic
def dot_rows_int4(
    context: Any, rows: Any, q: Any, sums: Any, spreads: Any, dim: Any, codes: Any, ranges: Any, keys: Any,
    out: Any, out_stride: Any, ahead: Any,
) -> Any:  # fmt: skip
    """`dot_rows` for int16 queries, whose products with codes are integers, and for keys of 4 bits.

    Args:
        context: Numba's.
        rows: 1 to `MOST_ROWS`.
        q: Address of int16 [rows, dim], in blocks of `round_query_block`.
        sums: Address of float32 [rows, dim / 64, 8], the blocks' sums.
        spreads: Address of float32 [rows], what the integers must be multiplied with.
        dim: Multiple of 64.
        codes: Address of uint8 [keys, dim / 2].
        ranges: Address of float16 [keys, dim / 32, 2], the step and the lowest value of each group.
        keys: As in `dot_rows`.
        out: Address of float32 [rows, keys], written.
        out_stride: Floats from one row of `out` to the next.
        ahead: As in `dot_rows`, of the codes.
    """
    count_of_keys = 4

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        by_rows(builder, signature.args[0], args[0], "dot_rows_int4_{}", args[1:], body)

    def body(builder: ir.IRBuilder, count: int, args: Args) -> None:
        q, sums, spreads, dim, codes, ranges, keys, out, out_stride, ahead = args
        totals = accumulators(builder, count * count_of_keys)
        of_rows = range(count)
        bytes_of_key = builder.lshr(dim, dim.type(1))
        bytes_of_range = builder.lshr(dim, dim.type(3))
        scales = [
            splat(builder, builder.load(pointer(builder, offset(builder, spreads, 4 * m), F32), align=4), 4)
            for m in of_rows
        ]
        with cgutils.for_range_slice(builder, keys.type(0), keys, keys.type(count_of_keys)) as (key, _first):
            for slot in totals:
                builder.store(constant(F32X8, 0.0), slot)
            starts, sides = (
                [offset(builder, base, builder.add(key, key.type(t)), size) for t in range(count_of_keys)]
                for base, size in ((codes, bytes_of_key), (ranges, bytes_of_range))
            )
            with cgutils.for_range_slice(builder, dim.type(0), dim, dim.type(BLOCK)) as (d, _second):
                queries, of_block = [], []
                for m in of_rows:
                    place = offset(builder, offset(builder, q, dim, 2 * m), d, 2)
                    queries.append(
                        [
                            builder.load(pointer(builder, offset(builder, place, 32 * k), I16X16), align=2)
                            for k in range(_WORD)
                        ]
                    )
                    place = builder.add(
                        sums, builder.lshr(builder.add(builder.mul(dim, dim.type(m)), d), dim.type(1))
                    )
                    of_block.append(builder.load(pointer(builder, place, F32X8), align=4))
                for t in range(count_of_keys):
                    words = pointer(builder, builder.add(starts[t], builder.lshr(d, d.type(1))), I16X16)
                    channels = _channels(builder, builder.load(words, align=1))
                    side = builder.add(sides[t], builder.lshr(d, d.type(3)))
                    halves = builder.load(pointer(builder, side, ir.VectorType(ir.HalfType(), 4)), align=4)
                    pairs = builder.fpext(halves, ir.VectorType(F32, 4))
                    step, low = (shuffle(builder, pairs, pairs, [i] * 4 + [i + 2] * 4) for i in range(2))
                    for m in of_rows:
                        slot = totals[m * count_of_keys + t]
                        products = pair_products(builder, queries[m][0], channels[0])
                        for k in range(1, _WORD):
                            products = builder.add(
                                products, pair_products(builder, queries[m][k], channels[k])
                            )
                        total = multiply_add(builder, of_block[m], low, builder.load(slot))
                        floats = builder.sitofp(products, F32X8)
                        builder.store(multiply_add(builder, floats, step, total), slot)
            next_block, block_bytes = (
                builder.add(starts[0], ahead),
                builder.mul(bytes_of_key, dim.type(count_of_keys)),
            )
            with cgutils.for_range_slice(builder, dim.type(0), block_bytes, dim.type(LINE)) as (line, _third):
                prefetch_line(builder, builder.add(next_block, line), L2)
            for m in of_rows:
                slots = totals[m * count_of_keys : (m + 1) * count_of_keys]
                four = builder.fmul(sum_four(builder, [builder.load(slot) for slot in slots]), scales[m])
                place = offset(builder, offset(builder, out, out_stride, 4 * m), key, 4)
                builder.store(four, pointer(builder, place, four.type), align=4)

    return types.void(rows, *[types.int64] * 10), generate


@intrinsic
def weigh_rows_int4(
    context: Any, rows: Any, weights: Any, weights_stride: Any, codes: Any, dim: Any, values: Any, out: Any,
    out_stride: Any, ahead: Any,
) -> Any:  # fmt: skip
    """`weigh_rows` for int16 weights and a group of 32 channels of 4 bits, two values at a time.

    Args:
        context: Numba's.
        rows: Of weights and of `out`; a literal, or 1 to `MOST_ROWS`.
        weights: Address of int16 [rows, values].
        weights_stride: Numbers from one row of weights to the next.
        codes: Address of uint8 [values, dim / 2], from the group's first channel on.
        dim: Channels of a value.
        values: How many, taken up to an even number: the weight of one too many is 0.
        out: Address of int32 [rows, 4, 8], added to: the k-th eight are channels k, k + 4, ...; no sum may
            exceed an int32.
        out_stride: Numbers from one row of `out` to the next.
        ahead: As in `weigh_rows`.
    """

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        by_rows(builder, signature.args[0], args[0], "weigh_rows_int4_{}", args[1:], body)

    def body(builder: ir.IRBuilder, height: int, args: Args) -> None:
        weights, weights_stride, codes, dim, values, out, out_stride, ahead = args
        tile, finish = integer_tile(builder, height, _WORD, out, out_stride)
        bytes_of_value = builder.lshr(dim, dim.type(1))
        starts = [offset(builder, weights, weights_stride, 2 * m) for m in range(height)]
        eight = ir.VectorType(I16, LANES)
        with cgutils.for_range_slice(builder, values.type(0), values, values.type(2)) as (index, _count):
            first = offset(builder, codes, index, bytes_of_value)
            second = builder.add(first, bytes_of_value)
            prefetch_line(builder, builder.add(first, ahead), L2)
            of_both = [builder.load(pointer(builder, row, eight), align=1) for row in (first, second)]
            mixed = [i + of for i in range(LANES) for of in (0, LANES)]
            channels = _channels(builder, shuffle(builder, of_both[0], of_both[1], mixed))
            for m in range(height):
                place = pointer(builder, offset(builder, starts[m], index, 2), I32)
                pair = builder.bitcast(splat(builder, builder.load(place, align=2)), I16X16)
                for k in range(_WORD):
                    slot = tile[m * _WORD + k]
                    products = pair_products(builder, pair, channels[k])
                    builder.store(builder.add(builder.load(slot), products), slot)
        finish()

    return types.void(rows, *[types.int64] * 8), generate


@intrinsic
def finish_group(context: Any, sums: Any, spread: Any, low: Any, target: Any) -> Any:
    """Write the sums of `weigh_rows_int4`, int32 [4, 8], times `spread` plus `low` as float32 [32]."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        sums, spread, low, target = args
        count = _WORD * LANES
        words, floats = (ir.VectorType(item, count) for item in (I32, F32))
        total = builder.load(pointer(builder, sums, words), align=4)
        mixed = shuffle(builder, total, total, [i + k for i in range(LANES) for k in range(0, count, LANES)])
        spreads, lows = (splat(builder, x, count) for x in (spread, low))
        result = multiply_add(builder, builder.sitofp(mixed, floats), spreads, lows)
        builder.store(result, pointer(builder, target, floats), align=4)

    return types.void(types.int64, *[types.float32] * 2, types.int64), generate


@intrinsic
def spread_ranges(
    context: Any, location: Any, stride: Any, count: Any, steps: Any, lows: Any, group: Any
) -> Any:
    """Write the steps and the lowest values of two neighbouring groups of eight vectors as floats.

    Args:
        context: Numba's.
        location: Address of the first vector's float16 [2, 2], step and lowest value of each group.
        stride: Bytes from one vector to the next.
        count: How many vectors there are; up to eight, others become 0.
        steps, lows: Addresses of float32 [8], those of the first group.
        group: Bytes from there to those of the second.
    """

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        location, stride, count, steps, lows, group = args
        shape = ir.VectorType(I64, LANES)
        words = load_strided(builder, location, stride, I64, size=8, align=2)
        counts = splat(builder, count)
        there = builder.icmp_signed("<", ir.Constant(shape, list(range(LANES))), counts)
        words = builder.select(there, words, constant(shape, 0))
        second = [builder.add(place, group) for place in (steps, lows)]
        for i, target in enumerate((steps, lows, *second)):
            bits = builder.lshr(words, constant(shape, 16 * i))
            halves = builder.bitcast(
                builder.trunc(bits, ir.VectorType(I16, LANES)), ir.VectorType(ir.HalfType(), LANES)
            )
            builder.store(builder.fpext(halves, F32X8), pointer(builder, target, F32X8), align=4)

    return types.void(*[types.int64] * 6), generate


@intrinsic
def round_range_weights(
    context: Any, rows: Any, weights: Any, width: Any, steps: Any, lows: Any, count: Any, groups: Any,
    target: Any, spreads: Any,
) -> Any:  # fmt: skip
    """Multiply exponentials by the steps of two neighbouring groups, and round the products to int16.

    Args:
        context: Numba's.
        rows: 1 to `MOST_ROWS`.
        weights: Address of exponentials float32 [rows, width].
        width: See there.
        steps, lows: Addresses of float32 [2, width], what `spread_ranges` wrote.
        count: Taken up to an eight, where steps and lowest values are 0.
        groups: Of a value.
        target: Address of int16 [rows, groups, width], from the first of the two groups on.
        spreads: Address of float32 [rows, groups, 2], likewise: what the integers must be multiplied with,
            and the sum of the exponentials times the lowest values.
    """

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        by_rows(builder, signature.args[0], args[0], "round_range_weights_{}", args[1:], body)

    def body(builder: ir.IRBuilder, height: int, args: Args) -> None:
        weights, width, steps, lows, count, groups, target, spreads = args
        pairs = [(m, j) for m in range(height) for j in range(2)]
        most, totals = ([cgutils.alloca_once(builder, F32X8) for _ in pairs] for _ in range(2))

        def load(base: ir.Value, row: int, t: ir.Value) -> ir.Value:
            place = offset(builder, offset(builder, base, width, 4 * row), t, 4)
            return builder.load(pointer(builder, place, F32X8), align=4)

        for slot in (*most, *totals):
            builder.store(constant(F32X8, 0.0), slot)
        with cgutils.for_range_slice(builder, count.type(0), count, count.type(LANES)) as (t, _first):
            of_groups = [(load(steps, j, t), load(lows, j, t)) for j in range(2)]
            of_rows = [load(weights, m, t) for m in range(height)]
            for slot, total, (m, j) in zip(most, totals, pairs, strict=True):
                (step, low), weight = of_groups[j], of_rows[m]
                product, old = builder.fmul(weight, step), builder.load(slot)
                builder.store(builder.select(builder.fcmp_ordered(">", product, old), product, old), slot)
                builder.store(multiply_add(builder, weight, low, builder.load(total)), total)
        factors = []
        for slot, total, (m, j) in zip(most, totals, pairs, strict=True):
            top = call(
                builder, "llvm.vector.reduce.fmax.v8f32", F32, [builder.load(slot)], fastmath=("nnan",)
            )
            some = builder.fcmp_ordered(">", top, F32(0.0))
            factor = builder.select(some, builder.fdiv(F32(LARGEST_INT16), top), F32(0.0))
            factors.append(splat(builder, factor))
            place = offset(builder, offset(builder, spreads, groups, 8 * m), 8 * j)
            spread = builder.fdiv(top, F32(LARGEST_INT16))
            builder.store(spread, pointer(builder, place, F32), align=4)
            name = "llvm.vector.reduce.fadd.v8f32"
            added = call(builder, name, F32, [F32(-0.0), builder.load(total)], fastmath=("reassoc",))
            builder.store(added, pointer(builder, builder.add(place, I64(4)), F32), align=4)
        short = ir.VectorType(I16, LANES)
        with cgutils.for_range_slice(builder, count.type(0), count, count.type(LANES)) as (t, _second):
            of_steps = [load(steps, j, t) for j in range(2)]
            of_rows = [load(weights, m, t) for m in range(height)]
            for factor, (m, j) in zip(factors, pairs, strict=True):
                product = builder.fmul(of_rows[m], of_steps[j])
                rounded = multiply_add(builder, product, factor, constant(F32X8, ROUNDER))
                bits = builder.trunc(builder.bitcast(rounded, I32X8), short)
                row = builder.mul(builder.add(builder.mul(groups, I64(m)), I64(j)), width)
                place = offset(builder, target, builder.add(row, t), 2)
                builder.store(bits, pointer(builder, place, short), align=2)

    return types.void(rows, *[types.int64] * 8), generate
