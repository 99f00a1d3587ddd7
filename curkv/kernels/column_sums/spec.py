"""Attention of a chunk summed over its queries: what an implementation is, inputs, and costs."""

from __future__ import annotations

import math
from functools import partial
from typing import Protocol

from torch import Tensor

from curkv.kernels.costs import Cost
from curkv.kernels.pages import Pages
from curkv.kernels.spec import Call, Case, Inputs


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
        window: int | None = None,
        softcap: float | None = None,
    ) -> None: ...


def _call(x: Inputs, masked: bool = False) -> Call:
    q, (_, query_start) = x.qkv(x.workload.chunk)[0], x.new_tokens()
    lse = x.near(math.log(x.workload.tokens), len(q), q.shape[1])
    arguments = q, lse, x.pages, *x.attended(1), query_start, x.scale
    masks = {name: value for name, value in x.masks().items() if masked and name != "sinks"}
    return Call(arguments, masks, written=(x.pages.attention,))


CASES = (
    Case(
        "",
        "prefill",
        Cost(
            "B*H*n*(D*s + e + 8) + T*Q*(D*a + 4)",
            "B*H*n*(D*s + e + 8 + 4/P) + T*Q*(D*a + 4)",
            "2*B*Q*D*c*(n - c/2)",
            "queries for each block of keys",
        ),
        _call,
        reads_vectors=True,
    ),
    Case(
        "masked",
        "prefill",
        Cost(
            "B*H*n*(D*s + e + 12) + T*Q*(D*a + 4)",
            "B*H*n*(D*s + e + 12 + 4/P) + T*Q*(D*a + 4)",
            "2*B*Q*D*c*(n - c/2)",
            "queries for each block of keys",
        ),
        partial(_call, masked=True),
        reads_vectors=True,
    ),
)
