"""Root-mean-square normalisation: what an implementation is."""

from __future__ import annotations

from typing import Protocol, overload

from torch import Tensor


class RmsNorm(Protocol):
    """See `reference.rms_norm`."""

    @overload
    def __call__(self, x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...
    @overload
    def __call__(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def __call__(  # noqa: D102
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]: ...
