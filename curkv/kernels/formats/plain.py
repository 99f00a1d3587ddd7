"""Vectors of floats, rounded to their type and otherwise as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curkv.kernels.formats.base import Array, KVFormat, VectorFormat


@dataclass(frozen=True)
class Plain(VectorFormat):
    """Vectors of one type of float.

    Attributes:
        dtype: float32, bfloat16 or float16.
    """

    dtype: torch.dtype

    @property
    def name(self) -> str:  # type: ignore[override]
        """The type's."""
        return str(self.dtype).removeprefix("torch.")

    def arrays(self, head_dim: int) -> dict[str, Array]:
        """The vectors."""
        return {"vectors": Array((head_dim,), self.dtype)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Rounds to nearest even."""
        return {"vectors": x.to(self.dtype)}

    def decode(self, entries: Mapping[str, Tensor]) -> Tensor:
        """Widens."""
        return entries["vectors"].float()


FORMATS = {
    each.name: KVFormat(each.name, each, each)
    for each in map(Plain, (torch.float32, torch.bfloat16, torch.float16))
}
