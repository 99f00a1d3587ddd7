"""Attention of chunks of prompts: what an implementation is."""

from __future__ import annotations

from typing import Literal, Protocol, overload

from torch import Tensor

from curkv.kernels.pages import Pages


class PagedPrefillAttention(Protocol):
    """See `reference.paged_prefill_attention`."""

    @overload
    def __call__(
        self,
        q: Tensor,
        pages: Pages,
        table: Tensor,
        lengths: Tensor,
        slots: Tensor,
        query_start: Tensor,
        scale: float,
        return_lse: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        q: Tensor,
        pages: Pages,
        table: Tensor,
        lengths: Tensor,
        slots: Tensor,
        query_start: Tensor,
        scale: float,
        return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...
    def __call__(  # noqa: D102
        self,
        q: Tensor,
        pages: Pages,
        table: Tensor,
        lengths: Tensor,
        slots: Tensor,
        query_start: Tensor,
        scale: float,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]: ...
