"""Vectors of int8 with a scale for each, on the CPU.

Decode attention multiplies integers: queries and weights are rounded to int16, each row by its largest
number, and pairs of products are summed as int32, which takes half the instructions. A key's scale multiplies
its scores, a value's its weights. What a weight is off by is at most a 65,534th of the largest of its split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from llvmlite import ir

from curkv.kernels.cpu.jit import inlined
from curkv.kernels.cpu.lanes import absolute, broadcast, keep_first, lane_max, maximum, mul
from curkv.kernels.cpu.llvm import F32, F32X8, Args, offset, pointer, splat, widen
from curkv.kernels.cpu.memory import (
    FLOAT32,
    INT8,
    load,
    load_int32,
    load_int32s,
    load_scalar,
    prefetch,
    store,
    store_int16,
    store_scalar,
)
from curkv.kernels.cpu.rows import LARGEST_INT16, dot_rows_int8, weigh_rows_int8
from curkv.kernels.cpu.vectors import Channels
from curkv.kernels.formats.cpu.base import CPUVectors, block_rows
from curkv.kernels.formats.int8 import LARGEST, Int8

_KIND = numba.typeof(INT8)


@inlined
def _round_row(source: int, count: int, target: int) -> Any:
    """Write float32 [count] as int16; returns what those must be multiplied with."""
    largest = broadcast(np.float32(0.0))
    for d in range(0, count, 8):
        largest = maximum(absolute(load(FLOAT32, source + 4 * d)), largest)
    most = lane_max(largest)
    spread = broadcast(np.float32(LARGEST_INT16) / most if most > 0 else np.float32(0.0))
    for d in range(0, count, 8):
        store_int16(target + 2 * d, mul(load(FLOAT32, source + 4 * d), spread))
    return most / np.float32(LARGEST_INT16)


@inlined
def _weigh_row(row: int, scale: int, table: int, page_size: int, count: int, target: int) -> Any:
    """Multiply exponentials float32 [count] by their values' scales; write int16, and zeros up to an eight.

    Returns:
        What those must be multiplied with.
    """
    zeros = broadcast(np.float32(0.0))
    largest = zeros
    for start in range(0, count, page_size):
        scales = scale + 4 * load_int32(table + 4 * (start // page_size)) * page_size
        for t in range(0, min(page_size, count - start), 8):
            weight = mul(load(FLOAT32, row + 4 * (start + t)), load(FLOAT32, scales + 4 * t))
            largest = maximum(keep_first(weight, count - start - t, zeros), largest)
    most = lane_max(largest)
    spread = broadcast(np.float32(LARGEST_INT16) / most if most > 0 else np.float32(0.0))
    for start in range(0, count, page_size):
        scales = scale + 4 * load_int32(table + 4 * (start // page_size)) * page_size
        for t in range(0, min(page_size, count - start), 8):
            weight = mul(load(FLOAT32, row + 4 * (start + t)), load(FLOAT32, scales + 4 * t))
            weight = mul(keep_first(weight, count - start - t, zeros), spread)
            store_int16(target + 2 * (start + t), weight)
    return most / np.float32(LARGEST_INT16)


@dataclass(frozen=True)
class Int8Vectors(CPUVectors):
    """Integers, and what they are multiplied with."""

    name = "int8"
    arrays = 2
    bits = 8

    def scratch(self, group: int, dim: int, width: int) -> tuple[int, int]:
        """Queries int16 [group, dim]; sums int32 [group, dim] and weights int16 [group, width].

        And for both float32 [group], what a row was divided by.
        """
        return group * (2 * dim + 4), group * (2 * width + 4 * dim + 4)

    def row(self, builder: ir.IRBuilder, store: Args, dim: ir.Value, token: ir.Value) -> Channels:
        """Widened and multiplied in registers."""
        vectors, scales = store
        start = offset(builder, vectors, token, dim)
        scale = builder.load(pointer(builder, offset(builder, scales, token, 4), F32), align=4)
        factor = splat(builder, scale)
        return lambda first: builder.fmul(widen(builder, _KIND, builder.add(start, first), F32X8), factor)

    @staticmethod
    def write(vectors: Any, source: int, dim: int, memory: Any, token: int) -> None:
        """Divided by a 127th of the largest, rounded to nearest even."""
        largest = broadcast(np.float32(0.0))
        for d in range(0, dim, 8):
            largest = maximum(absolute(load(FLOAT32, source + 4 * d)), largest)
        most = lane_max(largest)
        store_scalar(FLOAT32, memory[1] + 4 * token, most / np.float32(LARGEST))
        factor = broadcast(np.float32(LARGEST) / most if most > 0 else np.float32(1.0))
        for d in range(0, dim, 8):
            store(INT8, memory[0] + token * dim + d, mul(load(FLOAT32, source + 4 * d), factor))

    @staticmethod
    def prefetch_page(vectors: Any, memory: Any, dim: int, token: int, tokens: int) -> None:
        """The scales."""
        for t in range(0, tokens, 8):
            prefetch(memory[1] + 4 * (token + t))

    @staticmethod
    def round_queries(vectors: Any, group: int, dim: int, q: int, scratch: int) -> int:
        """To int16 [group, dim]."""
        spreads = scratch + 2 * group * dim
        for g in range(group):
            store_scalar(FLOAT32, spreads + 4 * g, _round_row(q + 4 * g * dim, dim, scratch + 2 * g * dim))
        return scratch

    @staticmethod
    def score_page(
        vectors: Any, group: int, dim: int, queries: int, memory: Any, token: int, tokens: int, scores: int,
        width: int, ahead: int, scratch: int,
    ) -> None:  # fmt: skip
        """Products of integers, then the scales."""
        keys, spreads = memory[0] + token * dim, scratch + 2 * group * dim
        g = 0
        while g < group:
            rows = block_rows(group - g)
            query, target = queries + 2 * g * dim, scores + 4 * g * width
            dot_rows_int8(rows, query, dim, keys, tokens, target, width, ahead)
            g += rows
        for t in range(0, tokens, 8):
            scale = load(FLOAT32, memory[1] + 4 * (token + t))
            for g in range(group):
                score = scores + 4 * (g * width + t)
                spread = broadcast(load_scalar(FLOAT32, spreads + 4 * g))
                store(FLOAT32, score, mul(load(FLOAT32, score), mul(scale, spread)))

    @staticmethod
    def round_weights(
        vectors: Any, group: int, dim: int, weights: int, width: int, memory: Any, table: int, page_size: int,
        count: int, scratch: int, out: int,
    ) -> None:  # fmt: skip
        """To int16 [group, width], multiplied by their values' scales."""
        spreads = scratch + 4 * group * dim
        for g in range(group):
            row, target = weights + 4 * g * width, spreads + 4 * group + 2 * g * width
            largest = _weigh_row(row, memory[1], table, page_size, count, target)
            store_scalar(FLOAT32, spreads + 4 * g, largest)
            for d in range(0, dim, 8):
                store(FLOAT32, scratch + 4 * (g * dim + d), broadcast(np.float32(0.0)))

    @staticmethod
    def weigh_page(
        vectors: Any, group: int, dim: int, weights: int, width: int, start: int, memory: Any, token: int,
        tokens: int, out: int, ahead: int, scratch: int,
    ) -> None:  # fmt: skip
        """Adds to int32 [group, dim] in the scratch memory."""
        values, rounded = memory[0] + token * dim, scratch + 4 * group * (dim + 1) + 2 * start
        body = dim - dim % 32
        g = 0
        while g < group:
            rows = block_rows(group - g)
            row, target = rounded + 2 * g * width, scratch + 4 * g * dim
            for d in range(0, body, 32):
                weigh_rows_int8(rows, 4, row, width, values + d, dim, tokens, target + 4 * d, dim, ahead)
            if body < dim:
                for r in range(rows):
                    single, place = row + 2 * r * width, target + 4 * (r * dim + body)
                    weigh_rows_int8(1, 2, single, width, values + body, dim, tokens, place, dim, ahead)
            g += rows

    @staticmethod
    def finish(vectors: Any, group: int, dim: int, scratch: int, out: int) -> None:
        """Sums times what their weights were divided by."""
        spreads = scratch + 4 * group * dim
        for g in range(group):
            spread = broadcast(load_scalar(FLOAT32, spreads + 4 * g))
            for d in range(0, dim, 8):
                total = mul(load_int32s(scratch + 4 * (g * dim + d)), spread)
                store(FLOAT32, out + 4 * (g * (dim + 2) + d), total)


def primitives(format: Int8) -> Int8Vectors:
    """There is one kind."""
    return Int8Vectors()
