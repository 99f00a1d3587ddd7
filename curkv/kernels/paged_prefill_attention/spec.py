"""Attention of chunks of prompts: what an implementation is, inputs, and costs."""

from __future__ import annotations

from functools import partial
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
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
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
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
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
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]: ...


def _call(x: Inputs, masked: bool = False) -> Call:
    _, query_start = x.new_tokens()
    arguments = x.qkv(x.workload.chunk)[0], x.pages, *x.attended(1), query_start, x.scale
    return Call(arguments, x.masks() if masked else {})


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
    Case(
        "masked",
        "prefill",
        Cost(
            "B*H*n*(2*D*s + 2*e + 4) + 2*T*Q*D*a",
            "B*H*n*(2*D*s + 2*e + 4 + 4/P) + 2*T*Q*D*a + 4*T*Q",
            "4*B*Q*D*c*(n - c/2)",
            "K and V for each tile of queries",
        ),
        partial(_call, masked=True),
        reads_vectors=True,
    ),
)
