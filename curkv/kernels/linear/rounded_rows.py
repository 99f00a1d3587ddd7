"""Rows rounded to int8 with a scale per 32 columns, as they are read, normalised or gated.

A row is made in memory that stays in the first-level cache and is rounded from there, so that it never
travels as floats.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from curkv.kernels.cpu.jit import inlined
from curkv.kernels.cpu.llvm import LINE
from curkv.kernels.cpu.memory import FLOAT32, address, store_int32, store_scalar
from curkv.kernels.cpu.quads import QUAD_BLOCK, largest_of_block, round_block
from curkv.kernels.cpu.workers import bits_of_float, compile_worker, empty, launch, read_arguments
from curkv.kernels.rms_norm.cpu import norm_row
from curkv.kernels.silu_mul.cpu import silu_mul_row

PART_SIZE = 1 << 13
"""Values that a thread takes; fewer are not worth a second thread."""
SMALLEST = np.float32(1e-30)
"""Blocks whose largest value is below are taken for zeros."""
QUAD_UNIT = 1 << 14
"""What scales of rows for bytes are divided by, and those of such weights multiplied with."""
_READ, _NORMALISE, _GATE = range(3)


class RoundedRows(NamedTuple):
    """What `quad_tile` multiplies with.

    Attributes:
        rows: How many.
        integers: Address of int8 [rows, depth].
        scales: Address of float32 [depth / 32, rows], NaN where not all values are finite.
        sums: Address of [depth / 32, rows], see `quad_tile`.
        memory: Where all of them lie.
    """

    rows: int
    integers: int
    scales: int
    sums: int
    memory: Tensor


def round_rows(x: Tensor, for_bytes: bool) -> RoundedRows:
    """Rounds float32 [T, K], K a multiple of 32, to be multiplied with bytes or with nibbles."""
    return _round(_READ, for_bytes, len(x), x.shape[1], address(x, torch.float32), 0, 0, 0, 0)


def round_normed_rows(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, for_bytes: bool
) -> tuple[RoundedRows, Tensor]:
    """Rounds what `rms_norm` gives; returns the sum with the residual too, x itself where there is none."""
    total = x if residual is None else empty(*x.shape)
    rounded = _round(
        _NORMALISE, for_bytes, len(x), x.shape[1], address(x, torch.float32),
        0 if residual is None else address(residual, torch.float32),
        address(weight, torch.float32), bits_of_float(eps), total.data_ptr(),
    )  # fmt: skip
    return rounded, total


def round_gated_rows(gate_up: Tensor, for_bytes: bool) -> RoundedRows:
    """Rounds what `silu_mul` gives."""
    depth = gate_up.shape[1] // 2
    return _round(_GATE, for_bytes, len(gate_up), depth, address(gate_up, torch.float32), 0, 0, 0, 0)


def _round(made_by: int, for_bytes: bool, count: int, depth: int, *source: int) -> RoundedRows:
    rows = max(1, PART_SIZE // depth)
    parts = -(-count // rows)
    size, side = (-(-part // LINE) * LINE for part in (count * depth, 4 * count * depth // QUAD_BLOCK))
    memory = empty(size + 2 * side + 4 * parts * depth, dtype=torch.int8)  # at the end parts make their rows
    integers = memory.data_ptr()
    scales = integers + size
    sums = scales + side
    launch(
        _worker(made_by, for_bytes), parts, count, rows, depth, integers, scales, sums, sums + side, *source
    )
    return RoundedRows(count, integers, scales, sums, memory)


@functools.cache
def _worker(made_by: int, for_bytes: bool) -> int:
    def work(arguments: int, part: int) -> None:
        count, rows, depth, integers, scales, sums, made = read_arguments(arguments, 7)
        x, residual, weight, eps, total = read_arguments(arguments + 8 * 7, 5)
        made += 4 * part * depth
        for row in range(part * rows, min(count, (part + 1) * rows)):
            place = 4 * row * depth
            if made_by == _READ:
                source = x + place
            elif made_by == _NORMALISE:
                source = made
                norm_row(x + place, residual and residual + place, weight, eps, total + place, made, depth)
            else:
                source = made
                silu_mul_row(x + 2 * place, made, depth)
            _round_row(
                for_bytes, source, integers + row * depth, scales + 4 * row, sums + 4 * row, count, depth
            )

    return compile_worker(work)


@inlined
def _round_row(
    for_bytes: Any, row: int, integers: int, scales: int, sums: int, count: int, depth: int
) -> None:
    for block in range(depth // QUAD_BLOCK):
        place, at = block * QUAD_BLOCK, 4 * block * count
        highest = largest_of_block(row + 4 * place)
        inverse = np.float32(127) / highest if highest >= SMALLEST else np.float32(0.0)
        total = round_block(row + 4 * place, inverse, integers + place)
        scale = highest / np.float32(127) if inverse > 0 else highest * np.float32(0.0)
        if for_bytes:
            store_scalar(FLOAT32, scales + at, scale / np.float32(QUAD_UNIT))
            store_int32(sums + at, -128 * total)
        else:
            store_scalar(FLOAT32, scales + at, scale)
            store_scalar(FLOAT32, sums + at, scale * np.float32(total))
