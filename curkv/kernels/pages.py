"""The memory that every cache kernel reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_INT8 = 127
"""Of the numbers that a key or value is rounded to, so that the range is symmetric."""


@dataclass(frozen=True, slots=True)
class Pages:
    """The page pool's tensors.

    A page holds `page_size` consecutive kept tokens of exactly one (sequence, layer, KV head).

    Attributes:
        k: [num_pages, page_size, head_dim], float32, bfloat16, float16 or int8. Keys after RoPE.
        v: [num_pages, page_size, head_dim], same dtype.
        position: int32 [num_pages, page_size], logical position of the token in its sequence.
        k_sq: float32 [num_pages, page_size], squared norm of the key before rounding to the KV dtype.
        v_sq: float32 [num_pages, page_size], squared norm of the value before rounding.
        attention: float32 [num_pages, page_size], attention probability received so far, 0 when stored.
        k_scale: float32 [num_pages, page_size], what an int8 key is multiplied with; None for other dtypes.
        v_scale: float32 [num_pages, page_size], the same for values.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    k_sq: Tensor
    v_sq: Tensor
    attention: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def arrays(self) -> dict[str, Tensor]:
        """Every tensor there is, by name; a token is one entry of each."""
        named = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: array for name, array in named.items() if array is not None}


def rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Round vectors to the dtype of a cache.

    An int8 vector's largest element becomes 127 or -127: no element is off by more than half of its scale,
    which is a 254th of the largest one.

    Args:
        x: float32 [..., head_dim].
        dtype: Of `Pages.k`.

    Returns:
        [..., head_dim] of `dtype`, and float32 [...], its scales if that is int8.
    """
    if dtype != torch.int8:
        return x.to(dtype), None
    largest = x.abs().amax(-1)
    factor = torch.where(largest > 0, LARGEST_INT8 / largest, 0.0)
    return (x * factor[..., None]).round().to(torch.int8), largest / LARGEST_INT8
