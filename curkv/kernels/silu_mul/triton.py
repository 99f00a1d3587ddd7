"""The gated activation of the MLP, with Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curkv.kernels.triton_util import narrow

_BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up; see `reference.silu_mul`."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _silu_mul_rows[(rows, triton.cdiv(size, _BLOCK))](
            gate_up, out, gate_up.stride(0), SIZE=size, BLOCK=_BLOCK, num_warps=4
        )
    return out


@triton.jit
def _silu_mul_rows(gate_up, out, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < SIZE
    gate = tl.load(gate_up + row * stride + i, mask=mask, other=0.0)
    up = tl.load(gate_up + row * stride + SIZE + i, mask=mask, other=0.0)
    tl.store(out + row * SIZE + i, narrow(gated(gate, up), out.dtype.element_ty), mask=mask)


@triton.jit
def gated(gate, up):
    """silu(gate) * up in float32."""
    gate = gate.to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)
