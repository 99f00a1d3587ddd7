"""Linear layers: what one is, and what makes them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from curkv.kernels.linear.formats import FLOAT32, WeightFormat


class Linear(Protocol):
    """A linear layer over packed weights: x W^T + b; see `reference.ComposedLinear`."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, N] from x [T, K]."""

    def after_rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The product with the normalised rows of x plus the residual, and that sum."""

    def after_silu_mul(self, gate_up: Tensor) -> Tensor:
        """The product with the gated activation of [T, 2 K]."""

    @property
    def given(self) -> Tensor | None:
        """[N, K], its weight as it was given, if it is held so; None: it is packed or rounded."""

    @property
    def nbytes(self) -> int:
        """Memory of its weights."""


class PackLinear(Protocol):
    """Makes a linear layer of weight [N, K] and bias [N] in a format; see `reference.pack_linear`."""

    def __call__(  # noqa: D102
        self, weight: Tensor, bias: Tensor | None = None, form: WeightFormat = FLOAT32
    ) -> Linear: ...
