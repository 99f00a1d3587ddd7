"""Root-mean-square normalisation on CPU; residual addition, mean and scaling read memory once."""

from __future__ import annotations

import functools
from typing import Any, overload

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from curkv.kernels.cpu.jit import kernel
from curkv.kernels.cpu.memory import address, floats, row_address
from curkv.kernels.cpu.workers import (
    bits_of_float,
    compile_worker,
    empty,
    float_of_bits,
    launch,
    read_arguments,
)

PART_SIZE = 1 << 15
"""Elements that a thread takes; fewer are not worth a second thread."""


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See `reference.rms_norm`; float32, the last dimension contiguous, a residual wholly."""
    tokens, *heads, width = x.shape
    rows = tokens * (heads[0] if heads else 1)
    out = empty(*x.shape)
    total = out if residual is None else empty(*x.shape)
    rows_at_once = max(1, PART_SIZE // width)
    launch(
        _worker(), -(-rows // rows_at_once), rows, rows_at_once, row_address(x, torch.float32),
        heads[0] if heads else 1, x.stride(0), x.stride(-2), width,
        0 if residual is None else address(residual, torch.float32), address(weight, torch.float32),
        bits_of_float(eps), total.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out if residual is None else (out, total)


@functools.cache
def _worker() -> int:
    def work(arguments: int, part: int) -> None:
        rows, rows_at_once = read_arguments(arguments, 2)
        first = part * rows_at_once
        _norm_rows(first, min(rows, first + rows_at_once), *read_arguments(arguments + 16, 10))

    return compile_worker(work)


@kernel
def _norm_rows(
    first: int, end: int, x: int, heads: int, token_stride: int, head_stride: int, width: int,
    residual: int, weight: int, eps_bits: int, total: int, out: int,
) -> None:  # fmt: skip
    """Normalise the rows from `first` to `end`. Addresses; strides in floats; residual 0: there is none."""
    for row in range(first, end):
        source = x + 4 * (row // heads * token_stride + row % heads * head_stride)
        place = 4 * row * width
        norm_row(source, residual and residual + place, weight, eps_bits, total + place, out + place, width)


@kernel
def norm_row(x: int, residual: int, weight: int, eps_bits: int, total: int, out: int, width: int) -> None:
    """Normalise one row. Addresses; with a residual, which is not 0, the sum goes to `total`."""
    values, scales = floats(x, width), floats(weight, width)
    if residual:
        sums = floats(total, width)
        _add(values, floats(residual, width), sums)
        values = sums
    _norm_row(values, scales, np.float32(float_of_bits(eps_bits)), floats(out, width))


@njit(nogil=True, cache=True)
def _add(x: NDArray[Any], residual: NDArray[Any], total: NDArray[Any]) -> None:
    for i in range(x.shape[0]):
        total[i] = x[i] + residual[i]


# The sum may be reordered, so that it vectorises; NaN and infinity keep their meaning.
@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"}, error_model="numpy")
def _inverse_rms(x: NDArray[Any], eps: np.float32) -> Any:
    squares = np.float32(0)
    for i in range(x.shape[0]):
        squares += x[i] * x[i]
    return np.float32(1) / np.sqrt(squares / np.float32(x.shape[0]) + eps)


@njit(nogil=True, cache=True)
def _norm_row(x: NDArray[Any], weight: NDArray[Any], eps: np.float32, out: NDArray[Any]) -> None:
    scale = _inverse_rms(x, eps)
    for i in range(x.shape[0]):
        out[i] = x[i] * scale * weight[i]
