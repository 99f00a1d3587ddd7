"""The gated activation with GELU on CPU, with the exponential of the other one."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from curkv.kernels.cpu.memory import floats
from curkv.kernels.cpu.workers import compile_worker, read_arguments
from curkv.kernels.silu_mul.cpu import exp, launch_gated

_SLOPE, _CUBIC, _ONE = np.float32(np.sqrt(8 / np.pi)), np.float32(0.044715), np.float32(1)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """See `reference.gelu_mul`; float32, contiguous."""
    return launch_gated(_worker(), gate_up)


@functools.cache
def _worker() -> int:
    def work(arguments: int, part: int) -> None:
        tokens, rows, size, gate_up, out = read_arguments(arguments, 5)
        for row in range(part * rows, min(tokens, (part + 1) * rows)):
            gate, up = gate_up + 8 * row * size, gate_up + 4 * (2 * row + 1) * size
            _gelu_mul_row(floats(gate, size), floats(up, size), floats(out + 4 * row * size, size))

    return compile_worker(work)


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _gelu_mul_row(gate: NDArray[Any], up: NDArray[Any], out: NDArray[Any]) -> None:
    for i in range(out.shape[0]):
        x = gate[i]
        out[i] = x / (_ONE + exp(-_SLOPE * (x + _CUBIC * x * x * x))) * up[i]
