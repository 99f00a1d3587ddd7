"""Rounding weights and laying them in panels, a panel of 16 rows at a time, on all threads.

The same values as `formats.quantise` and `formats.quantise_int4`, which say what they are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from torch import Tensor

from curkv.kernels.cpu.jit import inlined, intrinsic
from curkv.kernels.cpu.lanes import absolute, broadcast, lane_max, maximum
from curkv.kernels.cpu.llvm import F32, F32X8, I32, I64, LANES, Args, call, constant, offset, pointer
from curkv.kernels.cpu.memory import FLOAT32, UINT32, address, array, floats, load
from curkv.kernels.cpu.panels import transposed
from curkv.kernels.cpu.quads import NIBBLE_BLOCK_BYTES, QUAD_BLOCK
from curkv.kernels.cpu.tiles import PANEL
from curkv.kernels.cpu.workers import compile_worker, launch, read_arguments
from curkv.kernels.linear.formats import MOST_STEPS, NEGLIGIBLE, SHRINK
from curkv.kernels.linear.stored import StoredRows, values

BYTE, _UINT16 = np.empty(0, np.uint8), np.empty(0, np.uint16)
_SIDES = QUAD_BLOCK // 2 * PANEL
"""Bytes of the nibbles in a block, before its steps and lowest values."""
_SHRINK = np.array(SHRINK[1:], np.float32)
_LINE = 4 * PANEL
"""Bytes of a float32 for each row of a panel."""
_RANGE, _TRIAL, _BEST, _VALUES = 0, 2 * _LINE, 4 * _LINE, 7 * _LINE
"""Where a part's scratch has lowest and highest values, what is tried, the best of it, [32, 16] values."""
_SCRATCH = _VALUES + QUAD_BLOCK * _LINE


def pack_bytes(weight: Tensor, together: int, depth: int, zero: int, unit: int) -> tuple[Tensor, Tensor]:
    """Rounds rows to bytes.

    Args:
        weight: [N, K].
        together: Columns of a row that lie side by side: 2 or 4.
        depth: K up to a multiple of them, filled with zeros.
        zero: Added to the integers.
        unit: The scales are multiplied with it.

    Returns:
        uint8 [panels, depth / together, 16, together], and float32 [panels * 16], the rows' scales.
    """
    weight = values(weight).float().contiguous()
    rows, columns = weight.shape
    panels = -(-rows // PANEL)
    packed = torch.full((panels, depth // together, PANEL, together), zero, dtype=torch.uint8)
    scales, scratch = torch.zeros(panels * PANEL), torch.full((panels, depth), zero, dtype=torch.uint8)
    places = address(weight, torch.float32), packed.data_ptr(), scales.data_ptr(), scratch.data_ptr()
    launch(_bytes_worker(), panels, *places, rows, columns, depth, together, zero, unit)
    return packed, scales


def pack_nibbles(weight: Tensor) -> Tensor:
    """Rounds groups of 32 columns to 16 values.

    Args:
        weight: [N, K].

    Returns:
        uint8 [panels, groups, `NIBBLE_BLOCK_BYTES`], see `quad_tile`.
    """
    if isinstance(weight, StoredRows) and (grids := weight.grids()) is not None:
        return _laid_out(*(side.numpy() for side in grids))
    weight = values(weight).float().contiguous()
    rows, columns = weight.shape
    panels, groups = -(-rows // PANEL), -(-columns // QUAD_BLOCK)
    packed = torch.zeros((panels, groups, NIBBLE_BLOCK_BYTES), dtype=torch.uint8)
    scratch = torch.empty((panels, _SCRATCH), dtype=torch.uint8)
    places = address(weight, torch.float32), packed.data_ptr(), scratch.data_ptr()
    launch(_nibbles_worker(), panels, *places, rows, columns, groups)
    return packed


def _laid_out(integers: Any, steps: Any, lows: Any) -> Tensor:
    """Blocks of what has been rounded, see `Grids`; what `write_nibbles` writes."""
    rows, groups = steps.shape
    missing = (0, -rows % PANEL), (0, 0)
    integers, steps, lows = (
        np.pad(side, missing) if rows % PANEL else side for side in (integers, steps, lows)
    )
    packed = np.empty((len(integers) // PANEL, groups, NIBBLE_BLOCK_BYTES), np.uint8)
    fours = integers.view(np.uint32).reshape(-1, PANEL, groups, QUAD_BLOCK // 8, 2)
    words = packed[..., :_SIDES].view(np.uint32).reshape(-1, groups, QUAD_BLOCK // 8, PANEL)
    words[:] = (fours[..., 0] | fours[..., 1] << 4).transpose(0, 2, 3, 1)
    sides = packed[..., _SIDES:].view(np.float16).reshape(-1, groups, 2, PANEL)
    for place, side in enumerate((steps, lows)):
        sides[:, :, place] = side.reshape(-1, PANEL, groups).swapaxes(1, 2)
    return torch.from_numpy(packed)


@functools.cache
def _bytes_worker() -> int:
    def work(arguments: int, panel: int) -> None:
        weight, packed, scales, scratch, rows, columns, depth, together, zero, unit = read_arguments(
            arguments, 10
        )
        line = array(BYTE, scratch + panel * depth, depth)
        factors = floats(scales, (panel + 1) * PANEL)
        for row in range(min(PANEL, rows - panel * PANEL)):
            source = weight + 4 * (panel * PANEL + row) * columns
            values, lanes = floats(source, columns), broadcast(np.float32(0.0))
            whole = columns - columns % LANES
            for i in range(0, whole, LANES):
                lanes = maximum(absolute(load(FLOAT32, source + 4 * i)), lanes)
            highest = lane_max(lanes)
            for i in range(whole, columns):
                highest = max(highest, abs(values[i]))
            scale = highest / np.float32(127)
            step = scale if scale > 0 else np.float32(1)
            for i in range(columns):
                line[i] = np.uint8(np.int32(np.rint(values[i] / step)) + zero)
            factors[panel * PANEL + row] = scale * np.float32(unit)
            at = packed + panel * depth * PANEL + row * together
            if together == 4:
                _spread(UINT32, scratch + panel * depth, at, depth // 4)
            else:
                _spread(_UINT16, scratch + panel * depth, at, depth // 2)

    return compile_worker(work)


@inlined
def _spread(kind: Any, source: int, target: int, count: int) -> None:
    """Copy values to every sixteenth place."""
    values, places = array(kind, source, count), array(kind, target, (count - 1) * PANEL + 1)
    for i in range(count):
        places[i * PANEL] = values[i]


@functools.cache
def _nibbles_worker() -> int:
    def work(arguments: int, panel: int) -> None:
        weight, packed, scratch, rows, columns, groups = read_arguments(arguments, 6)
        part = scratch + panel * _SCRATCH
        values = floats(part + _VALUES, QUAD_BLOCK * PANEL)
        for group in range(groups):
            first = group * QUAD_BLOCK
            size = min(QUAD_BLOCK, columns - first)
            place, height = weight + 4 * (panel * PANEL * columns + first), min(PANEL, rows - panel * PANEL)
            if size == QUAD_BLOCK and height == PANEL:
                turn_block(place, 4 * columns, part + _VALUES)
            else:
                values[:] = 0
                for row in range(height):
                    source = floats(place + 4 * row * columns, size)
                    for i in range(size):
                        values[i * PANEL + row] = source[i]
            _find_grids(part)
            block = packed + (panel * groups + group) * NIBBLE_BLOCK_BYTES
            write_nibbles(part + _VALUES, part + _BEST, block)

    return compile_worker(work)


@inlined
def _find_grids(part: int) -> None:
    """Finds the step and the lowest value that leave the least squared error, see `formats.quantise_int4`."""
    find_ranges(part + _VALUES, part + _RANGE, part + _BEST)
    lowest, highest = floats(part + _RANGE, PANEL), floats(part + _RANGE + _LINE, PANEL)
    lows, steps = floats(part + _TRIAL, PANEL), floats(part + _TRIAL + _LINE, PANEL)
    for trial in range(MOST_STEPS + len(_SHRINK)):
        for row in range(PANEL):
            if trial < MOST_STEPS:
                lows[row] = lowest[row]
                steps[row] = (highest[row] - lowest[row]) / np.float32(15 - trial)
            else:
                share = _SHRINK[trial - MOST_STEPS]
                lows[row] = share * lowest[row]
                steps[row] = (share * highest[row] - share * lowest[row]) / np.float32(15)
        if try_grids(part + _VALUES, part + _TRIAL, part + _BEST):
            break


def _lines(builder: ir.IRBuilder, place: ir.Value, count: int) -> list[ir.Value]:
    """So many float32 [16] that lie behind each other."""
    kind = ir.VectorType(F32, PANEL)
    places = [pointer(builder, offset(builder, place, _LINE * i), kind) for i in range(count)]
    return [builder.load(at, align=4) for at in places]


def _keep_lines(builder: ir.IRBuilder, place: ir.Value, lines: Sequence[ir.Value]) -> None:
    for i, line in enumerate(lines):
        builder.store(line, pointer(builder, offset(builder, place, _LINE * i), line.type), align=4)


def _inverse(builder: ir.IRBuilder, step: ir.Value) -> ir.Value:
    """One over a step; of a step of zero one."""
    one = constant(step.type, 1.0)
    positive = builder.fcmp_ordered(">", step, constant(step.type, 0.0))
    return builder.fdiv(one, builder.select(positive, step, one))


def _nearest(builder: ir.IRBuilder, value: ir.Value, low: ir.Value, inverse: ir.Value) -> ir.Value:
    """The integer from 0 to 15 that a value is nearest to, as a float."""
    kind = value.type
    zero, most = constant(kind, 0.0), constant(kind, 15.0)
    found = builder.fmul(builder.fsub(value, low), inverse)
    found = call(builder, f"llvm.rint.v{PANEL}f32", kind, [found])
    found = builder.select(builder.fcmp_ordered(">", found, zero), found, zero)
    return builder.select(builder.fcmp_ordered("<", found, most), found, most)


@intrinsic
def turn_block(context: Any, rows: Any, stride: Any, columns: Any) -> Any:
    """Write 32 columns of 16 rows, float32 `stride` bytes apart, as [32, 16]."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        rows, stride, columns = args
        for first in range(0, PANEL, LANES):
            for column in range(0, QUAD_BLOCK, LANES):
                places = [
                    builder.add(offset(builder, rows, stride, first + row), I64(4 * column))
                    for row in range(LANES)
                ]
                block = [builder.load(pointer(builder, place, F32X8), align=4) for place in places]
                for i, line in enumerate(transposed(builder, block)):
                    place = offset(builder, columns, _LINE * (column + i) + 4 * first)
                    builder.store(line, pointer(builder, place, F32X8), align=4)

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def find_ranges(context: Any, values: Any, ranges: Any, best: Any) -> Any:
    """Write the lowest and highest of float32 [32, 16] by row of a panel, and infinity for the best error."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        values, ranges, best = args
        lines = _lines(builder, values, QUAD_BLOCK)
        lowest = highest = lines[0]
        for line in lines[1:]:
            lowest = builder.select(builder.fcmp_ordered("<", line, lowest), line, lowest)
            highest = builder.select(builder.fcmp_ordered(">", line, highest), line, highest)
        _keep_lines(builder, ranges, [lowest, highest])
        zero = constant(lowest.type, 0.0)
        _keep_lines(builder, best, [zero, zero, constant(lowest.type, float("inf"))])

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def try_grids(context: Any, values: Any, trial: Any, best: Any) -> Any:
    """Round float32 [32, 16] to 16 grids, and keep those that are better.

    Args:
        context: Numba's.
        values: Their address.
        trial: Address of float32 [2, 16], lowest values and steps.
        best: Address of float32 [3, 16], lowest values, steps and squared errors of the best so far.

    Returns:
        Whether all errors are negligible.
    """

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> ir.Value:
        values, trial, best = args
        low, step = (
            builder.fpext(builder.fptrunc(line, ir.VectorType(ir.HalfType(), PANEL)), line.type)
            for line in _lines(builder, trial, 2)
        )
        error, inverse = constant(low.type, 0.0), _inverse(builder, step)
        for line in _lines(builder, values, QUAD_BLOCK):
            rounded = builder.fadd(builder.fmul(_nearest(builder, line, low, inverse), step), low)
            off = builder.fsub(rounded, line)
            error = builder.fadd(error, builder.fmul(off, off))
        known = _lines(builder, best, 3)
        enough = constant(low.type, NEGLIGIBLE)

        def negligible(step: ir.Value, error: ir.Value) -> ir.Value:
            return builder.fcmp_ordered("<=", error, builder.fmul(enough, builder.fmul(step, step)))

        worse = builder.or_(builder.fcmp_ordered(">=", error, known[2]), negligible(*known[1:]))
        kept = [builder.select(worse, old, new) for old, new in zip(known, (low, step, error), strict=True)]
        _keep_lines(builder, best, kept)
        done = negligible(*kept[1:])
        return call(builder, f"llvm.vector.reduce.and.v{PANEL}i1", ir.IntType(1), [done])

    return types.boolean(types.int64, types.int64, types.int64), generate


@intrinsic
def write_nibbles(context: Any, values: Any, grids: Any, block: Any) -> Any:
    """Round float32 [32, 16] to grids, lowest values and steps [2, 16], and write a block of `quad_tile`."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        values, grids, block = args
        low, step = _lines(builder, grids, 2)
        inverse = _inverse(builder, step)
        words = ir.VectorType(I32, PANEL)
        numbers = [
            builder.fptosi(_nearest(builder, line, low, inverse), words)
            for line in _lines(builder, values, QUAD_BLOCK)
        ]
        for pair in range(QUAD_BLOCK // 8):
            word = constant(words, 0)
            for i in range(4):
                for half in range(2):
                    shift = constant(words, 8 * i + 4 * half)
                    word = builder.or_(word, builder.shl(numbers[8 * pair + 4 * half + i], shift))
            builder.store(word, pointer(builder, offset(builder, block, _LINE * pair), words), align=4)
        for i, side in enumerate((step, low)):
            halves = builder.fptrunc(side, ir.VectorType(ir.HalfType(), PANEL))
            place = offset(builder, block, _SIDES + 2 * PANEL * i)
            builder.store(halves, pointer(builder, place, halves.type), align=2)

    return types.void(types.int64, types.int64, types.int64), generate
