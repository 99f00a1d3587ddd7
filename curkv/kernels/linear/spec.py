"""Linear layers: what one is, and what makes them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from curkv.kernels.linear.formats import FLOAT32, WeightFormat

PANEL_ROWS = 16
"""Rows of a panel of a packed weight."""


class Packed(NamedTuple):
    """A weight [N, K] as it lies in memory.

    Attributes:
        rows: N.
        depth: K filled up: columns of x that are multiplied with.
        columns: K.
        panels: [panels, ...], of `PANEL_ROWS` each.
        scales: float32 [panels * `PANEL_ROWS`] of rows of bytes.
    """

    rows: int
    depth: int
    columns: int
    panels: Tensor
    scales: Tensor | None


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

    def rows(self, ids: Tensor, factor: float = 1.0) -> Tensor:
        """Rows of the weight times a factor, [T, K], for int64 [T]; in formats of embeddings."""

    @property
    def given(self) -> Tensor | None:
        """[N, K], its weight as it was given, or as rounded as it is held; None: it lies in another order."""

    @property
    def packed(self) -> Packed | None:
        """Its weight as it lies in memory, if it can be made of that again."""

    @property
    def nbytes(self) -> int:
        """Memory of its weights."""


class PackLinear(Protocol):
    """Makes a linear layer of weight [N, K], or of what was packed of one, and bias [N], in a format."""

    def __call__(  # noqa: D102
        self, weight: Tensor | Packed, bias: Tensor | None = None, form: WeightFormat = FLOAT32
    ) -> Linear: ...
