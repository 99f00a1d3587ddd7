"""Storing new keys and values in pages, with Numba."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import get_num_threads, prange
from torch import Tensor

from curkv.kernels.pages import Pages
from curkv.kernels.rope.cpu import TOKENS_PER_THREAD, rotate
from curkv.kernels.simd import (
    FLOAT32,
    KINDS,
    address,
    broadcast,
    fma,
    inlined,
    kernel,
    lane_sum,
    load,
    load_int32,
    load_scalar,
    parallel_kernel,
    row_address,
    store,
    store_int32,
    store_scalar,
)


def store_kv(
    pages: Pages,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    query_start: Tensor,
) -> None:
    """Rotate the new keys and write them, their values and the side arrays; see `reference.store_kv`."""
    tokens, heads, dim = k.shape
    dtype = pages.k.dtype
    _store(
        KINDS[dtype],
        row_address(k, torch.float32),
        k.stride(0),
        k.stride(1),
        row_address(v, torch.float32),
        v.stride(0),
        v.stride(1),
        address(cos, torch.float32),
        address(sin, torch.float32),
        address(positions, torch.int32),
        row_address(table, torch.int32),
        table.stride(0),
        table.stride(1),
        row_address(lengths, torch.int32),
        lengths.stride(0),
        address(slots, torch.int32),
        address(query_start, torch.int32),
        address(pages.k, dtype),
        address(pages.v, dtype),
        address(pages.position, torch.int32),
        address(pages.k_sq, torch.float32),
        address(pages.v_sq, torch.float32),
        address(pages.attention, torch.float32),
        tokens,
        slots.shape[0],
        heads,
        dim,
        pages.k.shape[1],
        min(get_num_threads(), -(-tokens // TOKENS_PER_THREAD)),
    )


@parallel_kernel
def _store(
    kind: Any,
    k: int,
    k_stride: int,
    k_head_stride: int,
    v: int,
    v_stride: int,
    v_head_stride: int,
    cos: int,
    sin: int,
    positions: int,
    table: int,
    table_stride: int,
    head_stride: int,
    lengths: int,
    lengths_stride: int,
    slots: int,
    query_start: int,
    k_pages: int,
    v_pages: int,
    position_pages: int,
    k_sq_pages: int,
    v_sq_pages: int,
    attention_pages: int,
    tokens: int,
    batch: int,
    heads: int,
    dim: int,
    page_size: int,
    parts: int,
) -> None:
    """Share the tokens among `parts` threads; strides are in elements per token, head or sequence."""
    rotated = np.empty((parts, dim), np.float32)
    for unsigned_part in prange(parts):
        part: Any = np.int64(unsigned_part)
        scratch = rotated[part]
        i = 0
        for token in range(tokens * part // parts, tokens * (part + 1) // parts):
            while load_int32(query_start + 4 * (i + 1)) <= token:
                i += 1
            slot, left = load_int32(slots + 4 * i), load_int32(query_start + 4 * (i + 1)) - token
            position = load_int32(positions + 4 * token)
            angle = 4 * position * (dim // 2)
            for head in range(heads):
                index = load_int32(lengths + 4 * (slot * lengths_stride + head)) - left
                entry = slot * table_stride + head * head_stride + index // page_size
                place = load_int32(table + 4 * entry) * page_size + index % page_size
                _store_token(
                    kind, k + 4 * (token * k_stride + head * k_head_stride),
                    v + 4 * (token * v_stride + head * v_head_stride), cos + angle, sin + angle, position,
                    place, dim, k_pages, v_pages, position_pages, k_sq_pages, v_sq_pages, attention_pages, scratch,
                )  # fmt: skip


@kernel
def _store_token(
    kind: Any,
    k: int,
    v: int,
    cos: int,
    sin: int,
    position: int,
    place: int,
    dim: int,
    k_pages: int,
    v_pages: int,
    position_pages: int,
    k_sq_pages: int,
    v_sq_pages: int,
    attention_pages: int,
    rotated: Any,
) -> None:
    """Write one token of one head to slot `place` of the pool; `rotated` is scratch, float32 [dim]."""
    rotate(k, rotated.ctypes.data, cos, sin, dim)
    offset = place * dim * kind.itemsize
    k_sq = _copy(kind, rotated.ctypes.data, k_pages + offset, dim)
    v_sq = _copy(kind, v, v_pages + offset, dim)
    store_scalar(FLOAT32, k_sq_pages + 4 * place, k_sq)
    store_scalar(FLOAT32, v_sq_pages + 4 * place, v_sq)
    store_int32(position_pages + 4 * place, position)
    store_scalar(FLOAT32, attention_pages + 4 * place, np.float32(0.0))


@inlined
def _copy(kind: Any, source: int, target: int, dim: int) -> Any:
    """Round `dim` floats to `kind`; returns the sum of their squares before rounding."""
    body = dim - dim % 8
    squares = broadcast(np.float32(0.0))
    for d in range(0, body, 8):
        vector = load(FLOAT32, source + 4 * d)
        squares = fma(vector, vector, squares)
        store(kind, target + d * kind.itemsize, vector)
    total = lane_sum(squares)
    for d in range(body, dim):
        value = load_scalar(FLOAT32, source + 4 * d)
        total += value * value
        store_scalar(kind, target + d * kind.itemsize, value)
    return total
