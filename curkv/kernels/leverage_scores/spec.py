"""CurDKV's leverage scores: what an implementation is."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from curkv.kernels.pages import Pages


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
    ) -> Tensor: ...
