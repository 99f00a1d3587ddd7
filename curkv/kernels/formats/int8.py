"""Vectors of int8 with a scale, or with one for each group of channels where they are wide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curkv.kernels.formats.base import Array, KVFormat, VectorFormat

LARGEST = 127
"""Largest of the integers; the least is its negative, so that the range is symmetric."""
WIDE = 128
"""Vectors of a multiple of so many channels have a scale for each group, others one for all."""
GROUP = 32
"""Channels of a group."""


def scales_of(head_dim: int) -> int:
    """How many scales a vector has."""
    return 1 if head_dim % WIDE else head_dim // GROUP


def _grouped(x: Tensor) -> Tensor:
    """[..., head_dim] as [..., scales, channels of each]."""
    scales = scales_of(x.shape[-1])
    return x.reshape(*x.shape[:-1], scales, x.shape[-1] // scales)


@dataclass(frozen=True)
class Int8(VectorFormat):
    """Integers times a scale: the largest element of those that have it in common becomes 127 or -127.

    No element is off by more than half of the scale, which is a 254th of the largest one.
    """

    name = "int8"
    multiple = 16

    def arrays(self, head_dim: int) -> dict[str, Array]:
        """The integers, and what they are multiplied with."""
        return {
            "vectors": Array((head_dim,), torch.int8),
            "scales": Array((scales_of(head_dim),), torch.float32),
        }

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Divides by a 127th of the largest element and rounds to nearest even; zeros have the scale 0."""
        groups = _grouped(x)
        largest = groups.abs().amax(-1)
        factor = torch.where(largest > 0, LARGEST / largest, 0.0)
        vectors = (groups * factor[..., None]).round().to(torch.int8).flatten(-2)
        return {"vectors": vectors, "scales": largest / LARGEST}

    def decode(self, entries: Mapping[str, Tensor]) -> Tensor:
        """Multiplies."""
        vectors: Tensor = (_grouped(entries["vectors"].float()) * entries["scales"][..., None]).flatten(-2)
        return vectors


FORMATS = {"int8": KVFormat("int8", Int8(), Int8())}
