"""The clamped gated activation: what an implementation is, inputs, and costs."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from curkv.kernels.costs import Cost
from curkv.kernels.spec import Call, Case, Inputs


class ClampedMul(Protocol):
    """See `reference.clamped_mul`."""

    def __call__(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor: ...  # noqa: D102


def _call(x: Inputs) -> Call:
    return Call((x.normal(x.workload.chunk, 2 * x.workload.model.intermediate), 1.702, 1.0))


CASES = (Case("", "prefill", Cost("3*T*I*a", "3*T*I*a", "9*T*I"), _call),)
