"""Micro-kernels of matrix products: tiles of C held in registers, B in panels of 16 columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from curkv.kernels.cpu.jit import intrinsic
from curkv.kernels.cpu.llvm import (
    BF16,
    F32,
    F32X8,
    I16X16,
    I32,
    I32X8,
    I64,
    LANES,
    LINE,
    Args,
    accumulators,
    call,
    call_own,
    constant,
    int16s,
    item_size,
    multiply_add,
    offset,
    pair_products,
    pointer,
    prefetch_line,
    splat,
    switch,
    widen,
)

PANEL = 2 * LANES
"""Columns of B in `panel_tile`."""
TILE_ROWS = 6
"""Most rows of A in `panel_tile` and `quad_tile`: 12 of 16 vector registers hold the tile."""


def float_tile(
    builder: ir.IRBuilder,
    height: int,
    width: int,
    replace: bool,
    a: ir.Value,
    a_stride: ir.Value,
    columns_of: Callable[[ir.Value], Callable[[int], ir.Value]],
    inner: ir.Value,
    c: ir.Value,
    c_stride: ir.Value,
) -> None:
    """C += A B (or C = A B) in float32, on a tile held in registers.

    `columns_of` a row of B emits what is done once for a row; what it gives emits the n-th eight columns.
    """
    tile = accumulators(builder, height * width)
    starts = [offset(builder, a, a_stride, 4 * m) for m in range(height)]
    rows_of_c = [offset(builder, c, c_stride, 4 * m) for m in range(height)]
    targets = [
        pointer(builder, offset(builder, row, 4 * LANES * n), F32X8)
        for row in rows_of_c
        for n in range(width)
    ]
    for slot, target in zip(tile, targets, strict=True):
        builder.store(constant(F32X8, 0.0) if replace else builder.load(target, align=4), slot)
    with cgutils.for_range(builder, inner) as loop:
        column = columns_of(loop.index)

        def factor(m: int) -> ir.Value:
            place = offset(builder, starts[m], loop.index, 4)
            return splat(builder, builder.load(pointer(builder, place, F32), align=4))

        # The fewer operands wait in registers, the other ones are loaded one after the other.
        if height < width:
            factors = [factor(m) for m in range(height)]
            pairs = (
                (m, n, factors[m], value)
                for n in range(width)
                for value in [column(n)]
                for m in range(height)
            )
        else:
            columns = [column(n) for n in range(width)]
            pairs = (
                (m, n, value, columns[n])
                for m in range(height)
                for value in [factor(m)]
                for n in range(width)
            )
        for m, n, left, right in pairs:
            slot = tile[m * width + n]
            builder.store(multiply_add(builder, left, right, builder.load(slot)), slot)
    for slot, target in zip(tile, targets, strict=True):
        builder.store(builder.load(slot), target, align=4)


def _float_panel(builder: ir.IRBuilder, kind: Any, height: int, replace: bool, *args: ir.Value) -> None:
    """The float32 body of `panel_tile` and `strip_tile`: `float_tile` over a panel."""
    a, a_stride, b, inner, c, c_stride, ahead = args
    size = item_size(kind)

    def columns(index: ir.Value) -> Callable[[int], ir.Value]:
        row = offset(builder, b, index, PANEL, size)
        for line in range(0, PANEL * size, LINE):
            prefetch_line(builder, offset(builder, builder.add(row, ahead), line))
        return lambda n: widen(builder, kind, offset(builder, row, LANES * size * n), F32X8)

    float_tile(builder, height, PANEL // LANES, replace, a, a_stride, columns, inner, c, c_stride)


@intrinsic
def panel_tile(
    context: Any, kind: Any, rows: Any, fresh: Any, a: Any, a_stride: Any, a_scales: Any,
    b: Any, b_scales: Any, inner: Any, c: Any, c_stride: Any, ahead: Any,
) -> Any:  # fmt: skip
    """C += A B (or C = A B) on a tile held in registers, B being a panel of 16 columns.

    Args:
        context: Numba's.
        kind: Of B, float32 or int8; with int8, A is int16 and both have scales.
        rows: Of A and C, 1 to `TILE_ROWS`.
        fresh: Literal, 1 to write A B, 0 to add it.
        a: Address of float32 or int16 [rows, inner].
        a_stride: Values from one row of A to the next.
        a_scales: Address of float32 [rows], what the rows of an int16 A are multiplied with.
        b: Address of float32 [inner, 16] or int8 [inner / 2, 16, 2], packed.
        b_scales: Address of float32 [16], what the columns of an int8 B are multiplied with.
        inner: Length of the inner dimension; with int8 a multiple of 4, and no sum of `inner` products may
            exceed an int32.
        c: Address of float32 [rows, 16].
        c_stride: Floats from one row of C to the next.
        ahead: Bytes from what is read of B to what is prefetched.
    """
    replace = bool(fresh.literal_value)

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        kind = signature.args[0]
        a, a_stride, _a_scales, b, _b_scales, *others = args[3:]
        int8 = kind.dtype == types.int8
        arguments = args[3:] if int8 else [a, a_stride, b, *others]

        def tile(height: int) -> None:
            def body(own: ir.IRBuilder, args: Args) -> None:
                if int8:
                    _int8_tile(own, height, replace, *args)
                else:
                    _float_panel(own, kind, height, replace, *args)

            call_own(builder, f"panel_tile_{height}_{int(replace)}_{kind.dtype}", arguments, body)

        switch(builder, args[1], TILE_ROWS, tile)

    return types.void(kind, types.int64, fresh, *[types.int64] * 9), generate


def _int8_tile(builder: ir.IRBuilder, height: int, replace: bool, *args: ir.Value) -> None:
    """The int8 body of `panel_tile`: neighbours of the inner dimension are multiplied and summed in pairs."""
    a, a_stride, a_scales, b, b_scales, inner, c, c_stride, ahead = args
    tile = [cgutils.alloca_once(builder, I32X8) for _ in range(2 * height)]
    for slot in tile:
        builder.store(constant(I32X8, 0), slot)
    starts = [offset(builder, a, a_stride, 2 * m) for m in range(height)]
    with cgutils.for_range_slice(builder, inner.type(0), inner, inner.type(4)) as (index, _count):
        for pair in range(2):
            at = builder.add(index, index.type(2 * pair))
            row = offset(builder, b, at, PANEL)
            columns = [int16s(builder, builder.add(row, row.type(2 * LANES * n))) for n in range(2)]
            for m in range(height):
                word = builder.load(pointer(builder, offset(builder, starts[m], at, 2), I32), align=4)
                factor = builder.bitcast(splat(builder, word), I16X16)
                for n, slot in enumerate(tile[2 * m : 2 * m + 2]):
                    products = pair_products(builder, factor, columns[n])
                    builder.store(builder.add(builder.load(slot), products), slot)
        prefetch_line(builder, builder.add(offset(builder, b, index, PANEL), ahead))

    def floats(base: ir.Value, n: int) -> ir.Value:
        return pointer(builder, builder.add(base, base.type(4 * LANES * n)), F32X8)

    for m in range(height):
        place = pointer(builder, builder.add(a_scales, a_scales.type(4 * m)), F32)
        a_scale = splat(builder, builder.load(place, align=4))
        for n in range(2):
            scale = builder.fmul(a_scale, builder.load(floats(b_scales, n), align=4))
            total = builder.sitofp(builder.load(tile[2 * m + n]), F32X8)
            target = floats(offset(builder, c, c_stride, 4 * m), n)
            if replace:
                builder.store(builder.fmul(total, scale), target, align=4)
            else:
                builder.store(
                    multiply_add(builder, total, scale, builder.load(target, align=4)), target, align=4
                )


STRIP, BFLOAT16_STRIP = 6, 12
"""Rows of a `strip_tile`; machines that multiply bfloat16 have 32 registers of 16 floats."""


@intrinsic
def strip_rows(context: Any, kind: Any) -> Any:
    """Rows of a `strip_tile` of a kind."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return I64(BFLOAT16_STRIP if signature.args[0].dtype == types.int16 else STRIP)

    return types.int64(kind), generate


@intrinsic
def strip_tile(
    context: Any, kind: Any, fresh: Any, a: Any, a_stride: Any, b: Any, inner: Any, c: Any, c_stride: Any,
    ahead: Any,
) -> Any:  # fmt: skip
    """C += A B (or C = A B) on a tile held in registers, as many rows as those can take.

    Args:
        context: Numba's.
        kind: Of A and B, float32 (6 rows) or, where `MULTIPLIES_BFLOAT16`, bfloat16 (12 rows).
        fresh: Literal, 1 to write A B, 0 to add it.
        a: Address of [rows, inner].
        a_stride: Values from one row of A to the next.
        b: Address of a panel, float32 [inner, 16] or bfloat16 [inner / 2, 16, 2].
        inner: Length of the inner dimension; with bfloat16 even.
        c: Address of float32 [rows, 16].
        c_stride: Floats from one row of C to the next.
        ahead: Bytes from B to the panel that will be read next, to be prefetched.
    """
    replace = bool(fresh.literal_value)

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        kind = signature.args[0]
        name = f"strip_tile_{int(replace)}_{kind.dtype}"
        a, a_stride, b, *others = args[2:]
        if kind.dtype == types.int16:
            call_own(builder, name, args[2:], lambda own, args: _bfloat16_tile(own, replace, *args))
            return
        call_own(
            builder, name, [a, a_stride, b, *others],
            lambda own, args: _float_panel(own, kind, STRIP, replace, *args),
        )  # fmt: skip

    return types.void(kind, fresh, *[types.int64] * 7), generate


def _bfloat16_tile(builder: ir.IRBuilder, replace: bool, *args: ir.Value) -> None:
    """The bfloat16 body of `strip_tile`: neighbours of the inner dimension are multiplied in pairs."""
    a, a_stride, b, inner, c, c_stride, ahead = args
    floats, pairs = ir.VectorType(F32, PANEL), ir.VectorType(BF16, 2 * PANEL)
    tile = [cgutils.alloca_once(builder, floats) for _ in range(BFLOAT16_STRIP)]
    starts = [offset(builder, a, a_stride, 2 * m) for m in range(BFLOAT16_STRIP)]
    targets = [pointer(builder, offset(builder, c, c_stride, 4 * m), floats) for m in range(BFLOAT16_STRIP)]
    for slot, target in zip(tile, targets, strict=True):
        builder.store(constant(floats, 0.0) if replace else builder.load(target, align=4), slot)
    with cgutils.for_range(builder, builder.lshr(inner, inner.type(1))) as loop:
        row = offset(builder, b, loop.index, 4 * PANEL)
        prefetch_line(builder, builder.add(row, ahead))
        columns = builder.load(pointer(builder, row, pairs), align=2)
        for m, slot in enumerate(tile):
            place = pointer(builder, offset(builder, starts[m], loop.index, 4), I32)
            factor = builder.bitcast(splat(builder, builder.load(place, align=2), PANEL), pairs)
            operands = [builder.load(slot), columns, factor]
            builder.store(call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", floats, operands), slot)
    for slot, target in zip(tile, targets, strict=True):
        builder.store(builder.load(slot), target, align=4)
