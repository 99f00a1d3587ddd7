"""Attention without pages: keys and values of sequences of equal length in plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from curkv.models.config import ModelConfig
from curkv.models.errors import UnsupportedModel
from curkv.models.rope import RopeTables


class DenseCache:
    """Keys and values of B sequences that grow in lockstep.

    Attributes:
        k: [layers, B, kv_heads, capacity, head_dim].
        v: Same.
        length: Tokens stored; the caller advances it after a step.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype):
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.padded_head_dim)
        self.k = torch.empty(shape, dtype=dtype)
        self.v = torch.empty(shape, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores [B, kv_heads, T, head_dim] after `length` and returns everything up to there."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class DenseAttention:
    """Causal attention among the tokens of each sequence, as layers see it (`blocks.CacheAttention`).

    Computed by torch, and differentiable.

    Args:
        config: Says which layers have windows.
        rope: Cosines and sines of all positions by layer, see `rope_tables`.
        sequences: B, among which the tokens that come are divided equally, one sequence after another.
        cache: What came before; without one nothing did, and nothing is kept.
    """

    def __init__(
        self, config: ModelConfig, rope: RopeTables, sequences: int = 1, cache: DenseCache | None = None
    ):
        if config.attention_softcap is not None or config.sinks:
            raise UnsupportedModel(
                f"{config.architecture} runs over pages only: its scores are capped, or have sinks"
            )
        self._config = config
        self._rope = rope
        self._sequences = sequences
        self._cache = cache

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        """Attends; see `blocks.CacheAttention.attend`. `batch` is not read."""
        q, k, v = (x.view(self._sequences, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        start = self._cache.length if self._cache else 0
        q, k = self._rotate(layer, q, start), self._rotate(layer, k, start)
        if self._cache:
            k, v = self._cache.append(layer, k, v)
        return _attend(q, k, v, self._config.layer(layer).window).transpose(1, 2).flatten(0, 1)

    def _rotate(self, layer: int, heads: Tensor, start: int) -> Tensor:
        """Applies RoPE to [B, heads, T, head_dim], whose first token has position `start`."""
        end = start + heads.shape[2]
        cos, sin = (table[start:end] for table in self._rope[layer])
        low, high = heads.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attends causally, to the newest `window` tokens if there is one: [B, heads, T, head_dim]."""
    grouped = q.shape[1] != k.shape[1]
    if window is not None and q.shape[2] == 1:
        k, v = k[:, :, -window:], v[:, :, -window:]
    if q.shape[2] > 1 and (window is None or k.shape[2] <= window):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if q.shape[2] > 1 and window is not None:
        behind = torch.arange(q.shape[2], device=q.device)[:, None] - torch.arange(
            k.shape[2], device=q.device
        )
        behind += k.shape[2] - q.shape[2]
        mask = (behind >= 0) & (behind < window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    per_kv_head = q.view(len(q), k.shape[1], -1, q.shape[-1])  # K and V are not copied per query head
    return F.scaled_dot_product_attention(per_kv_head, k, v).view(q.shape)
