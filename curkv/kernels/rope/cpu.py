"""Rotary position embedding with Numba."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import get_num_threads, prange
from torch import Tensor

from curkv.kernels.simd import (
    FLOAT32,
    address,
    broadcast,
    fma,
    inlined,
    load,
    load_int32,
    load_scalar,
    mul,
    parallel_kernel,
    row_address,
    store,
    store_scalar,
)

TOKENS_PER_THREAD = 16
"""Below that many tokens another thread costs more than it saves."""


def rope(q: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """Rotate the heads of each token in place; see `reference.rope`."""
    tokens, heads, dim = q.shape
    _rope(
        row_address(q, torch.float32),
        q.stride(0),
        q.stride(1),
        address(cos, torch.float32),
        address(sin, torch.float32),
        address(positions, torch.int32),
        tokens,
        heads,
        dim,
        min(get_num_threads(), -(-tokens // TOKENS_PER_THREAD)),
    )


@parallel_kernel
def _rope(
    q: int,
    token_stride: int,
    head_stride: int,
    cos: int,
    sin: int,
    positions: int,
    tokens: int,
    heads: int,
    dim: int,
    parts: int,
) -> None:
    for unsigned_part in prange(parts):
        part: Any = np.int64(unsigned_part)
        for token in range(tokens * part // parts, tokens * (part + 1) // parts):
            angle = 4 * load_int32(positions + 4 * token) * (dim // 2)
            for head in range(heads):
                place = q + 4 * (token * token_stride + head * head_stride)
                rotate(place, place, cos + angle, sin + angle, dim)


@inlined
def rotate(source: int, target: int, cos: int, sin: int, dim: int) -> None:
    """Rotate one head, float32 [dim] at `source`, by the angles at `cos` and `sin`, [dim / 2]."""
    half = dim // 2
    body = half - half % 8
    minus = broadcast(np.float32(-1.0))
    for d in range(0, body, 8):
        c, s = load(FLOAT32, cos + 4 * d), load(FLOAT32, sin + 4 * d)
        first, second = load(FLOAT32, source + 4 * d), load(FLOAT32, source + 4 * (half + d))
        store(FLOAT32, target + 4 * d, fma(first, c, mul(minus, mul(second, s))))
        store(FLOAT32, target + 4 * (half + d), fma(second, c, mul(first, s)))
    for d in range(body, half):
        c1, s1 = load_scalar(FLOAT32, cos + 4 * d), load_scalar(FLOAT32, sin + 4 * d)
        x1, x2 = load_scalar(FLOAT32, source + 4 * d), load_scalar(FLOAT32, source + 4 * (half + d))
        store_scalar(FLOAT32, target + 4 * d, x1 * c1 - x2 * s1)
        store_scalar(FLOAT32, target + 4 * (half + d), x2 * c1 + x1 * s1)
