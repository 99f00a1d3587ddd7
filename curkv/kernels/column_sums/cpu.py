"""How much attention each stored token received from a chunk of queries, with Numba.

A worker takes a tile of stored tokens of one (sequence, KV head): its keys are transposed once, the chunk's
queries pass by, and since nobody else writes to these tokens their sums need no lock.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import get_num_threads, prange
from torch import Tensor

from curkv.kernels.paged_prefill_attention.cpu import TILE_TOKENS, multiply, transpose_keys
from curkv.kernels.pages import Pages
from curkv.kernels.simd import (
    FLOAT32,
    KINDS,
    add,
    address,
    fetch_add,
    kernel,
    load,
    load_int32,
    load_scalar,
    parallel_kernel,
    row_address,
    row_exp2,
    store,
    store_scalar,
)

BLOCK_QUERIES = 48
"""Queries of one head whose products with a tile are held at once."""


def column_sums(
    q: Tensor,
    lse: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    query_start: Tensor,
    scale: float,
) -> None:
    """Add the attention that a chunk's queries pay to each stored token; see `reference.column_sums`.

    head_dim and the page size are multiples of 8.
    """
    _, query_heads, dim = q.shape
    heads, page_size, dtype = table.shape[1], pages.k.shape[1], pages.k.dtype
    if dim % 8 or page_size % 8:
        raise ValueError(f"head_dim {dim} and page size {page_size} must be multiples of 8")
    if q.stride()[1:] != (dim, 1):
        q = q.contiguous()
    _add_sums(
        KINDS[dtype],
        row_address(q, torch.float32),
        q.stride(0),
        address(lse.contiguous(), torch.float32),
        address(pages.k, dtype),
        address(pages.attention, torch.float32),
        row_address(table, torch.int32),
        table.stride(0),
        table.stride(1),
        row_address(lengths, torch.int32),
        lengths.stride(0),
        address(slots, torch.int32),
        address(query_start, torch.int32),
        slots.shape[0],
        heads,
        query_heads // heads,
        dim,
        page_size,
        scale,
        get_num_threads(),
    )


@parallel_kernel
def _add_sums(
    kind: Any,
    q: int,
    q_stride: int,
    lse: int,
    k: int,
    attention: int,
    table: int,
    table_stride: int,
    head_stride: int,
    lengths: int,
    lengths_stride: int,
    slots: int,
    query_start: int,
    batch: int,
    heads: int,
    group: int,
    dim: int,
    page_size: int,
    scale: float,
    threads: int,
) -> None:
    """Number the tiles of every (sequence, head) and let the workers take them."""
    starts = np.zeros(batch * heads + 1, np.int64)
    for row in range(batch * heads):
        slot = load_int32(slots + 4 * (row // heads))
        length = load_int32(lengths + 4 * (slot * lengths_stride + row % heads))
        starts[row + 1] = starts[row] + (length + TILE_TOKENS - 1) // TILE_TOKENS
    workers = min(threads, starts[batch * heads])
    counter = np.zeros(1, np.int64)
    keys = np.empty((workers, dim * TILE_TOKENS), np.float32)
    scores = np.empty((workers, BLOCK_QUERIES * TILE_TOKENS), np.float32)
    sums = np.empty((workers, TILE_TOKENS), np.float32)
    for unsigned_worker in prange(workers):
        worker: Any = np.int64(unsigned_worker)
        row = 0
        while True:
            item = fetch_add(counter.ctypes.data, 1)
            if item >= starts[batch * heads]:
                break
            while starts[row + 1] <= item:
                row += 1
            slot = load_int32(slots + 4 * (row // heads))
            begin = load_int32(query_start + 4 * (row // heads))
            chunk = load_int32(query_start + 4 * (row // heads) + 4) - begin
            head = row % heads
            pages = table + 4 * (slot * table_stride + head * head_stride)
            length = load_int32(lengths + 4 * (slot * lengths_stride + head))
            start = (item - starts[row]) * TILE_TOKENS
            width = min(TILE_TOKENS, length - start)
            transpose_keys(kind, k, pages, page_size, dim, start, width, keys[worker])
            _sum_tile(
                q + 4 * (begin * q_stride + head * group * dim), q_stride,
                lse + 4 * (begin * heads + head) * group, heads * group, chunk, start - (length - chunk),
                width, group, dim, scale, keys[worker], scores[worker], sums[worker],
            )  # fmt: skip
            _add_to_pages(attention, pages, page_size, start, width, sums[worker])


@kernel
def _sum_tile(
    q: int,
    q_stride: int,
    lse: int,
    lse_stride: int,
    chunk: int,
    offset: int,
    width: int,
    group: int,
    dim: int,
    scale: float,
    keys: Any,
    scores: Any,
    sums: Any,
) -> None:
    """Write the attention that a tile's tokens receive to `sums`.

    Args:
        q: Address of float32 [chunk, group, dim], `q_stride` floats per token.
        q_stride: See `q`.
        lse: Address of float32 [chunk, group], `lse_stride` floats per token.
        lse_stride: See `lse`.
        chunk: Tokens that query.
        offset: The tile's first token, counted from the chunk's first; negative if it is older.
        width: Tokens of the tile.
        group: Query heads per KV head.
        dim: Size of a head.
        scale: Factor of the products.
        keys: float32 [dim, TILE_TOKENS].
        scores: float32 [BLOCK_QUERIES, TILE_TOKENS], scratch.
        sums: float32 [TILE_TOKENS], written.
    """
    sums[:] = 0.0
    padded = (width + 7) // 8 * 8
    for first in range(max(0, offset), chunk, BLOCK_QUERIES):
        count = min(BLOCK_QUERIES, chunk - first)
        for g in range(group):
            left = q + 4 * (first * q_stride + g * dim)
            multiply(
                FLOAT32, 1, count, left, q_stride, keys.ctypes.data, TILE_TOKENS, dim, padded,
                scores.ctypes.data, TILE_TOKENS,
            )  # fmt: skip
            for i in range(count):
                seen = min(width, first + i - offset + 1)
                line = scores.ctypes.data + 4 * i * TILE_TOKENS
                normaliser = load_scalar(FLOAT32, lse + 4 * ((first + i) * lse_stride + g))
                row_exp2(line, seen, padded, scale * math.log2(math.e), normaliser / scale)
                for j in range(0, padded, 8):
                    place = sums.ctypes.data + 4 * j
                    store(FLOAT32, place, add(load(FLOAT32, place), load(FLOAT32, line + 4 * j)))


@kernel
def _add_to_pages(attention: int, table: int, page_size: int, start: int, width: int, sums: Any) -> None:
    """Add the sums of `width` tokens to the page pool."""
    for t in range(width):
        page = load_int32(table + 4 * ((start + t) // page_size))
        place = attention + 4 * (page * page_size + (start + t) % page_size)
        store_scalar(FLOAT32, place, load_scalar(FLOAT32, place) + sums[t])
