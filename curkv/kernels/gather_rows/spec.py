"""Picking rows of a matrix: what an implementation is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class GatherRows(Protocol):
    """See `reference.gather_rows`."""

    def __call__(self, source: Tensor, rows: Tensor) -> Tensor: ...  # noqa: D102
