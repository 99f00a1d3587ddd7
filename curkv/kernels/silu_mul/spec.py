"""The gated activation: what an implementation is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class SiluMul(Protocol):
    """See `reference.silu_mul`."""

    def __call__(self, gate_up: Tensor) -> Tensor: ...  # noqa: D102
