"""Root-mean-square normalisation with Triton, the residual's sum in the same pass."""

from __future__ import annotations

from typing import overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from curkv.kernels.triton_util import narrow, power_of_two


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise rows; see `reference.rms_norm`. Heads may lie apart, as in a product that is split."""
    size, heads = x.shape[-1], 1 if x.ndim == 2 else x.shape[1]
    rows = len(x) * heads
    out = torch.empty(x.shape, dtype=torch.result_type(x, weight), device=x.device)
    total = x if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    if rows:
        block = power_of_two(size)
        _normalise_rows[(rows,)](
            x,
            weight,
            x if residual is None else residual,
            out,
            total,
            x.stride(0),
            0 if x.ndim == 2 else x.stride(1),
            heads,
            x.stride(0) if residual is None else residual.stride(0),
            eps,
            SIZE=size,
            RESIDUAL=residual is not None,
            BLOCK=block,
            num_warps=max(1, min(8, block // 512)),
        )
    return out if residual is None else (out, total)


@triton.jit(do_not_specialize=["heads"])
def _normalise_rows(
    x,
    weight,
    residual,
    out,
    total,
    stride_x,
    stride_head,
    heads,
    stride_residual,
    eps,
    SIZE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row). As in the reference, the sum and the normalised row are rounded to the dtype of x."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < SIZE
    x += row // heads * stride_x + row % heads * stride_head
    values = tl.load(x + i, mask=mask, other=0.0)
    if RESIDUAL:
        values = added(values, residual + row * stride_residual + i, mask)
        tl.store(total + row * SIZE + i, values, mask=mask)
    w = tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
    values = normalised(values, SIZE, eps) * w
    tl.store(out + row * SIZE + i, narrow(values, out.dtype.element_ty), mask=mask)


@triton.jit
def added(values, residual, mask):
    """Add a row of the residual, whose elements `residual` points to; rounded to the dtype of the values."""
    total = values.to(tl.float32) + tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    return narrow(total, values.dtype)


@triton.jit
def normalised(values, SIZE: tl.constexpr, eps):
    """Divide a row by its root mean square; float32, rounded to the dtype of the values."""
    exact = values.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(exact * exact, 0) / SIZE + eps)
    return narrow(exact * scale, values.dtype).to(tl.float32)
