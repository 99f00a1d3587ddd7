"""Linear layers on a GPU: the vendor's matrix product is the fastest one; what goes before is Triton's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from curkv.kernels.formats.triton import nearest
from curkv.kernels.linear import reference
from curkv.kernels.linear.formats import FLOAT32, WeightFormat
from curkv.kernels.linear.reference import ComposedLinear, group_linear
from curkv.kernels.linear.spec import Linear, Packed
from curkv.kernels.rms_norm.triton import added, normalised, rms_norm
from curkv.kernels.silu_mul.triton import gated, silu_mul
from curkv.kernels.triton_util import narrow, power_of_two

__all__ = ["group_linear", "pack_linear"]

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max}
_FEWEST_ROWS = 32
"""Rows that a product of integers is filled up to: it takes no fewer than 17."""
_BLOCK = 1024


def pack_linear(weight: Tensor | Packed, bias: Tensor | None = None, form: WeightFormat = FLOAT32) -> Linear:
    """Makes a linear layer; see `reference.pack_linear`. 8-bit formats of a GPU round what goes in too."""
    made = reference.pack_linear(weight, bias, form)
    if form.device == "cuda" and made.scales is not None:
        return RoundedLinear(made.weight, made.scales, bias)
    return replace(made, rms_norm=rms_norm, silu_mul=silu_mul)


@dataclass(frozen=True, eq=False)
class RoundedLinear(ComposedLinear):
    """A linear layer over numbers of 8 bits: rows of x are rounded as those of the weight, each with a scale.

    A norm or a gate in front, and the rounding, are one launch.

    Attributes:
        weight: float8_e4m3fn or int8 [N, K]; N and K are multiples of 16.
        scales: float32 [N], by which its rows are multiplied.
        bias: [N].
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return sum(part.nbytes for part in (self.weight, self.bias, self.scales) if part is not None)

    @property
    def given(self) -> Tensor:  # type: ignore[override]
        """[N, K], bfloat16, what the weight has been rounded to."""
        return (self.weight.float() * self.scales[:, None]).bfloat16()

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + b, [T, N] from [T, K]."""
        return self._product(x, *round_rows(x, self.weight.dtype)[:2])

    def after_rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `ComposedLinear.after_rms_norm`."""
        rounded, scales, total = round_rows(x, self.weight.dtype, weight, eps, residual)
        return self._product(x, rounded, scales), total

    def after_silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `ComposedLinear.after_silu_mul`."""
        return self._product(gate_up, *round_rows(gate_up, self.weight.dtype, gate=True)[:2])

    def _product(self, x: Tensor, rounded: Tensor, scales: Tensor) -> Tensor:
        multiply = _multiply_integers if rounded.dtype == torch.int8 else _multiply_floats
        return multiply(rounded, scales, self.weight, self.scales, self.bias, x.dtype)


def round_rows(
    x: Tensor,
    dtype: torch.dtype,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gate: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds rows to 8 bits, after the residual's sum and the norm, or the gated activation, if wanted.

    Args:
        x: [T, K], or gate beside up, [T, 2 K].
        dtype: float8_e4m3fn or int8.
        norm: [K], weight of an RMS norm.
        eps: Of the norm.
        residual: [T, K], added to x first.
        gate: Whether x is gate and up.

    Returns:
        The rounded rows, [T, K]; float32 [T], their scales; the sum of x and the residual.
    """
    rows, size = len(x), x.shape[1] // (2 if gate else 1)
    out = torch.empty(rows, size, dtype=dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    total = x if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    if rows:
        block = power_of_two(size)
        _round_rows[(rows,)](
            x,
            x if norm is None else norm,
            x if residual is None else residual,
            total,
            out,
            scales,
            x.stride(0),
            x.stride(0) if residual is None else residual.stride(0),
            eps,
            _LARGEST[dtype],
            SIZE=size,
            NORMED=norm is not None,
            RESIDUAL=residual is not None,
            GATED=gate,
            BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
        )
    return out, scales, total


def _multiply_floats(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Products of 8-bit floats, summed and scaled in float32."""
    out = torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scales[:, None],
        scale_b=scales[None],
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.to(dtype)


def _multiply_integers(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Products of integers, summed in int32, scaled in float32."""
    if not len(x):
        return torch.empty(0, len(weight), dtype=dtype, device=x.device)
    sums = torch._int_mm(pad(x, (0, 0, 0, max(0, _FEWEST_ROWS - len(x)))), weight.t())
    return scale_rows(sums, x_scales, scales, bias, dtype)


def scale_rows(
    sums: Tensor, row_scales: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Makes numbers of sums of products of integers.

    Args:
        sums: int32 [T or more, N].
        row_scales: float32 [T].
        scales: float32 [N].
        bias: [N], added.
        dtype: Of the result.

    Returns:
        [T, N].
    """
    rows, size = len(row_scales), sums.shape[1]
    out = torch.empty(rows, size, dtype=dtype, device=sums.device)
    if rows:
        _scale_rows[(rows, triton.cdiv(size, _BLOCK))](
            sums,
            row_scales,
            scales,
            scales if bias is None else bias,
            out,
            SIZE=size,
            BIAS=bias is not None,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out


@triton.jit
def _round_rows(
    x,
    norm,
    residual,
    total,
    out,
    scales,
    stride_x,
    stride_residual,
    eps,
    largest,
    SIZE: tl.constexpr,
    NORMED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row). What goes before rounds as it does alone; zeros have the scale 0."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < SIZE
    values = tl.load(x + row * stride_x + i, mask=mask, other=0.0)
    if GATED:
        up = tl.load(x + row * stride_x + SIZE + i, mask=mask, other=0.0)
        values = narrow(gated(values, up), x.dtype.element_ty)
    if RESIDUAL:
        values = added(values, residual + row * stride_residual + i, mask)
        tl.store(total + row * SIZE + i, values, mask=mask)
    if NORMED:
        weight = tl.load(norm + i, mask=mask, other=0.0).to(tl.float32)
        values = narrow(normalised(values, SIZE, eps) * weight, x.dtype.element_ty)
    exact = values.to(tl.float32)
    most = tl.max(tl.abs(exact), 0)
    tl.store(scales + row, most / largest)
    exact *= tl.where(most > 0, largest / tl.where(most > 0, most, 1.0), 0.0)
    if out.dtype.element_ty == tl.int8:
        rounded = nearest(exact).to(tl.int8)
    else:
        rounded = narrow(exact, out.dtype.element_ty)
    tl.store(out + row * SIZE + i, rounded, mask=mask)


@triton.jit
def _scale_rows(
    sums, row_scales, scales, bias, out, SIZE: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < SIZE
    result = tl.load(sums + row * SIZE + i, mask=mask, other=0).to(tl.float32) * tl.load(row_scales + row)
    result *= tl.load(scales + i, mask=mask, other=0.0)
    if BIAS:
        result += tl.load(bias + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + i, narrow(result, out.dtype.element_ty), mask=mask)
