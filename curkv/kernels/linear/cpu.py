"""Linear layers on CPU: weights in panels of 16 rows, multiplied tile by tile in vector registers.

One layout serves a single token and a long chunk. A panel is read from memory in the order it is stored,
which lets a decode step run at memory bandwidth, and a 6 x 16 tile of the result keeps 12 of 16 vector
registers busy, which lets a prefill chunk run at the arithmetic peak (Goto and van de Geijn, "Anatomy of
high-performance matrix multiplication", 2008).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numba import get_num_threads, njit, prange
from numpy.typing import NDArray
from torch import Tensor

from curkv.kernels.linear.tile import gemm_tile

PANEL = 16
"""Rows of the weight in a panel: two vectors of 8 floats."""
TILE_ROWS = 6
"""Rows of x in a tile."""
BLOCK_ROWS = 96
"""Rows of x that are multiplied with a panel before the next one: they stay in the second-level cache."""
BLOCK_DEPTH = 576
"""Columns of a panel used at a time: such a part of it stays in the first-level cache."""


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Makes a linear layer, see `reference.pack_linear`; `weight` may be freed afterwards."""
    return _PackedLinear(weight, bias)


class _PackedLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None):
        self._rows, self._depth = weight.shape
        self._panels = -(-self._rows // PANEL)
        padded = torch.zeros(self._panels * PANEL, self._depth)
        padded[: self._rows] = weight
        self._weight = (
            padded.view(self._panels, PANEL, self._depth).transpose(1, 2).contiguous().numpy().ravel()
        )
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        out = torch.empty(count, self._panels * PANEL)
        _matmul(
            x.contiguous().numpy().ravel(),
            self._weight,
            out.numpy().ravel(),
            count,
            self._depth,
            get_num_threads(),
        )
        if out.shape[1] > self._rows:
            out = out[:, : self._rows].contiguous()
        return out if self._bias is None else out.add_(self._bias)


@njit(parallel=True, nogil=True, cache=True)
def _matmul(
    x: NDArray[Any], weight: NDArray[Any], out: NDArray[Any], count: int, depth: int, parts: int
) -> None:
    panels = weight.size // (depth * PANEL)
    for part in prange(parts):
        for start in range(0, depth, BLOCK_DEPTH):
            size = min(BLOCK_DEPTH, depth - start)
            for row in range(0, count, BLOCK_ROWS):
                rows = min(BLOCK_ROWS, count - row)
                for panel in range(panels * part // parts, panels * (part + 1) // parts):
                    place = (panel * depth + start) * PANEL
                    _block(
                        x,
                        row * depth + start,
                        depth,
                        weight,
                        place,
                        size,
                        out,
                        row,
                        panel,
                        panels,
                        rows,
                        start > 0,
                    )


@njit(nogil=True, cache=True)
def _block(
    x: NDArray[Any],
    x_start: int,
    depth: int,
    weight: NDArray[Any],
    w_start: int,
    size: int,
    out: NDArray[Any],
    first: int,
    panel: int,
    panels: int,
    rows: int,
    add: bool,
) -> None:
    """Multiplies `rows` rows of x with a panel, in tiles of nearly equal height."""
    width = panels * PANEL
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    for tile in range(tiles):
        row = rows * tile // tiles
        height = rows * (tile + 1) // tiles - row
        a, c = x_start + row * depth, (first + row) * width + panel * PANEL
        gemm_tile(height, x, a, depth, weight, w_start, size, out, c, width, add)
