"""Shape and size of a KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SIDE_BYTES = 16
"""Bytes of a token's side arrays: position, k_sq, v_sq and attention, 4 bytes each."""

_SCALE_BYTES = 8
"""Bytes of the scales of an int8 key and value."""


@dataclass(frozen=True)
class CacheLayout:
    """The shape of a cache.

    Attributes:
        num_layers: layers of the model.
        num_kv_heads: KV heads of a layer.
        head_dim: channels of a key or value.
        page_size: tokens per page.
        dtype: of keys and values: float32, bfloat16, float16 or int8.
        max_sequences: sequences held at once.
        max_tokens: most tokens that a head of one sequence can hold.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    max_sequences: int
    max_tokens: int

    @property
    def num_heads(self) -> int:
        """KV heads of all layers together; each has its own pages."""
        return self.num_layers * self.num_kv_heads

    @property
    def max_pages(self) -> int:
        """Pages that a head of one sequence can hold."""
        return -(-self.max_tokens // self.page_size)

    @property
    def head_token_bytes(self) -> int:
        """Bytes of one token in one head, side arrays included."""
        sides = _SIDE_BYTES + (_SCALE_BYTES if self.dtype == torch.int8 else 0)
        return 2 * self.head_dim * self.dtype.itemsize + sides

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in every head of every layer."""
        return self.num_heads * self.head_token_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.page_size * self.head_token_bytes

    def sequence_pages(self, tokens: int) -> int:
        """Pages of a sequence that holds `tokens` tokens in every head."""
        return self.num_heads * -(-tokens // self.page_size)
