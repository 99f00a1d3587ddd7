"""The most common kinds of GGUF blocks, compiled: values bit by bit those of the `gguf` package.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from curkv.kernels.cpu.jit import inlined, kernel

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.uint8]
"""[blocks, groups of 32, 32], of which there are a step and a lowest value each: float32 [blocks, groups]."""

_HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""Every float16, by its bits."""

_LOW, _FOUR = np.uint8(15), np.uint8(4)


@inlined
def _half(block: Any, at: int) -> Any:
    return _HALVES[block[at] | np.uint16(block[at + 1]) << 8]


@kernel
def _q4_0(blocks: Bytes, out: Floats) -> None:
    """A step; 32 nibbles less 8, the low ones first."""
    for i in range(len(blocks)):
        block, values = blocks[i], out[i]
        step = _half(block, 0)
        for j in range(16):
            values[j] = step * np.float32(np.int32(block[2 + j] & 15) - 8)
            values[16 + j] = step * np.float32(np.int32(block[2 + j] >> 4) - 8)


@kernel
def _q4_1(blocks: Bytes, out: Floats) -> None:
    """A step, a lowest value; 32 nibbles."""
    for i in range(len(blocks)):
        block, values = blocks[i], out[i]
        step, low = _half(block, 0), _half(block, 2)
        for j in range(16):
            values[j] = step * np.float32(block[4 + j] & 15) + low
            values[16 + j] = step * np.float32(block[4 + j] >> 4) + low


@kernel
def _q5_0(blocks: Bytes, out: Floats) -> None:
    """A step; fifth bits; 32 nibbles. Numbers less 16."""
    for i in range(len(blocks)):
        block, values = blocks[i], out[i]
        step = _half(block, 0)
        for j in range(16):
            low_bit = (block[2 + (j >> 3)] >> (j & 7)) & 1
            high_bit = (block[4 + (j >> 3)] >> (j & 7)) & 1
            values[j] = step * np.float32(np.int32((block[6 + j] & 15) | low_bit << 4) - 16)
            values[16 + j] = step * np.float32(np.int32((block[6 + j] >> 4) | high_bit << 4) - 16)


@kernel
def _q8_0(blocks: Bytes, out: Floats) -> None:
    """A step; 32 bytes with sign."""
    for i in range(len(blocks)):
        block, values = blocks[i], out[i]
        step = _half(block, 0)
        for j in range(32):
            values[j] = step * np.float32(np.int8(block[2 + j]))


@inlined
def _scale_and_low(block: Any, j: int) -> Any:
    """The 6-bit scale and lowest value of the j-th 32 values of a Q4_K or Q5_K block."""
    if j < 4:
        return block[4 + j] & 63, block[8 + j] & 63
    scale = (block[8 + j] & 15) | (block[j] >> 6) << 4
    return scale, (block[8 + j] >> 4) | (block[4 + j] >> 6) << 4


@kernel
def _q4_k(blocks: Bytes, out: Floats) -> None:
    """A step of steps, one of lowest values; eight of each in 6 bits; 256 nibbles, in pairs of 32."""
    for i in range(len(blocks)):
        block, values = blocks[i], out[i]
        step, low = _half(block, 0), _half(block, 2)
        for j in range(8):
            scale, least = _scale_and_low(block, j)
            d, m = step * np.float32(scale), low * np.float32(least)
            at, shift = 16 + 32 * (j >> 1), 4 * (j & 1)
            for n in range(32):
                values[32 * j + n] = d * np.float32((block[at + n] >> shift) & 15) - m


@kernel
def _q5_k(blocks: Bytes, out: Floats) -> None:
    """As Q4_K, with 256 fifth bits before the nibbles."""
    for i in range(len(blocks)):
        block, values = blocks[i], out[i]
        step, low = _half(block, 0), _half(block, 2)
        for j in range(8):
            scale, least = _scale_and_low(block, j)
            d, m = step * np.float32(scale), low * np.float32(least)
            at, shift = 48 + 32 * (j >> 1), 4 * (j & 1)
            for n in range(32):
                number = (block[at + n] >> shift) & 15 | ((block[16 + n] >> j) & 1) << 4
                values[32 * j + n] = d * np.float32(number) - m


@kernel
def _q6_k(blocks: Bytes, out: Floats) -> None:
    """256 nibbles, two higher bits of each, 16 scales with sign, a step. Numbers less 32."""
    for i in range(len(blocks)):
        block, values = blocks[i], out[i]
        step = _half(block, 208)
        for j in range(8):
            half, quarter = j >> 2, j & 3
            at, shift = 64 * half + 32 * (quarter & 1), 4 * (quarter >> 1)
            for n in range(32):
                high = (block[128 + 32 * half + n] >> (2 * quarter)) & 3
                number = np.int32((block[at + n] >> shift) & 15 | high << 4) - 32
                scale = step * np.float32(np.int8(block[192 + 2 * j + (n >> 4)]))
                values[32 * j + n] = scale * np.float32(number)


@kernel
def _q4_0_grids(blocks: Bytes, integers: Integers, steps: Floats, lows: Floats) -> None:
    """See `_q4_0`."""
    for i in range(len(blocks)):
        steps[i, 0] = _half(blocks[i], 0)
        lows[i, 0] = np.float32(-8) * steps[i, 0]
        _halves(blocks[i, 2:], integers[i, 0])


@kernel
def _q4_1_grids(blocks: Bytes, integers: Integers, steps: Floats, lows: Floats) -> None:
    """See `_q4_1`."""
    for i in range(len(blocks)):
        steps[i, 0], lows[i, 0] = _half(blocks[i], 0), _half(blocks[i], 2)
        _halves(blocks[i, 4:], integers[i, 0])


@inlined
def _halves(nibbles: Any, integers: Any) -> None:
    """The low halves of 16 bytes, and behind them the high ones."""
    for j in range(16):
        integers[j] = nibbles[j] & _LOW
        integers[16 + j] = nibbles[j] >> _FOUR


@kernel
def _q4_k_grids(blocks: Bytes, integers: Integers, steps: Floats, lows: Floats) -> None:
    """See `_q4_k`."""
    for i in range(len(blocks)):
        block = blocks[i]
        step, low = _half(block, 0), _half(block, 2)
        for j in range(8):
            scale, least = _scale_and_low(block, j)
            steps[i, j], lows[i, j] = step * np.float32(scale), -low * np.float32(least)
        for j in range(4):
            for n in range(32):
                integers[i, 2 * j, n] = block[16 + 32 * j + n] & _LOW
                integers[i, 2 * j + 1, n] = block[16 + 32 * j + n] >> _FOUR


DECODERS = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q5_0: _q5_0,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q5_K: _q5_k,
    GGMLQuantizationType.Q6_K: _q6_k,
}

GRIDS = {
    GGMLQuantizationType.Q4_0: _q4_0_grids,
    GGMLQuantizationType.Q4_1: _q4_1_grids,
    GGMLQuantizationType.Q4_K: _q4_k_grids,
}
"""Kinds of 4 bits: what their blocks are, without making values of them."""
