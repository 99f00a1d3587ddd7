"""Linear layers on CPU: weights in panels of 16 rows, multiplied tile by tile in vector registers.

One layout serves a single token and a long chunk. A panel is read from memory in the order it is stored,
which lets a decode step run at memory bandwidth, and a 6 x 16 tile of the result keeps 12 of 16 vector
registers busy, which lets a prefill chunk run at the arithmetic peak (Goto and van de Geijn, "Anatomy of
high-performance matrix multiplication", 2008).

Weights are float32, or int8 with a scale per row. Those are multiplied with int16: every row of x has one
scale per `BLOCK_DEPTH` columns, as fine as sums of so many products in an int32 allow, about 15 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import get_num_threads, prange
from torch import Tensor
from torch.nn.functional import pad

from curkv.kernels.linear.reference import quantise
from curkv.kernels.simd import (
    FLOAT32,
    INT8,
    LANES,
    PANEL,
    absolute,
    address,
    broadcast,
    fma,
    inlined,
    kernel,
    lane_max,
    lane_sum,
    load,
    maximum,
    mul,
    panel_tile,
    parallel_kernel,
    store_int16,
    store_scalar,
)

TILE_ROWS = 6
"""Rows of x in a tile."""
BLOCK_ROWS = 96
"""Rows of x that are multiplied with a panel before the next one: they stay in the second-level cache."""
BLOCK_DEPTH = 576
"""Columns of a panel used at a time: such a part of it stays in the first-level cache."""
AHEAD = 2048
"""Bytes by which a panel is prefetched."""
LARGEST = (2**31 - 1) // (127 * BLOCK_DEPTH)
"""Of the integers that stand for x: a block of products with weights up to 127 fits an int32."""
SMALLEST = np.float32(1e-30)
"""Blocks of x whose largest value is below are taken for zeros."""
PARALLEL_SIZE = 1 << 14
"""Values of x that are worth several threads to be quantised."""
PACKED_ROWS = 64 * PANEL
"""Rows quantised at a time, so that loading needs little memory."""


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> _PackedLinear:
    """Makes a linear layer, see `reference.pack_linear`; `weight` may be freed afterwards."""
    rows, depth = weight.shape
    packed = torch.zeros(_panels(rows) * PANEL, depth)
    packed[:rows] = weight
    packed = packed.view(-1, PANEL, depth).transpose(1, 2).contiguous()
    return _PackedLinear(rows, packed, bias)


def pack_linear_int8(weight: Tensor, bias: Tensor | None = None) -> _PackedLinear:
    """Makes a linear layer, see `reference.pack_linear_int8`; `weight` may be freed afterwards.

    A row of x that has NaN or infinity gives a row of NaN.
    """
    rows, depth = weight.shape
    panels, depth = _panels(rows), depth + -depth % LANES
    packed = torch.zeros(panels, depth // 2, PANEL, 2, dtype=torch.int8)
    scales = torch.zeros(panels * PANEL)
    for row in range(0, rows, PACKED_ROWS):
        part, scale = quantise(weight[row : row + PACKED_ROWS])
        part = pad(part, (0, depth - part.shape[1], 0, -len(part) % PANEL))
        part = part.view(-1, PANEL, depth // 2, 2).transpose(1, 2)
        packed[row // PANEL :][: len(part)] = part
        scales[row : row + len(scale)] = scale
    return _PackedLinear(rows, packed, bias, scales)


def _panels(rows: int) -> int:
    return -(-rows // PANEL)


class _PackedLinear:
    """A linear layer, see `pack_linear`.

    Attributes:
        nbytes: Memory of the weights.
    """

    def __init__(self, rows: int, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None):
        self._rows = rows
        self._panels, self._depth = len(weight), weight[0].numel() // PANEL
        self._weight, self._scales = weight, scales
        self._bias = None if bias is None else bias.float()
        self.nbytes = sum(part.nbytes for part in (weight, scales, self._bias) if part is not None)

    def __call__(self, x: Tensor) -> Tensor:
        count, depth = len(x), self._depth
        x = pad(x, (0, depth - x.shape[1])) if depth > x.shape[1] else x.contiguous()
        out = torch.empty(count, self._panels * PANEL)
        places = address(x, torch.float32), self._weight.data_ptr(), out.data_ptr()
        sizes = count, depth, self._panels, get_num_threads()
        if self._scales is None:
            _multiply(*places, *sizes)
        else:
            integers = torch.empty(count * depth, dtype=torch.int16)
            x_scales = torch.empty(count * -(-depth // BLOCK_DEPTH))
            scales = x_scales.data_ptr(), self._scales.data_ptr()
            _multiply_int8(*places, integers.data_ptr(), *scales, *sizes)
        if out.shape[1] > self._rows:
            out = out[:, : self._rows].contiguous()
        return out if self._bias is None else out.add_(self._bias)


@parallel_kernel
def _multiply(x: int, weight: int, out: int, count: int, depth: int, panels: int, parts: int) -> None:
    """Multiply `count` rows of x with all panels; x, weight and out are addresses."""
    for unsigned_part in prange(parts):
        part: Any = np.int64(unsigned_part)
        _multiply_part(FLOAT32, 4, x, 0, weight, 0, out, count, depth, panels, part, parts)


@parallel_kernel
def _multiply_int8(
    x: int, weight: int, out: int, integers: int, x_scales: int, scales: int,
    count: int, depth: int, panels: int, parts: int,
) -> None:  # fmt: skip
    """Round the rows of x to `integers` with `x_scales` and multiply them with panels that have `scales`."""
    if count * depth < PARALLEL_SIZE:
        _quantise_rows(x, integers, x_scales, 0, count, count, depth)
    else:
        for unsigned_part in prange(parts):
            part: Any = np.int64(unsigned_part)
            first, end = count * part // parts, count * (part + 1) // parts
            _quantise_rows(x, integers, x_scales, first, end, count, depth)
    for unsigned_part in prange(parts):
        part = np.int64(unsigned_part)
        _multiply_part(INT8, 2, integers, x_scales, weight, scales, out, count, depth, panels, part, parts)


@kernel
def _quantise_rows(x: int, integers: int, scales: int, first: int, end: int, count: int, depth: int) -> None:
    """Round the rows [first, end) of x [count, depth] to int16; scales are [blocks of the depth, count]."""
    for row in range(first, end):
        for start in range(0, depth, BLOCK_DEPTH):
            place = row * depth + start
            size = min(BLOCK_DEPTH, depth - start)
            scale = _quantise_block(x + 4 * place, integers + 2 * place, size)
            store_scalar(FLOAT32, scales + 4 * (start // BLOCK_DEPTH * count + row), scale)


@inlined
def _quantise_block(x: int, integers: int, size: int) -> Any:
    """Round `size` values to integers up to `LARGEST`; returns their scale, NaN if not all are finite."""
    zeros = broadcast(np.float32(0.0))
    largest, wrong = zeros, zeros
    for i in range(0, size, 8):
        values = load(FLOAT32, x + 4 * i)
        largest = maximum(absolute(values), largest)
        wrong = fma(values, zeros, wrong)
    highest = lane_max(largest)
    if highest < SMALLEST:
        highest = np.float32(0.0)
        inverse = broadcast(np.float32(0.0))
    else:
        inverse = broadcast(np.float32(LARGEST) / highest)
    for i in range(0, size, 8):
        store_int16(integers + 2 * i, mul(load(FLOAT32, x + 4 * i), inverse))
    return highest / np.float32(LARGEST) + lane_sum(wrong)


@inlined
def _multiply_part(
    kind: Any, item: int, x: int, x_scales: int, weight: int, scales: int, out: int,
    count: int, depth: int, panels: int, part: int, parts: int,
) -> None:  # fmt: skip
    """Multiply x, of `item` bytes a value, with one of `parts` shares of the panels, of the given kind."""
    first, end = panels * part // parts, panels * (part + 1) // parts
    for start in range(0, depth, BLOCK_DEPTH):
        size = min(BLOCK_DEPTH, depth - start)
        for row in range(0, count, BLOCK_ROWS):
            rows = min(BLOCK_ROWS, count - row)
            a = x + item * (row * depth + start)
            a_scales = x_scales + 4 * (start // BLOCK_DEPTH * count + row)
            for panel in range(first, end):
                b = weight + kind.itemsize * PANEL * (panel * depth + start)
                b_scales = scales + 4 * PANEL * panel
                c = out + 4 * PANEL * (row * panels + panel)
                if start:
                    _add_block(kind, item, rows, a, depth, a_scales, b, b_scales, size, c, panels * PANEL)
                else:
                    _write_block(kind, item, rows, a, depth, a_scales, b, b_scales, size, c, panels * PANEL)


@kernel
def _write_block(
    kind: Any, item: int, rows: int, a: int, depth: int, a_scales: int, b: int, b_scales: int,
    size: int, c: int, width: int,
) -> None:  # fmt: skip
    """Write the product of `rows` rows of x with a panel, in tiles of nearly equal height."""
    _tiles(kind, item, 1, rows, a, depth, a_scales, b, b_scales, size, c, width)


@kernel
def _add_block(
    kind: Any, item: int, rows: int, a: int, depth: int, a_scales: int, b: int, b_scales: int,
    size: int, c: int, width: int,
) -> None:  # fmt: skip
    """Add the product to what earlier columns gave."""
    _tiles(kind, item, 0, rows, a, depth, a_scales, b, b_scales, size, c, width)


@inlined
def _tiles(
    kind: Any, item: int, fresh: int, rows: int, a: int, depth: int, a_scales: int, b: int, b_scales: int,
    size: int, c: int, width: int,
) -> None:  # fmt: skip
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    for tile in range(tiles):
        row = rows * tile // tiles
        height = rows * (tile + 1) // tiles - row
        at, scale, to = a + item * row * depth, a_scales + 4 * row, c + 4 * row * width
        if height == 6:
            panel_tile(kind, 6, fresh, at, depth, scale, b, b_scales, size, to, width, AHEAD)
        elif height == 5:
            panel_tile(kind, 5, fresh, at, depth, scale, b, b_scales, size, to, width, AHEAD)
        elif height == 4:
            panel_tile(kind, 4, fresh, at, depth, scale, b, b_scales, size, to, width, AHEAD)
        elif height == 3:
            panel_tile(kind, 3, fresh, at, depth, scale, b, b_scales, size, to, width, AHEAD)
        elif height == 2:
            panel_tile(kind, 2, fresh, at, depth, scale, b, b_scales, size, to, width, AHEAD)
        else:
            panel_tile(kind, 1, fresh, at, depth, scale, b, b_scales, size, to, width, AHEAD)
