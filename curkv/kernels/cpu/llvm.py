"""Instructions in LLVM's words: types, loads and stores of 16-bit floats, address arithmetic, own functions.

Numba keeps no part of an array in registers and knows no 16-bit float on the CPU, so the intrinsics of this
package emit the instructions themselves. LLVM maps `<8 x float>` to what the machine has (one AVX register,
two NEON ones).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from curkv.kernels.cpu.features import MULTIPLIES_BFLOAT16

Args = list[ir.Value]
LANES = 8
LINE = 64  # bytes of a cache line
L1, L2 = 3, 2  # caches to prefetch into, as LLVM numbers them
F32 = ir.FloatType()
I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F32X8 = ir.VectorType(F32, LANES)
I32X8 = ir.VectorType(I32, LANES)
I16X16 = ir.VectorType(I16, 2 * LANES)
I8X16 = ir.VectorType(I8, 2 * LANES)
ROUNDER = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits of the mantissa
ROUNDER_BITS = int(np.float32(ROUNDER).view(np.int32))


class _Bfloat16Type(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat16Type)

    def __hash__(self) -> int:
        return hash(_Bfloat16Type)


BF16 = _Bfloat16Type()


def like(scalar: ir.Type, shape: ir.Type) -> ir.Type:
    """`scalar`, or a vector of it if `shape` is a vector."""
    return ir.VectorType(scalar, shape.count) if isinstance(shape, ir.VectorType) else scalar


def constant(shape: ir.Type, value: float) -> ir.Constant:
    """A number, or a vector with it in all lanes."""
    return ir.Constant(shape, [value] * shape.count if isinstance(shape, ir.VectorType) else value)


def pointer(builder: ir.IRBuilder, location: ir.Value, target: ir.Type) -> ir.Value:
    """An address, int64, as a pointer to `target`."""
    return builder.inttoptr(location, target.as_pointer())


def call(builder: ir.IRBuilder, name: str, returns: ir.Type, args: Args, **flags: Any) -> ir.Value:
    """Call an LLVM intrinsic."""
    function_type = ir.FunctionType(returns, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args, **flags)


def multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Lane by lane a b + c, fused where the machine can."""
    return call(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, [a, b, c])


def widen(builder: ir.IRBuilder, kind: Any, location: ir.Value, shape: ir.Type) -> ir.Value:
    """Load `shape` (float, or a vector of floats) from memory of the given kind."""
    if kind.dtype == types.float32:
        return builder.load(pointer(builder, location, shape), align=4)
    if kind.dtype == types.int8:
        byte = builder.load(pointer(builder, location, like(I8, shape)), align=1)
        return builder.sitofp(builder.sext(byte, like(I32, shape)), shape)
    bits = builder.load(pointer(builder, location, like(I16, shape)), align=2)
    if kind.dtype == types.uint16:
        return builder.fpext(builder.bitcast(bits, like(ir.HalfType(), shape)), shape)
    wide = like(I32, shape)
    return builder.bitcast(builder.shl(builder.zext(bits, wide), constant(wide, 16)), shape)


def narrow(builder: ir.IRBuilder, kind: Any, location: ir.Value, value: ir.Value) -> None:
    """Store a float, or a vector of floats, rounded to nearest even, to memory of the given kind.

    An int8 is any if the float is NaN or out of its range.
    """
    shape = value.type
    if kind.dtype == types.float32:
        builder.store(value, pointer(builder, location, shape), align=4)
        return
    if kind.dtype == types.int8:
        word = builder.bitcast(builder.fadd(value, constant(shape, ROUNDER)), like(I32, shape))
        byte = builder.trunc(word, like(I8, shape))
        builder.store(byte, pointer(builder, location, byte.type), align=1)
        return
    short = like(I16, shape)
    if kind.dtype == types.uint16:
        bits = builder.bitcast(builder.fptrunc(value, like(ir.HalfType(), shape)), short)
    elif MULTIPLIES_BFLOAT16 and shape == F32X8:
        bits = bfloat16_bits(builder, value)
    else:
        wide = like(I32, shape)
        word = builder.bitcast(value, wide)
        odd = builder.and_(builder.lshr(word, constant(wide, 16)), constant(wide, 1))
        rounded = builder.add(word, builder.add(odd, constant(wide, 0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", value, value)
        rounded = builder.select(is_nan, constant(wide, 0x7FC00000), rounded)
        bits = builder.trunc(builder.lshr(rounded, constant(wide, 16)), short)
    builder.store(bits, pointer(builder, location, short), align=2)


def bfloat16_bits(builder: ir.IRBuilder, floats: ir.Value) -> ir.Value:
    """Eight floats as bfloat16, by the machine's own instruction, in eight int16."""
    name = "llvm.x86.avx512bf16.cvtneps2bf16.256"
    rounded = call(builder, name, ir.VectorType(BF16, LANES), [floats])
    return builder.bitcast(rounded, like(I16, F32X8))


def splat(builder: ir.IRBuilder, scalar: ir.Value, count: int = LANES) -> ir.Value:
    """A scalar in all of `count` lanes."""
    first = builder.insert_element(
        ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined), scalar, I32(0)
    )
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, count), [0] * count))


def shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
    """The named lanes of a and b, those of b counted on from those of a."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def item_size(kind: Any) -> int:
    """Bytes of a value of a kind."""
    return int(kind.dtype.bitwidth) // 8


def offset(builder: ir.IRBuilder, base: ir.Value, *terms: int | ir.Value) -> ir.Value:
    """`base` plus a product of bytes, int64."""
    product: Any = I64(1)
    for term in terms:
        product = builder.mul(product, I64(term) if isinstance(term, int) else term)
    return builder.add(base, product)


def load_strided(
    builder: ir.IRBuilder, location: ir.Value, stride: ir.Value, item: ir.Type, size: int, align: int
) -> ir.Value:
    """Loads a vector of `LANES` items of `size` bytes that lie `stride` bytes apart.

    In one go, which takes them to be aligned to their size, where they are neighbours; else one by one, each
    aligned to `align` bytes.
    """
    shape = ir.VectorType(item, LANES)
    slot = cgutils.alloca_once(builder, shape)
    with builder.if_else(builder.icmp_unsigned("==", stride, I64(size))) as (neighbours, apart):
        with neighbours:
            builder.store(builder.load(pointer(builder, location, shape), align=size), slot)
        with apart:
            items = ir.Constant(shape, ir.Undefined)
            for i in range(LANES):
                place = pointer(builder, offset(builder, location, stride, i), item)
                items = builder.insert_element(items, builder.load(place, align=align), I32(i))
            builder.store(items, slot)
    return builder.load(slot)


def prefetch_line(builder: ir.IRBuilder, location: ir.Value, cache: int = L1) -> None:
    """Fetch a cache line for reading; no address is wrong."""
    place = pointer(builder, location, I8)
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, I32(0), I32(cache), I32(1)])


def accumulators(builder: ir.IRBuilder, count: int) -> list[ir.Value]:
    """Stack slots that LLVM turns into registers."""
    return [cgutils.alloca_once(builder, F32X8) for _ in range(count)]


def call_own(
    builder: ir.IRBuilder, name: str, args: Args, body: Callable[[ir.IRBuilder, Args], None]
) -> None:
    """Call `body` as a function of its own, so that the registers are all for its loop.

    Args:
        builder: Where to call from.
        name: Of the function; the same name means the same body.
        args: int64 values.
        body: Emits the function's instructions, given a builder and the function's arguments.
    """
    function = builder.module.globals.get(name)
    if function is None:
        function_type = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
        function = ir.Function(builder.module, function_type, name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        inner = ir.IRBuilder(function.append_basic_block())
        body(inner, list(function.args))
        inner.ret_void()
    builder.call(function, args)


def switch(builder: ir.IRBuilder, number: ir.Value, most: int, emit: Callable[[int], None]) -> None:
    """Run, of what `emit` emits for the numbers 1 to `most`, that of an int64; of any other one that of 1."""
    blocks = [builder.append_basic_block(f"case.{case}") for case in range(1, most + 1)]
    after = builder.append_basic_block("after")
    choice = builder.switch(number, blocks[0])
    for case, block in enumerate(blocks, 1):
        choice.add_case(I64(case), block)
        builder.position_at_end(block)
        emit(case)
        builder.branch(after)
    builder.position_at_end(after)


def int16s(builder: ir.IRBuilder, location: ir.Value) -> ir.Value:
    """Load sixteen int8 as int16."""
    return builder.sext(builder.load(pointer(builder, location, I8X16), align=1), I16X16)


def pair_products(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1] as eight int32.

    Widened before they are shuffled, so that LLVM makes one instruction of it where there is one (x86's
    pmaddwd).
    """
    products = builder.mul(*(builder.sext(x, like(I32, I16X16)) for x in (a, b)))
    lanes = [list(range(first, 2 * LANES, 2)) for first in (0, 1)]
    return builder.add(*(shuffle(builder, products, products, of_pair) for of_pair in lanes))
