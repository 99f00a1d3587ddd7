"""Attention of the last queries to what is stored: what an implementation is, inputs, and costs."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, Protocol

from torch import Tensor

from curkv.kernels.costs import Cost
from curkv.kernels.pages import Pages
from curkv.kernels.spec import SOFTCAP, Call, Case, Inputs


class WindowScores(Protocol):
    """See `reference.window_scores`."""

    def __call__(  # noqa: D102
        self,
        queries: Tensor,
        pages: Pages,
        table: Tensor,
        lengths: Tensor,
        scale: float,
        reduction: Literal["mean", "max"] = "mean",
        lse: Tensor | None = None,
        width: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor: ...


def _call(x: Inputs, lse_given: bool = False, masked: bool = False) -> Call:
    w, m = x.workload, x.workload.model
    table, lengths = x.rows()
    shape = len(table), w.window, m.query_heads // m.kv_heads
    arguments = x.normal(*shape, m.head_dim), x.pages, table, lengths, x.scale
    keywords: dict[str, object] = {"lse": x.near(math.log(w.tokens), *shape)} if lse_given else {}
    if masked:
        keywords = {"softcap": SOFTCAP, "sinks": x.near(1.0, len(table), shape[-1])}
    return Call(arguments, keywords)


CASES = (
    Case(
        "",
        "evict",
        Cost(
            "2*L*H*n*(D*s + e + 4) + 4*L*H*n + L*Q*w*D*a",
            "2*L*H*n*(D*s + e + 4 + 4/P) + 4*L*H*n + L*Q*w*(D*a + 8*S)",
            "4*L*Q*w*n*D",
            "queries for each block of keys",
        ),
        _call,
        reads_vectors=True,
    ),
    Case(
        "lse given",
        "evict",
        Cost(
            "L*H*n*(D*s + e + 4) + L*Q*w*(D*a + 4)",
            "L*H*n*(D*s + e + 4 + 4/P) + L*Q*w*(D*a + 4)",
            "2*L*Q*w*n*D",
            "queries for each block of keys",
        ),
        partial(_call, lse_given=True),
        reads_vectors=True,
    ),
    Case(
        "masked",
        "evict",
        Cost(
            "2*L*H*n*(D*s + e + 4) + 4*L*H*n + L*Q*w*D*a",
            "2*L*H*n*(D*s + e + 4 + 4/P) + 4*L*H*n + L*Q*w*(D*a + 8*S)",
            "4*L*Q*w*n*D",
            "queries for each block of keys",
        ),
        partial(_call, masked=True),
        reads_vectors=True,
    ),
)
