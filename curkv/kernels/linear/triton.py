"""Linear layers on a GPU: the vendor's matrix product is the fastest one; what goes before is Triton's."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from curkv.kernels.linear import reference
from curkv.kernels.linear.reference import ReferenceLinear
from curkv.kernels.rms_norm.triton import rms_norm
from curkv.kernels.silu_mul.triton import silu_mul


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> ReferenceLinear:
    """Makes a linear layer; see `reference.pack_linear`."""
    return _after_triton(reference.pack_linear(weight, bias))


def pack_linear_int8(weight: Tensor, bias: Tensor | None = None) -> ReferenceLinear:
    """Makes a linear layer; see `reference.pack_linear_int8`."""
    return _after_triton(reference.pack_linear_int8(weight, bias))


def pack_linear_int4(weight: Tensor, bias: Tensor | None = None) -> ReferenceLinear:
    """Makes a linear layer; see `reference.pack_linear_int4`."""
    return _after_triton(reference.pack_linear_int4(weight, bias))


def _after_triton(layer: ReferenceLinear) -> ReferenceLinear:
    return replace(layer, rms_norm=rms_norm, silu_mul=silu_mul)
