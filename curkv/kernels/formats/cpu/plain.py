"""Vectors of floats, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types

from curkv.kernels.cpu.jit import intrinsic
from curkv.kernels.cpu.lanes import float32x8
from curkv.kernels.cpu.llvm import F32X8, Args, item_size, narrow, offset, widen
from curkv.kernels.cpu.memory import FLOAT32, KINDS, load
from curkv.kernels.cpu.vectors import Channels, addresses
from curkv.kernels.formats.cpu.base import CPUVectors
from curkv.kernels.formats.plain import Plain


@intrinsic
def _store_channels(
    context: Any, vectors: Any, memory: Any, dim: Any, token: Any, first: Any, value: Any
) -> Any:
    """Store float32x8 as eight channels of a vector, from `first` on."""
    own = vectors.primitives

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, args: Args) -> None:
        _vectors, memory, dim, token, first, value = args
        start = own.place(builder, addresses(builder, memory), dim, token)
        narrow(builder, own.kind, offset(builder, start, first, own.bits // 8), value)

    return types.void(vectors, memory, *[types.int64] * 3, float32x8), generate


@dataclass(frozen=True)
class PlainVectors(CPUVectors):
    """Floats of one type.

    Attributes:
        dtype: Of the vectors.
    """

    dtype: torch.dtype
    arrays = 1

    @property
    def name(self) -> str:  # type: ignore[override]
        """Of the type."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def kind(self) -> Any:
        """Numba's type of the array that stands for the type."""
        return numba.typeof(KINDS[self.dtype])

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Of a channel."""
        return 8 * item_size(self.kind)

    def row(self, builder: ir.IRBuilder, store: Args, dim: ir.Value, token: ir.Value) -> Channels:
        """Widened in registers."""
        size = item_size(self.kind)
        start = offset(builder, store[0], token, dim, size)
        return lambda first: widen(builder, self.kind, offset(builder, start, first, size), F32X8)

    @staticmethod
    def write(vectors: Any, source: int, dim: int, memory: Any, token: int) -> None:
        """Rounded to nearest even."""
        for d in range(0, dim, 8):
            _store_channels(vectors, memory, dim, token, d, load(FLOAT32, source + 4 * d))


def primitives(format: Plain) -> PlainVectors:
    """Those of a type."""
    return PlainVectors(format.dtype)


FLOAT32_VECTORS = PlainVectors(torch.float32)
