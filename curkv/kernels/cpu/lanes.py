"""Eight float32 in a register, and arithmetic on them."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from curkv.kernels.cpu.jit import intrinsic
from curkv.kernels.cpu.llvm import F32, F32X8, I32, I32X8, LANES, Args, call, multiply_add, splat


class Float32x8(types.Type):
    """Numba type of eight float32 lanes, held in a register."""

    def __init__(self) -> None:
        super().__init__("float32x8")


float32x8 = Float32x8()


@register_model(Float32x8)
class _Float32x8Model(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, F32X8)


@intrinsic
def broadcast(context: Any, value: Any) -> Any:
    """A float32 in all lanes."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return splat(builder, args[0])

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
        return multiply_add(builder, *args)

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
        return call(builder, "llvm.fabs.v8f32", F32X8, args)

    return float32x8(float32x8), generate


@intrinsic
def keep_first(context: Any, a: Any, count: Any, b: Any) -> Any:
    """The first `count` lanes of a, the others of b."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        counts = splat(builder, builder.trunc(args[1], I32))
        kept = builder.icmp_signed("<", ir.Constant(I32X8, list(range(LANES))), counts)
        return builder.select(kept, args[0], args[2])

    return float32x8(float32x8, types.int64, float32x8), generate


@intrinsic
def lane_sum(context: Any, a: Any) -> Any:
    """The sum over the lanes, as float32."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        name = "llvm.vector.reduce.fadd.v8f32"
        return call(builder, name, F32, [F32(-0.0), args[0]], fastmath=("reassoc",))

    return types.float32(float32x8), generate


@intrinsic
def lane_max(context: Any, a: Any) -> Any:
    """The largest lane, as float32; lanes must not be NaN."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        name = "llvm.vector.reduce.fmax.v8f32"
        return call(builder, name, F32, [args[0]], fastmath=("nnan",))

    return types.float32(float32x8), generate
