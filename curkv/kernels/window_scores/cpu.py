"""How much attention the newest queries pay to each stored token, with Numba.

A worker takes a row and goes through its queries in blocks: products with all stored keys tile by tile, the
softmax of every query over what it may read, then its probabilities are added to (or maximised into) the row.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from numba import get_num_threads, prange
from torch import Tensor

from curkv.kernels.paged_prefill_attention.cpu import BLOCK_ROWS, TILE_TOKENS, multiply, transpose_keys
from curkv.kernels.pages import Pages
from curkv.kernels.simd import (
    FLOAT32,
    KINDS,
    address,
    broadcast,
    fetch_add,
    fma,
    kernel,
    load,
    load_int32,
    maximum,
    mul,
    parallel_kernel,
    row_address,
    row_exp2,
    row_max,
    store,
)


def window_scores(
    queries: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    reduction: Literal["mean", "max"] = "mean",
    lse: Tensor | None = None,
) -> Tensor:
    """Score the stored tokens of every head by the last w queries; see `reference.window_scores`.

    head_dim and the page size are multiples of 8.
    """
    rows, window, group, dim = queries.shape
    if dim % 8 or pages.k.shape[1] % 8:
        raise ValueError(f"head_dim {dim} and page size {pages.k.shape[1]} must be multiples of 8")
    width = int(lengths.max()) if rows else 0
    dtype = pages.k.dtype
    # Rows end on whole tiles, which kernels write beyond the last token.
    known = torch.empty(0) if lse is None else lse.contiguous()
    scores = torch.empty(rows, -(-width // TILE_TOKENS) * TILE_TOKENS)
    _score(
        KINDS[dtype],
        address(queries.contiguous(), torch.float32),
        address(pages.k, dtype),
        address(pages.position, torch.int32),
        row_address(table, torch.int32),
        table.stride(0),
        address(lengths.contiguous(), torch.int32),
        rows,
        window,
        group,
        dim,
        pages.k.shape[1],
        scale,
        reduction == "max",
        known.view(rows, -1).numpy() if lse is not None else known.view(1, 0).numpy(),
        scores.numpy(),
        get_num_threads(),
    )
    return scores[:, :width]


@parallel_kernel
def _score(
    kind: Any,
    queries: int,
    k: int,
    position: int,
    table: int,
    table_stride: int,
    lengths: int,
    rows: int,
    window: int,
    group: int,
    dim: int,
    page_size: int,
    scale: float,
    largest: bool,
    known: Any,
    scores: Any,
    threads: int,
) -> None:
    """Let workers take the rows one by one."""
    block = min(window * group, BLOCK_ROWS)
    workers = min(threads, rows)
    counter = np.zeros(1, np.int64)
    products = np.empty((workers, block * scores.shape[1]), np.float32)
    keys = np.empty((workers, dim * TILE_TOKENS), np.float32)
    for unsigned_worker in prange(workers):
        worker: Any = np.int64(unsigned_worker)
        while True:
            row = fetch_add(counter.ctypes.data, 1)
            if row >= rows:
                break
            _score_row(
                kind, queries + 4 * row * window * group * dim, k, position, table + 4 * row * table_stride,
                load_int32(lengths + 4 * row), window, group, dim, page_size, scale, largest,
                known[row % len(known)], block, products[worker], keys[worker], scores[row],
            )  # fmt: skip


@kernel
def _score_row(
    kind: Any,
    queries: int,
    k: int,
    position: int,
    table: int,
    length: int,
    window: int,
    group: int,
    dim: int,
    page_size: int,
    scale: float,
    largest: bool,
    known: Any,
    block: int,
    products: Any,
    keys: Any,
    scores: Any,
) -> None:
    """Score one row.

    Args:
        kind: Of K.
        queries: Address of float32 [window, group, dim].
        k: Address of the K pages.
        position: Address of the positions.
        table: Address of the row's pages.
        length: Tokens of the row.
        window: Tokens that query.
        group: Query heads per KV head.
        dim: Size of a head.
        page_size: Tokens per page.
        scale: Factor of the products.
        largest: Take the largest probability instead of the mean.
        known: float32 [window * group], log-sum-exp of each query, or empty.
        block: Queries that go through the keys together.
        products: float32 [block, width], scratch.
        keys: float32 [dim, TILE_TOKENS], scratch.
        scores: float32 [width], written; a multiple of TILE_TOKENS.
    """
    width = scores.size
    scores[:] = 0.0
    padded = (length + TILE_TOKENS - 1) // TILE_TOKENS * TILE_TOKENS
    for first in range(0, window * group if length else 0, block):
        count = min(block, window * group - first)
        for start in range(0, length, TILE_TOKENS):
            tokens = min(TILE_TOKENS, length - start)
            transpose_keys(kind, k, table, page_size, dim, start, tokens, keys)
            columns = (tokens + 7) // 8 * 8
            target = products.ctypes.data + 4 * start
            multiply(
                FLOAT32, 1, count, queries + 4 * first * dim, dim, keys.ctypes.data, TILE_TOKENS, dim,
                columns, target, width,
            )  # fmt: skip
        for i in range(count):
            late = window - 1 - (first + i) // group
            read = _readable(position, table, page_size, length, late)
            line = products.ctypes.data + 4 * i * width
            if read > 0:
                highest = known[first + i] / scale if known.size else row_max(line, read)
                total = row_exp2(line, read, padded, scale * math.log2(math.e), highest)
                share = 1.0 if known.size else 1.0 / total
                share /= 1 if largest else window * group
                _gather(line, read, share, largest, scores.ctypes.data)
    scores[length:] = -np.inf


@kernel
def _readable(position: int, table: int, page_size: int, length: int, late: int) -> int:
    """How many tokens are at most as new as the query that stands `late` tokens before the newest one."""
    last = length - 1
    newest = load_int32(
        position + 4 * (load_int32(table + 4 * (last // page_size)) * page_size + last % page_size)
    )
    for read in range(length, max(0, length - 1 - late), -1):
        token = read - 1
        page = load_int32(table + 4 * (token // page_size))
        if load_int32(position + 4 * (page * page_size + token % page_size)) <= newest - late:
            return read
    return max(0, length - 1 - late)


@kernel
def _gather(line: int, count: int, share: float, largest: bool, scores: int) -> None:
    """Add `share` times the exponentials to the scores, or take the larger of both; up to seven more."""
    spread = broadcast(np.float32(share))
    for j in range(0, count, 8):
        old = load(FLOAT32, scores + 4 * j)
        paid = load(FLOAT32, line + 4 * j)
        new = maximum(mul(spread, paid), old) if largest else fma(spread, paid, old)
        store(FLOAT32, scores + 4 * j, new)
