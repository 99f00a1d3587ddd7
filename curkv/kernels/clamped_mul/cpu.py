"""The clamped gated activation on CPU, with the exponential of the other ones."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from curkv.kernels.cpu.memory import floats
from curkv.kernels.cpu.workers import bits_of_float, compile_worker, float_of_bits, read_arguments
from curkv.kernels.silu_mul.cpu import exp, launch_gated

_ONE = np.float32(1)


def clamped_mul(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """See `reference.clamped_mul`; float32, contiguous."""
    return launch_gated(_worker(), gate_up, bits_of_float(alpha), bits_of_float(limit))


@functools.cache
def _worker() -> int:
    def work(arguments: int, part: int) -> None:
        tokens, rows, size, gate_up, out, alpha, limit = read_arguments(arguments, 7)
        slope, most = np.float32(float_of_bits(alpha)), np.float32(float_of_bits(limit))
        for row in range(part * rows, min(tokens, (part + 1) * rows)):
            gate, up = gate_up + 8 * row * size, gate_up + 4 * (2 * row + 1) * size
            made = floats(out + 4 * row * size, size)
            _clamped_mul_row(floats(gate, size), floats(up, size), made, slope, most)

    return compile_worker(work)


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _clamped_mul_row(
    gate: NDArray[Any], up: NDArray[Any], out: NDArray[Any], alpha: np.float32, limit: np.float32
) -> None:
    for i in range(out.shape[0]):
        g, u = gate[i], up[i]
        g = limit if g > limit else g  # in this order numbers that are none stay so
        u = limit if u > limit else u
        u = -limit if u < -limit else u
        out[i] = (u + _ONE) * g / (_ONE + exp(-alpha * g))
