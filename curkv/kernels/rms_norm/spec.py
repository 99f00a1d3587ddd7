"""Root-mean-square normalisation: what an implementation is, inputs, and costs."""

from __future__ import annotations

from typing import Protocol, overload

from torch import Tensor

from curkv.kernels.costs import Cost
from curkv.kernels.spec import Call, Case, Inputs


class RmsNorm(Protocol):
    """See `reference.rms_norm`."""

    @overload
    def __call__(self, x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...
    @overload
    def __call__(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def __call__(  # noqa: D102
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]: ...


def _call(x: Inputs) -> Call:
    hidden = x.normal(x.workload.chunk, x.workload.model.hidden)
    return Call((hidden, x.normal(hidden.shape[1]), 1e-5, hidden))


CASES = (Case("", "prefill", Cost("4*T*d*a + d*a", "4*T*d*a + d*a", "5*T*d"), _call),)
