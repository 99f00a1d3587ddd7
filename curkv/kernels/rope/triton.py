"""Rotary position embedding, with Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from curkv.kernels.triton_util import BOOKS, narrow, power_of_two

_MAX_BLOCK_H = 8


def rope(q: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """Rotate the heads of each token by its position, in place; see `reference.rope`."""
    tokens, heads, head_dim = q.shape
    if not tokens:
        return
    block_h = min(_MAX_BLOCK_H, power_of_two(heads))
    _rotate_heads[(tokens, triton.cdiv(heads, block_h))](
        q,
        cos,
        sin,
        positions,
        q.stride(0),
        q.stride(1),
        heads,
        HEAD_DIM=head_dim,
        BLOCK_H=block_h,
        BLOCK_HALF=power_of_two(head_dim // 2),
        num_warps=2,
    )


@triton.jit
def rotate(first, second, cos, sin):
    """Rotate pairs by an angle."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit(do_not_specialize_on_alignment=BOOKS)
def _rotate_heads(
    q,
    cos,
    sin,
    positions,
    stride_token,
    stride_head,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Program (token, block of heads)."""
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, BLOCK_HALF)
    position = tl.load(positions + token).to(tl.int64)
    c = tl.load(cos + position * HALF + i, mask=i < HALF, other=0.0)[None, :]
    s = tl.load(sin + position * HALF + i, mask=i < HALF, other=0.0)[None, :]
    pointers = q + token * stride_token + head[:, None] * stride_head + i[None, :]
    mask = (head < num_heads)[:, None] & (i < HALF)[None, :]
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)
    first, second = rotate(first, second, c, s)
    tl.store(pointers, narrow(first, q.dtype.element_ty), mask=mask)
    tl.store(pointers + HALF, narrow(second, q.dtype.element_ty), mask=mask)
