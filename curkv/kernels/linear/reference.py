"""Linear layers in torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from curkv.kernels.rms_norm.reference import rms_norm
from curkv.kernels.silu_mul.reference import silu_mul

GROUP = 32
"""Columns of an int4 weight that have a step and a lowest value in common."""
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
"""How much of a group's range its 16 values may span; the one with the least squared error is taken."""


class ComposedLinear(ABC):
    """A linear layer that runs what goes before on its own.

    Attributes:
        rms_norm, silu_mul: What may go before.
    """

    rms_norm: Callable[..., Any]
    silu_mul: Callable[[Tensor], Tensor]

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + b, [T, N] from [T, K]."""

    def after_rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The product with normalised rows, see `rms_norm`.

        Args:
            x: [T, K].
            weight: [K], of the norm.
            eps: Of the norm.
            residual: [T, K], added to x first.

        Returns:
            [T, N], and the sum x + residual, [T, K]; without a residual x itself.
        """
        if residual is None:
            return self(self.rms_norm(x, weight, eps)), x
        normed, total = self.rms_norm(x, weight, eps, residual)
        return self(normed), total

    def after_silu_mul(self, gate_up: Tensor) -> Tensor:
        """The product with silu(gate) * up, see `silu_mul`: [T, N] from [T, 2 K]."""
        return self(self.silu_mul(gate_up))


@dataclass(frozen=True, eq=False)
class ReferenceLinear(ComposedLinear):
    """A linear layer.

    Attributes:
        weight: [N, K], of the type of x, or int8.
        bias: [N].
        scales: float32 [N] of an int8 weight, by which its rows are multiplied.
        rms_norm, silu_mul: What may go before.
    """

    weight: Tensor
    bias: Tensor | None = None
    scales: Tensor | None = None
    rms_norm: Callable[..., Any] = rms_norm
    silu_mul: Callable[[Tensor], Tensor] = silu_mul

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
        A function from x [T, K] to x W^T + b, [T, N], see `ReferenceLinear`.
    """
    return ReferenceLinear(weight, bias)


def pack_linear_int8(weight: Tensor, bias: Tensor | None = None) -> ReferenceLinear:
    """Makes a linear layer whose weight is rounded to int8, see `quantise`; bias and x are not rounded.

    Args:
        weight: [N, K].
        bias: [N].

    Returns:
        A function from x [T, K] to x W^T + b, [T, N], see `ReferenceLinear`.
    """
    integers, scales = quantise(weight)
    return ReferenceLinear(integers, bias, scales)


def pack_linear_int4(weight: Tensor, bias: Tensor | None = None) -> ReferenceLinear:
    """Makes a linear layer whose weight is rounded to 4 bits, see `quantise_int4`; bias and x are not.

    Args:
        weight: [N, K].
        bias: [N].

    Returns:
        A function from x [T, K] to x W^T + b, [T, N], see `ReferenceLinear`.
    """
    integers, steps, lows = quantise_int4(weight)
    rounded = integers.view(*steps.shape, GROUP) * steps.float()[..., None] + lows.float()[..., None]
    return ReferenceLinear(rounded.flatten(1)[:, : weight.shape[1]].to(weight.dtype), bias)


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


def quantise_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds each group of 32 columns of a row to 16 evenly spaced values.

    A weight that has been rounded so before (llama.cpp's Q4_1 and Q4_0) is not changed.

    Args:
        weight: [N, K].

    Returns:
        integers: uint8 [N, K up to a multiple of 32], 0 to 15.
        steps: float16 [N, groups].
        lows: float16 [N, groups]; a group is about its integers times its step plus its lowest value.
    """
    groups = pad(weight.float(), (0, -weight.shape[1] % GROUP)).view(len(weight), -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    best = _round_groups(groups, low, high)
    for share in SHRINK[1:]:
        other = _round_groups(groups, share * low, share * high)
        better = other[3] < best[3]
        best = tuple(
            torch.where(better[..., None] if a.dim() > 2 else better, a, b)
            for a, b in zip(other, best, strict=True)
        )
    integers, steps, lows, _error = best
    return integers.flatten(1), steps, lows


def _round_groups(groups: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    """Integers, steps and lowest values of groups [N, G, 32] over given ranges, and the squared errors."""
    lows, steps = low.half(), ((high - low) / 15).half()
    offset, step = lows.float()[..., None], steps.float()[..., None]
    integers = ((groups - offset) / torch.where(step > 0, step, 1)).round().clamp(0, 15)
    error = (integers * step + offset - groups).square().sum(-1)
    return integers.to(torch.uint8), steps, lows, error
