"""Picking rows of a matrix: what an implementation is, inputs, and costs."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from curkv.kernels.costs import Cost
from curkv.kernels.spec import Call, Case, Inputs


class GatherRows(Protocol):
    """See `reference.gather_rows`."""

    def __call__(self, source: Tensor, rows: Tensor) -> Tensor: ...  # noqa: D102


def _call(x: Inputs) -> Call:
    hidden = x.normal(x.workload.tokens, x.workload.model.hidden)
    return Call((hidden, x.integers(len(hidden)).long().flip(0)[: x.workload.chunk]))


CASES = (Case("", "prefill", Cost("2*T*d*a + 8*T", "2*T*d*a + 8*T", "0"), _call),)
