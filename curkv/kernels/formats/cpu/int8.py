"""Vectors of int8 with a scale, or with one for each group of channels, on the CPU.

Decode attention multiplies integers: queries and weights are rounded to int16, each row by its largest
number, and pairs of products are summed as int32, which takes half the instructions. A key's scale multiplies
what its channels add to scores, a value's its weights, of which there are a row for each group. What a weight
is off by is at most a 65,534th of the largest of its split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from llvmlite import ir

from curkv.kernels.cpu.jit import inlined
from curkv.kernels.cpu.lanes import absolute, broadcast, keep_first, lane_max, maximum, mul
from curkv.kernels.cpu.llvm import F32, F32X8, I64, Args, offset, pointer, splat, widen
from curkv.kernels.cpu.memory import (
    FLOAT32,
    INT8,
    load,
    load_apart,
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
from curkv.kernels.formats.int8 import GROUP, LARGEST, WIDE, Int8, scales_of

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
def _scales(dim: int) -> int:
    """How many scales a vector has."""
    return max(1, int(dim % WIDE == 0) * (dim // GROUP))


@inlined
def _spread_scales(
    scales: int, groups: int, table: int, page_size: int, count: int, target: int, width: int
) -> None:
    """Write the scales of `count` vectors as float32 [groups, width], and zeros up to an eight."""
    zeros = broadcast(np.float32(0.0))
    for start in range(0, count, page_size):
        first = scales + 4 * load_int32(table + 4 * (start // page_size)) * page_size * groups
        for t in range(0, min(page_size, count - start), 8):
            for j in range(groups):
                scale = load_apart(first + 4 * (t * groups + j), 4 * groups)
                place = target + 4 * (j * width + start + t)
                store(FLOAT32, place, keep_first(scale, count - start - t, zeros))


@inlined
def _weigh_row(row: int, scales: int, count: int, target: int) -> Any:
    """Multiply exponentials float32 [count] by their values' scales, and write int16, up to an eight.

    Returns:
        What those must be multiplied with.
    """
    largest = broadcast(np.float32(0.0))
    for t in range(0, count, 8):
        largest = maximum(mul(load(FLOAT32, row + 4 * t), load(FLOAT32, scales + 4 * t)), largest)
    most = lane_max(largest)
    spread = broadcast(np.float32(LARGEST_INT16) / most if most > 0 else np.float32(0.0))
    for t in range(0, count, 8):
        weight = mul(load(FLOAT32, row + 4 * t), load(FLOAT32, scales + 4 * t))
        store_int16(target + 2 * t, mul(weight, spread))
    return most / np.float32(LARGEST_INT16)


@dataclass(frozen=True)
class Int8Vectors(CPUVectors):
    """Integers, and what they are multiplied with."""

    name = "int8"
    arrays = 2
    bits = 8

    def scratch(self, group: int, dim: int, width: int) -> tuple[int, int]:
        """For queries: int16 [group, dim], and float32 [group], what a row was divided by.

        For weights: sums int32 [group, dim], what a row was divided by float32 [group, scales], scales
        float32 [scales, width], weights int16 [group, scales, width].
        """
        scales = scales_of(dim)
        for_weights = group * (4 * dim + 4 * scales + 2 * scales * width) + 4 * scales * width
        return group * (2 * dim + 4), for_weights

    def row(self, builder: ir.IRBuilder, store: Args, dim: ir.Value, token: ir.Value) -> Channels:
        """Widened and multiplied in registers."""
        vectors, scales = store
        start = offset(builder, vectors, token, dim)
        wide = builder.icmp_unsigned("==", builder.urem(dim, I64(WIDE)), I64(0))
        count = builder.select(wide, builder.udiv(dim, I64(GROUP)), I64(1))
        own = offset(builder, scales, token, count, 4)

        def read(first: ir.Value) -> ir.Value:
            place = offset(builder, own, builder.select(wide, builder.udiv(first, I64(GROUP)), I64(0)), 4)
            factor = splat(builder, builder.load(pointer(builder, place, F32), align=4))
            return builder.fmul(widen(builder, _KIND, builder.add(start, first), F32X8), factor)

        return read

    @staticmethod
    def write(vectors: Any, source: int, dim: int, memory: Any, token: int) -> None:
        """Divided by a 127th of the largest, rounded to nearest even."""
        scales = _scales(dim)
        channels = dim // scales
        for j in range(scales):
            first = j * channels
            largest = broadcast(np.float32(0.0))
            for d in range(first, first + channels, 8):
                largest = maximum(absolute(load(FLOAT32, source + 4 * d)), largest)
            most = lane_max(largest)
            store_scalar(FLOAT32, memory[1] + 4 * (token * scales + j), most / np.float32(LARGEST))
            factor = broadcast(np.float32(LARGEST) / most if most > 0 else np.float32(1.0))
            for d in range(first, first + channels, 8):
                store(INT8, memory[0] + token * dim + d, mul(load(FLOAT32, source + 4 * d), factor))

    @staticmethod
    def prefetch_page(vectors: Any, memory: Any, dim: int, token: int, tokens: int) -> None:
        """The scales."""
        scales = _scales(dim)
        for t in range(token * scales, (token + tokens) * scales, 8):
            prefetch(memory[1] + 4 * t)

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
        """Products of integers, times the scales."""
        groups = _scales(dim)
        keys, scales = memory[0] + token * dim, memory[1] + 4 * token * groups
        spreads = scratch + 2 * group * dim
        g = 0
        while g < group:
            rows = block_rows(group - g)
            query, target = queries + 2 * g * dim, scores + 4 * g * width
            dot_rows_int8(
                rows, query, spreads + 4 * g, dim, keys, scales, groups, tokens, target, width, ahead
            )
            g += rows

    @staticmethod
    def round_weights(
        vectors: Any, group: int, dim: int, weights: int, width: int, memory: Any, table: int, page_size: int,
        count: int, scratch: int, out: int,
    ) -> None:  # fmt: skip
        """To int16 [group, scales, width], multiplied by their values' scales."""
        groups = _scales(dim)
        spreads = scratch + 4 * group * dim
        scales = spreads + 4 * group * groups
        rounded = scales + 4 * groups * width
        _spread_scales(memory[1], groups, table, page_size, count, scales, width)
        for g in range(group):
            for j in range(groups):
                row = g * groups + j
                spread = _weigh_row(
                    weights + 4 * g * width, scales + 4 * j * width, count, rounded + 2 * row * width
                )
                store_scalar(FLOAT32, spreads + 4 * row, spread)
        for d in range(0, group * dim, 8):
            store(FLOAT32, scratch + 4 * d, broadcast(np.float32(0.0)))

    @staticmethod
    def weigh_page(
        vectors: Any, group: int, dim: int, weights: int, width: int, start: int, memory: Any, token: int,
        tokens: int, out: int, ahead: int, scratch: int,
    ) -> None:  # fmt: skip
        """Adds to int32 [group, dim] in the scratch memory."""
        groups = _scales(dim)
        channels = dim // groups
        values = memory[0] + token * dim
        rounded = scratch + 4 * group * dim + 4 * group * groups + 4 * groups * width + 2 * start
        body = channels - channels % 32
        g = 0
        while g < group:
            rows = block_rows(group - g)
            for j in range(groups):
                row, first = rounded + 2 * (g * groups + j) * width, j * channels
                for d in range(first, first + body, 32):
                    target = scratch + 4 * (g * dim + d)
                    weigh_rows_int8(rows, 4, row, groups * width, values + d, dim, tokens, target, dim, ahead)
                if body < channels:
                    last = first + body
                    for r in range(rows):
                        single, place = row + 2 * r * groups * width, scratch + 4 * ((g + r) * dim + last)
                        weigh_rows_int8(1, 2, single, width, values + last, dim, tokens, place, dim, ahead)
            g += rows

    @staticmethod
    def finish(vectors: Any, group: int, dim: int, scratch: int, out: int) -> None:
        """Sums times what their weights were divided by."""
        groups, spreads = _scales(dim), scratch + 4 * group * dim
        channels = dim // groups
        for g in range(group):
            for d in range(0, dim, 8):
                spread = broadcast(load_scalar(FLOAT32, spreads + 4 * (g * groups + d // channels)))
                total = mul(load_int32s(scratch + 4 * (g * dim + d)), spread)
                store(FLOAT32, out + 4 * (g * (dim + 2) + d), total)


def primitives(format: Int8) -> Int8Vectors:
    """There is one kind."""
    return Int8Vectors()
