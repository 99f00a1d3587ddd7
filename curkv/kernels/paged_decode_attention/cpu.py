"""Attention of one new token per sequence over ragged pages, with Numba.

The tokens of each (sequence, KV head) are cut into splits of about 512; threads take (sequence, head, split)
items from a shared counter, so that one long sequence keeps all of them busy. An item reads its K once for
the whole group of query heads, takes the softmax of the scores, then reads its V once. Whoever finishes the
last split of a head merges them (Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
No score of a token beyond a head's length is used and no V beyond it is read: unused memory may hold NaN.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from curkv.kernels.cpu.jit import inlined, kernel
from curkv.kernels.cpu.lanes import absolute, broadcast, fma, keep_first, lane_max, maximum, mul
from curkv.kernels.cpu.memory import (
    FLOAT32,
    KINDS,
    address,
    fetch_add,
    load,
    load_int32,
    load_int32s,
    load_scalar,
    prefetch,
    row_address,
    scales_address,
    store,
    store_int16,
    store_scalar,
)
from curkv.kernels.cpu.rows import dot_rows, dot_rows_int8, weigh_rows, weigh_rows_int8
from curkv.kernels.cpu.softmax import row_exp2, row_max
from curkv.kernels.cpu.workers import (
    bits_of_float,
    compile_worker,
    counters,
    empty,
    float_of_bits,
    launch,
    read_arguments,
)
from curkv.kernels.pages import Pages

SPLIT_TOKENS = 512  # 127 times as many int16 are less than an int32 holds
_LARGEST_INT16 = np.float32(32767)


def paged_decode_attention(
    q: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    scale: float,
    accumulate: bool = False,
) -> Tensor:
    """Attend with one query per sequence; see `reference.paged_decode_attention`.

    head_dim and the page size are multiples of 8, and head_dim of 16 with pages of int8.
    """
    batch, query_heads, dim = q.shape
    heads, page_size, dtype = table.shape[1], pages.k.shape[1], pages.k.dtype
    if dim % 8 or page_size % 8:
        raise ValueError(f"head_dim {dim} and page size {page_size} must be multiples of 8")
    if dtype == torch.int8 and dim % 16:
        raise ValueError(f"head_dim {dim} must be a multiple of 16 with a cache of int8")
    if q.stride()[1:] != (dim, 1):
        q = q.contiguous()
    where = (
        row_address(table, torch.int32), table.stride(0), table.stride(1),
        row_address(lengths, torch.int32), lengths.stride(0), address(slots, torch.int32),
    )  # fmt: skip
    group = query_heads // heads
    width = max(1, SPLIT_TOKENS // page_size) * page_size
    items = batch * heads * -(-table.shape[2] * page_size // width)
    workers = min(numba.get_num_threads(), items)
    if accumulate:
        items = _count_items(*where[3:], batch, heads, width)
    out = empty(batch, query_heads, dim)
    finished = counters(batch * heads + 1)
    partial = empty(items, group, dim + 2)
    scores = empty(items if accumulate else workers, group, width)
    scratch_bytes = group * (6 * dim + 2 * width + 4) if dtype == torch.int8 else 0
    scratch = empty(workers, scratch_bytes, dtype=torch.int8) if scratch_bytes else partial
    launch(
        _worker(dtype), workers,
        row_address(q, torch.float32), q.stride(0), address(pages.k, dtype), address(pages.v, dtype),
        scales_address(pages.k_scale), scales_address(pages.v_scale), *where,
        out.data_ptr(), batch, heads, group, dim, page_size, width, bits_of_float(scale * math.log2(math.e)),
        finished.data_ptr(), partial.data_ptr(), scores.data_ptr(), scratch.data_ptr(), scratch_bytes,
        accumulate,
    )  # fmt: skip
    if accumulate:
        _add_attention(
            address(pages.attention, torch.float32), *where, batch, heads, group, dim, page_size, width,
            scale * math.log2(math.e), partial.data_ptr(), scores.data_ptr(),
        )  # fmt: skip
    return out


@kernel
def _count_items(lengths: int, lengths_stride: int, slots: int, batch: int, heads: int, width: int) -> int:
    """How many splits of `width` tokens there are."""
    items = 0
    for row in range(batch * heads):
        slot = load_int32(slots + 4 * (row // heads))
        items += _splits(load_int32(lengths + 4 * (slot * lengths_stride + row % heads)), width)
    return items


@inlined
def _splits(length: int, width: int) -> int:
    """Splits of a head: one if it has no tokens, which writes zeros."""
    return max(1, (length + width - 1) // width)


@functools.cache
def _worker(dtype: torch.dtype) -> int:
    kind = KINDS[dtype]

    def work(arguments: int, worker: int) -> None:
        _work(kind, arguments, worker)

    return compile_worker(work)


@inlined
def _work(kind: Any, arguments: int, worker: int) -> None:
    """Take splits until none is left, and merge the heads whose last split was finished here.

    The arguments, addresses unless stated otherwise:
        q: float32 [B, H, group, dim], `q_stride` floats per sequence.
        k, v: The pages of K and V.
        k_scale, v_scale: The pages of their scales, or 0.
        table: The page table, `table_stride` and `head_stride` entries per sequence and head.
        lengths: The lengths, `lengths_stride` entries per sequence.
        slots: int32 [B].
        out: float32 [B, H, group, dim].
        batch, heads, group, dim, page_size: Numbers: B, H, query heads per KV head, ...
        width: Number of tokens per split.
        factor: scale * log2(e), as bits.
        finished: int64 [B * H + 1], splits finished of each (sequence, head); at the end: splits taken.
        partial: float32 [splits, group, dim + 2], weighted values of each split, its largest score, and the
            sum of its exponentials relative to that.
        scores: float32 [splits or workers, group, width].
        scratch: `scratch_bytes` for each worker, if there are scales: queries int16 [group, dim], weights
            int16 [group, width], sums int32 [group, dim], float32 [group].
        keep: 1 to keep the exponentials of all splits in `scores`, 0 to keep those of each worker's last.
    """
    (
        q, q_stride, k, v, k_scale, v_scale, table, table_stride, head_stride, lengths, lengths_stride, slots,
        out, batch, heads, group, dim, page_size, width, factor_bits, finished, partial, scores, scratch,
        scratch_bytes, keep,
    ) = read_arguments(arguments, 26)  # fmt: skip
    factor = float_of_bits(factor_bits)
    rows = batch * heads
    row, first_item, splits, slot, length = -1, 0, 0, 0, 0
    while True:
        item = fetch_add(finished + 8 * rows, 1)
        while item >= first_item + splits and row < rows:
            row += 1
            if row < rows:
                slot = load_int32(slots + 4 * (row // heads))
                length = load_int32(lengths + 4 * (slot * lengths_stride + row % heads))
                first_item += splits
                splits = _splits(length, width)
        if row == rows:
            break
        split = item - first_item
        query = q + 4 * (row // heads * q_stride + row % heads * group * dim)
        pages = table + 4 * (slot * table_stride + row % heads * head_stride + split * (width // page_size))
        count = min(width, length - split * width)
        exponentials = scores + 4 * (item if keep else worker) * group * width
        mine = partial + 4 * item * group * (dim + 2)
        if k_scale:
            _attend_int8_split(
                group, dim, query, k, v, k_scale, v_scale, pages, page_size, count, width, factor,
                exponentials, scratch + worker * scratch_bytes, mine,
            )  # fmt: skip
        else:
            _attend_split(
                kind, group, dim, query, k, v, pages, page_size, count, width, factor, exponentials, mine
            )
        if fetch_add(finished + 8 * row, 1) == splits - 1:
            stride = 4 * group * (dim + 2)
            _merge(out + 4 * row * group * dim, group, dim, factor, splits, partial + first_item * stride)


@inlined
def _attend_split(
    kind: Any,
    group: int,
    dim: int,
    q: int,
    k: int,
    v: int,
    table: int,
    page_size: int,
    count: int,
    width: int,
    factor: float,
    scores: int,
    partial: int,
) -> None:
    """Attend with a group's queries over `count` tokens, which start on the first page of `table`.

    Writes the exponentials to `scores` and the rest to `partial`, float32 [group, dim + 2].
    """
    page_bytes = page_size * dim * kind.itemsize
    for start in range(0, count, page_size):
        page = load_int32(table + 4 * (start // page_size))
        tokens = min(page_size, count - start)
        keys = k + page * page_bytes
        if start + page_size < count:
            next_read = k + load_int32(table + 4 * (start // page_size + 1)) * page_bytes
        else:
            next_read = v + load_int32(table) * page_bytes
        _score_page(kind, group, dim, q, keys, tokens, scores + 4 * start, width, next_read - keys)
    for g in range(group):
        row = scores + 4 * g * width
        top = row_max(row, count)
        mine = partial + 4 * g * (dim + 2)
        store_scalar(FLOAT32, mine + 4 * dim, top)
        store_scalar(FLOAT32, mine + 4 * dim + 4, row_exp2(FLOAT32, row, count, count, factor, top))
        for d in range(0, dim, 8):
            store(FLOAT32, mine + 4 * d, broadcast(np.float32(0.0)))
    for start in range(0, count, page_size):
        page = load_int32(table + 4 * (start // page_size))
        tokens = min(page_size, count - start)
        values = v + page * page_bytes
        next_read = values
        if start + page_size < count:
            next_read = v + load_int32(table + 4 * (start // page_size + 1)) * page_bytes
        _weigh_page(kind, group, dim, scores + 4 * start, width, values, tokens, partial, next_read - values)


@inlined
def _attend_int8_split(
    group: int,
    dim: int,
    q: int,
    k: int,
    v: int,
    k_scale: int,
    v_scale: int,
    table: int,
    page_size: int,
    count: int,
    width: int,
    factor: float,
    scores: int,
    scratch: int,
    partial: int,
) -> None:
    """`_attend_split` for pages of int8: a key's scale multiplies its scores, a value's its weights.

    Queries and weights are rounded to int16, each row by its largest number. What a weight is off by is at
    most a 65,534th of the largest weight of the split.
    """
    weights = scratch + 2 * group * dim
    sums = weights + 2 * group * width
    ranges = sums + 4 * group * dim
    for g in range(group):
        store_scalar(FLOAT32, ranges + 4 * g, _round_row(q + 4 * g * dim, dim, scratch + 2 * g * dim))
        for d in range(0, dim, 8):
            store(FLOAT32, sums + 4 * (g * dim + d), broadcast(np.float32(0.0)))
    for start in range(0, count, page_size):
        page = load_int32(table + 4 * (start // page_size))
        tokens = min(page_size, count - start)
        next_page, base = load_int32(table), v
        if start + page_size < count:
            next_page, base = load_int32(table + 4 * (start // page_size + 1)), k
        keys = k + page * page_size * dim
        ahead = base + next_page * page_size * dim - keys
        _score_int8_page(group, dim, scratch, keys, tokens, scores + 4 * start, width, ahead)
        for t in range(0, tokens, 8):
            place = 4 * (page * page_size + t)
            prefetch(v_scale + place)
            prefetch(k_scale + 4 * (next_page * page_size + t))
            scale = load(FLOAT32, k_scale + place)
            for g in range(group):
                score = scores + 4 * (g * width + start + t)
                spread = broadcast(load_scalar(FLOAT32, ranges + 4 * g))
                store(FLOAT32, score, mul(load(FLOAT32, score), mul(scale, spread)))
    for g in range(group):
        row = scores + 4 * g * width
        top = row_max(row, count)
        mine = partial + 4 * g * (dim + 2)
        store_scalar(FLOAT32, mine + 4 * dim, top)
        store_scalar(FLOAT32, mine + 4 * dim + 4, row_exp2(FLOAT32, row, count, count, factor, top))
        largest = _weigh_row(row, v_scale, table, page_size, count, weights + 2 * g * width)
        store_scalar(FLOAT32, ranges + 4 * g, largest)
    for start in range(0, count, page_size):
        page = load_int32(table + 4 * (start // page_size))
        tokens = min(page_size, count - start)
        next_page = page
        if start + page_size < count:
            next_page = load_int32(table + 4 * (start // page_size + 1))
        ahead = (next_page - page) * page_size * dim
        values = v + page * page_size * dim
        _weigh_int8_page(group, dim, weights + 2 * start, width, values, tokens, sums, ahead)
    for g in range(group):
        spread = broadcast(load_scalar(FLOAT32, ranges + 4 * g))
        for d in range(0, dim, 8):
            total = mul(load_int32s(sums + 4 * (g * dim + d)), spread)
            store(FLOAT32, partial + 4 * (g * (dim + 2) + d), total)


@inlined
def _round_row(source: int, count: int, target: int) -> Any:
    """Write float32 [count] as int16; returns what those must be multiplied with."""
    largest = broadcast(np.float32(0.0))
    for d in range(0, count, 8):
        largest = maximum(absolute(load(FLOAT32, source + 4 * d)), largest)
    most = lane_max(largest)
    spread = broadcast(_LARGEST_INT16 / most if most > 0 else np.float32(0.0))
    for d in range(0, count, 8):
        store_int16(target + 2 * d, mul(load(FLOAT32, source + 4 * d), spread))
    return most / _LARGEST_INT16


@inlined
def _weigh_row(row: int, v_scale: int, table: int, page_size: int, count: int, target: int) -> Any:
    """Multiply exponentials float32 [count] by their values' scales; write int16, and zeros up to an eight.

    Returns:
        What those must be multiplied with.
    """
    zeros = broadcast(np.float32(0.0))
    largest = zeros
    for start in range(0, count, page_size):
        scales = v_scale + 4 * load_int32(table + 4 * (start // page_size)) * page_size
        for t in range(0, min(page_size, count - start), 8):
            weight = mul(load(FLOAT32, row + 4 * (start + t)), load(FLOAT32, scales + 4 * t))
            largest = maximum(keep_first(weight, count - start - t, zeros), largest)
    most = lane_max(largest)
    spread = broadcast(_LARGEST_INT16 / most if most > 0 else np.float32(0.0))
    for start in range(0, count, page_size):
        scales = v_scale + 4 * load_int32(table + 4 * (start // page_size)) * page_size
        for t in range(0, min(page_size, count - start), 8):
            weight = mul(load(FLOAT32, row + 4 * (start + t)), load(FLOAT32, scales + 4 * t))
            weight = mul(keep_first(weight, count - start - t, zeros), spread)
            store_int16(target + 2 * (start + t), weight)
    return most / _LARGEST_INT16


@inlined
def _score_int8_page(
    group: int, dim: int, q: int, k: int, tokens: int, scores: int, width: int, ahead: int
) -> None:
    """`_score_page` for int16 queries and int8 keys, without scales."""
    g = 0
    while g < group:
        rows = _block(group - g)
        query, target = q + 2 * g * dim, scores + 4 * g * width
        if rows == 3:
            dot_rows_int8(3, query, dim, k, tokens, target, width, ahead)
        elif rows == 2:
            dot_rows_int8(2, query, dim, k, tokens, target, width, ahead)
        else:
            dot_rows_int8(1, query, dim, k, tokens, target, width, ahead)
        g += rows


@inlined
def _weigh_int8_page(
    group: int, dim: int, weights: int, width: int, v: int, tokens: int, sums: int, ahead: int
) -> None:
    """Add a page's int8 values, weighted by int16 [group, width], to `sums`, int32 [group, dim]."""
    body = dim - dim % 32
    g = 0
    while g < group:
        rows = _block(group - g)
        row, target = weights + 2 * g * width, sums + 4 * g * dim
        for d in range(0, body, 32):
            if rows == 3:
                weigh_rows_int8(3, 4, row, width, v + d, dim, tokens, target + 4 * d, dim, ahead)
            elif rows == 2:
                weigh_rows_int8(2, 4, row, width, v + d, dim, tokens, target + 4 * d, dim, ahead)
            else:
                weigh_rows_int8(1, 4, row, width, v + d, dim, tokens, target + 4 * d, dim, ahead)
        if body < dim:
            for r in range(rows):
                single, place = row + 2 * r * width, target + 4 * (r * dim + body)
                weigh_rows_int8(1, 2, single, width, v + body, dim, tokens, place, dim, ahead)
        g += rows


@inlined
def _block(rows: int) -> int:
    """How many of the query heads that are left to take together: 3 x 4 accumulators fit 16 registers."""
    return 3 if rows == 3 or rows >= 5 else min(rows, 2)


@inlined
def _score_page(
    kind: Any, group: int, dim: int, q: int, k: int, tokens: int, scores: int, width: int, ahead: int
) -> None:
    """Write the scores [group, tokens] of a page's keys, four at a time: up to three too many."""
    g = 0
    while g < group:
        rows = _block(group - g)
        query, target = q + 4 * g * dim, scores + 4 * g * width
        if rows == 3:
            dot_rows(kind, 3, query, dim, k, tokens, target, width, ahead)
        elif rows == 2:
            dot_rows(kind, 2, query, dim, k, tokens, target, width, ahead)
        else:
            dot_rows(kind, 1, query, dim, k, tokens, target, width, ahead)
        g += rows


@inlined
def _weigh_page(
    kind: Any, group: int, dim: int, weights: int, width: int, v: int, tokens: int, out: int, ahead: int
) -> None:
    """Add a page's values, weighted, to `out`, float32 [group, dim + 2]."""
    stride = dim + 2
    g = 0
    while g < group:
        rows = _block(group - g)
        row, target = weights + 4 * g * width, out + 4 * g * stride
        wide = 64 if rows == 1 else 32
        body = dim - dim % wide
        for d in range(0, body, wide):
            value, place = v + d * kind.itemsize, target + 4 * d
            if rows == 3:
                weigh_rows(kind, 3, 4, row, width, value, dim, tokens, place, stride, ahead)
            elif rows == 2:
                weigh_rows(kind, 2, 4, row, width, value, dim, tokens, place, stride, ahead)
            else:
                weigh_rows(kind, 1, 8, row, width, value, dim, tokens, place, stride, ahead)
        for d in range(body, dim, 8):
            value, place = v + d * kind.itemsize, target + 4 * d
            for r in range(rows):
                single, out_row = row + 4 * r * width, place + 4 * r * stride
                weigh_rows(kind, 1, 1, single, width, value, dim, tokens, out_row, stride, ahead)
        g += rows


@inlined
def _merge(out: int, group: int, dim: int, factor: float, splits: int, partial: int) -> None:
    """Combine the splits of one head, float32 [splits, group, dim + 2], into [group, dim] at `out`."""
    for g in range(group):
        target = out + 4 * g * dim
        top, total = _combine(group, dim, factor, splits, partial, g)
        for split in range(splits):
            source = partial + 4 * (split * group + g) * (dim + 2)
            weight = broadcast(np.float32(_share(factor, load_scalar(FLOAT32, source + 4 * dim), top, total)))
            for d in range(0, dim, 8):
                old = load(FLOAT32, target + 4 * d) if split else broadcast(np.float32(0.0))
                store(FLOAT32, target + 4 * d, fma(weight, load(FLOAT32, source + 4 * d), old))


@inlined
def _combine(group: int, dim: int, factor: float, splits: int, partial: int, g: int) -> tuple[Any, Any]:
    """A query's largest score over all splits, and the sum of its exponentials relative to that."""
    top, total = np.float32(-np.inf), 0.0
    for split in range(splits):
        state = partial + 4 * ((split * group + g) * (dim + 2) + dim)
        other, count = load_scalar(FLOAT32, state), load_scalar(FLOAT32, state + 4)
        if other > top:
            total *= np.exp2(factor * (top - other))
            top = other
        if count > 0:
            total += count * np.exp2(factor * (other - top))
    return top, total


@inlined
def _share(factor: float, highest: float, top: float, total: float) -> float:
    """What turns a split's exponentials into probabilities; 0 if the head has no tokens."""
    return np.exp2(factor * (highest - top)) / total if total > 0 else 0.0


@kernel
def _add_attention(
    attention: int,
    table: int,
    table_stride: int,
    head_stride: int,
    lengths: int,
    lengths_stride: int,
    slots: int,
    batch: int,
    heads: int,
    group: int,
    dim: int,
    page_size: int,
    width: int,
    factor: float,
    partial: int,
    scores: int,
) -> None:
    """Add the tokens' probabilities, summed over the query heads of a group, to the page pool."""
    scale = np.empty(group, np.float32)
    for row in range(batch * heads):
        slot = load_int32(slots + 4 * (row // heads))
        length = load_int32(lengths + 4 * (slot * lengths_stride + row % heads))
        splits = _splits(length, width)
        for split in range(splits):
            for g in range(group):
                top, total = _combine(group, dim, factor, splits, partial, g)
                highest = load_scalar(FLOAT32, partial + 4 * ((split * group + g) * (dim + 2) + dim))
                scale[g] = _share(factor, highest, top, total)
            start = split * width
            pages = table + 4 * (slot * table_stride + row % heads * head_stride)
            _add_split(
                attention, pages, page_size, start, min(width, length - start), group, scale, scores, width
            )
            scores += 4 * group * width
        partial += 4 * splits * group * (dim + 2)


@inlined
def _add_split(
    attention: int,
    table: int,
    page_size: int,
    start: int,
    count: int,
    group: int,
    scale: Any,
    scores: int,
    width: int,
) -> None:
    """Add `count` tokens' exponentials, float32 [group, width], scaled per query head, by eights.

    Those behind the last token are 0.
    """
    for t in range(0, count, 8):
        page = load_int32(table + 4 * ((start + t) // page_size))
        place = attention + 4 * (page * page_size + (start + t) % page_size)
        weigh_rows(FLOAT32, 1, 1, scale.ctypes.data, 0, scores + 4 * t, width, group, place, 0, 0)
