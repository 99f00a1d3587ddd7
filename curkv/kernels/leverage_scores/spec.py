"""CurDKV's leverage scores: what an implementation is, inputs, and costs."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from curkv.kernels.costs import Cost
from curkv.kernels.pages import Pages
from curkv.kernels.spec import Call, Case, Inputs


class LeverageScores(Protocol):
    """See `reference.leverage_scores`."""

    def __call__(  # noqa: D102
        self,
        pages: Pages,
        table: Tensor,
        lengths: Tensor,
        *,
        normalization: Literal["window", "head"] = "window",
        window: int = 16,
        partial: Literal["corrected", "left", "right"] = "corrected",
        combine: Literal["product", "mean", "key", "value"] = "product",
        sketch: Tensor | None = None,
        width: int | None = None,
    ) -> Tensor: ...


def _call(x: Inputs) -> Call:
    return Call((x.pages, *x.rows()))


def _call_with_sketch(x: Inputs) -> Call:
    sketch = x.normal(x.workload.model.head_dim, x.workload.rank, dtype=torch.float32)
    return Call((x.pages, *x.rows()), {"normalization": "head", "sketch": sketch / x.workload.rank**0.5})


CASES = (
    Case(
        "",
        "evict",
        Cost("12*L*H*n", "L*H*n*(12 + 4/P)", "8*L*H*n", "both energies, for the row's sum"),
        _call,
    ),
    Case(
        "sketch",
        "evict",
        Cost(
            "L*H*n*(2*D*s + 2*e + 4)",
            "L*H*n*(2*D*s + 2*e + 4 + 4/P + 16)",
            "8*L*H*n*D*r",
            "both energies, for the row's sum",
        ),
        _call_with_sketch,
        reads_vectors=True,
    ),
)
