"""Rotary position embedding: what an implementation is, inputs, and costs."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from curkv.kernels.costs import Cost
from curkv.kernels.spec import Call, Case, Inputs


class Rope(Protocol):
    """See `reference.rope`."""

    def __call__(self, q: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None: ...  # noqa: D102


def _call(x: Inputs) -> Call:
    q = x.qkv(x.workload.chunk)[0]
    return Call((q, *x.angles(), x.new_tokens()[0]), written=(q,))


CASES = (Case("", "prefill", Cost("2*T*Q*D*a + 4*T*D", "2*T*Q*D*a + 4*T*D + 4*T", "3*T*Q*D"), _call),)
