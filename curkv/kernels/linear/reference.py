"""Linear layers in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True, eq=False)
class ReferenceLinear:
    """A linear layer.

    Attributes:
        weight: [N, K], of the type of x, or int8.
        bias: [N].
        scales: float32 [N] of an int8 weight, by which its rows are multiplied.
    """

    weight: Tensor
    bias: Tensor | None = None
    scales: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return sum(part.nbytes for part in (self.weight, self.bias, self.scales) if part is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + b, [T, N] from [T, K]."""
        if self.scales is None:
            return linear(x, self.weight, self.bias)
        out = linear(x, self.weight.to(x.dtype)) * self.scales.to(x.dtype)
        return out if self.bias is None else out + self.bias


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> ReferenceLinear:
    """Makes a linear layer.

    Args:
        weight: [N, K].
        bias: [N].

    Returns:
        A function from x [T, K] to x W^T + b, [T, N], that knows its `nbytes`.
    """
    return ReferenceLinear(weight, bias)


def pack_linear_int8(weight: Tensor, bias: Tensor | None = None) -> ReferenceLinear:
    """Makes a linear layer whose weight is rounded to int8, see `quantise`; bias and x are not rounded.

    Args:
        weight: [N, K].
        bias: [N].

    Returns:
        A function from x [T, K] to x W^T + b, [T, N], that knows its `nbytes`.
    """
    integers, scales = quantise(weight)
    return ReferenceLinear(integers, bias, scales)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to integers of at most 127, in steps of a 127th of its largest value.

    Args:
        weight: [N, K].

    Returns:
        integers: int8 [N, K].
        scales: float32 [N]; a row is about its integers times its scale.
    """
    scales = weight.abs().amax(dim=1).float() / 127
    steps = torch.where(scales > 0, scales, 1)[:, None]
    return (weight / steps).round().to(torch.int8), scales
