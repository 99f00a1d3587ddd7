"""What the experts of each token have made of it, added up: what an implementation is, inputs, and costs."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from curkv.kernels.costs import Cost
from curkv.kernels.spec import Call, Case, Inputs


class Combine(Protocol):
    """See `reference.combine`."""

    def __call__(  # noqa: D102
        self,
        rows: Tensor,
        places: Tensor,
        shares: Tensor,
        shared: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor: ...


CHOSEN = 2
"""Experts of a token in Mixtral."""


def _call(x: Inputs, *beside: int) -> Call:
    count, hidden = x.workload.chunk, x.workload.model.hidden
    places = x.integers(CHOSEN * count).long().flip(0).view(count, CHOSEN)
    more = (x.normal(count, columns or hidden) for columns in beside)
    return Call((x.normal(CHOSEN * count, hidden), places, x.uniform(count, CHOSEN), *more))


CASES = (
    Case("", "prefill", Cost("3*T*d*a + 24*T", "3*T*d*a + 24*T", "4*T*d"), lambda x: _call(x)),
    Case("one shared", "prefill", Cost("4*T*d*a + 24*T", "4*T*d*a + 24*T", "5*T*d"), lambda x: _call(x, 0)),
    Case("behind a gate", "prefill", Cost("4*T*d*a", "4*T*d*a", "6*T*d"), lambda x: _call(x, 0, 1)),
)
