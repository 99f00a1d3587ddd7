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
    token = tl.program_id(0)
    c, s = load_angles(cos, sin, tl.load(positions + token), HEAD_DIM, BLOCK_HALF)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    rotate_in_place(q, token, head, num_heads, stride_token, stride_head, c, s, HEAD_DIM, BLOCK_HALF)


@triton.jit
def load_angles(cos, sin, position, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Cosines and sines [1, BLOCK_HALF] of a position."""
    HALF: tl.constexpr = HEAD_DIM // 2
    i = tl.arange(0, BLOCK_HALF)
    turn = position.to(tl.int64) * HALF + i
    c = tl.load(cos + turn, mask=i < HALF, other=0.0)[None, :]
    s = tl.load(sin + turn, mask=i < HALF, other=0.0)[None, :]
    return c, s


@triton.jit
def rotate_in_place(
    q,
    token,
    head,
    num_heads,
    stride_token,
    stride_head,
    cos,
    sin,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Rotate some heads [heads] of a token by angles [1, BLOCK_HALF]."""
    HALF: tl.constexpr = HEAD_DIM // 2
    i = tl.arange(0, BLOCK_HALF)
    pointers = q + token.to(tl.int64) * stride_token + head[:, None] * stride_head + i[None, :]
    mask = (head < num_heads)[:, None] & (i < HALF)[None, :]
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)
    first, second = rotate(first, second, cos, sin)
    tl.store(pointers, narrow(first, q.dtype.element_ty), mask=mask)
    tl.store(pointers + HALF, narrow(second, q.dtype.element_ty), mask=mask)
