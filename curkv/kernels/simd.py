"""Building blocks of the Numba kernels: vectors of eight floats, 16-bit loads and stores, matrix tiles.

Numba keeps no part of an array in registers and knows no 16-bit float on the CPU. The intrinsics below emit
the LLVM instructions themselves. LLVM maps `<8 x float>` to what the machine has (one AVX register, two NEON
ones).

Kernels take addresses (`tensor.data_ptr()` as an integer) instead of arrays: a call with twenty integers
costs a microsecond, one with ten arrays twenty. Memory of the KV dtype is read and written through a `kind`,
an empty array whose dtype tells which it is, so that one function body specialises per dtype:

| torch | kind (numpy) | widening in registers |
|---|---|---|
| float32 | float32 | none |
| float16 | uint16 | bit cast to half, extended |
| bfloat16 | int16 | shifted left by 16 bits |

An address does not keep its array alive. Hence: allocate scratch arrays in one function, take their addresses
in functions that it calls. Numba's disk cache does not notice that a callee in another file has changed:
delete `__pycache__` after working on this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic
from numba.extending import models, register_model

F = TypeVar("F", bound=Callable[..., Any])
Args = list[ir.Value]

LANES = 8
_FLOAT = ir.FloatType()
_INT16 = ir.IntType(16)
_INT32 = ir.IntType(32)
_FLOATS = ir.VectorType(_FLOAT, LANES)

# OpenMP starts a parallel region in 2 us, Numba's own pool in 60. The first one that can be loaded is taken.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

KINDS: dict[torch.dtype, np.ndarray[Any, Any]] = {
    torch.float32: np.empty(0, np.float32),
    torch.float16: np.empty(0, np.uint16),
    torch.bfloat16: np.empty(0, np.int16),
}
FLOAT32 = KINDS[torch.float32]


def kernel(function: F) -> F:
    """Compile a function; C division, no GIL, cached on disk."""
    compiled: F = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    return compiled


def inlined(function: F) -> F:
    """Make a function part of the kernels that call it, instead of compiling it on its own."""
    compiled: F = numba.njit(inline="always", error_model="numpy")(function)
    return compiled


def parallel_kernel(function: F) -> F:
    """Compile a function called from Python that may use `prange`."""
    compiled: F = numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)(function)
    return compiled


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a Numba intrinsic whose plain integer arguments arrive as literal types."""
    made: Callable[..., Any] = _intrinsic(prefer_literal=True)(function)
    return made


def address(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """The address of a contiguous tensor's memory.

    Raises:
        TypeError: The tensor has another dtype or is not contiguous, so that a kernel would misread it.
    """
    if tensor.dtype is not dtype or not tensor.is_contiguous():
        raise TypeError(
            f"expected a contiguous {dtype} tensor, got {tensor.dtype}, strides {tensor.stride()}"
        )
    return tensor.data_ptr()


def row_address(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """The address of a tensor whose last dimension is contiguous.

    Raises:
        TypeError: The tensor has another dtype or its last dimension is strided.
    """
    if tensor.dtype is not dtype or tensor.stride(-1) != 1:
        raise TypeError(
            f"expected {dtype} with contiguous rows, got {tensor.dtype}, strides {tensor.stride()}"
        )
    return tensor.data_ptr()


class Float32x8(types.Type):
    """Numba type of eight float32 lanes, held in a register."""

    def __init__(self) -> None:
        super().__init__("float32x8")


float32x8 = Float32x8()


@register_model(Float32x8)
class _Float32x8Model(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _FLOATS)


def _like(scalar: ir.Type, shape: ir.Type) -> ir.Type:
    """`scalar`, or a vector of it if `shape` is a vector."""
    return ir.VectorType(scalar, shape.count) if isinstance(shape, ir.VectorType) else scalar


def _constant(shape: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(shape, [value] * shape.count if isinstance(shape, ir.VectorType) else value)


def _pointer(builder: ir.IRBuilder, location: ir.Value, target: ir.Type) -> ir.Value:
    return builder.inttoptr(location, target.as_pointer())


def _call(builder: ir.IRBuilder, name: str, returns: ir.Type, args: Args, **flags: Any) -> ir.Value:
    """Call an LLVM intrinsic."""
    function_type = ir.FunctionType(returns, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args, **flags)


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return _call(builder, "llvm.fmuladd.v8f32", _FLOATS, [a, b, c])


def _widen(builder: ir.IRBuilder, kind: Any, location: ir.Value, shape: ir.Type) -> ir.Value:
    """Load `shape` (float, or a vector of floats) from memory of the given kind."""
    if kind.dtype == types.float32:
        return builder.load(_pointer(builder, location, shape), align=4)
    bits = builder.load(_pointer(builder, location, _like(_INT16, shape)), align=2)
    if kind.dtype == types.uint16:
        return builder.fpext(builder.bitcast(bits, _like(ir.HalfType(), shape)), shape)
    wide = _like(_INT32, shape)
    return builder.bitcast(builder.shl(builder.zext(bits, wide), _constant(wide, 16)), shape)


def _narrow(builder: ir.IRBuilder, kind: Any, location: ir.Value, value: ir.Value) -> None:
    """Store a float, or a vector of floats, rounded to nearest even, to memory of the given kind."""
    shape = value.type
    if kind.dtype == types.float32:
        builder.store(value, _pointer(builder, location, shape), align=4)
        return
    short = _like(_INT16, shape)
    if kind.dtype == types.uint16:
        bits = builder.bitcast(builder.fptrunc(value, _like(ir.HalfType(), shape)), short)
    else:
        wide = _like(_INT32, shape)
        word = builder.bitcast(value, wide)
        odd = builder.and_(builder.lshr(word, _constant(wide, 16)), _constant(wide, 1))
        rounded = builder.add(word, builder.add(odd, _constant(wide, 0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", value, value)
        rounded = builder.select(is_nan, _constant(wide, 0x7FC00000), rounded)
        bits = builder.trunc(builder.lshr(rounded, _constant(wide, 16)), short)
    builder.store(bits, _pointer(builder, location, short), align=2)


def _splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), scalar, _INT32(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES))


def _shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT32, len(lanes)), lanes))


@intrinsic
def load(context: Any, kind: Any, location: Any) -> Any:
    """Load eight values of `kind` as float32x8."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return _widen(builder, signature.args[0], args[1], _FLOATS)

    return float32x8(kind, types.int64), generate


@intrinsic
def load_scalar(context: Any, kind: Any, location: Any) -> Any:
    """Load one value of `kind` as float32."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return _widen(builder, signature.args[0], args[1], _FLOAT)

    return types.float32(kind, types.int64), generate


@intrinsic
def store(context: Any, kind: Any, location: Any, value: Any) -> Any:
    """Store float32x8 as eight values of `kind`, rounded to nearest even."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        _narrow(builder, signature.args[0], args[1], args[2])

    return types.void(kind, types.int64, float32x8), generate


@intrinsic
def store_scalar(context: Any, kind: Any, location: Any, value: Any) -> Any:
    """Store a float32 as one value of `kind`, rounded to nearest even."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        _narrow(builder, signature.args[0], args[1], args[2])

    return types.void(kind, types.int64, types.float32), generate


@intrinsic
def load_int32(context: Any, location: Any) -> Any:
    """Load an int32 as int64."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return builder.sext(builder.load(_pointer(builder, args[0], _INT32), align=4), ir.IntType(64))

    return types.int64(types.int64), generate


@intrinsic
def store_int32(context: Any, location: Any, value: Any) -> Any:
    """Store the low half of an int64."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        builder.store(builder.trunc(args[1], _INT32), _pointer(builder, args[0], _INT32), align=4)

    return types.void(types.int64, types.int64), generate


@intrinsic
def fetch_add(context: Any, location: Any, value: Any) -> Any:
    """Add to an int64 that several threads share; returns what it was before. Orders memory accesses."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return builder.atomic_rmw("add", _pointer(builder, args[0], ir.IntType(64)), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def broadcast(context: Any, value: Any) -> Any:
    """A float32 in all lanes."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return _splat(builder, args[0])

    return float32x8(types.float32), generate


@intrinsic
def add(context: Any, a: Any, b: Any) -> Any:
    """Lane by lane a + b."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return builder.fadd(*args)

    return float32x8(float32x8, float32x8), generate


@intrinsic
def mul(context: Any, a: Any, b: Any) -> Any:
    """Lane by lane a b."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return builder.fmul(*args)

    return float32x8(float32x8, float32x8), generate


@intrinsic
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """Lane by lane a b + c, fused where the machine can."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return _fma(builder, *args)

    return float32x8(float32x8, float32x8, float32x8), generate


@intrinsic
def maximum(context: Any, a: Any, b: Any) -> Any:
    """Lane by lane the larger of a and b; b where a is NaN."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return float32x8(float32x8, float32x8), generate


@intrinsic
def keep_first(context: Any, a: Any, count: Any, b: Any) -> Any:
    """The first `count` lanes of a, the others of b."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        lanes = ir.VectorType(_INT32, LANES)
        count = builder.trunc(args[1], _INT32)
        first = builder.insert_element(ir.Constant(lanes, ir.Undefined), count, _INT32(0))
        counts = builder.shuffle_vector(first, first, ir.Constant(lanes, [0] * LANES))
        kept = builder.icmp_signed("<", ir.Constant(lanes, list(range(LANES))), counts)
        return builder.select(kept, args[0], args[2])

    return float32x8(float32x8, types.int64, float32x8), generate


@intrinsic
def lane_sum(context: Any, a: Any) -> Any:
    """The sum over the lanes, as float32."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        name = "llvm.vector.reduce.fadd.v8f32"
        return _call(builder, name, _FLOAT, [_FLOAT(-0.0), args[0]], fastmath=("reassoc",))

    return types.float32(float32x8), generate


@intrinsic
def lane_max(context: Any, a: Any) -> Any:
    """The largest lane, as float32; lanes must not be NaN."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        name = "llvm.vector.reduce.fmax.v8f32"
        return _call(builder, name, _FLOAT, [args[0]], fastmath=("nnan",))

    return types.float32(float32x8), generate


# 2^f on [-1/2, 1/2], least largest relative error (7.5e-8; 2.1e-7 with float32 rounding).
_EXP2 = (1.0000000716543658, 0.6931469670549113, 0.24022119724872848,
         0.0555071328958381, 0.00967554129296315, 0.001327646679244232)  # fmt: skip
_ROUNDER = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits of the mantissa


@intrinsic
def exp2(context: Any, a: Any) -> Any:
    """Lane by lane 2^a for a <= 127; below -126 it stays at 2^-126."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        lowest = _constant(_FLOATS, -126.0)
        x = builder.select(builder.fcmp_ordered(">", args[0], lowest), args[0], lowest)
        shifted = builder.fadd(x, _constant(_FLOATS, _ROUNDER))
        fraction = builder.fsub(x, builder.fsub(shifted, _constant(_FLOATS, _ROUNDER)))
        power = _constant(_FLOATS, _EXP2[-1])
        for coefficient in _EXP2[-2::-1]:
            power = _fma(builder, power, fraction, _constant(_FLOATS, coefficient))
        words = ir.VectorType(_INT32, LANES)
        exponent = builder.shl(builder.bitcast(shifted, words), _constant(words, 23))
        return builder.bitcast(builder.add(builder.bitcast(power, words), exponent), _FLOATS)

    return float32x8(float32x8), generate


def _item_size(kind: Any) -> int:
    return int(kind.dtype.bitwidth) // 8


def _offset(builder: ir.IRBuilder, base: ir.Value, *terms: int | ir.Value) -> ir.Value:
    """`base` plus a product of bytes, int64."""
    product: Any = ir.IntType(64)(1)
    for term in terms:
        product = builder.mul(product, ir.IntType(64)(term) if isinstance(term, int) else term)
    return builder.add(base, product)


def _accumulators(builder: ir.IRBuilder, count: int) -> list[ir.Value]:
    """Stack slots that LLVM turns into registers."""
    return [cgutils.alloca_once(builder, _FLOATS) for _ in range(count)]


@intrinsic
def dot_tile(context: Any, kind: Any, rows: Any, q: Any, dim: Any, k: Any, out: Any, out_stride: Any) -> Any:
    """Products of `rows` query vectors and four consecutive keys.

    Args:
        context: Numba's.
        kind: Of the keys.
        rows: Literal, 1 to 4.
        q: Address of float32 [rows, dim].
        dim: Multiple of 8.
        k: Address of [4, dim] of `kind`.
        out: Address of float32 [rows, 4], written.
        out_stride: Floats from one row of `out` to the next.
    """
    count, keys = rows.literal_value, 4

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        kind, _, q, dim, k, out, out_stride = signature.args[0], *args[1:]
        size = _item_size(kind)
        sums = _accumulators(builder, count * keys)
        for slot in sums:
            builder.store(_constant(_FLOATS, 0.0), slot)
        with cgutils.for_range_slice(builder, dim.type(0), dim, dim.type(LANES)) as (d, _count):
            loaded = [
                _widen(
                    builder,
                    kind,
                    _offset(builder, k, builder.add(builder.mul(dim, dim.type(t)), d), size),
                    _FLOATS,
                )
                for t in range(keys)
            ]
            for m in range(count):
                place = _offset(builder, q, builder.add(builder.mul(dim, dim.type(m)), d), 4)
                query = builder.load(_pointer(builder, place, _FLOATS), align=4)
                for t in range(keys):
                    slot = sums[m * keys + t]
                    builder.store(_fma(builder, query, loaded[t], builder.load(slot)), slot)
        for m in range(count):
            four = _sum_four(builder, [builder.load(slot) for slot in sums[m * keys : (m + 1) * keys]])
            builder.store(
                four, _pointer(builder, _offset(builder, out, out_stride, 4 * m), four.type), align=4
            )

    integer = types.int64
    return types.void(kind, rows, integer, integer, integer, integer, integer), generate


def _sum_four(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """The lane sums of four vectors, `<4 x float>`."""
    even, odd = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]

    def pairs(a: ir.Value, b: ir.Value) -> ir.Value:
        return builder.fadd(_shuffle(builder, a, b, even), _shuffle(builder, a, b, odd))

    quads = pairs(pairs(vectors[0], vectors[1]), pairs(vectors[2], vectors[3]))
    return builder.fadd(
        _shuffle(builder, quads, quads, [0, 1, 2, 3]), _shuffle(builder, quads, quads, [4, 5, 6, 7])
    )


@intrinsic
def matrix_tile(
    context: Any, kind: Any, rows: Any, vectors: Any, fresh: Any,
    a: Any, a_stride: Any, b: Any, b_stride: Any, inner: Any, c: Any, c_stride: Any,
) -> Any:  # fmt: skip
    """C += A B (or C = A B) on a tile held in registers.

    Args:
        context: Numba's.
        kind: Of B.
        rows: Literal, rows of A and C.
        vectors: Literal, columns of B and C in eights.
        fresh: Literal, 1 to write A B, 0 to add it.
        a: Address of float32 [rows, inner].
        a_stride: Floats from one row of A to the next.
        b: Address of [inner, 8 * vectors] of `kind`.
        b_stride: Values from one row of B to the next.
        inner: Length of the inner dimension.
        c: Address of float32 [rows, 8 * vectors].
        c_stride: Floats from one row of C to the next.
    """
    height, width, replace = rows.literal_value, vectors.literal_value, bool(fresh.literal_value)

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        kind, (a, a_stride, b, b_stride, inner, c, c_stride) = signature.args[0], args[4:]
        size = _item_size(kind)
        tile = _accumulators(builder, height * width)
        starts = [_offset(builder, a, a_stride, 4 * m) for m in range(height)]
        targets = [
            _pointer(builder, _offset(builder, _offset(builder, c, c_stride, 4 * m), 4 * LANES * n), _FLOATS)
            for m in range(height)
            for n in range(width)
        ]
        for slot, target in zip(tile, targets, strict=True):
            builder.store(_constant(_FLOATS, 0.0) if replace else builder.load(target, align=4), slot)
        with cgutils.for_range(builder, inner) as loop:
            row = _offset(builder, b, loop.index, b_stride, size)
            loaded = [
                _widen(builder, kind, _offset(builder, row, LANES * size * n), _FLOATS) for n in range(width)
            ]
            for m in range(height):
                factor = builder.load(
                    _pointer(builder, _offset(builder, starts[m], loop.index, 4), _FLOAT), align=4
                )
                spread = _splat(builder, factor)
                for n in range(width):
                    slot = tile[m * width + n]
                    builder.store(_fma(builder, spread, loaded[n], builder.load(slot)), slot)
        for slot, target in zip(tile, targets, strict=True):
            builder.store(builder.load(slot), target, align=4)

    addresses = [types.int64] * 7
    return types.void(kind, rows, vectors, fresh, *addresses), generate


@intrinsic
def transpose_tile(
    context: Any, kind: Any, source: Any, source_stride: Any, target: Any, target_stride: Any
) -> Any:
    """Widen an 8 x 8 block and write its transpose.

    Args:
        context: Numba's.
        kind: Of the source.
        source: Address of [8, 8] of `kind`.
        source_stride: Values from one row of the source to the next.
        target: Address of float32 [8, 8].
        target_stride: Floats from one row of the target to the next.
    """

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        kind, source, source_stride, target, target_stride = signature.args[0], *args[1:]
        size = _item_size(kind)
        rows = [
            _widen(builder, kind, _offset(builder, source, source_stride, size * i), _FLOATS)
            for i in range(LANES)
        ]
        # Three rounds of exchanges: single lanes, pairs, halves.
        for low, high, step in (
            ([0, 8, 2, 10, 4, 12, 6, 14], [1, 9, 3, 11, 5, 13, 7, 15], 1),
            ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15], 2),
            ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15], 4),
        ):
            for i in (i for i in range(LANES) if not i & step):
                a, b = rows[i], rows[i + step]
                rows[i], rows[i + step] = _shuffle(builder, a, b, low), _shuffle(builder, a, b, high)
        for i, row in enumerate(rows):
            place = _offset(builder, target, target_stride, 4 * i)
            builder.store(row, _pointer(builder, place, _FLOATS), align=4)

    integer = types.int64
    return types.void(kind, integer, integer, integer, integer), generate


@inlined
def row_max(scores: int, count: int) -> Any:
    """The largest of `count` floats, -inf without any; up to seven more are read and ignored."""
    lowest = broadcast(np.float32(-np.inf))
    best = lowest
    body = count - count % 8
    for j in range(0, body, 8):
        best = maximum(load(FLOAT32, scores + 4 * j), best)
    if body < count:
        best = maximum(keep_first(load(FLOAT32, scores + 4 * body), count - body, lowest), best)
    return lane_max(best)


@inlined
def row_exp2(scores: int, count: int, width: int, factor: float, highest: float) -> Any:
    """Replace `count` floats x by 2^(factor (x - highest)), and those up to `width`, a multiple of 8, by 0.

    Returns:
        The sum of the powers.
    """
    spread = broadcast(np.float32(factor))
    shift = broadcast(np.float32(-factor * highest))
    zeros = broadcast(np.float32(0.0))
    total = zeros
    body = count - count % 8
    for j in range(0, body, 8):
        power = exp2(fma(load(FLOAT32, scores + 4 * j), spread, shift))
        store(FLOAT32, scores + 4 * j, power)
        total = add(total, power)
    if body < count:
        power = exp2(fma(load(FLOAT32, scores + 4 * body), spread, shift))
        power = keep_first(power, count - body, zeros)
        store(FLOAT32, scores + 4 * body, power)
        total = add(total, power)
        body += 8
    for j in range(body, width, 8):
        store(FLOAT32, scores + 4 * j, zeros)
    return lane_sum(total)
