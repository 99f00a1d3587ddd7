"""Root-mean-square normalisation on CPU; residual addition, mean and scaling read memory once."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor, from_numpy

PARALLEL_SIZE = 1 << 16
"""Elements from which several threads pay for their start (about 10 us)."""


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See `reference.rms_norm`; float32, contiguous."""
    rows, scales, epsilon = x.numpy(), weight.numpy(), np.float32(eps)
    out = np.empty_like(rows)
    parallel = rows.size >= PARALLEL_SIZE
    if residual is None:
        (_norm_parallel if parallel else _norm_serial)(rows, scales, epsilon, out)
        return from_numpy(out)
    total = np.empty_like(rows)
    (_add_norm_parallel if parallel else _add_norm_serial)(
        rows, residual.numpy(), scales, epsilon, total, out
    )
    return from_numpy(out), from_numpy(total)


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


@njit(nogil=True, cache=True)
def _add_norm_row(
    x: NDArray[Any],
    residual: NDArray[Any],
    weight: NDArray[Any],
    eps: np.float32,
    total: NDArray[Any],
    out: NDArray[Any],
) -> None:
    for i in range(x.shape[0]):
        total[i] = x[i] + residual[i]
    _norm_row(total, weight, eps, out)


@njit(nogil=True, cache=True)
def _norm_serial(x: NDArray[Any], weight: NDArray[Any], eps: np.float32, out: NDArray[Any]) -> None:
    for row in range(x.shape[0]):
        _norm_row(x[row], weight, eps, out[row])


@njit(nogil=True, cache=True, parallel=True)
def _norm_parallel(x: NDArray[Any], weight: NDArray[Any], eps: np.float32, out: NDArray[Any]) -> None:
    for row in prange(x.shape[0]):
        _norm_row(x[row], weight, eps, out[row])


@njit(nogil=True, cache=True)
def _add_norm_serial(
    x: NDArray[Any],
    residual: NDArray[Any],
    weight: NDArray[Any],
    eps: np.float32,
    total: NDArray[Any],
    out: NDArray[Any],
) -> None:
    for row in range(x.shape[0]):
        _add_norm_row(x[row], residual[row], weight, eps, total[row], out[row])


@njit(nogil=True, cache=True, parallel=True)
def _add_norm_parallel(
    x: NDArray[Any],
    residual: NDArray[Any],
    weight: NDArray[Any],
    eps: np.float32,
    total: NDArray[Any],
    out: NDArray[Any],
) -> None:
    for row in prange(x.shape[0]):
        _add_norm_row(x[row], residual[row], weight, eps, total[row], out[row])
