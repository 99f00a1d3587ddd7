"""Running compiled workers on all threads.

Numba compiles and optimises the body of a `prange` loop, and all that it calls, four times over. Here the one
parallel loop calls a function pointer instead: it is compiled once, and a kernel once per KV dtype.

A worker is a function of (address of its arguments, number of the worker). All workers of a launch get the
same arguments and take pieces of work from a shared counter (`simd.fetch_add`), so that a thread that the
machine runs slower does less.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types

from curkv.kernels.simd import Args, intrinsic

_INT64 = ir.IntType(64)


@intrinsic
def _call_worker(context: Any, function: Any, arguments: Any, worker: Any) -> Any:
    """Call the function at an address."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        function_type = ir.FunctionType(ir.VoidType(), [_INT64, _INT64])
        builder.call(builder.inttoptr(args[0], function_type.as_pointer()), args[1:])

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def read_arguments(context: Any, arguments: Any, count: Any) -> Any:
    """The `count` (a literal) int64 at an address, as a tuple."""
    length = count.literal_value

    def generate(codegen: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        start = builder.inttoptr(args[0], _INT64.as_pointer())
        values = [builder.load(builder.gep(start, [_INT64(i)])) for i in range(length)]
        return codegen.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.int64, length)(types.int64, count), generate


@intrinsic
def float_of_bits(context: Any, bits: Any) -> Any:
    """The float64 whose bits an int64 holds."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), generate


def bits_of_float(value: float) -> int:
    """The bits of a float64 as an int64, to pass it among a worker's arguments."""
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


def compile_worker(function: Callable[[int, int], None]) -> int:
    """Compile a worker, or load it from Numba's cache; returns its address."""
    compiled = numba.cfunc(types.void(types.int64, types.int64), cache=True, error_model="numpy")(function)
    address: int = compiled.address
    _keep.append(compiled)
    return address


_keep: list[Any] = []


@numba.njit(parallel=True, nogil=True, cache=True)
def launch_packed(function: int, arguments: int, workers: int) -> None:
    """`launch`, compiled, with the address of the arguments, int64."""
    for worker in prange(workers):
        _call_worker(function, arguments, np.int64(worker))


def launch(function: int, workers: int, *arguments: int) -> None:
    """Run `workers` workers, each on a thread of its own where there are as many, and wait for them."""
    packed = array("q", arguments)
    launch_packed(function, packed.buffer_info()[0], workers)
