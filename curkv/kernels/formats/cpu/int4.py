"""Vectors of 4 bits a channel in groups with a step and a lowest value, on the CPU.

Decode attention multiplies codes with integers, as int8 does: queries, and weights times a group's steps, are
rounded to int16. What lowest values add needs no loop over channels: a score's is theirs times the sum of a
group's query, a group's output the sum of the weights times theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir

from curkv.kernels.cpu.jit import inlined
from curkv.kernels.cpu.lanes import absolute, add, broadcast, lane_max, maximum, mul
from curkv.kernels.cpu.llvm import (
    F32,
    F32X8,
    I32,
    I32X8,
    LANES,
    Args,
    constant,
    multiply_add,
    offset,
    pointer,
    splat,
)
from curkv.kernels.cpu.memory import (
    FLOAT32,
    KINDS,
    load,
    load_int32,
    load_scalar,
    prefetch,
    store,
    store_scalar,
)
from curkv.kernels.cpu.nibble_rows import (
    BLOCK,
    dot_rows_int4,
    finish_group,
    round_query_block,
    round_range_weights,
    spread_ranges,
    store_nibbles,
    weigh_rows_int4,
)
from curkv.kernels.cpu.rows import LARGEST_INT16
from curkv.kernels.cpu.vectors import Channels
from curkv.kernels.formats.cpu.base import CPUVectors, block_rows
from curkv.kernels.formats.int4 import GROUP, LARGEST, Int4

_HALF = KINDS[torch.float16]
_RANGE = 4
"""Bytes of a group's step and lowest value."""


@inlined
def _range_bytes(dim: int) -> int:
    """Bytes of a vector's steps and lowest values."""
    return dim // GROUP * _RANGE


@dataclass(frozen=True)
class Int4Vectors(CPUVectors):
    """Codes, and the steps and lowest values of their groups."""

    name = "int4"
    arrays = 2
    bits = 4

    def scratch(self, group: int, dim: int, width: int) -> tuple[int, int]:
        """For queries: sums float32 [group, dim / 64, 8], spreads float32 [group], int16 [group, dim].

        For weights: sums int32 [group, dim], spreads and what lowest values add float32 [group, groups, 2],
        steps and lowest values float32 [2, groups, width], weights int16 [group, groups, width].
        """
        groups = dim // GROUP
        for_weights = group * (4 * dim + 8 * groups + 2 * groups * width) + 8 * groups * width
        return group * (dim // 2 + 4 + 2 * dim), for_weights

    def row(self, builder: ir.IRBuilder, store: Args, dim: ir.Value, token: ir.Value) -> Channels:
        """Shifted, masked, widened, multiplied and added to in registers."""
        codes = self.place(builder, store, dim, token)
        ranges = offset(builder, store[1], token, builder.lshr(dim, dim.type(3)))
        shifts = ir.Constant(I32X8, [4 * i for i in range(LANES)])

        def channels(first: ir.Value) -> ir.Value:
            place = builder.add(codes, builder.lshr(first, first.type(1)))
            word = splat(builder, builder.load(pointer(builder, place, I32), align=4))
            numbers = builder.and_(builder.lshr(word, shifts), constant(I32X8, LARGEST))
            place = offset(builder, ranges, builder.lshr(first, first.type(5)), _RANGE)
            pair = builder.load(pointer(builder, place, ir.VectorType(ir.HalfType(), 2)), align=2)
            step, low = (
                splat(builder, builder.fpext(builder.extract_element(pair, I32(i)), F32)) for i in range(2)
            )
            return multiply_add(builder, builder.sitofp(numbers, F32X8), step, low)

        return channels

    @staticmethod
    def write(vectors: Any, source: int, dim: int, memory: Any, token: int) -> None:
        """Rounded to the nearest code, after step and lowest value have been rounded."""
        negative = broadcast(np.float32(-1.0))
        for d in range(0, dim, GROUP):
            highest, lowest = broadcast(np.float32(-np.inf)), broadcast(np.float32(-np.inf))
            for i in range(d, d + GROUP, 8):
                value = load(FLOAT32, source + 4 * i)
                highest = maximum(value, highest)
                lowest = maximum(mul(value, negative), lowest)
            place = memory[1] + token * _range_bytes(dim) + d // GROUP * _RANGE
            low = -lane_max(lowest)
            store_scalar(_HALF, place, (lane_max(highest) - low) / np.float32(LARGEST))
            store_scalar(_HALF, place + 2, low)
            step = load_scalar(_HALF, place)
            shift = broadcast(-load_scalar(_HALF, place + 2))
            factor = broadcast(np.float32(1.0) / step if step > 0 else np.float32(0.0))
            for i in range(d, d + GROUP, 8):
                value = mul(add(load(FLOAT32, source + 4 * i), shift), factor)
                store_nibbles(memory[0] + (token * dim + i) // 2, value)

    @staticmethod
    def prefetch_page(vectors: Any, memory: Any, dim: int, token: int, tokens: int) -> None:
        """The steps and lowest values."""
        size = _range_bytes(dim)
        for place in range(token * size, (token + tokens) * size, 64):
            prefetch(memory[1] + place)

    @staticmethod
    def round_queries(vectors: Any, group: int, dim: int, q: int, scratch: int) -> int:
        """To int16 [group, dim], in the order of the codes' registers."""
        spreads = scratch + group * dim // 2
        queries = spreads + 4 * group
        for g in range(group):
            row = q + 4 * g * dim
            largest = broadcast(np.float32(0.0))
            for d in range(0, dim, 8):
                largest = maximum(absolute(load(FLOAT32, row + 4 * d)), largest)
            most = lane_max(largest)
            factor = np.float32(LARGEST_INT16) / most if most > 0 else np.float32(0.0)
            store_scalar(FLOAT32, spreads + 4 * g, most / np.float32(LARGEST_INT16))
            for d in range(0, dim, BLOCK):
                place = g * dim + d
                round_query_block(row + 4 * d, factor, queries + 2 * place, scratch + place // 2)
        return queries

    @staticmethod
    def score_page(
        vectors: Any, group: int, dim: int, queries: int, memory: Any, token: int, tokens: int, scores: int,
        width: int, ahead: int, scratch: int,
    ) -> None:  # fmt: skip
        """Products of integers, then steps and lowest values."""
        codes, ranges = memory[0] + token * dim // 2, memory[1] + token * _range_bytes(dim)
        spreads = scratch + group * dim // 2
        g = 0
        while g < group:
            rows = block_rows(group - g)
            query, sums = queries + 2 * g * dim, scratch + g * dim // 2
            target = scores + 4 * g * width
            dot_rows_int4(
                rows, query, sums, spreads + 4 * g, dim, codes, ranges, tokens, target, width, ahead
            )
            g += rows

    @staticmethod
    def round_weights(
        vectors: Any, group: int, dim: int, weights: int, width: int, memory: Any, table: int, page_size: int,
        count: int, scratch: int, out: int,
    ) -> None:  # fmt: skip
        """To int16 [group, groups, width], multiplied by the steps of their values' groups."""
        groups, size = dim // GROUP, _range_bytes(dim)
        spreads = scratch + 4 * group * dim
        steps = spreads + 8 * group * groups
        lows = steps + 4 * groups * width
        rounded = lows + 4 * groups * width
        for start in range(0, count, page_size):
            first = memory[1] + load_int32(table + 4 * (start // page_size)) * page_size * size
            for t in range(start, min(start + page_size, count), 8):
                for j in range(0, groups, 2):
                    place, target = first + (t - start) * size + j * _RANGE, 4 * (j * width + t)
                    spread_ranges(place, size, count - t, steps + target, lows + target, 4 * width)
        g = 0
        while g < group:
            rows = block_rows(group - g)
            for j in range(0, groups, 2):
                row, first = weights + 4 * g * width, g * groups + j
                round_range_weights(
                    rows, row, width, steps + 4 * j * width, lows + 4 * j * width, count, groups,
                    rounded + 2 * first * width, spreads + 8 * first,
                )  # fmt: skip
            g += rows
        for d in range(0, group * dim, 8):
            store(FLOAT32, scratch + 4 * d, broadcast(np.float32(0.0)))

    @staticmethod
    def weigh_page(
        vectors: Any, group: int, dim: int, weights: int, width: int, start: int, memory: Any, token: int,
        tokens: int, out: int, ahead: int, scratch: int,
    ) -> None:  # fmt: skip
        """Adds to int32 [group, dim] in the scratch memory."""
        groups = dim // GROUP
        codes = memory[0] + token * dim // 2
        rounded = scratch + 4 * group * dim + 8 * group * groups + 8 * groups * width + 2 * start
        g = 0
        while g < group:
            rows = block_rows(group - g)
            for j in range(groups):
                row, target = rounded + 2 * (g * groups + j) * width, scratch + 4 * (g * dim + j * GROUP)
                weigh_rows_int4(
                    rows, row, groups * width, codes + j * GROUP // 2, dim, tokens, target, dim, ahead
                )
            g += rows

    @staticmethod
    def finish(vectors: Any, group: int, dim: int, scratch: int, out: int) -> None:
        """Sums times what their weights were divided by, and what lowest values add."""
        groups, spreads = dim // GROUP, scratch + 4 * group * dim
        for row in range(group * groups):
            spread = load_scalar(FLOAT32, spreads + 8 * row)
            low = load_scalar(FLOAT32, spreads + 8 * row + 4)
            target = out + 4 * (row // groups * (dim + 2) + row % groups * GROUP)
            finish_group(scratch + 4 * row * GROUP, spread, low, target)


def primitives(format: Int4) -> Int4Vectors:
    """There is one kind."""
    return Int4Vectors()
