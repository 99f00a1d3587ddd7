"""Picking rows of a matrix, in torch."""

from __future__ import annotations

from torch import Tensor


def gather_rows(source: Tensor, rows: Tensor) -> Tensor:
    """Copies rows.

    Args:
        source: [N, d], rows contiguous.
        rows: int64 [T], each in 0..N - 1.

    Returns:
        [T, d].
    """
    return source[rows]
