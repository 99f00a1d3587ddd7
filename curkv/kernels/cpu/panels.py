"""Packing B of `strip_tile`: rows or columns of keys and values into panels."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from curkv.kernels.cpu.jit import intrinsic
from curkv.kernels.cpu.lanes import float32x8
from curkv.kernels.cpu.llvm import (
    F32X8,
    I16X16,
    LANES,
    Args,
    bfloat16_bits,
    offset,
    pointer,
    shuffle,
)
from curkv.kernels.cpu.tiles import PANEL
from curkv.kernels.cpu.vectors import addresses


@intrinsic
def store_panel_rows(context: Any, kind: Any, location: Any, first: Any, second: Any) -> Any:
    """Store eight columns of two rows of a B of `strip_tile`, float32x8 each, at the first one's address."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        kind, place, *rows = signature.args[0], *args[1:]
        if kind.dtype == types.int16:
            bits = [bfloat16_bits(builder, row) for row in rows]
            pairs = [i + of for i in range(LANES) for of in (0, LANES)]
            builder.store(shuffle(builder, bits[0], bits[1], pairs), pointer(builder, place, I16X16), align=2)
            return
        for i, row in enumerate(rows):
            builder.store(row, pointer(builder, offset(builder, place, 4 * PANEL * i), F32X8), align=4)

    return types.void(kind, types.int64, float32x8, float32x8), generate


def transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """The columns of an 8 x 8 block: three rounds of exchanges, of single lanes, pairs and halves."""
    for low, high, step in (
        ([0, 8, 2, 10, 4, 12, 6, 14], [1, 9, 3, 11, 5, 13, 7, 15], 1),
        ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15], 2),
        ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15], 4),
    ):
        for i in (i for i in range(LANES) if not i & step):
            a, b = rows[i], rows[i + step]
            rows[i], rows[i + step] = shuffle(builder, a, b, low), shuffle(builder, a, b, high)
    return rows


@intrinsic
def store_panel_columns(
    context: Any, kind: Any, location: Any, primitives: Any, store: Any, dim: Any, token: Any, first: Any
) -> Any:
    """Store eight channels (bfloat16: 16) of 8 vectors as columns of a B of `strip_tile`.

    Args:
        context: Numba's.
        kind: Of B, float32 or bfloat16.
        location: Address in the panel.
        primitives: Of the vectors' format.
        store: Where the vectors lie.
        dim: Channels of a vector.
        token: Number of the first vector; the others follow.
        first: Of the channels.
    """
    own = primitives.primitives

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        pairs = signature.args[0].dtype == types.int16
        _kind, location, _primitives, store, dim, token, first = args
        arrays = addresses(builder, store)

        def eight(row: int) -> ir.Value:
            return own.row(builder, arrays, dim, builder.add(token, token.type(row)))(first)

        def sixteen(row: int) -> ir.Value:
            channels = own.row(builder, arrays, dim, builder.add(token, token.type(row)))
            places = (first, builder.add(first, first.type(LANES)))
            bits = [bfloat16_bits(builder, channels(place)) for place in places]
            return builder.bitcast(shuffle(builder, bits[0], bits[1], list(range(2 * LANES))), F32X8)

        rows = [sixteen(row) if pairs else eight(row) for row in range(LANES)]
        for i, column in enumerate(transposed(builder, rows)):
            place = offset(builder, location, 4 * PANEL * i)
            builder.store(column, pointer(builder, place, F32X8), align=4)

    return types.void(kind, types.int64, primitives, store, *[types.int64] * 3), generate
