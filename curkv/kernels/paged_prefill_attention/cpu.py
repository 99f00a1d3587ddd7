"""Attention of chunks of new tokens over ragged pages, with Numba.

A worker takes a block of queries of one KV head, all query heads of the group together, and goes through the
stored tokens tile by tile (FlashAttention-2, https://arxiv.org/abs/2307.08691, section 3.1): keys are widened
and transposed once per tile, scores and outputs are products of matrices held in vector registers, values are
widened on their way there. Only tiles that reach past a query's own position are masked. Unused memory may
hold NaN: no score of it is used and no value of it is read.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import get_num_threads, prange
from torch import Tensor

from curkv.kernels.pages import Pages
from curkv.kernels.simd import (
    FLOAT32,
    KINDS,
    address,
    broadcast,
    fetch_add,
    inlined,
    kernel,
    load,
    load_int32,
    matrix_tile,
    mul,
    parallel_kernel,
    row_address,
    row_exp2,
    row_max,
    store,
    store_scalar,
    transpose_tile,
)

BLOCK_ROWS = 96
"""Rows of queries per work item: their outputs and scores stay in the second-level cache."""
TILE_TOKENS = 64
"""Stored tokens per tile: their transposed keys stay in the first-level cache."""


def paged_prefill_attention(
    q: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    query_start: Tensor,
    scale: float,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with a chunk of queries per sequence; see `reference.paged_prefill_attention`.

    head_dim and the page size are multiples of 8.
    """
    count, query_heads, dim = q.shape
    heads, page_size = table.shape[1], pages.k.shape[1]
    if dim % 8 or page_size % 8:
        raise ValueError(f"head_dim {dim} and page size {page_size} must be multiples of 8")
    if q.stride()[1:] != (dim, 1):
        q = q.contiguous()
    out, lse = torch.empty((count, query_heads, dim)), torch.empty((count, query_heads))
    dtype = pages.k.dtype
    _attend(
        KINDS[dtype],
        row_address(q, torch.float32),
        q.stride(0),
        address(pages.k, dtype),
        address(pages.v, dtype),
        row_address(table, torch.int32),
        table.stride(0),
        table.stride(1),
        row_address(lengths, torch.int32),
        lengths.stride(0),
        address(slots, torch.int32),
        address(query_start, torch.int32),
        out.data_ptr(),
        lse.data_ptr(),
        slots.shape[0],
        heads,
        query_heads // heads,
        dim,
        page_size,
        scale,
        get_num_threads(),
    )
    return (out, lse) if return_lse else out


@parallel_kernel
def _attend(
    kind: Any,
    q: int,
    q_stride: int,
    k: int,
    v: int,
    table: int,
    table_stride: int,
    head_stride: int,
    lengths: int,
    lengths_stride: int,
    slots: int,
    query_start: int,
    out: int,
    lse: int,
    batch: int,
    heads: int,
    group: int,
    dim: int,
    page_size: int,
    scale: float,
    threads: int,
) -> None:
    """Number the work items and let the workers take them; see `_work`."""
    block = max(1, BLOCK_ROWS // group)
    starts = np.zeros(batch + 1, np.int64)
    for i in range(batch):
        queries = load_int32(query_start + 4 * (i + 1)) - load_int32(query_start + 4 * i)
        starts[i + 1] = starts[i] + heads * ((queries + block - 1) // block)
    workers = min(threads, starts[batch])
    counter = np.zeros(1, np.int64)
    rows = block * group
    queries = np.empty((workers, rows * dim), np.float32)
    outputs = np.empty((workers, rows * dim), np.float32)
    scores = np.empty((workers, rows * TILE_TOKENS), np.float32)
    keys = np.empty((workers, dim * TILE_TOKENS), np.float32)
    highest = np.empty((workers, rows), np.float32)
    total = np.empty((workers, rows), np.float32)
    for unsigned_worker in prange(workers):
        worker: Any = np.int64(unsigned_worker)
        _work(
            kind, q, q_stride, k, v, table, table_stride, head_stride, lengths, lengths_stride, slots,
            query_start, out, lse, heads, group, dim, page_size, scale, block, starts, counter,
            queries[worker], outputs[worker], scores[worker], keys[worker], highest[worker], total[worker],
        )  # fmt: skip


@kernel
def _work(
    kind: Any,
    q: int,
    q_stride: int,
    k: int,
    v: int,
    table: int,
    table_stride: int,
    head_stride: int,
    lengths: int,
    lengths_stride: int,
    slots: int,
    query_start: int,
    out: int,
    lse: int,
    heads: int,
    group: int,
    dim: int,
    page_size: int,
    scale: float,
    block: int,
    starts: Any,
    counter: Any,
    queries: Any,
    outputs: Any,
    scores: Any,
    keys: Any,
    highest: Any,
    total: Any,
) -> None:
    """Take items until none is left, of each sequence the latest queries first: they read the most.

    Args:
        kind: Of K and V.
        q: Address of float32 [T, H, group, dim], `q_stride` floats per token.
        k: Address of the K pages.
        v: Address of the V pages.
        table: Address of the page table, `table_stride` and `head_stride` entries per sequence and head.
        lengths: Address of the lengths, `lengths_stride` entries per sequence.
        slots: Address of int32 [B].
        query_start: Address of int32 [B + 1].
        out: Address of float32 [T, H, group, dim].
        lse: Address of float32 [T, H, group].
        heads: KV heads, H.
        group: Query heads per KV head.
        dim: Size of a head.
        page_size: Tokens per page.
        scale: Factor of the scores.
        block: Tokens of an item; its rows are [token, query head of the group].
        starts: int64 [B + 1], first item of each sequence.
        counter: int64 [1], items taken.
        queries: float32 [rows, dim], scratch as all that follow.
        outputs: float32 [rows, dim], not yet divided by `total`.
        scores: float32 [rows, TILE_TOKENS].
        keys: float32 [dim, TILE_TOKENS].
        highest: float32 [rows], largest score so far.
        total: float32 [rows], sum of the exponentials so far.
    """
    i = 0
    while True:
        item = fetch_add(counter.ctypes.data, 1)
        if item >= starts[starts.size - 1]:
            return
        while starts[i + 1] <= item:
            i += 1
        slot, begin, end = (
            load_int32(slots + 4 * i),
            load_int32(query_start + 4 * i),
            load_int32(query_start + 4 * i + 4),
        )
        place = starts[i + 1] - 1 - item
        head, first = place % heads, begin + place // heads * block
        tokens = min(block, end - first)
        seen = load_int32(lengths + 4 * (slot * lengths_stride + head)) - (end - first) + 1
        _gather(tokens, group, dim, q + 4 * (first * q_stride + head * group * dim), q_stride, queries)
        _attend_block(
            kind, k, v, table + 4 * (slot * table_stride + head * head_stride), page_size, dim, tokens, group,
            seen, scale, queries, outputs, scores, keys, highest, total,
        )  # fmt: skip
        _finish(
            tokens,
            group,
            dim,
            scale,
            outputs,
            highest,
            total,
            heads,
            out + 4 * (first * heads + head) * group * dim,
            lse + 4 * (first * heads + head) * group,
        )


@kernel
def _gather(tokens: int, group: int, dim: int, q: int, q_stride: int, queries: Any) -> None:
    """Copy an item's queries together."""
    for t in range(tokens):
        for d in range(0, group * dim, 8):
            store(
                FLOAT32,
                queries.ctypes.data + 4 * (t * group * dim + d),
                load(FLOAT32, q + 4 * (t * q_stride + d)),
            )


@kernel
def _attend_block(
    kind: Any,
    k: int,
    v: int,
    table: int,
    page_size: int,
    dim: int,
    tokens: int,
    group: int,
    seen: int,
    scale: float,
    queries: Any,
    outputs: Any,
    scores: Any,
    keys: Any,
    highest: Any,
    total: Any,
) -> None:
    """Go through the tiles; the item's token t sees the first `seen` + t stored tokens."""
    rows = tokens * group
    highest[:rows] = -np.inf
    total[:rows] = 0.0
    outputs[: rows * dim] = 0.0
    last = seen + tokens - 1
    for start in range(0, last, TILE_TOKENS):
        width = min(TILE_TOKENS, last - start)
        transpose_keys(kind, k, table, page_size, dim, start, width, keys)
        multiply(
            FLOAT32,
            1,
            rows,
            queries.ctypes.data,
            dim,
            keys.ctypes.data,
            TILE_TOKENS,
            dim,
            (width + 7) // 8 * 8,
            scores.ctypes.data,
            TILE_TOKENS,
        )
        _softmax(
            rows, group, dim, seen - start, width, scale * math.log2(math.e), scores, outputs, highest, total
        )
        position = start
        while position < start + width:
            offset = position % page_size
            run = min(page_size - offset, start + width - position)
            page = load_int32(table + 4 * (position // page_size))
            values = v + (page * page_size + offset) * dim * kind.itemsize
            weights = scores.ctypes.data + 4 * (position - start)
            multiply(kind, 0, rows, weights, TILE_TOKENS, values, dim, run, dim, outputs.ctypes.data, dim)
            position += run


@kernel
def transpose_keys(
    kind: Any, k: int, table: int, page_size: int, dim: int, start: int, width: int, keys: Any
) -> None:
    """Widen the keys of a tile into [dim, TILE_TOKENS]."""
    for t in range(0, width, 8):
        page = load_int32(table + 4 * ((start + t) // page_size))
        source = k + (page * page_size + (start + t) % page_size) * dim * kind.itemsize
        for d in range(0, dim, 8):
            target = keys.ctypes.data + 4 * (d * TILE_TOKENS + t)
            transpose_tile(kind, source + d * kind.itemsize, dim, target, TILE_TOKENS)


@kernel
def _softmax(
    rows: int,
    group: int,
    dim: int,
    seen: int,
    width: int,
    factor: float,
    scores: Any,
    outputs: Any,
    highest: Any,
    total: Any,
) -> None:
    """Turn a tile's scores into exponentials and rescale what the row has gathered before.

    Token t of the item sees the first `seen` + t tokens of the tile.
    """
    for row in range(rows):
        line = scores.ctypes.data + 4 * row * TILE_TOKENS
        count = min(width, max(0, seen + row // group))
        top = max(highest[row], row_max(line, count))
        if top > highest[row]:
            shrink = np.float32(np.exp2(factor * (highest[row] - top)))
            highest[row] = top
            total[row] *= shrink
            spread = broadcast(shrink)
            for d in range(0, dim, 8):
                place = outputs.ctypes.data + 4 * (row * dim + d)
                store(FLOAT32, place, mul(load(FLOAT32, place), spread))
        total[row] += row_exp2(line, count, (width + 7) // 8 * 8, factor, top)


@inlined
def multiply(
    kind: Any,
    fresh: int,
    rows: int,
    a: int,
    a_stride: int,
    b: int,
    b_stride: int,
    inner: int,
    columns: int,
    c: int,
    c_stride: int,
) -> None:
    """C (+)= A B, in tiles of 6 x 16."""
    for column in range(0, columns, 16):
        right, target = b + column * kind.itemsize, c + 4 * column
        if columns - column >= 16:
            row = 0
            while row + 6 <= rows:
                left, place = a + 4 * row * a_stride, target + 4 * row * c_stride
                if fresh:
                    matrix_tile(kind, 6, 2, 1, left, a_stride, right, b_stride, inner, place, c_stride)
                else:
                    matrix_tile(kind, 6, 2, 0, left, a_stride, right, b_stride, inner, place, c_stride)
                row += 6
            while row < rows:
                left, place = a + 4 * row * a_stride, target + 4 * row * c_stride
                if fresh:
                    matrix_tile(kind, 1, 2, 1, left, a_stride, right, b_stride, inner, place, c_stride)
                else:
                    matrix_tile(kind, 1, 2, 0, left, a_stride, right, b_stride, inner, place, c_stride)
                row += 1
        else:
            for row in range(rows):
                left, place = a + 4 * row * a_stride, target + 4 * row * c_stride
                if fresh:
                    matrix_tile(kind, 1, 1, 1, left, a_stride, right, b_stride, inner, place, c_stride)
                else:
                    matrix_tile(kind, 1, 1, 0, left, a_stride, right, b_stride, inner, place, c_stride)


@kernel
def _finish(
    tokens: int,
    group: int,
    dim: int,
    scale: float,
    outputs: Any,
    highest: Any,
    total: Any,
    heads: int,
    out: int,
    lse: int,
) -> None:
    """Divide by the sums and write one item's outputs and log-sum-exps."""
    for row in range(tokens * group):
        place = row // group * heads * group + row % group
        spread = broadcast(np.float32(1.0 / total[row]))
        for d in range(0, dim, 8):
            value = load(FLOAT32, outputs.ctypes.data + 4 * (row * dim + d))
            store(FLOAT32, out + 4 * (place * dim + d), mul(value, spread))
        store_scalar(FLOAT32, lse + 4 * place, np.float32(highest[row] * scale + np.log(total[row])))
