"""Attention of a chunk summed over its queries: what an implementation is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from curkv.kernels.pages import Pages


class ColumnSums(Protocol):
    """See `reference.column_sums`."""

    def __call__(  # noqa: D102
        self,
        q: Tensor,
        lse: Tensor,
        pages: Pages,
        table: Tensor,
        lengths: Tensor,
        slots: Tensor,
        query_start: Tensor,
        scale: float,
    ) -> None: ...
