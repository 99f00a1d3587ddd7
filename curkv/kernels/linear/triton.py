"""Linear layers on a GPU: the vendor's matrix product is the fastest one; what goes before is Triton's."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from curkv.kernels.linear import reference
from curkv.kernels.linear.formats import FLOAT32, WeightFormat
from curkv.kernels.linear.reference import ReferenceLinear
from curkv.kernels.linear.spec import Packed
from curkv.kernels.rms_norm.triton import rms_norm
from curkv.kernels.silu_mul.triton import silu_mul


def pack_linear(
    weight: Tensor | Packed, bias: Tensor | None = None, form: WeightFormat = FLOAT32
) -> ReferenceLinear:
    """Makes a linear layer; see `reference.pack_linear`."""
    return replace(reference.pack_linear(weight, bias, form), rms_norm=rms_norm, silu_mul=silu_mul)
