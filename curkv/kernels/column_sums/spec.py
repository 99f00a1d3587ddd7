"""Attention of a chunk summed over its queries: what an implementation is, inputs, and costs."""

from __future__ import annotations

import math
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
    ) -> None: ...


def _call(x: Inputs) -> Call:
    q, (_, query_start) = x.qkv(x.workload.chunk)[0], x.new_tokens()
    lse = x.near(math.log(x.workload.tokens), len(q), q.shape[1])
    arguments = q, lse, x.pages, *x.attended(1), query_start, x.scale
    return Call(arguments, written=(x.pages.attention,))


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
)
