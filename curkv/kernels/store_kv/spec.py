"""Storing keys and values: what an implementation is, inputs, and costs."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from curkv.kernels.costs import Cost
from curkv.kernels.pages import Pages
from curkv.kernels.spec import Call, Case, Inputs


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
        q: Tensor | None = None,
    ) -> None: ...


def _call(x: Inputs) -> Call:
    q, k, v = x.qkv(x.workload.chunk)
    positions, query_start = x.new_tokens()
    arguments = x.pages, k, v, *x.angles(), positions, *x.attended(1), query_start, q
    return Call(arguments, written=(q, *x.pages.arrays.values()))


CASES = (
    Case(
        "",
        "prefill",
        Cost(
            "T*H*(2*D*(a + s) + 2*e + 16) + 2*T*Q*D*a + 4*T*D",
            "T*H*(2*D*(a + s) + 2*e + 16 + 8) + 2*T*Q*D*a + 4*T*D + 4*T",
            "7*T*H*D + 3*T*Q*D",
        ),
        _call,
        reads_vectors=True,
    ),
)
