"""Root-mean-square normalisation in torch."""

from __future__ import annotations

from typing import overload

from torch import Tensor


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalises rows: x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, https://arxiv.org/abs/1910.07467).

    Args:
        x: [T, d], or [T, heads, d] without a residual.
        weight: [d].
        eps: Added to the mean square.
        residual: [T, d], added to x first.

    Returns:
        The shape of x; with a residual, that and the sum x + residual, [T, d].
    """
    total = x if residual is None else x + residual
    exact = total.float()
    scale = (exact.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    out = weight * (exact * scale).to(x.dtype)
    return out if residual is None else (out, total)
