"""Attention of one new token per sequence over ragged pages, with Numba.

The tokens of each (sequence, KV head) are cut into splits of about 512; threads take (sequence, head, split)
items from a shared counter, so that one long sequence keeps all of them busy. An item reads its K once for
the whole group of query heads, takes the softmax of the scores, then reads its V once. Whoever finishes the
last split of a head merges them (Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
No score of a token beyond a head's length is used and no V beyond it is read: unused memory may hold NaN.
With a window a head begins on the page of the first token in it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curkv.kernels.cpu.jit import inlined
from curkv.kernels.cpu.lanes import broadcast, fma
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
from curkv.kernels.cpu.positions import first_in_window, position_of
from curkv.kernels.cpu.softmax import hide_first, row_exp2, row_max, row_softcap
from curkv.kernels.cpu.threads import THREADS
from curkv.kernels.cpu.vectors import address_of, read_addresses
from curkv.kernels.cpu.workers import (
    bits_of_float,
    compile_worker,
    counters,
    empty,
    float_of_bits,
    launch,
    read_arguments,
)
from curkv.kernels.formats.base import VectorFormat
from curkv.kernels.formats.cpu.base import (
    finish,
    prefetch_page,
    round_queries,
    round_weights,
    score_page,
    weigh_page,
)
from curkv.kernels.pages import Pages

SPLIT_TOKENS = 512  # 127 times as many int16 are less than an int32 holds


def paged_decode_attention(
    q: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend with one query per sequence; see `reference.paged_decode_attention`.

    head_dim and the page size are multiples of 8.
    """
    batch, query_heads, dim = q.shape
    heads, page_size = table.shape[1], pages.page_size
    if dim % 8 or page_size % 8:
        raise ValueError(f"head_dim {dim} and page size {page_size} must be multiples of 8")
    for format in (pages.k.format, pages.v.format):
        if dim % format.multiple:
            raise ValueError(
                f"head_dim {dim} must be a multiple of {format.multiple} with a cache of {format.name}"
            )
    if q.stride()[1:] != (dim, 1):
        q = q.contiguous()
    where = (
        row_address(table, torch.int32), table.stride(0), table.stride(1),
        row_address(lengths, torch.int32), lengths.stride(0), address(slots, torch.int32),
        address(pages.position, torch.int32), window or 0,
    )  # fmt: skip
    extra = 0 if sinks is None else address(sinks, torch.float32)
    group = query_heads // heads
    width = max(1, SPLIT_TOKENS // page_size) * page_size
    items = batch * heads * -(-table.shape[2] * page_size // width)
    workers = min(THREADS.most, items)
    out = empty(batch, query_heads, dim)
    finished = counters(batch * heads + 1)
    partial = empty(items, group, dim + 2)
    scores = empty(workers, group, width)
    for_queries, for_weights = _scratch(pages.k.format, pages.v.format, group, dim, width)
    scratch_bytes = for_queries + for_weights
    scratch = empty(workers, scratch_bytes, dtype=torch.int8) if scratch_bytes else partial
    launch(
        _worker(pages.k.format, pages.v.format), workers,
        row_address(q, torch.float32), q.stride(0), address(pages.k.addresses, torch.int64),
        address(pages.v.addresses, torch.int64), *where,
        out.data_ptr(), batch, heads, group, dim, page_size, width, bits_of_float(scale * math.log2(math.e)),
        finished.data_ptr(), partial.data_ptr(), scores.data_ptr(), scratch.data_ptr(), for_queries,
        scratch_bytes, bits_of_float(softcap / scale if softcap else 0.0), extra,
    )  # fmt: skip
    return out


@inlined
def _passed(position: int, table: int, page_size: int, length: int, window: int) -> int:
    """Tokens of a head that are too old for a window to hold them and the newest one."""
    passed = 0
    if window > 0 and length > 0:
        newest = position_of(position, table, page_size, length - 1)
        passed = first_in_window(position, table, page_size, length - 1, newest, window)
    return passed


@inlined
def _splits(length: int, width: int) -> int:
    """Splits of a head: one if it has no tokens, which writes zeros."""
    return max(1, (length + width - 1) // width)


@functools.cache
def _scratch(keys: VectorFormat, values: VectorFormat, group: int, dim: int, width: int) -> tuple[int, int]:
    """Bytes that a worker needs to round queries and to round weights."""
    for_queries, _ = keys.on_cpu().scratch(group, dim, width)
    _, for_weights = values.on_cpu().scratch(group, dim, width)
    return for_queries, for_weights


@functools.cache
def _worker(key_format: VectorFormat, value_format: VectorFormat) -> int:
    keys, values = key_format.on_cpu(), value_format.on_cpu()

    def work(arguments: int, worker: int) -> None:
        _work(keys, values, arguments, worker)

    return compile_worker(work)


@inlined
def _work(keys: Any, values: Any, arguments: int, worker: int) -> None:
    """Take splits until none is left, and merge the heads whose last split was finished here.

    The arguments, addresses unless stated otherwise:
        q: float32 [B, H, group, dim], `q_stride` floats per sequence.
        k, v: The stores of keys and values, of the formats `keys` and `values`.
        table: The page table, `table_stride` and `head_stride` entries per sequence and head.
        lengths: The lengths, `lengths_stride` entries per sequence.
        slots: int32 [B].
        position, window: The pages of positions, and how many newest positions a query attends to, or 0.
        out: float32 [B, H, group, dim].
        batch, heads, group, dim, page_size: Numbers: B, H, query heads per KV head, ...
        width: Number of tokens per split.
        factor: scale * log2(e), as bits.
        finished: int64 [B * H + 1], splits finished of each (sequence, head); at the end: splits taken.
        partial: float32 [splits, group, dim + 2], weighted values of each split, its largest score, and the
            sum of its exponentials relative to that.
        scores: float32 [workers, group, width], the exponentials of each worker's last split.
        scratch: `scratch_bytes` for each worker, the first `for_queries` for queries, the rest for weights.
        ceiling: softcap / scale as bits, or those of 0.
        sinks: float32 [H, group], or 0.
    """
    (
        q, q_stride, k, v, table, table_stride, head_stride, lengths, lengths_stride, slots, position, window,
        out, batch, heads, group, dim, page_size, width, factor_bits, finished, partial, scores, scratch,
        for_queries, scratch_bytes, ceiling, sinks,
    ) = read_arguments(arguments, 28)  # fmt: skip
    k_store, v_store = read_addresses(keys, k), read_addresses(values, v)
    own = scratch + worker * scratch_bytes
    factor = float_of_bits(factor_bits)
    rows = batch * heads
    row, first_item, splits, slot, length, first_page, passed = -1, 0, 0, 0, 0, 0, 0
    while True:
        item = fetch_add(finished + 8 * rows, 1)
        while item >= first_item + splits and row < rows:
            row += 1
            if row < rows:
                slot = load_int32(slots + 4 * (row // heads))
                length = load_int32(lengths + 4 * (slot * lengths_stride + row % heads))
                first_page = table + 4 * (slot * table_stride + row % heads * head_stride)
                passed = _passed(position, first_page, page_size, length, window)
                first_page += 4 * (passed // page_size)
                length -= passed // page_size * page_size
                passed %= page_size
                first_item += splits
                splits = _splits(length, width)
        if row == rows:
            break
        split = item - first_item
        query = q + 4 * (row // heads * q_stride + row % heads * group * dim)
        pages = first_page + 4 * split * (width // page_size)
        count = min(width, length - split * width)
        exponentials = scores + 4 * worker * group * width
        mine = partial + 4 * item * group * (dim + 2)
        _attend_split(
            keys, values, group, dim, query, k_store, v_store, pages, page_size,
            0 if split else passed, count, width, factor, float_of_bits(ceiling), exponentials, own,
            own + for_queries, mine,
        )  # fmt: skip
        if fetch_add(finished + 8 * row, 1) == splits - 1:
            stride = 4 * group * (dim + 2)
            extra = sinks + 4 * (row % heads) * group if sinks else 0
            target, source = out + 4 * row * group * dim, partial + first_item * stride
            _merge(target, group, dim, factor, splits, source, extra)


@inlined
def _attend_split(
    keys: Any,
    values: Any,
    group: int,
    dim: int,
    q: int,
    k: Any,
    v: Any,
    table: int,
    page_size: int,
    hidden: int,
    count: int,
    width: int,
    factor: float,
    ceiling: float,
    scores: int,
    key_scratch: int,
    value_scratch: int,
    partial: int,
) -> None:
    """Attend with a group's queries over `count` tokens, which start on the first page of `table`.

    The first `hidden` of them, fewer than a page, are not attended to. Scores are capped unless `ceiling` is
    0. Writes the exponentials to `scores` and the rest to `partial`, float32 [group, dim + 2].
    """
    queries = round_queries(keys, group, dim, q, key_scratch)
    for start in range(0, count, page_size):
        token = load_int32(table + 4 * (start // page_size)) * page_size
        tokens = min(page_size, count - start)
        place = address_of(keys, k, dim, token)
        if start + page_size < count:
            next_token = load_int32(table + 4 * (start // page_size + 1)) * page_size
            ahead = address_of(keys, k, dim, next_token) - place
            prefetch_page(keys, k, dim, next_token, tokens)
        else:
            ahead = address_of(values, v, dim, load_int32(table) * page_size) - place
        prefetch_page(values, v, dim, token, tokens)
        score_page(keys, group, dim, queries, k, token, tokens, scores + 4 * start, width, ahead, key_scratch)
    for g in range(group):
        row = scores + 4 * g * width
        if ceiling > 0:
            row_softcap(row, count, ceiling)
        hide_first(row, hidden)
        top = row_max(row, count)
        mine = partial + 4 * g * (dim + 2)
        store_scalar(FLOAT32, mine + 4 * dim, top)
        store_scalar(FLOAT32, mine + 4 * dim + 4, row_exp2(FLOAT32, row, count, count, factor, top))
    round_weights(values, group, dim, scores, width, v, table, page_size, count, value_scratch, partial)
    for start in range(0, count, page_size):
        token = load_int32(table + 4 * (start // page_size)) * page_size
        tokens = min(page_size, count - start)
        next_token = token
        if start + page_size < count:
            next_token = load_int32(table + 4 * (start // page_size + 1)) * page_size
        ahead = address_of(values, v, dim, next_token) - address_of(values, v, dim, token)
        weigh_page(values, group, dim, scores, width, start, v, token, tokens, partial, ahead, value_scratch)
    finish(values, group, dim, value_scratch, partial)


@inlined
def _merge(out: int, group: int, dim: int, factor: float, splits: int, partial: int, sinks: int) -> None:
    """Combine the splits of one head, float32 [splits, group, dim + 2], into [group, dim] at `out`."""
    for g in range(group):
        target = out + 4 * g * dim
        top, total = _combine(group, dim, factor, splits, partial, sinks, g)
        for split in range(splits):
            source = partial + 4 * (split * group + g) * (dim + 2)
            weight = broadcast(np.float32(_share(factor, load_scalar(FLOAT32, source + 4 * dim), top, total)))
            for d in range(0, dim, 8):
                old = load(FLOAT32, target + 4 * d) if split else broadcast(np.float32(0.0))
                store(FLOAT32, target + 4 * d, fma(weight, load(FLOAT32, source + 4 * d), old))


@inlined
def _combine(
    group: int, dim: int, factor: float, splits: int, partial: int, sinks: int, g: int
) -> tuple[Any, Any]:
    """A query's largest score over all splits, and the sum of its exponentials relative to that.

    The sum has that of its head's sink too, if `sinks` are not 0.
    """
    top, total = np.float32(-np.inf), 0.0
    for split in range(splits):
        state = partial + 4 * ((split * group + g) * (dim + 2) + dim)
        other, count = load_scalar(FLOAT32, state), load_scalar(FLOAT32, state + 4)
        if other > top:
            total *= np.exp2(factor * (top - other))
            top = other
        if count > 0:
            total += count * np.exp2(factor * (other - top))
    if sinks and total > 0:
        total += np.exp2(math.log2(math.e) * load_scalar(FLOAT32, sinks + 4 * g) - factor * top)
    return top, total


@inlined
def _share(factor: float, highest: float, top: float, total: float) -> float:
    """What turns a split's exponentials into probabilities; 0 if the head has no tokens."""
    return np.exp2(factor * (highest - top)) / total if total > 0 else 0.0
