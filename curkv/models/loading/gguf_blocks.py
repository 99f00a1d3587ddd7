"""Values of the blocks that GGUF files are quantised in.

What each type means is the `gguf` package's: its arithmetic, in numpy, a stretch at a time that stays in the
second-level cache, in two threads or more. The types that most files are made of are compiled, to the same
values bit by bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from curkv.kernels.cpu.cores import usable_cores
from curkv.kernels.linear.formats import GROUP
from curkv.kernels.linear.stored import Bytes
from curkv.models.errors import UnsupportedModel

STRETCH = 1 << 16
"""Values that are made at a time: all that lies between blocks and them fits a second-level cache."""
PART = 1 << 20
"""Values that a thread takes."""

FOUR_BITS = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q4_K)
"""Kinds whose values are 16 in each group of 32."""

Floats = npt.NDArray[np.float32]
Decode = Callable[[Bytes, Floats], None]
"""Writes the values of blocks, uint8 [blocks, size], to float32 [blocks, values]."""


def dequantise(blocks: Bytes, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> Floats:
    """Returns the values of a tensor.

    Args:
        blocks: uint8, all its bytes.
        kind: How they are quantised.
        shape: Of the tensor.

    Raises:
        UnsupportedModel: The `gguf` package does not know what the blocks mean.
    """
    values, size = GGML_QUANT_SIZES[kind]
    decode = _decoder(kind)
    blocks, out = blocks.reshape(-1, size), np.empty((math.prod(shape) // values, values), np.float32)
    count = PART // values

    def part(start: int) -> None:
        decode(blocks[start : start + count], out[start : start + count])

    starts = range(0, len(blocks), count)
    if len(starts) <= 1:
        part(0)
    else:
        with ThreadPoolExecutor(usable_cores()) as pool:
            list(pool.map(part, starts))
    return out.reshape(shape)


def grids_of(rows: Bytes, kind: GGMLQuantizationType) -> tuple[npt.NDArray[Any], ...]:
    """Returns what rows of a matrix have been rounded to, see `kernels.linear.stored.Grids`.

    Args:
        rows: uint8 [N, bytes of a row].
        kind: One of `FOUR_BITS`.
    """
    from curkv.models.loading import compiled_blocks

    values, size = GGML_QUANT_SIZES[kind]
    blocks = rows.reshape(-1, size)
    integers = np.empty((len(blocks), values // GROUP, GROUP), np.uint8)
    steps, lows = np.empty((2, len(blocks), values // GROUP), np.float32)
    compiled_blocks.GRIDS[kind](blocks, integers, steps, lows)
    found = integers, steps.astype(np.float16), lows.astype(np.float16)
    return tuple(side.reshape(len(rows), -1) for side in found)


@functools.cache
def _decoder(kind: GGMLQuantizationType) -> Decode:
    from curkv.models.loading import compiled_blocks  # compiles nothing until it is called

    return compiled_blocks.DECODERS.get(kind) or functools.partial(_decode_by_numpy, kind)


def _decode_by_numpy(kind: GGMLQuantizationType, blocks: Bytes, out: Floats) -> None:
    count = max(1, STRETCH // out.shape[1])
    for start in range(0, len(blocks), count):
        some: Any = blocks[start : start + count]
        if kind in _PLAIN:
            out[start : start + count] = some.view(_PLAIN[kind])
            continue
        try:
            row = gguf.dequantize(some.reshape(1, -1), kind)  # which takes sixteen rows at a time
        except NotImplementedError as error:
            raise UnsupportedModel(f"tensors of the GGUF type {kind.name} are not supported") from error
        out[start : start + count] = row.reshape(-1, out.shape[1])


_PLAIN = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.F64: np.float64,
}
