"""Rotary position embedding in plain torch."""

from __future__ import annotations

from torch import Tensor


def rope(q: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """Rotate the heads of each token by its position, in place.

    x1' = x1 cos - x2 sin, x2' = x2 cos + x1 sin, where x1 and x2 are the first and the second half of a
    head: the `rotate_half` convention of Hugging Face transformers (RoFormer,
    https://arxiv.org/abs/2104.09864, section 3.4).

    Args:
        q: float32 [T, heads, head_dim], changed in place; any stride over tokens and heads.
        cos: float32 [max_positions, head_dim / 2].
        sin: float32 [max_positions, head_dim / 2].
        positions: int32 [T], rows of `cos` and `sin`.
    """
    half = q.shape[-1] // 2
    rows = positions.long()
    c, s = cos[rows, None], sin[rows, None]
    first, second = q[..., :half].clone(), q[..., half:].clone()
    q[..., :half] = first * c - second * s
    q[..., half:] = second * c + first * s
