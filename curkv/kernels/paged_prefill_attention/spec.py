"""Attention of chunks of prompts: what an implementation is, inputs, and costs."""

from __future__ import annotations

from functools import partial
from typing import Literal, Protocol, overload

import torch
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


QUESTION = 64
"""Tokens of a question behind a text."""


def _call(x: Inputs, masked: bool = False, tokens: int | None = None) -> Call:
    tokens = x.workload.chunk if tokens is None else min(tokens, x.workload.chunk)
    query_start = torch.tensor([0, tokens], dtype=torch.int32, device=x.device)
    arguments = x.qkv(tokens)[0], x.pages, *x.attended(1), query_start, x.scale
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
    Case(
        "a question",
        "prefill",
        Cost(
            f"B*H*n*(2*D*s + 2*e) + 2*{QUESTION}*Q*D*a",
            f"B*H*n*(2*D*s + 2*e + 4/P) + {QUESTION}*Q*(2*D*a + 4)",
            f"4*B*Q*D*{QUESTION}*n",
            "partial results",
        ),
        partial(_call, tokens=QUESTION),
        reads_vectors=True,
    ),
)
