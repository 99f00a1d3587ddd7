"""Storing keys and values: what an implementation is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from curkv.kernels.pages import Pages


class StoreKV(Protocol):
    """See `reference.store_kv`."""

    def __call__(  # noqa: D102
        self,
        pages: Pages,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        table: Tensor,
        lengths: Tensor,
        slots: Tensor,
        query_start: Tensor,
    ) -> None: ...
