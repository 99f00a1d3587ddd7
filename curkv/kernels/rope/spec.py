"""Rotary position embedding: what an implementation is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Rope(Protocol):
    """See `reference.rope`."""

    def __call__(self, q: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None: ...  # noqa: D102
