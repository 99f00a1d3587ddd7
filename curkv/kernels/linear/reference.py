"""Linear layers in torch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import linear


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Makes a linear layer.

    Args:
        weight: [N, K].
        bias: [N].

    Returns:
        A function from x [T, K] to x W^T + b, [T, N].
    """
    return lambda x: linear(x, weight, bias)
