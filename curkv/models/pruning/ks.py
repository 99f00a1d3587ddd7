"""Distance between the spectra of a matrix and of some of its rows (arXiv 2501.15296, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor


def singular_values(weight: Tensor) -> Tensor:
    """Returns the singular values, ascending, computed in float32 whatever the matrix is stored in."""
    values: Tensor = torch.linalg.svdvals(weight.float())
    return values.flip(0)


def ks_distance(first: Tensor, second: Tensor) -> float:
    """Kolmogorov-Smirnov distance of two samples: the largest gap between their distribution functions.

    Args:
        first: [a], ascending.
        second: [b], ascending.

    Returns:
        In [0, 1].
    """
    values = torch.cat([first, second])
    below_first = torch.searchsorted(first, values, right=True) / len(first)
    below_second = torch.searchsorted(second, values, right=True) / len(second)
    return float((below_first - below_second).abs().max())
