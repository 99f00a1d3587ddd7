"""How much attention each stored token received from a chunk of queries, with Numba.

A worker takes a block of stored tokens of one (sequence, KV head): its keys are transposed once, the chunk's
queries pass by, and since nobody else writes to these tokens their sums need no lock.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curkv.kernels.cpu.jit import inlined
from curkv.kernels.cpu.lanes import add, broadcast
from curkv.kernels.cpu.memory import (
    FLOAT32,
    address,
    fetch_add,
    load,
    load_int32,
    load_scalar,
    row_address,
    store,
    store_scalar,
)
from curkv.kernels.cpu.positions import position_of
from curkv.kernels.cpu.softmax import hide_first, row_exp2, row_softcap
from curkv.kernels.cpu.threads import THREADS
from curkv.kernels.cpu.tiles import STRIP, strip_tile
from curkv.kernels.cpu.vectors import read_addresses
from curkv.kernels.cpu.workers import bits_of_float, compile_worker, float_of_bits, launch, read_arguments
from curkv.kernels.formats.base import VectorFormat
from curkv.kernels.paged_prefill_attention.cpu import KEY_BLOCK, load_keys, load_queries
from curkv.kernels.pages import Pages

QUERY_ROWS = 96  # (query, query head) pairs that are copied together


def column_sums(
    q: Tensor,
    lse: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    query_start: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Add the attention that a chunk's queries pay to each stored token; see `reference.column_sums`.

    head_dim and the page size are multiples of 8.
    """
    _, query_heads, dim = q.shape
    heads, page_size = table.shape[1], pages.page_size
    if dim % 8 or page_size % 8:
        raise ValueError(f"head_dim {dim} and page size {page_size} must be multiples of 8")
    if q.stride()[1:] != (dim, 1):
        q = q.contiguous()
    lse = lse.contiguous()
    group = query_heads // heads
    block = max(1, QUERY_ROWS // group)
    rows = -(-block * group // STRIP) * STRIP
    threads = THREADS.most
    counter = torch.zeros(1, dtype=torch.int64)
    scratch = torch.empty((threads, (rows + KEY_BLOCK) * dim + (STRIP + 1) * KEY_BLOCK))
    launch(
        _worker(pages.k.format), threads,
        row_address(q, torch.float32), q.stride(0), address(lse, torch.float32),
        address(pages.k.addresses, torch.int64), address(pages.attention, torch.float32),
        row_address(table, torch.int32), table.stride(0), table.stride(1),
        row_address(lengths, torch.int32), lengths.stride(0), address(slots, torch.int32),
        address(query_start, torch.int32), slots.shape[0], heads, group, dim, page_size, block,
        bits_of_float(scale * math.log2(math.e)), counter.data_ptr(), scratch.data_ptr(),
        4 * scratch.stride(0), address(pages.position, torch.int32), window or 0,
        bits_of_float(softcap / scale if softcap else 0.0),
    )  # fmt: skip


@functools.cache
def _worker(format: VectorFormat) -> int:
    vectors = format.on_cpu()

    def work(arguments: int, worker: int) -> None:
        _work(vectors, arguments, worker)

    return compile_worker(work)


@inlined
def _work(vectors: Any, arguments: int, worker: int) -> None:
    """Take blocks of stored tokens until none is left.

    The arguments, addresses unless stated otherwise:
        q: float32 [T, H, group, dim], `q_stride` floats per token.
        lse: float32 [T, H, group].
        k, attention: The store of the keys, and the pages of sums.
        table: The page table, `table_stride` and `head_stride` entries per sequence and head.
        lengths: The lengths, `lengths_stride` entries per sequence.
        slots, query_start: int32 [B] and [B + 1].
        batch, heads, group, dim, page_size: Numbers: B, H, query heads per KV head, ...
        block: Number of queries that are copied together.
        factor: scale * log2(e), as bits.
        counter: int64, blocks taken.
        scratch: `scratch_bytes` for each worker: queries, a block of keys, scores of a strip, sums.
        position, window: The pages of positions, and how many newest positions a query attends to, or 0.
        ceiling: softcap / scale as bits, or those of 0.
    """
    (
        q, q_stride, lse, k, attention, table, table_stride, head_stride, lengths, lengths_stride,
        slots, query_start, batch, heads, group, dim, page_size, block, factor_bits, counter, scratch,
        scratch_bytes, position, window, ceiling,
    ) = read_arguments(arguments, 25)  # fmt: skip
    rows = (block * group + STRIP - 1) // STRIP * STRIP
    queries = scratch + worker * scratch_bytes
    keys = queries + 4 * rows * dim
    scores = keys + 4 * KEY_BLOCK * dim
    sums = scores + 4 * STRIP * KEY_BLOCK
    row, first_item, items, slot, begin, chunk, length = -1, 0, 0, 0, 0, 0, 0
    while True:
        item = fetch_add(counter, 1)
        while item >= first_item + items and row < batch * heads:
            row += 1
            if row < batch * heads:
                i = row // heads
                slot = load_int32(slots + 4 * i)
                begin = load_int32(query_start + 4 * i)
                chunk = load_int32(query_start + 4 * i + 4) - begin
                length = load_int32(lengths + 4 * (slot * lengths_stride + row % heads))
                first_item += items
                items = (length + KEY_BLOCK - 1) // KEY_BLOCK
        if row == batch * heads:
            break
        head = row % heads
        pages = table + 4 * (slot * table_stride + head * head_stride)
        start = (item - first_item) * KEY_BLOCK
        width = min(KEY_BLOCK, length - start)
        load_keys(vectors, FLOAT32, dim, read_addresses(vectors, k), pages, page_size, start, width, keys)
        _sum_block(
            q + 4 * (begin * q_stride + head * group * dim), q_stride,
            lse + 4 * (begin * heads + head) * group, heads * group, chunk, start - (length - chunk), width,
            group, dim, block, position, window, pages, page_size, start, float_of_bits(factor_bits),
            float_of_bits(ceiling), queries, keys, scores, sums,
        )  # fmt: skip
        for t in range(width):
            page = load_int32(pages + 4 * ((start + t) // page_size))
            place = attention + 4 * (page * page_size + (start + t) % page_size)
            total = load_scalar(FLOAT32, place) + load_scalar(FLOAT32, sums + 4 * t)
            store_scalar(FLOAT32, place, total)


@inlined
def _sum_block(
    q: int,
    q_stride: int,
    lse: int,
    lse_stride: int,
    chunk: int,
    offset: int,
    width: int,
    group: int,
    dim: int,
    block: int,
    position: int,
    window: int,
    table: int,
    page_size: int,
    start: int,
    factor: float,
    ceiling: float,
    queries: int,
    keys: int,
    scores: int,
    sums: int,
) -> None:
    """Write the attention that `width` tokens receive to `sums`; all but numbers are addresses.

    Args:
        q: Of float32 [chunk, group, dim], `q_stride` floats per token.
        q_stride: See `q`.
        lse: Of float32 [chunk, group], `lse_stride` floats per token.
        lse_stride: See `lse`.
        chunk: Tokens that query.
        offset: The first of the stored tokens, counted from the chunk's first; negative if it is older.
        width: Stored tokens.
        group: Query heads per KV head.
        dim: Size of a head.
        block: Queries that are copied together.
        position: Of the pages of positions.
        window: How many newest positions a query attends to, or 0.
        table: Of the head's row of the page table.
        page_size: Tokens per page.
        start: The first of the stored tokens.
        factor: Of the products, with base 2.
        ceiling: That caps the products, or 0.
        queries: Of scratch, float32 [block * group in whole strips, dim].
        keys: Of the panels of keys.
        scores: Of scratch, float32 [STRIP, KEY_BLOCK].
        sums: Of float32 [KEY_BLOCK], written.
    """
    padded = (width + 7) // 8 * 8
    for j in range(0, padded, 8):
        store(FLOAT32, sums + 4 * j, broadcast(np.float32(0.0)))
    own, hidden = 0, 0  # the position of the chunk's first token; tokens that windows have passed
    if window > 0:
        own = position_of(position, table, page_size, start - offset)
    for first in range(max(0, offset), chunk, block):
        if hidden == width:
            break
        count = min(block, chunk - first)
        rows = count * group
        whole = (rows + STRIP - 1) // STRIP * STRIP
        load_queries(FLOAT32, queries, q + 4 * first * q_stride, q_stride, count, group * dim, whole * dim)
        for row in range(0, rows, STRIP):
            for t in range(0, width, 16):
                strip_tile(
                    FLOAT32, 1, queries + 4 * row * dim, dim, keys + 4 * t * dim, dim,
                    scores + 4 * t, KEY_BLOCK, 64 * dim,
                )  # fmt: skip
            for r in range(min(STRIP, rows - row)):
                token, line = first + (row + r) // group, scores + 4 * r * KEY_BLOCK
                natural = load_scalar(FLOAT32, lse + 4 * (token * lse_stride + (row + r) % group))
                seen = min(width, token - offset + 1)
                if window > 0:
                    while hidden < width and (
                        position_of(position, table, page_size, start + hidden) <= own + token - window
                    ):
                        hidden += 1
                if hidden < seen:
                    if ceiling > 0:
                        row_softcap(line, seen, ceiling)
                    hide_first(line, hidden)
                    row_exp2(FLOAT32, line, seen, padded, factor, natural * math.log2(math.e) / factor)
                    for j in range(0, padded, 8):
                        place = sums + 4 * j
                        store(FLOAT32, place, add(load(FLOAT32, place), load(FLOAT32, line + 4 * j)))
