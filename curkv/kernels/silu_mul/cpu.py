"""The gated activation of the MLP on CPU, with an exponential that vectorises."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from curkv.kernels.cpu.jit import kernel
from curkv.kernels.cpu.memory import address, floats
from curkv.kernels.cpu.workers import compile_worker, empty, launch, read_arguments

PART_SIZE = 1 << 12
"""Results that a thread takes; fewer are not worth a second thread."""


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `reference.silu_mul`; float32, contiguous."""
    return launch_gated(_worker(), gate_up)


def launch_gated(worker: int, gate_up: Tensor, *more: int) -> Tensor:
    """Has a worker make float32 [T, I] of gate beside up, [T, 2 I], in parts of some rows."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = empty(tokens, size)
    rows = max(1, PART_SIZE // max(size, 1))
    places = address(gate_up, torch.float32), out.data_ptr()
    launch(worker, -(-tokens // rows), tokens, rows, size, *places, *more)
    return out


@functools.cache
def _worker() -> int:
    def work(arguments: int, part: int) -> None:
        tokens, rows, size, gate_up, out = read_arguments(arguments, 5)
        for row in range(part * rows, min(tokens, (part + 1) * rows)):
            silu_mul_row(gate_up + 8 * row * size, out + 4 * row * size, size)

    return compile_worker(work)


def _type_power_of_two(typing_context: Any, exponent: Any) -> Any:
    """2^(exponent - 127) for an int32 exponent in 1..254, which becomes the exponent bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.shl(arguments[0], ir.Constant(ir.IntType(32), 23))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), generate


_power_of_two: Callable[..., Any] = intrinsic(_type_power_of_two)

# exp(z) = 2^n exp(r), n = round(z / ln 2), |r| <= ln(2) / 2; ln 2 in two parts so that n ln 2 is exact
# enough, and the polynomial of Cephes (expf), relative error about 1e-7.
_LOWEST, _HIGHEST = np.float32(-87), np.float32(88)
_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ONE, _BIAS, _ROUND = np.float32(1), np.float32(127), np.float32(127.5)


@njit(nogil=True, inline="always")
def exp(z: np.float32) -> Any:
    """e^z, whose loops LLVM vectorises; z is taken to be from -87 to 88."""
    z = z if z > _LOWEST else _LOWEST
    z = z if z < _HIGHEST else _HIGHEST
    exponent = np.int32(z * _LOG2_E + _ROUND)
    n = np.float32(exponent) - _BIAS
    r = z - n * _LN2_HIGH - n * _LN2_LOW
    polynomial = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    return (polynomial * r * r + r + _ONE) * _power_of_two(exponent)


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _silu_mul_row(gate: NDArray[Any], up: NDArray[Any], out: NDArray[Any]) -> None:
    for i in range(out.shape[0]):
        out[i] = gate[i] / (_ONE + exp(-gate[i])) * up[i]


@kernel
def silu_mul_row(gate_up: int, out: int, size: int) -> None:
    """One row of `size` results, from and to addresses."""
    _silu_mul_row(floats(gate_up, size), floats(gate_up + 4 * size, size), floats(out, size))
