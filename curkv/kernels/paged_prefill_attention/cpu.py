"""Attention of chunks of new tokens over ragged pages, with Numba.

Threads take blocks of queries of one (sequence, KV head) from a shared counter, those with the most keys
first. For each block of keys, K is transposed and K and V are converted into scratch memory, once for all
query heads of the group and all queries of the block; then strips of query rows go through scores,
exponentials and weighted values with a running maximum (FlashAttention-2, https://arxiv.org/abs/2307.08691,
section 3.1). A strip starts at the block of the first key that one of its queries may see, and stops at the
last one. No score beyond a query's last key is used and no V beyond the length is read: unused memory may
hold NaN.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curkv.kernels.cpu.features import MULTIPLIES_BFLOAT16
from curkv.kernels.cpu.jit import inlined
from curkv.kernels.cpu.lanes import broadcast, mul
from curkv.kernels.cpu.memory import (
    FLOAT32,
    KINDS,
    address,
    fetch_add,
    load,
    load_int32,
    load_scalar,
    row_address,
    store,
    store_int32,
    store_scalar,
)
from curkv.kernels.cpu.panels import store_panel_columns, store_panel_rows
from curkv.kernels.cpu.positions import first_in_window, position_of
from curkv.kernels.cpu.softmax import hide_first, row_exp2, row_max, row_softcap
from curkv.kernels.cpu.threads import THREADS
from curkv.kernels.cpu.tiles import BFLOAT16_STRIP, strip_rows, strip_tile
from curkv.kernels.cpu.vectors import load_channels, read_addresses
from curkv.kernels.cpu.workers import bits_of_float, compile_worker, float_of_bits, launch, read_arguments
from curkv.kernels.formats.base import VectorFormat
from curkv.kernels.pages import Pages

KEY_BLOCK = 128  # keys in scratch at once: K and V of head_dim 64 take 64 KiB, which stays in the L2 cache
QUERY_ROWS = 384  # (query, query head) pairs that share them


def paged_prefill_attention(
    q: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    query_start: Tensor,
    scale: float,
    return_lse: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with a chunk of queries per sequence; see `reference.paged_prefill_attention`.

    head_dim and the page size are multiples of 8. Queries of bfloat16 are widened where the machine does not
    multiply in it.
    """
    tokens, query_heads, dim = q.shape
    heads, page_size = table.shape[1], pages.page_size
    if dim % 8 or page_size % 8:
        raise ValueError(f"head_dim {dim} and page size {page_size} must be multiples of 8")
    if not (MULTIPLIES_BFLOAT16 and dim % 16 == 0):
        q = q.float()
    if q.stride()[1:] != (dim, 1):
        q = q.contiguous()
    group = query_heads // heads
    threads = THREADS.most
    block = max(1, min(QUERY_ROWS // group, -(-tokens * heads // (4 * threads))))
    out = torch.empty((tokens, query_heads, dim))
    lse = torch.empty((tokens, query_heads) if return_lse else 0)
    counter = torch.zeros(1, dtype=torch.int64)
    scratch = torch.empty((threads, _scratch_size(block * group, dim)))
    launch(
        _worker(pages.k.format, pages.v.format, q.dtype), threads,
        row_address(q, q.dtype), q.stride(0), address(pages.k.addresses, torch.int64),
        address(pages.v.addresses, torch.int64),
        row_address(table, torch.int32), table.stride(0), table.stride(1),
        row_address(lengths, torch.int32), lengths.stride(0),
        address(slots, torch.int32), address(query_start, torch.int32),
        out.data_ptr(), lse.data_ptr() if return_lse else 0,
        slots.shape[0], heads, group, dim, page_size, block, bits_of_float(scale * math.log2(math.e)),
        counter.data_ptr(), scratch.data_ptr(), 4 * scratch.stride(0),
        address(pages.position, torch.int32), window or 0, bits_of_float(softcap / scale if softcap else 0.0),
        0 if sinks is None else address(sinks, torch.float32),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _scratch_size(rows: int, dim: int) -> int:
    """Floats of scratch per worker; see `_attend_block`."""
    padded_rows, padded_dim = rows + BFLOAT16_STRIP, dim + 8
    return padded_rows * (dim + padded_dim + 3) + KEY_BLOCK * (dim + padded_dim) + BFLOAT16_STRIP * KEY_BLOCK


@functools.cache
def _worker(key_format: VectorFormat, value_format: VectorFormat, operands: torch.dtype) -> int:
    keys, values, operand = key_format.on_cpu(), value_format.on_cpu(), KINDS[operands]

    def work(arguments: int, worker: int) -> None:
        _work(keys, values, operand, arguments, worker)

    return compile_worker(work)


@inlined
def _work(keys: Any, values: Any, operand: Any, arguments: int, worker: int) -> None:
    """Take blocks of queries until none is left.

    The arguments, addresses unless stated otherwise:
        q: [T, H, group, dim] of the kind `operand`, `q_stride` values per token.
        k, v: The stores of keys and values, of the formats `keys` and `values`.
        table: The page table, `table_stride` and `head_stride` entries per sequence and head.
        lengths: The lengths, `lengths_stride` entries per sequence.
        slots, query_start: int32 [B] and [B + 1].
        out: float32 [T, H, group, dim].
        lse: float32 [T, H, group], or 0.
        batch, heads, group, dim, page_size: Numbers: B, H, query heads per KV head, ...
        block: Number of queries in a block.
        factor: scale * log2(e), as bits.
        counter: int64, blocks taken.
        scratch: `scratch_bytes` for each worker.
        position, window: The pages of positions, and how many newest positions a query attends to, or 0.
        ceiling: softcap / scale as bits, or those of 0.
        sinks: float32 [H, group], or 0.
    """
    (
        q, q_stride, k, v, table, table_stride, head_stride, lengths, lengths_stride, slots,
        query_start, out, lse, batch, heads, group, dim, page_size, block, factor_bits, counter, scratch,
        scratch_bytes, position, window, ceiling, sinks,
    ) = read_arguments(arguments, 27)  # fmt: skip
    i, first_item, items, start, new_tokens = -1, 0, 0, 0, 0
    while True:
        item = fetch_add(counter, 1)
        while item >= first_item + items and i < batch:
            i += 1
            if i < batch:
                start = load_int32(query_start + 4 * i)
                new_tokens = load_int32(query_start + 4 * i + 4) - start
                first_item += items
                items = (new_tokens + block - 1) // block * heads
        if i == batch:
            break
        head = (item - first_item) % heads
        first = (items // heads - 1 - (item - first_item) // heads) * block
        count = min(block, new_tokens - first)
        slot = load_int32(slots + 4 * i)
        seen = load_int32(lengths + 4 * (slot * lengths_stride + head)) - new_tokens + first + 1
        row = ((start + first) * heads + head) * group
        _attend_block(
            keys, values, operand, group, dim,
            q + operand.itemsize * ((start + first) * q_stride + head * group * dim), q_stride, count, seen,
            read_addresses(keys, k), read_addresses(values, v),
            table + 4 * (slot * table_stride + head * head_stride), page_size,
            position, window, float_of_bits(factor_bits), float_of_bits(ceiling),
            sinks + 4 * head * group if sinks else 0, out + 4 * row * dim, lse + 4 * row if lse else 0,
            heads * group, scratch + worker * scratch_bytes,
        )  # fmt: skip


@inlined
def _attend_block(
    key_format: Any,
    value_format: Any,
    operand: Any,
    group: int,
    dim: int,
    q: int,
    q_stride: int,
    count: int,
    seen: int,
    k: Any,
    v: Any,
    table: int,
    page_size: int,
    position: int,
    window: int,
    factor: float,
    ceiling: float,
    sinks: int,
    out: int,
    lse: int,
    out_heads: int,
    scratch: int,
) -> None:
    """Attend with `count` queries of one group of heads; query i sees the first `seen + i` tokens of `table`.

    Of these those within `window` positions of its own, if that is not 0.

    Scratch: queries [rows, dim] and outputs [rows, padded], where rows = count * group and head_dim are
    padded to whole tiles, then a row's largest score and its sum of exponentials, K and V in panels of 16
    columns, the scores of a strip, whose exponentials take their place, and each query's first token. What is
    multiplied is of the kind `operand`: float32, or bfloat16 in half of the room.
    """
    rows, strip = count * group, strip_rows(operand)
    padded_rows = (rows + strip - 1) // strip * strip
    padded = (dim + 15) // 16 * 16
    outputs = scratch + 4 * padded_rows * dim
    states = outputs + 4 * padded_rows * padded
    keys = states + 8 * padded_rows
    values = keys + 4 * KEY_BLOCK * dim
    scores = values + 4 * KEY_BLOCK * padded
    begins = scores + 4 * strip * KEY_BLOCK
    load_queries(operand, scratch, q, q_stride, count, group * dim, padded_rows * dim)
    zeros = broadcast(np.float32(0.0))
    for d in range(0, padded_rows * padded, 8):
        store(FLOAT32, outputs + 4 * d, zeros)
    for row in range(padded_rows):
        store_scalar(FLOAT32, states + 8 * row, np.float32(-np.inf))
        store_scalar(FLOAT32, states + 8 * row + 4, np.float32(0.0))
    length, start = seen + count - 1, 0
    if window > 0:
        for i in range(count):
            newest = position_of(position, table, page_size, seen + i - 1)
            begin = first_in_window(position, table, page_size, seen + i - 1, newest, window)
            store_int32(begins + 4 * i, begin)
        start = load_int32(begins) // 8 * 8
    for first in range(start, length, KEY_BLOCK):
        tokens = min(KEY_BLOCK, length - first)
        load_keys(key_format, operand, dim, k, table, page_size, first, tokens, keys)
        _load_values(value_format, operand, dim, v, table, page_size, first, tokens, values)
        for row in range(0, rows, strip):
            last = min(row + strip, rows) - 1
            width = min(tokens, seen + last // group - first)
            passed = window > 0 and load_int32(begins + 4 * (row // group)) >= first + tokens
            if width > 0 and not passed:
                query = scratch + operand.itemsize * row * dim
                for t in range(0, width, 16):
                    panel, ahead = keys + operand.itemsize * t * dim, 16 * operand.itemsize * dim
                    strip_tile(operand, 1, query, dim, panel, dim, scores + 4 * t, KEY_BLOCK, ahead)
                for r in range(strip):
                    token = min(row + r, last) // group
                    visible = min(tokens, seen + token - first)
                    hidden = max(0, load_int32(begins + 4 * token) - first) if window > 0 else 0
                    _update_row(
                        operand, scores + 4 * r * KEY_BLOCK, hidden, visible, width, factor, ceiling,
                        states + 8 * (row + r), outputs + 4 * (row + r) * padded, padded,
                    )  # fmt: skip
                weights_stride, ahead = 4 * KEY_BLOCK // operand.itemsize, 16 * operand.itemsize * KEY_BLOCK
                for d in range(0, padded, 16):
                    panel = values + operand.itemsize * d * KEY_BLOCK
                    strip_tile(
                        operand, 0, scores, weights_stride, panel, width + width % 2,
                        outputs + 4 * (row * padded + d), padded, ahead,
                    )  # fmt: skip
    for row in range(rows):
        place = row // group * out_heads + row % group
        top, total = load_scalar(FLOAT32, states + 8 * row), load_scalar(FLOAT32, states + 8 * row + 4)
        whole = np.float64(total)
        if sinks:  # which may be far above the scores
            sink = load_scalar(FLOAT32, sinks + 4 * (row % group))
            whole += np.exp2(math.log2(math.e) * sink - factor * top)
        inverse = broadcast(np.float32(1.0 / whole))
        for d in range(0, dim, 8):
            value = mul(load(FLOAT32, outputs + 4 * (row * padded + d)), inverse)
            store(FLOAT32, out + 4 * (place * dim + d), value)
        if lse:
            natural = (factor * top + np.log2(whole)) * math.log(2)
            store_scalar(FLOAT32, lse + 4 * place, np.float32(natural))


@inlined
def load_queries(
    kind: Any, target: int, q: int, q_stride: int, count: int, size: int, padded_size: int
) -> None:
    """Copy `count` tokens' queries, `size` values each, and fill up with zeros to `padded_size` values."""
    for i in range(count):
        for d in range(0, size, 8):
            value = load(kind, q + kind.itemsize * (i * q_stride + d))
            store(kind, target + kind.itemsize * (i * size + d), value)
    for d in range(count * size, padded_size, 8):
        store(kind, target + kind.itemsize * d, broadcast(np.float32(0.0)))


@inlined
def load_keys(
    vectors: Any,
    operand: Any,
    dim: int,
    k: Any,
    table: int,
    page_size: int,
    first: int,
    tokens: int,
    target: int,
) -> None:
    """Write keys `first ...` as panels [tokens / 16, dim, 16] of `operand`, by eights: up to seven too many.

    How a panel is packed is told at `strip_tile`.
    """
    for t in range(0, tokens, 8):
        index = first + t
        token = load_int32(table + 4 * (index // page_size)) * page_size + index % page_size
        panel = target + operand.itemsize * (t // 16 * 16 * dim) + 4 * (t % 16)
        for d in range(0, dim, 32 // operand.itemsize):
            store_panel_columns(operand, panel + 16 * operand.itemsize * d, vectors, k, dim, token, d)


@inlined
def _load_values(
    vectors: Any,
    operand: Any,
    dim: int,
    v: Any,
    table: int,
    page_size: int,
    first: int,
    tokens: int,
    target: int,
) -> None:
    """Write values `first ...` as panels [dim / 16, KEY_BLOCK, 16] of `operand`, padded with zeros.

    An odd number of tokens is followed by a row of zeros.
    """
    zeros = broadcast(np.float32(0.0))
    for t in range(0, tokens, 2):
        index = first + t
        token = load_int32(table + 4 * (index // page_size)) * page_size + index % page_size
        single = t + 1 == tokens
        for d in range(0, dim, 8):
            place = target + operand.itemsize * 16 * (d // 16 * KEY_BLOCK + t) + 4 * (d % 16)
            value = load_channels(vectors, v, dim, token, d)
            after = zeros if single else load_channels(vectors, v, dim, token + 1, d)
            store_panel_rows(operand, place, value, after)
        if dim % 16:
            place = target + operand.itemsize * 16 * (dim // 16 * KEY_BLOCK + t) + 4 * 8
            store_panel_rows(operand, place, zeros, zeros)


@inlined
def _update_row(
    operand: Any,
    scores: int,
    hidden: int,
    visible: int,
    width: int,
    factor: float,
    ceiling: float,
    state: int,
    output: int,
    padded: int,
) -> None:
    """Turn a row's scores from `hidden` to `visible` into exponentials of `operand`, the others into zeros.

    Those that end at `width` are written. Updates the row's largest score and sum of exponentials at `state`,
    and rescales its output when the largest score has grown.
    """
    if visible <= hidden:
        for t in range(0, width, 8):
            store(operand, scores + operand.itemsize * t, broadcast(np.float32(0.0)))
    else:
        if ceiling > 0:
            row_softcap(scores, visible, ceiling)
        hide_first(scores, hidden)
        top, total = load_scalar(FLOAT32, state), load_scalar(FLOAT32, state + 4)
        highest = row_max(scores, visible)
        if highest > top:
            shrink = np.float32(np.exp2(factor * (top - highest)))
            total *= shrink
            for d in range(0, padded, 8):
                value = mul(load(FLOAT32, output + 4 * d), broadcast(shrink))
                store(FLOAT32, output + 4 * d, value)
            top = highest
            store_scalar(FLOAT32, state, top)
        total += row_exp2(operand, scores, visible, width, factor, top)
        store_scalar(FLOAT32, state + 4, total)
