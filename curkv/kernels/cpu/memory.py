"""Memory by its address: how kernels read and write it.

Kernels take addresses (`tensor.data_ptr()` as an integer) instead of arrays: a call with twenty integers
costs a microsecond, one with ten arrays twenty. Memory is read and written through a `kind`,
an empty array whose dtype tells which it is, so that one function body specialises per dtype:

| torch | kind (numpy) | widening in registers |
|---|---|---|
| float32 | float32 | none |
| float16 | uint16 | bit cast to half, extended |
| bfloat16 | int16 | shifted left by 16 bits |
| int8 | int8 | extended, converted |

An address does not keep its array alive: whoever takes the address of a tensor or an array keeps that one
in a variable that is used again after the last access.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types

from curkv.kernels.cpu.jit import inlined, intrinsic
from curkv.kernels.cpu.lanes import float32x8
from curkv.kernels.cpu.llvm import (
    F32,
    F32X8,
    I16,
    I32,
    I32X8,
    I64,
    L2,
    ROUNDER,
    Args,
    constant,
    like,
    load_strided,
    narrow,
    pointer,
    prefetch_line,
    widen,
)

KINDS: dict[torch.dtype, np.ndarray[Any, Any]] = {
    torch.float32: np.empty(0, np.float32),
    torch.float16: np.empty(0, np.uint16),
    torch.bfloat16: np.empty(0, np.int16),
    torch.int8: np.empty(0, np.int8),
}
"""The kind of a dtype."""
FLOAT32 = KINDS[torch.float32]
INT8 = KINDS[torch.int8]
BOOL, INT32, UINT32, INT64 = (np.empty(0, dtype) for dtype in (np.bool_, np.int32, np.uint32, np.int64))
"""Kinds that only `array` takes."""


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


@intrinsic
def load(context: Any, kind: Any, location: Any) -> Any:
    """Load eight values of `kind` as float32x8."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return widen(builder, signature.args[0], args[1], F32X8)

    return float32x8(kind, types.int64), generate


@intrinsic
def load_apart(context: Any, location: Any, stride: Any) -> Any:
    """Load eight float32 that lie `stride` bytes apart as float32x8."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        location, stride = args
        return load_strided(builder, location, stride, F32, size=4, align=4)

    return float32x8(types.int64, types.int64), generate


@intrinsic
def load_scalar(context: Any, kind: Any, location: Any) -> Any:
    """Load one value of `kind` as float32."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return widen(builder, signature.args[0], args[1], F32)

    return types.float32(kind, types.int64), generate


@intrinsic
def store(context: Any, kind: Any, location: Any, value: Any) -> Any:
    """Store float32x8 as eight values of `kind`, rounded to nearest even."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        narrow(builder, signature.args[0], args[1], args[2])

    return types.void(kind, types.int64, float32x8), generate


@intrinsic
def store_scalar(context: Any, kind: Any, location: Any, value: Any) -> Any:
    """Store a float32 as one value of `kind`, rounded to nearest even."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        narrow(builder, signature.args[0], args[1], args[2])

    return types.void(kind, types.int64, types.float32), generate


@intrinsic
def load_int32(context: Any, location: Any) -> Any:
    """Load an int32 as int64."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return builder.sext(builder.load(pointer(builder, args[0], I32), align=4), I64)

    return types.int64(types.int64), generate


@intrinsic
def load_int64(context: Any, location: Any) -> Any:
    """Load an int64."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return builder.load(pointer(builder, args[0], I64), align=8)

    return types.int64(types.int64), generate


@intrinsic
def store_int64(context: Any, location: Any, value: Any) -> Any:
    """Store an int64."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        builder.store(args[1], pointer(builder, args[0], I64), align=8)

    return types.void(types.int64, types.int64), generate


@intrinsic
def store_int32(context: Any, location: Any, value: Any) -> Any:
    """Store the low half of an int64."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        builder.store(builder.trunc(args[1], I32), pointer(builder, args[0], I32), align=4)

    return types.void(types.int64, types.int64), generate


@intrinsic
def load_int32s(context: Any, location: Any) -> Any:
    """Load eight int32 as float32x8."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return builder.sitofp(builder.load(pointer(builder, args[0], I32X8), align=4), F32X8)

    return float32x8(types.int64), generate


@intrinsic
def _pointer_to(context: Any, kind: Any, location: Any) -> Any:
    def generate(codegen: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return builder.inttoptr(args[1], codegen.get_value_type(signature.return_type))

    return types.CPointer(kind.dtype)(kind, types.int64), generate


@inlined
def array(kind: Any, location: int, shape: Any) -> Any:
    """What lies at an address as an array of a shape, of the dtype of an empty array `kind`."""
    return numba.carray(_pointer_to(kind, location), shape)


@inlined
def floats(location: int, count: int) -> Any:
    """The `count` float32 at an address as an array."""
    return array(FLOAT32, location, count)


@intrinsic
def fetch_add(context: Any, location: Any, value: Any) -> Any:
    """Add to an int64 that several threads share; returns what it was before. Orders memory accesses."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def store_int16(context: Any, location: Any, value: Any) -> Any:
    """Store float32x8 as eight int16, rounded to nearest even; any int16 for what is NaN or too large."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        rounded = builder.fadd(args[1], constant(F32X8, ROUNDER))
        short = like(I16, F32X8)
        bits = builder.trunc(builder.bitcast(rounded, I32X8), short)
        builder.store(bits, pointer(builder, args[0], short), align=2)

    return types.void(types.int64, float32x8), generate


@intrinsic
def prefetch(context: Any, location: Any) -> Any:
    """Fetch the cache line of an address into the L2 cache; no address is wrong."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        prefetch_line(builder, args[0], L2)

    return types.void(types.int64), generate
