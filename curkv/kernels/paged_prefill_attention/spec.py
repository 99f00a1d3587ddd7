"""Attention of chunks of prompts: what an implementation is, inputs, and costs."""

from __future__ import annotations

from typing import Literal, Protocol, overload

from torch import Tensor

from curkv.kernels.costs import Cost
from curkv.kernels.pages import Pages
from curkv.kernels.spec import Call, Case, Inputs


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


def _call(x: Inputs) -> Call:
    _, query_start = x.new_tokens()
    return Call((x.qkv(x.workload.chunk)[0], x.pages, *x.attended(1), query_start, x.scale))


CASES = (
    Case(
        "",
        "prefill",
        Cost(
            "B*H*n*(2*D*s + 2*e) + 2*T*Q*D*a",
            "B*H*n*(2*D*s + 2*e + 4/P) + 2*T*Q*D*a + 4*T*Q",
            "4*B*Q*D*c*(n - c/2)",
            "K and V for each tile of queries",
        ),
        _call,
        reads_vectors=True,
    ),
)
