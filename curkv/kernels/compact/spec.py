"""Moving kept tokens to the front: what an implementation is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from curkv.kernels.pages import Pages


class Compact(Protocol):
    """See `reference.compact`."""

    def __call__(  # noqa: D102
        self, pages: Pages, source: Tensor, target: Tensor, indices: Tensor, counts: Tensor
    ) -> None: ...
