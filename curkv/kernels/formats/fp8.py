"""Vectors of 8-bit floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curkv.kernels.formats.base import Array, KVFormat, VectorFormat

LARGEST = 448.0
"""Largest number of the type."""


@dataclass(frozen=True)
class Fp8(VectorFormat):
    """Floats with four bits of exponent and three of mantissa (e4m3, arXiv:2209.05433), without a scale.

    No element from 2^-6 to 448 is off by more than a 16th of itself, smaller ones by 2^-10; larger ones
    become 448. Nothing but the numbers is read, and GPUs widen them by an instruction.
    """

    name = "fp8"
    multiple = 16
    devices = ("cuda",)

    def arrays(self, head_dim: int) -> dict[str, Array]:
        """The vectors."""
        return {"vectors": Array((head_dim,), torch.float8_e4m3fn)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Rounds to nearest even."""
        return {"vectors": x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)}

    def decode(self, entries: Mapping[str, Tensor]) -> Tensor:
        """Widens."""
        return entries["vectors"].float()


FORMATS = {"fp8": KVFormat("fp8", Fp8(), Fp8())}
