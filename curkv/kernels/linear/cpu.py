"""Linear layers on CPU: weights in panels of 16 rows, multiplied tile by tile in vector registers.

One layout serves a single token and a long chunk. A panel is read from memory in the order it is stored,
which lets a decode step run at memory bandwidth, and a 6 x 16 tile of the result keeps 12 of 16 vector
registers busy, which lets a prefill chunk run at the arithmetic peak (Goto and van de Geijn, "Anatomy of
high-performance matrix multiplication", 2008).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import get_num_threads, njit, prange
from torch import Tensor

from curkv.kernels.simd import FLOAT32, address, inlined, kernel, matrix_tile

PANEL = 16
"""Rows of the weight in a panel: two vectors of 8 floats."""
TILE_ROWS = 6
"""Rows of x in a tile."""
BLOCK_ROWS = 96
"""Rows of x that are multiplied with a panel before the next one: they stay in the second-level cache."""
BLOCK_DEPTH = 576
"""Columns of a panel used at a time: such a part of it stays in the first-level cache."""
AHEAD = 512
"""Bytes by which a panel is prefetched."""


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Makes a linear layer, see `reference.pack_linear`; `weight` may be freed afterwards."""
    return _PackedLinear(weight, bias)


class _PackedLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None):
        self._rows, self._depth = weight.shape
        self._panels = -(-self._rows // PANEL)
        padded = torch.zeros(self._panels * PANEL, self._depth)
        padded[: self._rows] = weight
        self._weight = padded.view(self._panels, PANEL, self._depth).transpose(1, 2).contiguous()
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty(x.shape[0], self._panels * PANEL)
        _matmul(
            address(x, torch.float32),
            self._weight.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            self._depth,
            self._panels,
            get_num_threads(),
        )
        if out.shape[1] > self._rows:
            out = out[:, : self._rows].contiguous()
        return out if self._bias is None else out.add_(self._bias)


@njit(parallel=True, nogil=True, cache=True)
def _matmul(x: int, weight: int, out: int, count: int, depth: int, panels: int, parts: int) -> None:
    """Let each of `parts` threads multiply x, at an address like all else, with its share of the panels."""
    for unsigned_part in prange(parts):
        part: Any = np.int64(unsigned_part)
        first, end = panels * part // parts, panels * (part + 1) // parts
        for start in range(0, depth, BLOCK_DEPTH):
            size = min(BLOCK_DEPTH, depth - start)
            for row in range(0, count, BLOCK_ROWS):
                left = x + 4 * (row * depth + start)
                for panel in range(first, end):
                    right = weight + 4 * PANEL * (panel * depth + start)
                    place = out + 4 * PANEL * (row * panels + panel)
                    rows = min(BLOCK_ROWS, count - row)
                    if start:
                        _add_block(left, depth, right, size, place, panels * PANEL, rows)
                    else:
                        _write_block(left, depth, right, size, place, panels * PANEL, rows)


@kernel
def _write_block(x: int, depth: int, panel: int, size: int, out: int, width: int, rows: int) -> None:
    """Write the product of `rows` rows of x with a panel, in tiles of nearly equal height."""
    _tiles(1, x, depth, panel, size, out, width, rows)


@kernel
def _add_block(x: int, depth: int, panel: int, size: int, out: int, width: int, rows: int) -> None:
    """Add the product to what earlier columns gave."""
    _tiles(0, x, depth, panel, size, out, width, rows)


@inlined
def _tiles(fresh: int, x: int, depth: int, panel: int, size: int, out: int, width: int, rows: int) -> None:
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    for tile in range(tiles):
        row = rows * tile // tiles
        height = rows * (tile + 1) // tiles - row
        a, c = x + 4 * row * depth, out + 4 * row * width
        if height == 6:
            matrix_tile(FLOAT32, 6, 2, fresh, a, depth, panel, PANEL, size, c, width, AHEAD)
        elif height == 5:
            matrix_tile(FLOAT32, 5, 2, fresh, a, depth, panel, PANEL, size, c, width, AHEAD)
        elif height == 4:
            matrix_tile(FLOAT32, 4, 2, fresh, a, depth, panel, PANEL, size, c, width, AHEAD)
        elif height == 3:
            matrix_tile(FLOAT32, 3, 2, fresh, a, depth, panel, PANEL, size, c, width, AHEAD)
        elif height == 2:
            matrix_tile(FLOAT32, 2, 2, fresh, a, depth, panel, PANEL, size, c, width, AHEAD)
        else:
            matrix_tile(FLOAT32, 1, 2, fresh, a, depth, panel, PANEL, size, c, width, AHEAD)
