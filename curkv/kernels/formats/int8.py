"""Vectors of int8 with a scale for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curkv.kernels.formats.base import Array, KVFormat, VectorFormat

LARGEST = 127
"""Largest of the integers; the least is its negative, so that the range is symmetric."""


@dataclass(frozen=True)
class Int8(VectorFormat):
    """Integers times a scale: a vector's largest element becomes 127 or -127.

    No element is off by more than half of the scale, which is a 254th of the largest one.
    """

    name = "int8"
    multiple = 16

    def arrays(self, head_dim: int) -> dict[str, Array]:
        """The integers, and what they are multiplied with."""
        return {"vectors": Array((head_dim,), torch.int8), "scales": Array((), torch.float32)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Divides by a 127th of the largest element and rounds to nearest even; zeros have the scale 0."""
        largest = x.abs().amax(-1)
        factor = torch.where(largest > 0, LARGEST / largest, 0.0)
        return {"vectors": (x * factor[..., None]).round().to(torch.int8), "scales": largest / LARGEST}

    def decode(self, entries: Mapping[str, Tensor]) -> Tensor:
        """Multiplies."""
        return entries["vectors"].float() * entries["scales"][..., None]


FORMATS = {"int8": KVFormat("int8", Int8(), Int8())}
