"""The micro-kernel of products of bytes in fours, and how rows are rounded for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from curkv.kernels.cpu.features import FEATURES, MULTIPLIES_QUADS
from curkv.kernels.cpu.jit import intrinsic
from curkv.kernels.cpu.llvm import (
    F32,
    I8,
    I16,
    I16X16,
    I32,
    I32X8,
    I64,
    LANES,
    LINE,
    ROUNDER,
    ROUNDER_BITS,
    Args,
    call,
    call_own,
    constant,
    multiply_add,
    offset,
    pair_products,
    pointer,
    prefetch_line,
    shuffle,
    splat,
    switch,
)
from curkv.kernels.cpu.tiles import PANEL, TILE_ROWS

_QUAD_LANES = 2 * LANES if FEATURES.get("avx512vnni") else LANES  # columns in a register of `quad_tile`
BYTES, NIBBLES, NIBBLES_BY_AVX2, NIBBLES_BY_ANY = range(4)
"""What the B of `quad_tile` is made of, and for which machines it multiplies."""
OWN_NIBBLES = NIBBLES if MULTIPLIES_QUADS else NIBBLES_BY_AVX2 if FEATURES.get("avx2") else NIBBLES_BY_ANY
"""What nibbles are multiplied as on this machine."""
QUAD_BLOCK = 32
"""Values of a row of A in `quad_tile` that have a scale in common, and of a column of nibbles."""
NIBBLE_BLOCK_BYTES = 16 * QUAD_BLOCK // 2 + 2 * 2 * 16
"""Size of a block of a panel of nibbles: 16 columns of 32, a step and a lowest value in float16 for each."""


@intrinsic
def largest_of_block(context: Any, location: Any) -> Any:
    """The largest absolute value of `QUAD_BLOCK` floats; infinity or NaN if one of them is that."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        words = ir.VectorType(I32, QUAD_BLOCK)
        bits = builder.load(pointer(builder, args[0], words), align=4)
        # Without the sign bit floats are ordered as integers, and NaN lies above infinity.
        absolutes = builder.and_(bits, constant(words, 2**31 - 1))
        largest = call(builder, f"llvm.vector.reduce.smax.v{QUAD_BLOCK}i32", I32, [absolutes])
        return builder.bitcast(largest, F32)

    return types.float32(types.int64), generate


@intrinsic
def round_block(context: Any, location: Any, factor: Any, target: Any) -> Any:
    """Multiply `QUAD_BLOCK` floats with a factor and store them as int8, rounded to nearest even.

    Any int8 for what is NaN or too large.

    Returns:
        The integers' sum.
    """

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        location, factor, target = args
        floats, words = (ir.VectorType(item, QUAD_BLOCK) for item in (F32, I32))
        values = builder.load(pointer(builder, location, floats), align=4)
        scaled = builder.fmul(values, splat(builder, factor, QUAD_BLOCK))
        shifted = builder.bitcast(builder.fadd(scaled, constant(floats, ROUNDER)), words)
        bytes_ = builder.trunc(shifted, ir.VectorType(I8, QUAD_BLOCK))
        builder.store(bytes_, pointer(builder, target, bytes_.type), align=1)
        total = call(builder, f"llvm.vector.reduce.add.v{QUAD_BLOCK}i32", I32, [shifted])
        return builder.sext(builder.sub(total, I32(QUAD_BLOCK * ROUNDER_BITS)), I64)

    return types.int64(types.int64, types.float32, types.int64), generate


@intrinsic
def quad_tile(
    context: Any, weights: Any, rows: Any, a: Any, a_stride: Any, a_scales: Any, a_sums: Any,
    scale_stride: Any, b: Any, b_scales: Any, inner: Any, c: Any, c_stride: Any, ahead: Any,
) -> Any:  # fmt: skip
    """C = A B on a tile held in registers, B being a panel of 16 columns, by products of bytes in fours.

    `BYTES` and `NIBBLES` only where `MULTIPLIES_QUADS`. That instruction takes one side without sign: bytes
    are stored plus 128.

    Args:
        context: Numba's.
        weights: Literal, `BYTES` or one of the `NIBBLES`, of 4 bits without sign.
        rows: Of A and C, 1 to `TILE_ROWS`.
        a: Address of int8 [rows, inner].
        a_stride: Values from one row of A to the next.
        a_scales: Address of float32 [inner / 32, rows], what the blocks of A are multiplied with.
        a_sums: Address of [inner / 32, rows], what the blocks of A sum up to: with bytes int32 and times
            -128, with nibbles float32 and times the block's scale.
        scale_stride: Values from the scales and sums of one block to those of the next.
        b: Address of the panel. Bytes: uint8 [inner / 4, 16, 4]. Nibbles: blocks of `NIBBLE_BLOCK_BYTES`,
            each uint8 [4, 16, 4] with the quads 2 i in the low halves and 2 i + 1 in the high ones, and
            float16 [2, 16], steps and lowest values.
        b_scales: Address of float32 [16], what columns of bytes are multiplied with.
        inner: Length of the inner dimension, a multiple of 32.
        c: Address of float32 [rows, 16].
        c_stride: Floats from one row of C to the next.
        ahead: Bytes from what is read of B to what is prefetched.
    """
    form = weights.literal_value

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        def tile(height: int) -> None:
            name = f"quad_tile_{form}_{height}"
            call_own(builder, name, args[2:], lambda own, args: _quad_tile(own, form, height, *args))

        switch(builder, args[1], TILE_ROWS, tile)

    return types.void(weights, *[types.int64] * 12), generate


def _quad_tile(builder: ir.IRBuilder, form: int, height: int, *args: ir.Value) -> None:
    """The body of `quad_tile`: integers within a block of A, floats over the blocks."""
    a, a_stride, a_scales, a_sums, scale_stride, b, b_scales, inner, c, c_stride, ahead = args
    lanes = LANES if form in (NIBBLES_BY_AVX2, NIBBLES_BY_ANY) else _QUAD_LANES
    width = PANEL // lanes
    float32s = ir.VectorType(F32, lanes)
    totals = [cgutils.alloca_once(builder, float32s) for _ in range(width * height)]
    for slot in totals:
        builder.store(constant(float32s, 0.0), slot)
    starts = [offset(builder, a, a_stride, m) for m in range(height)]
    blocks = builder.udiv(inner, inner.type(QUAD_BLOCK))
    with cgutils.for_range(builder, blocks) as loop:
        scale_row = builder.mul(loop.index, scale_stride)
        at = builder.mul(loop.index, inner.type(QUAD_BLOCK))

        def of_row(base: ir.Value, m: int, item: ir.Type) -> ir.Value:
            place = offset(builder, offset(builder, base, scale_row, 4), 4 * m)
            return splat(builder, builder.load(pointer(builder, place, item), align=4), lanes)

        def quad(m: int, index: int) -> ir.Value:
            place = offset(builder, builder.add(starts[m], at), 4 * index)
            return splat(builder, builder.load(pointer(builder, place, I32), align=1), lanes)

        def of_panel(first: int, item: ir.Type, size: int) -> list[ir.Value]:
            places = [offset(builder, block, first + size * lanes * n) for n in range(width)]
            shape = ir.VectorType(item, lanes)
            return [builder.load(pointer(builder, place, shape), align=1) for place in places]

        if form == BYTES:
            block = offset(builder, b, at, PANEL)
            sums = [start for m in range(height) for start in [of_row(a_sums, m, I32)] * width]
            for index in range(QUAD_BLOCK // 4):
                columns = of_panel(4 * PANEL * index, I32, 4)
                prefetch_line(builder, offset(builder, builder.add(block, ahead), 4 * PANEL * index))
                for m in range(height):
                    factor = quad(m, index)
                    for n, at_n in enumerate(range(width * m, width * m + width)):
                        sums[at_n] = _quad_products(builder, sums[at_n], columns[n], factor)
        else:
            block = offset(builder, b, loop.index, NIBBLE_BLOCK_BYTES)
            sums = _nibble_sums(builder, form, height, lanes, of_panel, quad)
            for line in range(0, NIBBLE_BLOCK_BYTES, LINE):
                prefetch_line(builder, offset(builder, builder.add(block, ahead), line))
            sides = QUAD_BLOCK // 2 * PANEL
            steps, lows = (
                [builder.fpext(part, float32s) for part in of_panel(place, ir.HalfType(), 2)]
                for place in (sides, sides + 2 * PANEL)
            )
        for m in range(height):
            scale = of_row(a_scales, m, F32)
            for n, slot in enumerate(totals[width * m : width * m + width]):
                floats, total = builder.sitofp(sums[width * m + n], float32s), builder.load(slot)
                if form == BYTES:
                    total = multiply_add(builder, floats, scale, total)
                else:
                    total = multiply_add(builder, floats, builder.fmul(scale, steps[n]), total)
                    total = multiply_add(builder, of_row(a_sums, m, F32), lows[n], total)
                builder.store(total, slot)
    for m in range(height):
        for n in range(width):
            place = pointer(builder, offset(builder, b_scales, 4 * lanes * n), float32s)
            target = offset(builder, offset(builder, c, c_stride, 4 * m), 4 * lanes * n)
            product = builder.load(totals[width * m + n])
            if form == BYTES:
                product = builder.fmul(product, builder.load(place, align=4))
            builder.store(product, pointer(builder, target, float32s), align=4)


def _quad_products(builder: ir.IRBuilder, sums: ir.Value, b: ir.Value, a: ir.Value) -> ir.Value:
    """`sums`, int32, plus products in fours of bytes b without sign and a with sign."""
    name = f"llvm.x86.avx512.vpdpbusd.{32 * sums.type.count}"
    return call(builder, name, sums.type, [sums, b, a])


def _nibble_sums(
    builder: ir.IRBuilder,
    form: int,
    height: int,
    lanes: int,
    of_panel: Callable[[int, ir.Type, int], list[ir.Value]],
    quad: Callable[[int, int], ir.Value],
) -> list[ir.Value]:
    """The products of a block of nibbles and of A, summed up as int32: [rows, 16 / lanes], `lanes` each."""
    width, bytes_, int32s = PANEL // lanes, ir.VectorType(I8, 4 * lanes), ir.VectorType(I32, lanes)
    wide = form == NIBBLES_BY_AVX2
    sums = [constant(I16X16 if wide else int32s, 0)] * (width * height)
    for pair in range(QUAD_BLOCK // 8):
        columns = [builder.bitcast(part, bytes_) for part in of_panel(4 * PANEL * pair, I32, 4)]
        low = [builder.and_(part, constant(bytes_, 15)) for part in columns]
        high = [builder.lshr(part, constant(bytes_, 4)) for part in columns]
        for index, nibbles in ((2 * pair, low), (2 * pair + 1, high)):
            for m in range(height):
                factor = quad(m, index)
                for n, at in enumerate(range(width * m, width * m + width)):
                    total = sums[at]
                    if form == NIBBLES:
                        quads = builder.bitcast(nibbles[n], int32s)
                        sums[at] = _quad_products(builder, total, quads, factor)
                    elif wide:
                        # Pairs of products, at most 2 * 15 * 127 each: sums of eight fit an int16.
                        operands = [nibbles[n], builder.bitcast(factor, bytes_)]
                        products = call(builder, "llvm.x86.avx2.pmadd.ub.sw", I16X16, operands)
                        sums[at] = builder.add(total, products)
                    else:
                        sums[at] = builder.add(total, _plain_quads(builder, nibbles[n], factor))
    if not wide:
        return sums
    return [pair_products(builder, part, constant(I16X16, 1)) for part in sums]


def _plain_quads(builder: ir.IRBuilder, b: ir.Value, a: ir.Value) -> ir.Value:
    """Products in fours of bytes b without sign and a with sign, eight int32, on any machine."""
    shorts = ir.VectorType(I16, 4 * LANES)
    products = builder.mul(builder.zext(b, shorts), builder.sext(builder.bitcast(a, b.type), shorts))
    parts = [
        builder.sext(shuffle(builder, products, products, list(range(i, 4 * LANES, 4))), I32X8)
        for i in range(4)
    ]
    return builder.add(builder.add(parts[0], parts[1]), builder.add(parts[2], parts[3]))
