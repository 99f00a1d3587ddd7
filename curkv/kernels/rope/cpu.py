"""Rotary position embedding with Numba."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curkv.kernels.cpu.jit import inlined, kernel
from curkv.kernels.cpu.lanes import broadcast, fma, lane_sum, mul
from curkv.kernels.cpu.memory import (
    FLOAT32,
    address,
    load,
    load_int32,
    load_scalar,
    row_address,
    store,
    store_scalar,
)
from curkv.kernels.cpu.workers import compile_worker, launch, read_arguments

TOKENS_AT_ONCE = 16
"""Tokens that a thread takes; fewer are not worth a second thread."""


def rope(q: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """Rotate the heads of each token by its position, in place; see `reference.rope`. head_dim is even."""
    tokens, heads, dim = q.shape
    arguments = (
        row_address(q, torch.float32), q.stride(0), q.stride(1), address(cos, torch.float32),
        address(sin, torch.float32), address(positions, torch.int32), heads, dim // 2,
    )  # fmt: skip
    launch(_worker(), -(-tokens // TOKENS_AT_ONCE), tokens, *arguments)


@functools.cache
def _worker() -> int:
    def work(arguments: int, part: int) -> None:
        first = part * TOKENS_AT_ONCE
        end = min(read_arguments(arguments, 1)[0], first + TOKENS_AT_ONCE)
        _rotate_tokens(first, end, *read_arguments(arguments + 8, 8))

    return compile_worker(work)


@kernel
def _rotate_tokens(
    first: int,
    end: int,
    q: int,
    token_stride: int,
    head_stride: int,
    cos: int,
    sin: int,
    positions: int,
    heads: int,
    half: int,
) -> None:
    """Rotate the tokens from `first` to `end`. Addresses; strides in floats; half of head_dim."""
    for t in range(first, end):
        row = 4 * load_int32(positions + 4 * t) * half
        for head in range(heads):
            place = q + 4 * (t * token_stride + head * head_stride)
            rotate(place, cos + row, sin + row, half, FLOAT32, place)


@inlined
def rotate(source: int, cosines: int, sines: int, half: int, kind: Any, target: int) -> Any:
    """Rotate one head of 2 * half floats and write it as `kind`, in place if that is float32.

    Returns:
        The squared norm of the rotated head before it is rounded.
    """
    squares = broadcast(np.float32(0.0))
    body = half - half % 8
    for d in range(0, body, 8):
        x, y = load(FLOAT32, source + 4 * d), load(FLOAT32, source + 4 * (half + d))
        c, s = load(FLOAT32, cosines + 4 * d), load(FLOAT32, sines + 4 * d)
        first = fma(x, c, mul(y, mul(s, broadcast(np.float32(-1.0)))))
        second = fma(y, c, mul(x, s))
        store(kind, target + kind.itemsize * d, first)
        store(kind, target + kind.itemsize * (half + d), second)
        squares = fma(second, second, fma(first, first, squares))
    rest = np.float32(0.0)
    for d in range(body, half):
        a, b = load_scalar(FLOAT32, source + 4 * d), load_scalar(FLOAT32, source + 4 * (half + d))
        cosine, sine = load_scalar(FLOAT32, cosines + 4 * d), load_scalar(FLOAT32, sines + 4 * d)
        store_scalar(kind, target + kind.itemsize * d, a * cosine - b * sine)
        store_scalar(kind, target + kind.itemsize * (half + d), b * cosine + a * sine)
        rest += a * a + b * b
    return lane_sum(squares) + rest
