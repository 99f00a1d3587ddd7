"""The memory that every cache kernel reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Pages:
    """The page pool's tensors.

    A page holds `page_size` consecutive kept tokens of exactly one (sequence, layer, KV head).

    Attributes:
        k: [num_pages, page_size, head_dim], float32, bfloat16 or float16. Keys after RoPE.
        v: [num_pages, page_size, head_dim], same dtype.
        position: int32 [num_pages, page_size], logical position of the token in its sequence.
        k_sq: float32 [num_pages, page_size], squared norm of the key before rounding to the KV dtype.
        v_sq: float32 [num_pages, page_size], squared norm of the value before rounding.
        attention: float32 [num_pages, page_size], attention probability received so far, 0 when stored.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    k_sq: Tensor
    v_sq: Tensor
    attention: Tensor
