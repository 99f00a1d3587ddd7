"""Linear layers: what one is, and what makes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from curkv.kernels.costs import Cost
from curkv.kernels.linear.formats import FLOAT32, WeightFormat
from curkv.kernels.spec import Call, Case, Inputs

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


class GroupedLinear(Protocol):
    """Linear layers of one shape, of which each has rows of its own; see `reference.GroupedLinear`."""

    def __call__(self, x: Tensor, groups: Tensor) -> Tensor:
        """[T, N] from x [T, K]; groups are those of `Routes`."""

    def after_silu_mul(self, gate_up: Tensor, groups: Tensor) -> Tensor:
        """The products with the gated activation of [T, 2 K]."""


class GroupLinear(Protocol):
    """Has linear layers run as one."""

    def __call__(self, layers: Sequence[Linear]) -> GroupedLinear: ...  # noqa: D102


def _normalised(x: Inputs, dtype: torch.dtype) -> Call:
    hidden = x.normal(x.workload.chunk, x.workload.model.hidden)
    return Call((hidden, dtype, x.normal(hidden.shape[1]), 1e-5, hidden))


def _gated(x: Inputs) -> Call:
    gate_up = x.normal(x.workload.chunk, 2 * x.workload.model.intermediate)
    return Call((gate_up, torch.int8), {"gate": True})


def _scaled(x: Inputs) -> Call:
    rows, columns = x.workload.chunk, x.workload.model.hidden
    sums = x.integers(rows * columns).view(rows, columns)
    return Call((sums, x.uniform(rows), x.uniform(columns), None, x.workload.dtype))


_NORMALISED = "T*d*(3*a + 1) + d*a + 4*T"

GPU_CASES = (
    (
        "round_rows",
        Case(
            "int8", "prefill", Cost(_NORMALISED, _NORMALISED, "8*T*d"), partial(_normalised, dtype=torch.int8)
        ),
    ),
    (
        "round_rows",
        Case(
            "fp8",
            "prefill",
            Cost(_NORMALISED, _NORMALISED, "8*T*d"),
            partial(_normalised, dtype=torch.float8_e4m3fn),
            writes_fp8=True,
        ),
    ),
    (
        "round_rows",
        Case("gated", "prefill", Cost("T*I*(2*a + 1) + 4*T", "T*I*(2*a + 1) + 4*T", "8*T*I"), _gated),
    ),
    (
        "scale_rows",
        Case("", "prefill", Cost("T*d*(4 + a) + 4*T + 4*d", "T*d*(4 + a) + 4*T + 4*d", "2*T*d"), _scaled),
    ),
)
"""What Triton's kernels do besides the product, which is the vendor's: see `triton.round_rows`."""
