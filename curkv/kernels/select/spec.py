"""Choosing the tokens to keep: what an implementation is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Select(Protocol):
    """See `reference.select`."""

    def __call__(  # noqa: D102
        self, scores: Tensor, lengths: Tensor, keep: Tensor, floor: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...
