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
| int8 | int8 | extended, converted; scales are applied elsewhere |

Where much is multiplied with int8, it is rounded to int16 and pairs of products are summed as int32
(`panel_tile`, `dot_rows_int8`, `weigh_rows_int8`), which takes half the instructions.

An address does not keep its array alive: whoever takes the address of a tensor or an array keeps that one
in a variable that is used again after the last access.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic
from numba.extending import models, register_model

F = TypeVar("F", bound=Callable[..., Any])
Args = list[ir.Value]

LANES = 8
PANEL = 2 * LANES
"""Columns of B in `panel_tile`."""
LINE = 64  # bytes of a cache line
_L1, _L2 = 3, 2  # caches to prefetch into, as LLVM numbers them
_FLOAT = ir.FloatType()
_INT8 = ir.IntType(8)
_INT16 = ir.IntType(16)
_INT32 = ir.IntType(32)
_FLOATS = ir.VectorType(_FLOAT, LANES)
_INT32S = ir.VectorType(_INT32, LANES)
_INT16S = ir.VectorType(_INT16, 2 * LANES)
_BYTES = ir.VectorType(_INT8, 2 * LANES)


class _Bfloat16Type(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat16Type)

    def __hash__(self) -> int:
        return hash(_Bfloat16Type)


# OpenMP starts a parallel region in 2 us, Numba's own pool in 60. The first one that can be loaded is taken.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

KINDS: dict[torch.dtype, np.ndarray[Any, Any]] = {
    torch.float32: np.empty(0, np.float32),
    torch.float16: np.empty(0, np.uint16),
    torch.bfloat16: np.empty(0, np.int16),
    torch.int8: np.empty(0, np.int8),
}
FLOAT32 = KINDS[torch.float32]
INT8 = KINDS[torch.int8]
_FEATURES = get_host_cpu_features()
MULTIPLIES_QUADS = bool(
    _FEATURES.get("avxvnni") or (_FEATURES.get("avx512vnni") and _FEATURES.get("avx512vl"))
)
"""Whether the machine multiplies bytes in fours and adds them up in an int32 (x86's vpdpbusd)."""
_QUAD_LANES = 2 * LANES if _FEATURES.get("avx512vnni") else LANES  # columns in a register of `quad_tile`
BYTES, NIBBLES, NIBBLES_BY_AVX2, NIBBLES_BY_ANY = range(4)
"""What the B of `quad_tile` is made of, and for which machines it multiplies."""
OWN_NIBBLES = NIBBLES if MULTIPLIES_QUADS else NIBBLES_BY_AVX2 if _FEATURES.get("avx2") else NIBBLES_BY_ANY
"""The one for this machine."""
MULTIPLIES_BFLOAT16 = bool(_FEATURES.get("avx512bf16") and _FEATURES.get("avx512vl"))
"""Whether the machine multiplies bfloat16 in pairs and adds them up in a float32 (x86's vdpbf16ps)."""


def kernel(function: F) -> F:
    """Compile a function; C division, no GIL, cached on disk."""
    compiled: F = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    return compiled


def inlined(function: F) -> F:
    """Make a function part of the kernels that call it, instead of compiling it on its own."""
    compiled: F = numba.njit(inline="always", error_model="numpy")(function)
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


def scales_address(scales: torch.Tensor | None) -> int:
    """The address of the scales of an int8 cache; 0 where there are none."""
    return 0 if scales is None else address(scales, torch.float32)


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
    return _call(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, [a, b, c])


def _widen(builder: ir.IRBuilder, kind: Any, location: ir.Value, shape: ir.Type) -> ir.Value:
    """Load `shape` (float, or a vector of floats) from memory of the given kind."""
    if kind.dtype == types.float32:
        return builder.load(_pointer(builder, location, shape), align=4)
    if kind.dtype == types.int8:
        byte = builder.load(_pointer(builder, location, _like(_INT8, shape)), align=1)
        return builder.sitofp(builder.sext(byte, _like(_INT32, shape)), shape)
    bits = builder.load(_pointer(builder, location, _like(_INT16, shape)), align=2)
    if kind.dtype == types.uint16:
        return builder.fpext(builder.bitcast(bits, _like(ir.HalfType(), shape)), shape)
    wide = _like(_INT32, shape)
    return builder.bitcast(builder.shl(builder.zext(bits, wide), _constant(wide, 16)), shape)


def _narrow(builder: ir.IRBuilder, kind: Any, location: ir.Value, value: ir.Value) -> None:
    """Store a float, or a vector of floats, rounded to nearest even, to memory of the given kind.

    An int8 is any if the float is NaN or out of its range.
    """
    shape = value.type
    if kind.dtype == types.float32:
        builder.store(value, _pointer(builder, location, shape), align=4)
        return
    if kind.dtype == types.int8:
        word = builder.bitcast(builder.fadd(value, _constant(shape, _ROUNDER)), _like(_INT32, shape))
        byte = builder.trunc(word, _like(_INT8, shape))
        builder.store(byte, _pointer(builder, location, byte.type), align=1)
        return
    short = _like(_INT16, shape)
    if kind.dtype == types.uint16:
        bits = builder.bitcast(builder.fptrunc(value, _like(ir.HalfType(), shape)), short)
    elif MULTIPLIES_BFLOAT16 and shape == _FLOATS:
        bits = _bfloat16_bits(builder, value)
    else:
        wide = _like(_INT32, shape)
        word = builder.bitcast(value, wide)
        odd = builder.and_(builder.lshr(word, _constant(wide, 16)), _constant(wide, 1))
        rounded = builder.add(word, builder.add(odd, _constant(wide, 0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", value, value)
        rounded = builder.select(is_nan, _constant(wide, 0x7FC00000), rounded)
        bits = builder.trunc(builder.lshr(rounded, _constant(wide, 16)), short)
    builder.store(bits, _pointer(builder, location, short), align=2)


def _bfloat16_bits(builder: ir.IRBuilder, floats: ir.Value) -> ir.Value:
    """Eight floats as bfloat16, by the machine's own instruction, in eight int16."""
    name = "llvm.x86.avx512bf16.cvtneps2bf16.256"
    rounded = _call(builder, name, ir.VectorType(_Bfloat16Type(), LANES), [floats])
    return builder.bitcast(rounded, _like(_INT16, _FLOATS))


def _splat(builder: ir.IRBuilder, scalar: ir.Value, count: int = LANES) -> ir.Value:
    first = builder.insert_element(
        ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined), scalar, _INT32(0)
    )
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_INT32, count), [0] * count))


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
def load_int64(context: Any, location: Any) -> Any:
    """Load an int64."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return builder.load(_pointer(builder, args[0], ir.IntType(64)), align=8)

    return types.int64(types.int64), generate


@intrinsic
def store_int32(context: Any, location: Any, value: Any) -> Any:
    """Store the low half of an int64."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        builder.store(builder.trunc(args[1], _INT32), _pointer(builder, args[0], _INT32), align=4)

    return types.void(types.int64, types.int64), generate


@intrinsic
def load_int32s(context: Any, location: Any) -> Any:
    """Load eight int32 as float32x8."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return builder.sitofp(builder.load(_pointer(builder, args[0], _INT32S), align=4), _FLOATS)

    return float32x8(types.int64), generate


@intrinsic
def _float_pointer(context: Any, location: Any) -> Any:
    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return _pointer(builder, args[0], _FLOAT)

    return types.CPointer(types.float32)(types.int64), generate


@inlined
def floats(location: int, count: int) -> Any:
    """The `count` float32 at an address as an array."""
    return numba.carray(_float_pointer(location), count)


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
def absolute(context: Any, a: Any) -> Any:
    """Lane by lane |a|."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return _call(builder, "llvm.fabs.v8f32", _FLOATS, args)

    return float32x8(float32x8), generate


@intrinsic
def store_int16(context: Any, location: Any, value: Any) -> Any:
    """Store float32x8 as eight int16, rounded to nearest even; any int16 for what is NaN or too large."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        rounded = builder.fadd(args[1], _constant(_FLOATS, _ROUNDER))
        short = _like(_INT16, _FLOATS)
        bits = builder.trunc(builder.bitcast(rounded, _INT32S), short)
        builder.store(bits, _pointer(builder, args[0], short), align=2)

    return types.void(types.int64, float32x8), generate


@intrinsic
def largest_of_block(context: Any, location: Any) -> Any:
    """The largest absolute value of `QUAD_BLOCK` floats; infinity or NaN if one of them is that."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        words = ir.VectorType(_INT32, QUAD_BLOCK)
        bits = builder.load(_pointer(builder, args[0], words), align=4)
        # Without the sign bit floats are ordered as integers, and NaN lies above infinity.
        absolutes = builder.and_(bits, _constant(words, 2**31 - 1))
        largest = _call(builder, f"llvm.vector.reduce.smax.v{QUAD_BLOCK}i32", _INT32, [absolutes])
        return builder.bitcast(largest, _FLOAT)

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
        floats, words = (ir.VectorType(item, QUAD_BLOCK) for item in (_FLOAT, _INT32))
        values = builder.load(_pointer(builder, location, floats), align=4)
        scaled = builder.fmul(values, _splat(builder, factor, QUAD_BLOCK))
        shifted = builder.bitcast(builder.fadd(scaled, _constant(floats, _ROUNDER)), words)
        bytes_ = builder.trunc(shifted, ir.VectorType(_INT8, QUAD_BLOCK))
        builder.store(bytes_, _pointer(builder, target, bytes_.type), align=1)
        total = _call(builder, f"llvm.vector.reduce.add.v{QUAD_BLOCK}i32", _INT32, [shifted])
        return builder.sext(builder.sub(total, _INT32(QUAD_BLOCK * _ROUNDER_BITS)), ir.IntType(64))

    return types.int64(types.int64, types.float32, types.int64), generate


@intrinsic
def keep_first(context: Any, a: Any, count: Any, b: Any) -> Any:
    """The first `count` lanes of a, the others of b."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        counts = _splat(builder, builder.trunc(args[1], _INT32))
        kept = builder.icmp_signed("<", ir.Constant(_INT32S, list(range(LANES))), counts)
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
# The same on [0, 1] (7.5e-5, a fiftieth of what bfloat16 rounds off).
_COARSE_EXP2 = (0.9999252183, 0.6958335393, 0.2260671587, 0.0780245207)
_FLOOR = 1  # x86's number of that way of rounding
_ROUNDER = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits of the mantissa
_ROUNDER_BITS = int(np.float32(_ROUNDER).view(np.int32))


@intrinsic
def exp2(context: Any, kind: Any, a: Any) -> Any:
    """Lane by lane 2^a for a <= 127, as exact as values of the kind are; below -126 next to nothing."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        coarse = MULTIPLIES_BFLOAT16 and signature.args[0].dtype == types.int16
        return (_coarse_exp2 if coarse else _exp2)(builder, args[1])

    return float32x8(kind, float32x8), generate


def _exp2(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    lowest = _constant(_FLOATS, -126.0)
    x = builder.select(builder.fcmp_ordered(">", a, lowest), a, lowest)
    shifted = builder.fadd(x, _constant(_FLOATS, _ROUNDER))
    fraction = builder.fsub(x, builder.fsub(shifted, _constant(_FLOATS, _ROUNDER)))
    power = builder.bitcast(_polynomial(builder, _EXP2, fraction), _INT32S)
    exponent = builder.shl(builder.bitcast(shifted, _INT32S), _constant(_INT32S, 23))
    return builder.bitcast(builder.add(power, exponent), _FLOATS)


def _coarse_exp2(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """By AVX-512, which every machine that multiplies bfloat16 has: x - floor(x), and p 2^floor(x)."""
    every, name = _INT8(-1), "llvm.x86.avx512.mask.{}.ps.256"
    fraction = _call(builder, name.format("reduce"), _FLOATS, [a, _INT32(_FLOOR), a, every])
    power = _polynomial(builder, _COARSE_EXP2, fraction)
    return _call(builder, name.format("scalef"), _FLOATS, [power, a, power, every])


def _polynomial(builder: ir.IRBuilder, coefficients: tuple[float, ...], x: ir.Value) -> ir.Value:
    value = _constant(_FLOATS, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = _fma(builder, value, x, _constant(_FLOATS, coefficient))
    return value


def _item_size(kind: Any) -> int:
    return int(kind.dtype.bitwidth) // 8


def _offset(builder: ir.IRBuilder, base: ir.Value, *terms: int | ir.Value) -> ir.Value:
    """`base` plus a product of bytes, int64."""
    product: Any = ir.IntType(64)(1)
    for term in terms:
        product = builder.mul(product, ir.IntType(64)(term) if isinstance(term, int) else term)
    return builder.add(base, product)


def _prefetch(builder: ir.IRBuilder, location: ir.Value, cache: int = _L1) -> None:
    """Fetch a cache line for reading; no address is wrong."""
    place = _pointer(builder, location, _INT8)
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, _INT32(0), _INT32(cache), _INT32(1)])


def _accumulators(builder: ir.IRBuilder, count: int) -> list[ir.Value]:
    """Stack slots that LLVM turns into registers."""
    return [cgutils.alloca_once(builder, _FLOATS) for _ in range(count)]


def _call_own(
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


@intrinsic
def prefetch(context: Any, location: Any) -> Any:
    """Fetch the cache line of an address into the L2 cache; no address is wrong."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        _prefetch(builder, args[0], _L2)

    return types.void(types.int64), generate


@intrinsic
def dot_rows(
    context: Any, kind: Any, rows: Any,
    q: Any, dim: Any, k: Any, keys: Any, out: Any, out_stride: Any, ahead: Any,
) -> Any:  # fmt: skip
    """Products of `rows` query vectors and consecutive keys, four keys at a time.

    Args:
        context: Numba's.
        kind: Of the keys.
        rows: Literal, 1 to 3.
        q: Address of float32 [rows, dim].
        dim: Multiple of 8.
        k: Address of [keys, dim] of `kind`.
        keys: Taken up to a multiple of four: so many are read, and written to `out`.
        out: Address of float32 [rows, keys], written.
        out_stride: Floats from one row of `out` to the next.
        ahead: Bytes from `k` to the keys that will be read next, to be prefetched: into the L2 cache, since
            a page of keys and the next one together push each other out of L1.
    """
    count, block = rows.literal_value, 4

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        kind = signature.args[0]
        name = f"dot_rows_{count}_{kind.dtype}"
        _call_own(builder, name, args[2:], lambda inner, own: body(inner, kind, *own))

    def body(builder: ir.IRBuilder, kind: Any, *args: ir.Value) -> None:
        q, dim, k, keys, out, out_stride, ahead = args
        size = _item_size(kind)
        sums = _accumulators(builder, count * block)
        with cgutils.for_range_slice(builder, keys.type(0), keys, keys.type(block)) as (key, _first):
            for slot in sums:
                builder.store(_constant(_FLOATS, 0.0), slot)
            starts = [_offset(builder, k, builder.add(key, key.type(t)), dim, size) for t in range(block)]
            with cgutils.for_range_slice(builder, dim.type(0), dim, dim.type(LANES)) as (d, _second):
                places = [_offset(builder, _offset(builder, q, dim, 4 * m), d, 4) for m in range(count)]
                queries = [builder.load(_pointer(builder, place, _FLOATS), align=4) for place in places]
                for t in range(block):
                    loaded = _widen(builder, kind, _offset(builder, starts[t], d, size), _FLOATS)
                    for m in range(count):
                        slot = sums[m * block + t]
                        builder.store(_fma(builder, queries[m], loaded, builder.load(slot)), slot)
            block_bytes = builder.mul(dim, dim.type(block * size))
            next_block = builder.add(starts[0], ahead)
            with cgutils.for_range_slice(builder, dim.type(0), block_bytes, dim.type(LINE)) as (
                line,
                _third,
            ):
                _prefetch(builder, builder.add(next_block, line), _L2)
            for m in range(count):
                four = _sum_four(builder, [builder.load(slot) for slot in sums[m * block : (m + 1) * block]])
                place = _offset(builder, _offset(builder, out, out_stride, 4 * m), key, 4)
                builder.store(four, _pointer(builder, place, four.type), align=4)

    return types.void(kind, rows, *[types.int64] * 7), generate


def _sum_four(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """The lane sums of four vectors of eight floats or int32, a vector of four."""
    even, odd = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
    add = builder.fadd if vectors[0].type == _FLOATS else builder.add

    def pairs(a: ir.Value, b: ir.Value) -> ir.Value:
        return add(_shuffle(builder, a, b, even), _shuffle(builder, a, b, odd))

    quads = pairs(pairs(vectors[0], vectors[1]), pairs(vectors[2], vectors[3]))
    return add(_shuffle(builder, quads, quads, [0, 1, 2, 3]), _shuffle(builder, quads, quads, [4, 5, 6, 7]))


@intrinsic
def dot_rows_int8(
    context: Any, rows: Any, q: Any, dim: Any, k: Any, keys: Any, out: Any, out_stride: Any, ahead: Any
) -> Any:
    """`dot_rows` for int16 queries and int8 keys: the products as they are, without any scale.

    Args:
        context: Numba's.
        rows: Literal, 1 to 3.
        q: Address of int16 [rows, dim].
        dim: Multiple of 16, at most 512, so that no sum exceeds an int32.
        k: Address of int8 [keys, dim].
        keys: As in `dot_rows`.
        out: Address of float32 [rows, keys], written.
        out_stride: Floats from one row of `out` to the next.
        ahead: As in `dot_rows`.
    """
    count, block = rows.literal_value, 4

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        _call_own(builder, f"dot_rows_int8_{count}", args[1:], lambda inner, own: body(inner, *own))

    def body(builder: ir.IRBuilder, *args: ir.Value) -> None:
        q, dim, k, keys, out, out_stride, ahead = args
        sums = [cgutils.alloca_once(builder, _INT32S) for _ in range(count * block)]
        with cgutils.for_range_slice(builder, keys.type(0), keys, keys.type(block)) as (key, _first):
            for slot in sums:
                builder.store(_constant(_INT32S, 0), slot)
            starts = [_offset(builder, k, builder.add(key, key.type(t)), dim) for t in range(block)]
            with cgutils.for_range_slice(builder, dim.type(0), dim, dim.type(2 * LANES)) as (d, _second):
                places = [_offset(builder, _offset(builder, q, dim, 2 * m), d, 2) for m in range(count)]
                queries = [builder.load(_pointer(builder, place, _INT16S), align=2) for place in places]
                for t in range(block):
                    loaded = _int16s(builder, builder.add(starts[t], d))
                    for m in range(count):
                        slot = sums[m * block + t]
                        products = _pair_products(builder, queries[m], loaded)
                        builder.store(builder.add(builder.load(slot), products), slot)
            next_block, block_bytes = builder.add(starts[0], ahead), builder.mul(dim, dim.type(block))
            with cgutils.for_range_slice(builder, dim.type(0), block_bytes, dim.type(LINE)) as (
                line,
                _third,
            ):
                _prefetch(builder, builder.add(next_block, line), _L2)
            for m in range(count):
                four = _sum_four(builder, [builder.load(slot) for slot in sums[m * block : (m + 1) * block]])
                value = builder.sitofp(four, ir.VectorType(_FLOAT, block))
                place = _offset(builder, _offset(builder, out, out_stride, 4 * m), key, 4)
                builder.store(value, _pointer(builder, place, value.type), align=4)

    return types.void(rows, *[types.int64] * 7), generate


@intrinsic
def weigh_rows_int8(
    context: Any, rows: Any, vectors: Any,
    weights: Any, weights_stride: Any, v: Any, dim: Any, values: Any, out: Any, out_stride: Any, ahead: Any,
) -> Any:  # fmt: skip
    """`weigh_rows` for int16 weights and int8 values, two values at a time; sums are int32.

    Args:
        context: Numba's.
        rows: Literal, rows of weights and of `out`.
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
    height, width = rows.literal_value, vectors.literal_value

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        name = f"weigh_rows_int8_{height}_{width}"
        _call_own(builder, name, args[2:], lambda inner, own: body(inner, *own))

    def body(builder: ir.IRBuilder, *args: ir.Value) -> None:
        weights, weights_stride, v, dim, values, out, out_stride, ahead = args
        tile = [cgutils.alloca_once(builder, _INT32S) for _ in range(height * width)]
        targets = [
            _pointer(
                builder, _offset(builder, _offset(builder, out, out_stride, 4 * m), 4 * LANES * n), _INT32S
            )
            for m in range(height)
            for n in range(width)
        ]
        for slot, target in zip(tile, targets, strict=True):
            builder.store(builder.load(target, align=4), slot)
        starts = [_offset(builder, weights, weights_stride, 2 * m) for m in range(height)]
        with cgutils.for_range_slice(builder, values.type(0), values, values.type(2)) as (index, _count):
            first = _offset(builder, v, index, dim)
            second = builder.add(first, dim)
            for row in (first, second):
                for line in range(0, LANES * width, LINE):
                    _prefetch(builder, builder.add(builder.add(row, ahead), row.type(line)), _L2)
            places = [_pointer(builder, _offset(builder, start, index, 2), _INT32) for start in starts]
            pairs = [
                builder.bitcast(_splat(builder, builder.load(place, align=2)), _INT16S) for place in places
            ]
            for n in range(0, width, 2):
                of_both = [
                    builder.load(_pointer(builder, builder.add(row, row.type(LANES * n)), _BYTES), align=1)
                    for row in (first, second)
                ]
                for half in range(2):
                    mixed = [i + of for i in range(LANES * half, LANES * (half + 1)) for of in (0, 2 * LANES)]
                    numbers = builder.sext(_shuffle(builder, of_both[0], of_both[1], mixed), _INT16S)
                    for m in range(height):
                        slot = tile[m * width + n + half]
                        products = _pair_products(builder, pairs[m], numbers)
                        builder.store(builder.add(builder.load(slot), products), slot)
        for slot, target in zip(tile, targets, strict=True):
            builder.store(builder.load(slot), target, align=4)

    return types.void(rows, vectors, *[types.int64] * 8), generate


@intrinsic
def weigh_rows(
    context: Any, kind: Any, rows: Any, vectors: Any,
    weights: Any, weights_stride: Any, v: Any, dim: Any, values: Any, out: Any, out_stride: Any, ahead: Any,
) -> Any:  # fmt: skip
    """Add weighted sums of consecutive values to `out`, for `rows` rows of weights at once.

    Args:
        context: Numba's.
        kind: Of the values.
        rows: Literal, rows of weights and of `out`.
        vectors: Literal, columns in eights.
        weights: Address of float32 [rows, values].
        weights_stride: Floats from one row of weights to the next.
        v: Address of [values, 8 * vectors] of `kind`.
        dim: Numbers from one row of `v` to the next.
        values: How many.
        out: Address of float32 [rows, 8 * vectors].
        out_stride: Floats from one row of `out` to the next.
        ahead: Bytes from `v` to the values that will be read next, to be prefetched into the L2 cache.
    """
    height, width = rows.literal_value, vectors.literal_value

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        kind = signature.args[0]

        def body(inner: ir.IRBuilder, own: Args) -> None:
            _float_tile(inner, kind, height, width, False, *own, cache=_L2)

        _call_own(builder, f"weigh_rows_{height}_{width}_{kind.dtype}", args[3:], body)

    return types.void(kind, rows, vectors, *[types.int64] * 8), generate


def _float_tile(
    builder: ir.IRBuilder,
    kind: Any,
    height: int,
    width: int,
    replace: bool,
    *args: ir.Value,
    cache: int = _L1,
) -> None:
    """The float32 body of `panel_tile` and `strip_tile`, and that of `weigh_rows`."""
    a, a_stride, b, b_stride, inner, c, c_stride, ahead = args
    size = _item_size(kind)
    tile = _accumulators(builder, height * width)
    starts = [_offset(builder, a, a_stride, 4 * m) for m in range(height)]
    rows_of_c = [_offset(builder, c, c_stride, 4 * m) for m in range(height)]
    targets = [
        _pointer(builder, _offset(builder, row, 4 * LANES * n), _FLOATS)
        for row in rows_of_c
        for n in range(width)
    ]
    for slot, target in zip(tile, targets, strict=True):
        builder.store(_constant(_FLOATS, 0.0) if replace else builder.load(target, align=4), slot)
    with cgutils.for_range(builder, inner) as loop:
        row = _offset(builder, b, loop.index, b_stride, size)

        for line in range(0, LANES * size * width, LINE):
            _prefetch(builder, _offset(builder, builder.add(row, ahead), line), cache)

        def factor(m: int) -> ir.Value:
            place = _offset(builder, starts[m], loop.index, 4)
            return _splat(builder, builder.load(_pointer(builder, place, _FLOAT), align=4))

        def column(n: int) -> ir.Value:
            return _widen(builder, kind, _offset(builder, row, LANES * size * n), _FLOATS)

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
            builder.store(_fma(builder, left, right, builder.load(slot)), slot)
    for slot, target in zip(tile, targets, strict=True):
        builder.store(builder.load(slot), target, align=4)


@intrinsic
def panel_tile(
    context: Any, kind: Any, rows: Any, fresh: Any, a: Any, a_stride: Any, a_scales: Any,
    b: Any, b_scales: Any, inner: Any, c: Any, c_stride: Any, ahead: Any,
) -> Any:  # fmt: skip
    """C += A B (or C = A B) on a tile held in registers, B being a panel of 16 columns.

    Args:
        context: Numba's.
        kind: Of B, float32 or int8; with int8, A is int16 and both have scales.
        rows: Literal, rows of A and C.
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
    height, replace = rows.literal_value, bool(fresh.literal_value)

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        kind = signature.args[0]
        name = f"panel_tile_{height}_{int(replace)}_{kind.dtype}"
        if kind.dtype == types.int8:
            _call_own(builder, name, args[3:], lambda own, args: _int8_tile(own, height, replace, *args))
            return
        a, a_stride, _a_scales, b, _b_scales, *others = args[3:]
        if kind.dtype == types.int16:
            arguments = [a, a_stride, b, *others]
            _call_own(builder, name, arguments, lambda own, args: _bfloat16_tile(own, height, replace, *args))
            return
        arguments = [a, a_stride, b, b.type(PANEL), *others]
        _call_own(
            builder, name, arguments, lambda own, args: _float_tile(own, kind, height, 2, replace, *args)
        )

    return types.void(kind, rows, fresh, *[types.int64] * 9), generate


def _int8_tile(builder: ir.IRBuilder, height: int, replace: bool, *args: ir.Value) -> None:
    """The int8 body of `panel_tile`: neighbours of the inner dimension are multiplied and summed in pairs."""
    a, a_stride, a_scales, b, b_scales, inner, c, c_stride, ahead = args
    tile = [cgutils.alloca_once(builder, _INT32S) for _ in range(2 * height)]
    for slot in tile:
        builder.store(_constant(_INT32S, 0), slot)
    starts = [_offset(builder, a, a_stride, 2 * m) for m in range(height)]
    with cgutils.for_range_slice(builder, inner.type(0), inner, inner.type(4)) as (index, _count):
        for pair in range(2):
            at = builder.add(index, index.type(2 * pair))
            row = _offset(builder, b, at, PANEL)
            columns = [_int16s(builder, builder.add(row, row.type(2 * LANES * n))) for n in range(2)]
            for m in range(height):
                word = builder.load(_pointer(builder, _offset(builder, starts[m], at, 2), _INT32), align=4)
                factor = builder.bitcast(_splat(builder, word), _INT16S)
                for n, slot in enumerate(tile[2 * m : 2 * m + 2]):
                    products = _pair_products(builder, factor, columns[n])
                    builder.store(builder.add(builder.load(slot), products), slot)
        _prefetch(builder, builder.add(_offset(builder, b, index, PANEL), ahead))

    def floats(base: ir.Value, n: int) -> ir.Value:
        return _pointer(builder, builder.add(base, base.type(4 * LANES * n)), _FLOATS)

    for m in range(height):
        place = _pointer(builder, builder.add(a_scales, a_scales.type(4 * m)), _FLOAT)
        a_scale = _splat(builder, builder.load(place, align=4))
        for n in range(2):
            scale = builder.fmul(a_scale, builder.load(floats(b_scales, n), align=4))
            total = builder.sitofp(builder.load(tile[2 * m + n]), _FLOATS)
            target = floats(_offset(builder, c, c_stride, 4 * m), n)
            if replace:
                builder.store(builder.fmul(total, scale), target, align=4)
            else:
                builder.store(_fma(builder, total, scale, builder.load(target, align=4)), target, align=4)


def _int16s(builder: ir.IRBuilder, location: ir.Value) -> ir.Value:
    """Load sixteen int8 as int16."""
    return builder.sext(builder.load(_pointer(builder, location, _BYTES), align=1), _INT16S)


def _pair_products(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1] as eight int32.

    Widened before they are shuffled, so that LLVM makes one instruction of it where there is one (x86's
    pmaddwd).
    """
    products = builder.mul(*(builder.sext(x, _like(_INT32, _INT16S)) for x in (a, b)))
    lanes = [list(range(first, 2 * LANES, 2)) for first in (0, 1)]
    return builder.add(*(_shuffle(builder, products, products, of_pair) for of_pair in lanes))


STRIP, BFLOAT16_STRIP = 6, 12
"""Rows of a `strip_tile`; machines that multiply bfloat16 have 32 registers of 16 floats."""


@intrinsic
def strip_rows(context: Any, kind: Any) -> Any:
    """Rows of a `strip_tile` of a kind."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return ir.IntType(64)(BFLOAT16_STRIP if signature.args[0].dtype == types.int16 else STRIP)

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
            _call_own(builder, name, args[2:], lambda own, args: _bfloat16_tile(own, replace, *args))
            return
        _call_own(
            builder, name, [a, a_stride, b, b.type(PANEL), *others],
            lambda own, args: _float_tile(own, kind, STRIP, 2, replace, *args),
        )  # fmt: skip

    return types.void(kind, fresh, *[types.int64] * 7), generate


def _bfloat16_tile(builder: ir.IRBuilder, replace: bool, *args: ir.Value) -> None:
    """The bfloat16 body of `strip_tile`: neighbours of the inner dimension are multiplied in pairs."""
    a, a_stride, b, inner, c, c_stride, ahead = args
    floats, pairs = ir.VectorType(_FLOAT, PANEL), ir.VectorType(_Bfloat16Type(), 2 * PANEL)
    tile = [cgutils.alloca_once(builder, floats) for _ in range(BFLOAT16_STRIP)]
    starts = [_offset(builder, a, a_stride, 2 * m) for m in range(BFLOAT16_STRIP)]
    targets = [_pointer(builder, _offset(builder, c, c_stride, 4 * m), floats) for m in range(BFLOAT16_STRIP)]
    for slot, target in zip(tile, targets, strict=True):
        builder.store(_constant(floats, 0.0) if replace else builder.load(target, align=4), slot)
    with cgutils.for_range(builder, builder.lshr(inner, inner.type(1))) as loop:
        row = _offset(builder, b, loop.index, 4 * PANEL)
        _prefetch(builder, builder.add(row, ahead))
        columns = builder.load(_pointer(builder, row, pairs), align=2)
        for m, slot in enumerate(tile):
            place = _pointer(builder, _offset(builder, starts[m], loop.index, 4), _INT32)
            factor = builder.bitcast(_splat(builder, builder.load(place, align=2), PANEL), pairs)
            operands = [builder.load(slot), columns, factor]
            builder.store(_call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", floats, operands), slot)
    for slot, target in zip(tile, targets, strict=True):
        builder.store(builder.load(slot), target, align=4)


QUAD_BLOCK = 32
"""Values of a row of A in `quad_tile` that have a scale in common, and of a column of nibbles."""
NIBBLE_BLOCK_BYTES = 16 * QUAD_BLOCK // 2 + 2 * 2 * 16
"""Of a block of a panel of nibbles: 16 columns of 32, a step and a lowest value in float16 for each."""


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
        rows: Literal, rows of A and C.
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
    form, height = weights.literal_value, rows.literal_value

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        name = f"quad_tile_{form}_{height}"
        _call_own(builder, name, args[2:], lambda own, args: _quad_tile(own, form, height, *args))

    return types.void(weights, rows, *[types.int64] * 11), generate


def _quad_tile(builder: ir.IRBuilder, form: int, height: int, *args: ir.Value) -> None:
    """The body of `quad_tile`: integers within a block of A, floats over the blocks."""
    a, a_stride, a_scales, a_sums, scale_stride, b, b_scales, inner, c, c_stride, ahead = args
    lanes = LANES if form in (NIBBLES_BY_AVX2, NIBBLES_BY_ANY) else _QUAD_LANES
    width = PANEL // lanes
    float32s = ir.VectorType(_FLOAT, lanes)
    totals = [cgutils.alloca_once(builder, float32s) for _ in range(width * height)]
    for slot in totals:
        builder.store(_constant(float32s, 0.0), slot)
    starts = [_offset(builder, a, a_stride, m) for m in range(height)]
    blocks = builder.udiv(inner, inner.type(QUAD_BLOCK))
    with cgutils.for_range(builder, blocks) as loop:
        scale_row = builder.mul(loop.index, scale_stride)
        at = builder.mul(loop.index, inner.type(QUAD_BLOCK))

        def of_row(base: ir.Value, m: int, item: ir.Type) -> ir.Value:
            place = _offset(builder, _offset(builder, base, scale_row, 4), 4 * m)
            return _splat(builder, builder.load(_pointer(builder, place, item), align=4), lanes)

        def quad(m: int, index: int) -> ir.Value:
            place = _offset(builder, builder.add(starts[m], at), 4 * index)
            return _splat(builder, builder.load(_pointer(builder, place, _INT32), align=1), lanes)

        def of_panel(offset: int, item: ir.Type, size: int) -> list[ir.Value]:
            places = [_offset(builder, block, offset + size * lanes * n) for n in range(width)]
            shape = ir.VectorType(item, lanes)
            return [builder.load(_pointer(builder, place, shape), align=1) for place in places]

        if form == BYTES:
            block = _offset(builder, b, at, PANEL)
            sums = [offset for m in range(height) for offset in [of_row(a_sums, m, _INT32)] * width]
            for index in range(QUAD_BLOCK // 4):
                columns = of_panel(4 * PANEL * index, _INT32, 4)
                _prefetch(builder, _offset(builder, builder.add(block, ahead), 4 * PANEL * index))
                for m in range(height):
                    factor = quad(m, index)
                    for n, at_n in enumerate(range(width * m, width * m + width)):
                        sums[at_n] = _quad_products(builder, sums[at_n], columns[n], factor)
        else:
            block = _offset(builder, b, loop.index, NIBBLE_BLOCK_BYTES)
            sums = _nibble_sums(builder, form, height, lanes, of_panel, quad)
            for line in range(0, NIBBLE_BLOCK_BYTES, LINE):
                _prefetch(builder, _offset(builder, builder.add(block, ahead), line))
            sides = QUAD_BLOCK // 2 * PANEL
            steps, lows = (
                [builder.fpext(part, float32s) for part in of_panel(place, ir.HalfType(), 2)]
                for place in (sides, sides + 2 * PANEL)
            )
        for m in range(height):
            scale = of_row(a_scales, m, _FLOAT)
            for n, slot in enumerate(totals[width * m : width * m + width]):
                floats, total = builder.sitofp(sums[width * m + n], float32s), builder.load(slot)
                if form == BYTES:
                    total = _fma(builder, floats, scale, total)
                else:
                    total = _fma(builder, floats, builder.fmul(scale, steps[n]), total)
                    total = _fma(builder, of_row(a_sums, m, _FLOAT), lows[n], total)
                builder.store(total, slot)
    for m in range(height):
        for n in range(width):
            place = _pointer(builder, _offset(builder, b_scales, 4 * lanes * n), float32s)
            target = _offset(builder, _offset(builder, c, c_stride, 4 * m), 4 * lanes * n)
            product = builder.load(totals[width * m + n])
            if form == BYTES:
                product = builder.fmul(product, builder.load(place, align=4))
            builder.store(product, _pointer(builder, target, float32s), align=4)


def _quad_products(builder: ir.IRBuilder, sums: ir.Value, b: ir.Value, a: ir.Value) -> ir.Value:
    """`sums`, int32, plus products in fours of bytes b without sign and a with sign."""
    name = f"llvm.x86.avx512.vpdpbusd.{32 * sums.type.count}"
    return _call(builder, name, sums.type, [sums, b, a])


def _nibble_sums(
    builder: ir.IRBuilder,
    form: int,
    height: int,
    lanes: int,
    of_panel: Callable[[int, ir.Type, int], list[ir.Value]],
    quad: Callable[[int, int], ir.Value],
) -> list[ir.Value]:
    """The products of a block of nibbles and of A, summed up as int32: [rows, 16 / lanes], `lanes` each."""
    width, bytes_, int32s = PANEL // lanes, ir.VectorType(_INT8, 4 * lanes), ir.VectorType(_INT32, lanes)
    wide = form == NIBBLES_BY_AVX2
    sums = [_constant(_INT16S if wide else int32s, 0)] * (width * height)
    for pair in range(QUAD_BLOCK // 8):
        columns = [builder.bitcast(part, bytes_) for part in of_panel(4 * PANEL * pair, _INT32, 4)]
        low = [builder.and_(part, _constant(bytes_, 15)) for part in columns]
        high = [builder.lshr(part, _constant(bytes_, 4)) for part in columns]
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
                        products = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", _INT16S, operands)
                        sums[at] = builder.add(total, products)
                    else:
                        sums[at] = builder.add(total, _plain_quads(builder, nibbles[n], factor))
    if not wide:
        return sums
    return [_pair_products(builder, part, _constant(_INT16S, 1)) for part in sums]


def _plain_quads(builder: ir.IRBuilder, b: ir.Value, a: ir.Value) -> ir.Value:
    """Products in fours of bytes b without sign and a with sign, eight int32, on any machine."""
    shorts = ir.VectorType(_INT16, 4 * LANES)
    products = builder.mul(builder.zext(b, shorts), builder.sext(builder.bitcast(a, b.type), shorts))
    parts = [
        builder.sext(_shuffle(builder, products, products, list(range(i, 4 * LANES, 4))), _INT32S)
        for i in range(4)
    ]
    return builder.add(builder.add(parts[0], parts[1]), builder.add(parts[2], parts[3]))


@intrinsic
def store_panel_rows(context: Any, kind: Any, location: Any, first: Any, second: Any) -> Any:
    """Store eight columns of two rows of a B of `strip_tile`, float32x8 each, at the first one's address."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        kind, place, *rows = signature.args[0], *args[1:]
        if kind.dtype == types.int16:
            bits = [_bfloat16_bits(builder, row) for row in rows]
            pairs = [i + of for i in range(LANES) for of in (0, LANES)]
            builder.store(
                _shuffle(builder, bits[0], bits[1], pairs), _pointer(builder, place, _INT16S), align=2
            )
            return
        for i, row in enumerate(rows):
            builder.store(row, _pointer(builder, _offset(builder, place, 4 * PANEL * i), _FLOATS), align=4)

    return types.void(kind, types.int64, float32x8, float32x8), generate


def _transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """The columns of an 8 x 8 block: three rounds of exchanges, of single lanes, pairs and halves."""
    for low, high, step in (
        ([0, 8, 2, 10, 4, 12, 6, 14], [1, 9, 3, 11, 5, 13, 7, 15], 1),
        ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15], 2),
        ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15], 4),
    ):
        for i in (i for i in range(LANES) if not i & step):
            a, b = rows[i], rows[i + step]
            rows[i], rows[i + step] = _shuffle(builder, a, b, low), _shuffle(builder, a, b, high)
    return rows


@intrinsic
def store_panel_columns(
    context: Any, kind: Any, location: Any, source_kind: Any, source: Any, source_stride: Any, scales: Any
) -> Any:
    """Store eight columns of 8 rows (bfloat16: 16) of a B of `strip_tile`, whose transpose is read.

    Args:
        context: Numba's.
        kind: Of B, float32 or bfloat16.
        location: Address in the panel.
        source_kind: Of the source.
        source: Address of [8, 8] of `source_kind`; bfloat16: [8, 16].
        source_stride: Values from one row of the source to the next.
        scales: Address of float32 [8], what the rows of an int8 source are multiplied with.
    """

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        pairs, kind = signature.args[0].dtype == types.int16, signature.args[2]
        _kind, location, _source_kind, source, source_stride, scales = args
        size = _item_size(kind)

        def eight(row: int, first: int) -> ir.Value:
            start = _offset(builder, _offset(builder, source, source_stride, size * row), size * first)
            values = _widen(builder, kind, start, _FLOATS)
            if kind.dtype != types.int8:
                return values
            scale = builder.load(_pointer(builder, _offset(builder, scales, 4 * row), _FLOAT), align=4)
            return builder.fmul(values, _splat(builder, scale))

        def sixteen(row: int) -> ir.Value:
            bits = [_bfloat16_bits(builder, eight(row, first)) for first in (0, LANES)]
            return builder.bitcast(_shuffle(builder, bits[0], bits[1], list(range(2 * LANES))), _FLOATS)

        rows = [sixteen(row) if pairs else eight(row, 0) for row in range(LANES)]
        for i, column in enumerate(_transposed(builder, rows)):
            place = _offset(builder, location, 4 * PANEL * i)
            builder.store(column, _pointer(builder, place, _FLOATS), align=4)

    return types.void(kind, types.int64, source_kind, *[types.int64] * 3), generate


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
def row_exp2(kind: Any, scores: int, count: int, width: int, factor: float, highest: float) -> Any:
    """Replace `count` floats x by 2^(factor (x - highest)), and those up to `width`, a multiple of 8, by 0.

    They are written as `kind`, from the same address on.

    Returns:
        The sum of the powers.
    """
    spread = broadcast(np.float32(factor))
    shift = broadcast(np.float32(-factor * highest))
    zeros = broadcast(np.float32(0.0))
    total = zeros
    body = count - count % 8
    for j in range(0, body, 8):
        power = exp2(kind, fma(load(FLOAT32, scores + 4 * j), spread, shift))
        store(kind, scores + kind.itemsize * j, power)
        total = add(total, power)
    if body < count:
        power = exp2(kind, fma(load(FLOAT32, scores + 4 * body), spread, shift))
        power = keep_first(power, count - body, zeros)
        store(kind, scores + kind.itemsize * body, power)
        total = add(total, power)
        body += 8
    for j in range(body, width, 8):
        store(kind, scores + kind.itemsize * j, zeros)
    return lane_sum(total)
