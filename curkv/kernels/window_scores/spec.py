"""Attention of the last queries to what is stored: what an implementation is."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from curkv.kernels.pages import Pages


class WindowScores(Protocol):
    """See `reference.window_scores`."""

    def __call__(  # noqa: D102
        self,
        queries: Tensor,
        pages: Pages,
        table: Tensor,
        lengths: Tensor,
        scale: float,
        reduction: Literal["mean", "max"] = "mean",
        lse: Tensor | None = None,
    ) -> Tensor: ...
