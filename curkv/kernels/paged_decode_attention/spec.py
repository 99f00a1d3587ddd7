"""Attention of one token per sequence: what an implementation is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from curkv.kernels.pages import Pages


class PagedDecodeAttention(Protocol):
    """See `reference.paged_decode_attention`."""

    def __call__(  # noqa: D102
        self,
        q: Tensor,
        pages: Pages,
        table: Tensor,
        lengths: Tensor,
        slots: Tensor,
        scale: float,
        accumulate: bool = False,
    ) -> Tensor: ...
