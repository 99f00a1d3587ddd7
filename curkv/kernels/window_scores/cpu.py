"""How much attention the newest queries pay to each stored token, with Numba.

A worker takes a row and goes through its queries in blocks: products with all stored keys, one block of keys
at a time, the softmax of every query over what it may read, then its probabilities are added to (or maximised
into) the row. Where the log-sum-exp is known, it takes a block of a row's keys, and all queries pass by; of
the largest probability it looks for the exponent alone.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from curkv.kernels.cpu.features import MULTIPLIES_BFLOAT16
from curkv.kernels.cpu.jit import inlined
from curkv.kernels.cpu.lanes import broadcast, fma, maximum, mul
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
    store_scalar,
)
from curkv.kernels.cpu.positions import position_of
from curkv.kernels.cpu.softmax import exp2, row_exp2, row_max, row_softcap
from curkv.kernels.cpu.threads import THREADS
from curkv.kernels.cpu.tiles import BFLOAT16_STRIP, STRIP, strip_rows, strip_tile
from curkv.kernels.cpu.vectors import read_addresses
from curkv.kernels.cpu.workers import bits_of_float, compile_worker, float_of_bits, launch, read_arguments
from curkv.kernels.formats.base import VectorFormat
from curkv.kernels.paged_prefill_attention.cpu import KEY_BLOCK, load_keys, load_queries
from curkv.kernels.pages import Pages, longest

BLOCK_ROWS = 96  # (query, query head) pairs that go through the keys together


def window_scores(
    queries: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    reduction: Literal["mean", "max"] = "mean",
    lse: Tensor | None = None,
    width: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Score the stored tokens of every head by the last w queries; see `reference.window_scores`.

    head_dim and the page size are multiples of 8.
    """
    rows, window, group, dim = queries.shape
    page_size = pages.page_size
    if dim % 8 or page_size % 8:
        raise ValueError(f"head_dim {dim} and page size {page_size} must be multiples of 8")
    most = longest(lengths) if width is None else width
    # Rows end on whole blocks of keys, which the products reach beyond the last token.
    width = -(-most // KEY_BLOCK) * KEY_BLOCK
    lengths = lengths.contiguous()
    if lse is not None:
        heads = pages, table, lengths
        return _scores_of_later(queries, *heads, scale, reduction, lse, width, softcap)[:, :most]
    queries = queries.float().contiguous()
    scores = torch.empty(rows, width)
    block = -(-min(window * group, BLOCK_ROWS) // STRIP) * STRIP
    workers = min(THREADS.most, rows)
    counter = torch.zeros(1, dtype=torch.int64)
    scratch = torch.empty((workers, block * dim + KEY_BLOCK * dim + block * width))
    launch(
        _worker(pages.k.format), workers,
        address(queries, torch.float32), address(pages.k.addresses, torch.int64),
        address(pages.position, torch.int32), row_address(table, torch.int32), table.stride(0),
        address(lengths, torch.int32),
        scores.data_ptr(),
        rows, window, group, dim, page_size, width, block, bits_of_float(scale * math.log2(math.e)),
        reduction == "max", counter.data_ptr(), scratch.data_ptr(), 4 * scratch.stride(0),
        bits_of_float(softcap / scale if softcap else 0.0),
        0 if sinks is None else address(sinks, torch.float32),
    )  # fmt: skip
    return scores[:, :most]


def _scores_of_later(
    queries: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    reduction: Literal["mean", "max"],
    lse: Tensor,
    width: int,
    softcap: float | None,
) -> Tensor:
    """Score tokens by queries that all read them, float32 [N, width]; `width` is of whole blocks of keys."""
    rows, dim = len(queries), queries.shape[3]
    if not (queries.dtype == torch.bfloat16 and MULTIPLIES_BFLOAT16 and dim % 16 == 0):
        queries = queries.float()
    strip = BFLOAT16_STRIP if queries.dtype == torch.bfloat16 else STRIP
    pairs = lse[0].numel() if rows else 0
    missing = -pairs % strip  # to whole strips, by queries that pay nothing
    q = F.pad(queries.reshape(rows, pairs, dim), (0, 0, 0, missing))
    known = F.pad(lse.reshape(rows, pairs), (0, missing), value=math.inf)
    scores = torch.full((rows, width), -math.inf)
    workers = min(THREADS.most, max(1, rows * (width // KEY_BLOCK)))
    counter = torch.zeros(1, dtype=torch.int64)
    scratch = torch.empty(workers, (dim + strip + 1) * KEY_BLOCK)
    launch(
        _worker_of_later(pages.k.format, q.dtype), workers,
        address(q, q.dtype), address(known, torch.float32), address(pages.k.addresses, torch.int64),
        row_address(table, torch.int32), table.stride(0), address(lengths, torch.int32), scores.data_ptr(),
        rows, pairs, pairs + missing, dim, pages.page_size, width, bits_of_float(scale * math.log2(math.e)),
        reduction == "max", bits_of_float(softcap / scale if softcap else 0.0), counter.data_ptr(),
        scratch.data_ptr(), 4 * scratch.stride(0),
    )  # fmt: skip
    return scores


@functools.cache
def _worker(format: VectorFormat) -> int:
    vectors = format.on_cpu()

    def work(arguments: int, worker: int) -> None:
        _work(vectors, arguments, worker)

    return compile_worker(work)


@functools.cache
def _worker_of_later(format: VectorFormat, operands: torch.dtype) -> int:
    vectors, operand = format.on_cpu(), KINDS[operands]

    def work(arguments: int, worker: int) -> None:
        _work_of_later(vectors, operand, arguments, worker)

    return compile_worker(work)


@inlined
def _work(vectors: Any, arguments: int, worker: int) -> None:
    """Take rows until none is left.

    The arguments, addresses unless stated otherwise:
        queries: float32 [N, window, group, dim].
        k, position: The store of the keys, and the pages of positions.
        table: The rows' pages, `table_stride` entries per row.
        lengths: int32 [N].
        scores: float32 [N, width], written.
        rows, window, group, dim, page_size, width: Numbers: N, ...
        block: Number of (query, query head) pairs that go through the keys together, whole strips.
        factor: scale * log2(e), as bits.
        largest: 1 to take the largest probability, 0 for the mean.
        counter: int64, rows taken.
        scratch: `scratch_bytes` for each worker: queries [block, dim], a block of keys, products
            [block, width].
        ceiling: softcap / scale as bits, or those of 0.
        sinks: float32 [N, group], or 0.
    """
    (
        queries, k, position, table, table_stride, lengths, scores, rows, window, group, dim, page_size,
        width, block, factor_bits, largest, counter, scratch, scratch_bytes, ceiling_bits, sinks,
    ) = read_arguments(arguments, 21)  # fmt: skip
    factor, ceiling = float_of_bits(factor_bits), float_of_bits(ceiling_bits)
    pairs, keys = window * group, read_addresses(vectors, k)
    own = scratch + worker * scratch_bytes
    while True:
        row = fetch_add(counter, 1)
        if row >= rows:
            break
        length = load_int32(lengths + 4 * row)
        pages, target = table + 4 * row * table_stride, scores + 4 * row * width
        zeros = broadcast(np.float32(0.0))
        for j in range(0, width, 8):
            store(FLOAT32, target + 4 * j, zeros)
        newest = position_of(position, pages, page_size, length - 1) if length else 0
        for first in range(0, pairs if length else 0, block):
            count = min(block, pairs - first)
            products = own + 4 * (block + KEY_BLOCK) * dim
            _multiply(
                vectors, queries + 4 * (row * pairs + first) * dim, count, keys, pages, page_size, dim,
                length, own, own + 4 * block * dim, products, width,
            )  # fmt: skip
            for i in range(count):
                late = window - 1 - (first + i) // group
                read = _readable(position, pages, page_size, length, newest, late)
                line = products + 4 * i * width
                if read > 0:
                    share = 1.0 if largest else 1.0 / pairs
                    padded = (read + 7) // 8 * 8
                    if ceiling > 0:
                        row_softcap(line, read, ceiling)
                    top = row_max(line, read)
                    total = np.float64(row_exp2(FLOAT32, line, read, padded, factor, top))
                    if sinks:
                        sink = load_scalar(FLOAT32, sinks + 4 * (row * group + (first + i) % group))
                        total += np.exp2(math.log2(math.e) * sink - factor * top)
                    share /= total
                    _gather(line, read, share, largest, target)
        for j in range(length, width):
            store_scalar(FLOAT32, target + 4 * j, np.float32(-np.inf))


@inlined
def _multiply(
    vectors: Any,
    queries: int,
    count: int,
    k: Any,
    table: int,
    page_size: int,
    dim: int,
    length: int,
    rows: int,
    keys: int,
    products: int,
    width: int,
) -> None:
    """Write the products of `count` queries and all keys; `rows` and `keys` are scratch."""
    padded = (count + STRIP - 1) // STRIP * STRIP
    load_queries(FLOAT32, rows, queries, dim, count, dim, padded * dim)
    for first in range(0, length, KEY_BLOCK):
        tokens = min(KEY_BLOCK, length - first)
        load_keys(vectors, FLOAT32, dim, k, table, page_size, first, tokens, keys)
        for row in range(0, padded, STRIP):
            for t in range(0, tokens, 16):
                strip_tile(
                    FLOAT32, 1, rows + 4 * row * dim, dim, keys + 4 * t * dim, dim,
                    products + 4 * (row * width + first + t), width, 64 * dim,
                )  # fmt: skip


@inlined
def _readable(position: int, table: int, page_size: int, length: int, newest: int, late: int) -> int:
    """How many tokens are at most as new as the query that stands `late` tokens before the newest one."""
    read = length
    while read > max(0, length - late) and position_of(position, table, page_size, read - 1) > newest - late:
        read -= 1
    return read


@inlined
def _gather(line: int, count: int, share: float, largest: int, scores: int) -> None:
    """Add `share` times the exponentials to the scores, or take the larger of both; up to seven more."""
    spread = broadcast(np.float32(share))
    for j in range(0, count, 8):
        old = load(FLOAT32, scores + 4 * j)
        paid = load(FLOAT32, line + 4 * j)
        new = maximum(mul(spread, paid), old) if largest else fma(spread, paid, old)
        store(FLOAT32, scores + 4 * j, new)


@inlined
def _work_of_later(vectors: Any, operand: Any, arguments: int, worker: int) -> None:
    """Take blocks of keys until none is left.

    The arguments, addresses unless stated otherwise:
        queries: [N, padded, dim] of the kind `operand`.
        known: float32 [N, padded], log-sum-exp of each query, inf behind the last one.
        k: The store of the keys.
        table: The rows' pages, `table_stride` entries per row.
        lengths: int32 [N].
        scores: float32 [N, width], written up to a row's length.
        rows, pairs, padded, dim, page_size, width: Numbers: N, a row's queries, these in whole strips, ...
        factor: scale * log2(e), as bits.
        largest: 1 to take the largest probability, 0 for the mean.
        ceiling: softcap / scale as bits, or those of 0.
        counter: int64, blocks taken.
        scratch: `scratch_bytes` for each worker: a block of keys, products of a strip, a block of scores.
    """
    (
        queries, known, k, table, table_stride, lengths, scores, rows, pairs, padded, dim, page_size, width,
        factor_bits, largest, ceiling_bits, counter, scratch, scratch_bytes,
    ) = read_arguments(arguments, 19)  # fmt: skip
    blocks, strip = width // KEY_BLOCK, strip_rows(operand)
    keys = scratch + worker * scratch_bytes
    products = keys + 4 * dim * KEY_BLOCK
    block = products + 4 * strip * KEY_BLOCK
    factor = broadcast(np.float32(float_of_bits(factor_bits)))
    lowest = broadcast(np.float32(-np.inf if largest else 0.0))
    share = broadcast(np.float32(1.0 / pairs))
    ceiling = float_of_bits(ceiling_bits)
    while True:
        item = fetch_add(counter, 1)
        if item >= rows * blocks:
            break
        row, first = item // blocks, item % blocks * KEY_BLOCK
        tokens = min(KEY_BLOCK, load_int32(lengths + 4 * row) - first)
        if tokens > 0:
            load_keys(
                vectors, operand, dim, read_addresses(vectors, k), table + 4 * row * table_stride, page_size,
                first, tokens, keys,
            )  # fmt: skip
            for j in range(0, tokens, 8):
                store(FLOAT32, block + 4 * j, lowest)
            for query in range(0, padded, strip):
                for t in range(0, tokens, 16):
                    strip_tile(
                        operand, 1, queries + operand.itemsize * (row * padded + query) * dim, dim,
                        keys + operand.itemsize * t * dim, dim, products + 4 * t, KEY_BLOCK,
                        16 * operand.itemsize * dim,
                    )  # fmt: skip
                for i in range(strip):
                    line = products + 4 * i * KEY_BLOCK
                    natural = load_scalar(FLOAT32, known + 4 * (row * padded + query + i))
                    shift = broadcast(np.float32(-math.log2(math.e) * natural))
                    if ceiling > 0:
                        row_softcap(line, tokens, ceiling)
                    for j in range(0, tokens, 8):
                        old = load(FLOAT32, block + 4 * j)
                        power = fma(load(FLOAT32, line + 4 * j), factor, shift)
                        new = maximum(power, old) if largest else fma(share, exp2(FLOAT32, power), old)
                        store(FLOAT32, block + 4 * j, new)
            for j in range(tokens):
                value = load_scalar(FLOAT32, block + 4 * j)
                paid = np.float32(np.exp2(value)) if largest else value
                store_scalar(FLOAT32, scores + 4 * (row * width + first + j), paid)
